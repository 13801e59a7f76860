"""`musiclm export`: write the model of a finished training run for inference."""

from dataclasses import dataclass, field
from pathlib import Path

from audiolm_pytorch.saving.text import printable

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """Write the model of a finished training run with fp16 weights, for inference."""

    run: Path
    """Folder of the run, the --out of `musiclm train all` or `musiclm train musicgen`."""
    out: Path
    """Folder to write."""
    bundled: dict[str, str] = field(default_factory=dict)
    """Parts that are not copied, each with the name of the equal bundled module, such as: codec codec_16khz."""
    allow_noncommercial: bool = False
    """Also export weights whose licence forbids commercial use."""

    def execute(self) -> int:
        """Write the model folder and print its size."""
        from musiclm_pytorch.musicgen.published import is_musicgen
        from musiclm_pytorch.pretrained.export import export_musicgen, export_musiclm

        options = {"allow_noncommercial": self.allow_noncommercial}
        export = export_musicgen if is_musicgen(self.run, **options) else export_musiclm
        num_bytes = export(self.run, self.out, bundled=self.bundled, **options)
        print(printable(f"wrote {self.out}, {num_bytes / 1e6:.1f} MB"))
        return 0
