"""Features of long waves in bounded memory: overlapping windows that stand at fixed places."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from beartype import beartype
from torch import Tensor

__all__ = ["ReceptiveField", "Windows", "features_in_windows"]


@beartype
@dataclass(frozen=True)
class ReceptiveField:
    """Which positions of its input (samples, or vectors of a front end) each frame of an encoder is made of.

    A stack of convolutions without padding is one such rule, however many layers it has: kernels and strides add up
    exactly. Frame i covers positions `[i * stride, i * stride + reach)`.

    Attributes:
        reach: Positions that one frame is made of; HuBERT's seven convolutions reach 400 samples.
        stride: Positions from one frame to the next; 320 samples in HuBERT.
    """

    reach: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        if min(self.reach, self.stride) < 1:
            raise ValueError(f"reach and stride must be positive, got {self.reach} and {self.stride}")

    @classmethod
    def of_convolutions(cls, kernels: Iterable[int], strides: Iterable[int]) -> "ReceptiveField":
        """The rule of a stack of convolutions without padding, first layer first."""
        reach, stride = 1, 1
        for kernel, step in zip(kernels, strides):
            reach += (kernel - 1) * stride
            stride *= step
        return cls(reach, stride)

    def num_frames(self, num_positions: int) -> int:
        """Frames that fit into that many positions; 0 where not one does."""
        return max(0, (num_positions - self.reach) // self.stride + 1)

    def span(self, first: int, last: int) -> slice:
        """The positions that frames `first <= i < last` are made of."""
        return slice(first * self.stride, (last - 1) * self.stride + self.reach)


@beartype
@dataclass(frozen=True)
class Windows:
    """Where the windows stand: window w answers for frames `[w * keep, (w + 1) * keep)`.

    Attributes:
        keep: Frames that a window answers for.
        context: Frames that it sees on each side of them.
    """

    keep: int
    context: int

    def __post_init__(self) -> None:
        if self.keep < 1 or self.context < 0:
            raise ValueError(f"a window needs keep >= 1 and context >= 0 frames, got {self.keep} and {self.context}")


def features_in_windows(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, frames: ReceptiveField, windows: Windows
) -> Tensor:
    """Encode a batch without padding; what is longer than a window, window by window.

    The windows' places depend on nothing but the input's own start, so an item gives the same features alone, in any
    batch and however much follows. An input of up to `keep` frames is encoded whole. Beyond that, an encoder that sees
    no farther than `context` frames gives what it gives for the whole input; of another, the frames near the seams are
    approximate. Every frame is answered for by exactly one window, so counts never differ.

    Args:
        encode: `[b, m, ...]` to `[b, frames.num_frames(m), d]`.
        inputs: `[b, n, ...]`, samples or vectors of a front end.
        frames: The arithmetic of `encode`.
        windows: Where the windows stand.

    Returns:
        Features `[b, frames.num_frames(n), d]`.
    """
    total = frames.num_frames(inputs.shape[1])
    if total <= windows.keep:
        return encode(inputs)
    found = inputs.new_empty(0)
    for start in range(0, total, windows.keep):
        first = max(0, start - windows.context)
        last = min(total, start + windows.keep + windows.context)
        features = encode(inputs[:, frames.span(first, last)])[:, start - first : start - first + windows.keep]
        if start == 0:
            found = features.new_empty(len(inputs), total, features.shape[-1])
        found[:, start : start + windows.keep] = features
    return found
