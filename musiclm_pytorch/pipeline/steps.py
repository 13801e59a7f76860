"""The steps of the training pipeline, and the report of a finished step."""

from dataclasses import dataclass

from audiolm_pytorch.checks.types import typed

__all__ = ["ALL_STEPS", "MELODY_STEPS", "STEPS", "StepReport", "check_step"]

# Each step, with the steps whose results it needs.
STEPS: dict[str, tuple[str, ...]] = {
    "codec": (),
    "semantic-tokenizer": (),
    "mulan": (),
    "quantizer": ("mulan",),
    "tokens": ("semantic-tokenizer", "codec", "mulan"),
    "semantic": ("tokens", "quantizer"),
    "coarse": ("tokens", "quantizer"),
    "fine": ("tokens", "quantizer"),
}
# Optional steps: an embedder of melodies, and the stages trained on with melodies.
MELODY_STEPS: dict[str, tuple[str, ...]] = {
    "melody": (),
    "melody-semantic": ("tokens", "quantizer", "melody", "semantic"),
    "melody-coarse": ("tokens", "quantizer", "melody", "coarse"),
}
ALL_STEPS = {**STEPS, **MELODY_STEPS}


@dataclass(frozen=True)
class StepReport:
    """Name of a finished step, its duration in seconds (including interrupted runs), and a line of metrics."""

    step: str
    seconds: float
    summary: str


@typed
def check_step(step: str) -> None:
    """Check that `step` is "all" (all steps except the optional ones) or the name of a pipeline step."""
    if step != "all" and step not in ALL_STEPS:
        raise ValueError(f"there is no step {step!r}; pass all or one of: {', '.join(ALL_STEPS)}")
