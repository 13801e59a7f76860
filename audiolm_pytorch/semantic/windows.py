"""Compute features of long waves in bounded memory, in overlapping windows at fixed positions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from beartype import beartype
from torch import Tensor

__all__ = ["ReceptiveField", "Windows", "features_in_windows"]


@beartype
@dataclass(frozen=True)
class ReceptiveField:
    """Receptive field of convolutions without padding: frame i covers inputs `[i * stride, i * stride + reach)`.

    An input is a sample, or a vector of a front end. For HuBERT, `reach` is 400 samples and `stride` is 320 samples.
    """

    reach: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        if min(self.reach, self.stride) < 1:
            raise ValueError(f"reach and stride must be positive, got reach {self.reach} and stride {self.stride}")

    @classmethod
    def of_convolutions(cls, kernels: Iterable[int], strides: Iterable[int]) -> "ReceptiveField":
        """Return the receptive field of a stack of convolutions, listed from the first to the last layer."""
        reach, stride = 1, 1
        for kernel, step in zip(kernels, strides):
            reach += (kernel - 1) * stride
            stride *= step
        return cls(reach, stride)

    def num_frames(self, num_positions: int) -> int:
        """Return the number of frames of `num_positions` inputs, or 0 if the inputs are too few for one frame."""
        return max(0, (num_positions - self.reach) // self.stride + 1)

    def span(self, first: int, last: int) -> slice:
        """Return the slice of the inputs that the frames `first <= i < last` cover."""
        return slice(first * self.stride, (last - 1) * self.stride + self.reach)


@beartype
@dataclass(frozen=True)
class Windows:
    """Window w returns `keep` frames from frame `w * keep`, and also encodes `context` more frames on each side."""

    keep: int
    context: int

    def __post_init__(self) -> None:
        if self.keep < 1 or self.context < 0:
            raise ValueError(f"a window needs keep >= 1 and context >= 0, got keep {self.keep}, context {self.context}")


def features_in_windows(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, frames: ReceptiveField, windows: Windows
) -> Tensor:
    """Encode a batch without padding, in windows if an item has more than `windows.keep` frames.

    Window positions count from the start of an item, so that its features do not depend on the batch. If a frame
    depends on at most `context` neighbours on each side, the result is equal to that without windows. If a frame
    depends on more than `context` neighbours, frames near the ends of a window are approximate.

    Args:
        encode: Function that converts inputs `[b, m, ...]` to frames `[b, frames.num_frames(m), d]`.
        inputs: Samples or vectors of a front end, `[b, n, ...]`.
    """
    total = frames.num_frames(inputs.shape[1])
    if total <= windows.keep:
        return encode(inputs)
    parts = []
    for start in range(0, total, windows.keep):
        first = max(0, start - windows.context)
        last = min(total, start + windows.keep + windows.context)
        features = encode(inputs[:, frames.span(first, last)])
        parts.append(features[:, start - first : start - first + windows.keep])
    return torch.cat(parts, dim=1)
