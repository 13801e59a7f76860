"""`musiclm plot RUN...`: loss curves of runs, over each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from audiolm_pytorch.saving.text import printable

__all__ = ["Plot"]


@dataclass(frozen=True)
class Plot:
    """Draw the loss of runs over training steps as SVG files, one for each step of the pipeline.

    Runs are drawn over each other. A dashed line is the chance loss.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs, the --out of musiclm train, or folders of trainers."""
    out: Path = Path("plots")
    """Folder of the SVG files."""
    metric: str = "loss"
    """Draw this metric of metrics.jsonl instead of the loss, such as accuracy, or mel of a codec."""

    def execute(self) -> int:
        """Write the files, and print their paths."""
        from audiolm_pytorch.training.loss_curve import write_loss_curve
        from audiolm_pytorch.training.tracking import MetricsFile

        if not self.runs:
            raise ValueError("a run is missing; write musiclm plot RUN, where RUN is the --out of musiclm train")
        plots: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for run in self.runs:
            files = {file.parent.name: file for file in sorted(run.glob("*/metrics.jsonl"))}
            files[""] = run / "metrics.jsonl"
            rows = {step: MetricsFile(file).rows() for step, file in files.items() if file.is_file()}
            if not rows:
                raise ValueError(f"{run} contains no metrics.jsonl of a training; pass the --out of musiclm train")
            for step, step_rows in rows.items():
                plots.setdefault(step, {})[str(run) if len(self.runs) > 1 else ""] = step_rows
        written = [
            path
            for step, runs in plots.items()
            if write_loss_curve(path := self.out / f"{step or self.metric}.svg", runs, step or "training", self.metric)
        ]
        if not written:
            names = {name for runs in plots.values() for rows in runs.values() for row in rows for name in row}
            names = {name for name in names if not name.endswith("chance")} - {"step", "phase", "seconds"}
            raise ValueError(f"no run has the metric {self.metric!r}; choose one of: {', '.join(sorted(names))}")
        for path in written:
            print(printable(path))
        return 0
