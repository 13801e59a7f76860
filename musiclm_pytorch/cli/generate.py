"""`musiclm generate`: music from a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from musiclm_pytorch.cli.checks import check_file, device_named

__all__ = ["Generate"]

_AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
_MAX_SECONDS = 3600


@dataclass(frozen=True)
class Generate:
    """Generate music from a text. Of several candidates the one that MuLaN ranks best is kept."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """Description of the music, e.g. "a fast jig played on the flute"."""
    model: str = "tiny"
    """Name of a bundled model, or the folder of a trained one."""
    seconds: float = 5.0
    """Length in seconds, rounded up to whole frames."""
    num_samples: int = 4
    """Number of candidates."""
    seed: int = 0
    """Candidate i is sampled with seed + i. The same command generates the same music."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... or auto, which selects a GPU if there is one."""
    continue_from: Path | None = None
    """Audio file to continue, of any sample rate. Its length counts towards --seconds."""
    out: Path = Path("music.wav")
    """File to write (.wav, .flac or .ogg). A missing folder is created."""
    plot: Path | None = None
    """Plot the wave and its mel spectrogram into this picture file (needs the [plot] extra)."""

    def execute(self) -> int:
        """Write the best candidate to a file and print the similarity of each to the text."""
        _check(self)

        from audiolm_pytorch.audio.files import write_audio
        from musiclm_pytorch.pretrained.model_folder import load_musiclm

        musiclm = load_musiclm(self.model, device=device_named(self.device))
        candidates = musiclm(
            self.text,
            num_samples=self.num_samples,
            seconds=self.seconds,
            seed=self.seed,
            return_all=True,
            progress=True,
            prime_wave=self.continue_from,
        )
        best = int(candidates.order[0, 0])
        wave = candidates.waves[0, best]
        if not wave.isfinite().all():
            raise RuntimeError(f"the model {self.model} generated NaN samples; train it longer or use another model")
        write_audio(self.out, wave, candidates.sample_hz)
        for number, (score, seed) in enumerate(zip(candidates.scores[0].tolist(), candidates.seeds[0])):
            print(f"candidate {number + 1}  seed {seed}  similarity {score:.3f}{'  <- kept' if number == best else ''}")
        print(f"wrote {self.out}")
        if self.plot is not None:
            from musiclm_pytorch.evaluation.plots import plot_wave

            plot_wave(wave, candidates.sample_hz, self.plot, title=self.text)
            print(f"wrote {self.plot}")
        return 0


def _check(command: Generate) -> None:
    """Check the arguments and that the files can be written, before the model is loaded."""
    if not command.text.strip():
        raise ValueError('the text is empty; describe the music, e.g. "a slow waltz on the cello"')
    if command.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {command.num_samples}")
    if not 0 < command.seconds <= _MAX_SECONDS:
        raise ValueError(f"--seconds must be above 0 and at most {_MAX_SECONDS}, got {command.seconds:g}")
    if command.seed < 0:
        raise ValueError(f"--seed must not be negative, got {command.seed}")
    check_file(command.out, _AUDIO_SUFFIXES)
    if command.plot is not None:
        from musiclm_pytorch.evaluation.plots import PICTURE_SUFFIXES, require_matplotlib

        check_file(command.plot, PICTURE_SUFFIXES)
        require_matplotlib()
