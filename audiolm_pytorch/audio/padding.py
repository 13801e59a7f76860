"""Functions that check, split and resample padded batches of waves of unequal length."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.resample import resample

__all__ = ["check_waves", "checked_lengths", "items_by_length", "length_mask", "resampled_items"]


def check_waves(wave: Tensor, lengths: Tensor | None = None, device: torch.device | None = None) -> None:
    """Check that `wave` is a mono batch `[b, n]` of finite floats.

    Args:
        lengths: Number of samples of each item `[b]`, after which the item has padding of any value; None if no item is
            padded.
        device: Device on which `wave` must be; None for any device.
    """
    if wave.ndim != 2 or not wave.is_floating_point() or not wave.numel():
        raise ValueError(
            f"wave must be float [b, n] and not empty, got {wave.dtype} with shape {tuple(wave.shape)}; mix channels "
            "down and add a batch axis"
        )
    if device is not None and wave.device != device:
        raise ValueError(f"wave is on {wave.device}, the model on {device}; move one of them with .to(...)")
    if lengths is not None:
        wave = wave.masked_fill(~length_mask(checked_lengths(lengths, wave), wave.shape[1]), 0.0)
    if not all(extreme.isfinite() for extreme in torch.aminmax(wave)):
        raise ValueError("wave contains NaN or infinite samples; replace them first, e.g. with torch.nan_to_num")


def checked_lengths(lengths: Tensor, wave: Tensor) -> Tensor:
    """Check that `lengths [b]` are integers in 1..n for `wave [b, (c,) n]`, and convert them to int64 on its device."""
    if lengths.shape != wave.shape[:1] or lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(
            f"lengths must be {wave.shape[0]} integers, one per item of the batch, got {lengths.dtype} with shape "
            f"{list(lengths.shape)}"
        )
    if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= wave.shape[-1]:
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


def resampled_items(wave: Tensor, from_hz: int, to_hz: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Resample every item of `wave [b, n]` without its padding, so that padding does not change the result.

    Returns:
        The resampled waves, padded with zeros to the longest, and the number of samples `[b]` of each wave.
    """
    if from_hz < 1:
        raise ValueError(f"input_sample_hz must be positive, got {from_hz}")
    samples = [wave.shape[1]] * len(wave) if lengths is None else checked_lengths(lengths, wave).tolist()
    items = [resample(item[:length], from_hz, to_hz) for item, length in zip(wave, samples)]
    return pad_sequence(items, batch_first=True), torch.tensor([len(item) for item in items], device=wave.device)
