"""`musiclm export`: write the model of a finished training run for inference."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from audiolm_pytorch.saving.text import printable

if TYPE_CHECKING:
    from audiolm_pytorch.lm.token_model import TokenTransformer

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """Write the model of a finished training run with fp16 weights, for inference, or as ONNX files."""

    run: Path
    """Folder of the run, the --out of `musiclm train all` or `musiclm train musicgen`; with --onnx also the name of a
    bundled model."""
    out: Path
    """Folder to write."""
    onnx: bool = False
    """Write ONNX files of the codec's encoder and decoder and of a decoding step of every language model (needs the
    [onnx] extra)."""
    bundled: dict[str, str] = field(default_factory=dict)
    """Parts that are not copied, each with the name of the equal bundled module, such as: codec codec_16khz."""
    allow_noncommercial: bool = False
    """Also export weights whose licence forbids commercial use."""

    def execute(self) -> int:
        """Write the model folder and print its size."""
        from musiclm_pytorch.musicgen.published import is_musicgen
        from musiclm_pytorch.pretrained.export import export_musicgen, export_musiclm

        if self.onnx and self.bundled:
            raise ValueError("--onnx writes all weights; leave out --bundled")
        options = {"allow_noncommercial": self.allow_noncommercial}
        is_music_gen = is_musicgen(self.run, **options)
        if self.onnx:
            self._write_onnx(is_music_gen)
            return 0
        export = export_musicgen if is_music_gen else export_musiclm
        num_bytes = export(self.run, self.out, bundled=self.bundled, **options)
        print(printable(f"wrote {self.out}, {num_bytes / 1e6:.1f} MB"))
        return 0

    def _write_onnx(self, is_music_gen: bool) -> None:
        from musiclm_pytorch.musicgen.musicgen import MusicGen
        from musiclm_pytorch.musiclm import MusicLM
        from musiclm_pytorch.pretrained.onnx import export_onnx

        stages: dict[str, TokenTransformer]
        if is_music_gen:
            musicgen = MusicGen.from_pretrained(self.run, allow_noncommercial=self.allow_noncommercial)
            codec, stages = musicgen.codec, {"musicgen": musicgen.transformer}
        else:
            audio_lm = MusicLM.from_pretrained(self.run, allow_noncommercial=self.allow_noncommercial).audio_lm
            codec, stages = audio_lm.codec, {**audio_lm.stages}
        for path in export_onnx(self.out, codec, stages):
            print(printable(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB"))
