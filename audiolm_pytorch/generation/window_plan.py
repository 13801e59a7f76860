"""Where the windows over a long sequence stand."""

from dataclasses import dataclass
from math import ceil

from beartype import beartype

__all__ = ["Window", "plan_windows"]


@dataclass(frozen=True)
class Window:
    """A stretch of predicted frames that is decoded at once.

    Attributes:
        start: First frame.
        stop: Frame after the last.
    """

    start: int
    stop: int


@beartype
def plan_windows(num_frames: int, window_frames: int | None, alignment: int = 1) -> list[Window]:
    """Cover a sequence with windows of which each carries the second half of the one before (MusicLM, sec. 5.4).

    Args:
        num_frames: Frames to cover.
        window_frames: Frames of a window; None = one window over everything.
        alignment: Windows start at multiples of this many frames.

    Returns:
        The windows, in order. Where they start does not depend on `num_frames`.

    Raises:
        ValueError: If the window is too short to advance by `alignment` frames and keep some.
    """
    if window_frames is None or num_frames <= window_frames:
        return [Window(0, num_frames)]
    hop = window_frames // 2 // alignment * alignment
    if hop < 1:
        raise ValueError(f"windows of {window_frames} frames cannot advance by half, in steps of {alignment} frames")
    num_windows = 1 + ceil((num_frames - window_frames) / hop)
    return [Window(i * hop, min(i * hop + window_frames, num_frames)) for i in range(num_windows)]
