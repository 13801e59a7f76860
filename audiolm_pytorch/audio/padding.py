"""Lengths and masks of padded batches of waves of unequal length."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.tracing import is_traced

__all__ = ["checked_lengths", "items_by_length", "length_mask"]


def checked_lengths(lengths: Tensor, wave: Tensor) -> Tensor:
    """Check that `lengths [b]` are integers in 1..n for `wave [b, (c,) n]`, and convert them to int64 on its device."""
    if lengths.shape != wave.shape[:1] or lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(
            f"lengths must be {wave.shape[0]} integers, one per item of the batch, got {lengths.dtype} with shape "
            f"{list(lengths.shape)}"
        )
    if not is_traced() and lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= wave.shape[-1]:
        raise ValueError(f"lengths must lie in 1..{wave.shape[-1]} (samples of the wave), got {lengths.tolist()}")
    return lengths.to(wave.device, torch.long)


def length_mask(lengths: Tensor, num_positions: int) -> Tensor:
    """Build a mask `[b, num_positions]` that is True at the first `lengths[i]` positions of item i."""
    return torch.arange(num_positions, device=lengths.device) < rearrange(lengths, "b -> b 1")


def items_by_length(wave: Tensor, lengths: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a padded batch `[b, n]` or `[b, c, n]` into batches of items of equal length, without padding.

    Yields:
        For each length, the indices `[r]` of the r items of this length, and their waves `[r, (c,) length]`.
    """
    if lengths is None:
        yield torch.arange(len(wave), device=wave.device), wave
        return
    lengths = checked_lengths(lengths, wave)
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        yield rows, wave[rows, ..., :length]
