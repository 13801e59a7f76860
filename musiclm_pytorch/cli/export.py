"""`musiclm export`: write the model of a finished training run for inference."""

from dataclasses import dataclass
from pathlib import Path

from audiolm_pytorch.saving.text import printable

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """Write the model of a finished training run with fp16 weights, for inference."""

    run: Path
    """Folder of the run, the --out of `musiclm train all`."""
    out: Path
    """Folder to write."""
    allow_noncommercial: bool = False
    """Also export weights whose licence forbids commercial use."""

    def execute(self) -> int:
        """Write the model folder and print its size."""
        from musiclm_pytorch.pretrained.export import export_musiclm

        num_bytes = export_musiclm(self.run, self.out, allow_noncommercial=self.allow_noncommercial)
        print(printable(f"wrote {self.out}, {num_bytes / 1e6:.1f} MB"))
        return 0
