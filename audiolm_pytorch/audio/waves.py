"""Checks of waves and sample rates, which every public function that receives a wave applies."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.padding import checked_lengths, length_mask
from audiolm_pytorch.checks.tracing import is_traced

__all__ = [
    "MAX_AMPLITUDE",
    "MAX_HZ",
    "MIN_HZ",
    "check_channels",
    "check_dtype",
    "check_rate",
    "check_samples",
    "checked_wave",
    "mono_waves",
    "one_mono_wave",
    "split_batch",
    "with_channels",
]

# Waves have values in -1..1. Larger samples are possible in float files, but 40 dB above full scale is a mistake.
MAX_AMPLITUDE = 100.0
MIN_HZ, MAX_HZ = 1_000, 768_000
MAX_CHANNELS = 1024  # of libsndfile


def check_rate(sample_hz: int, name: str = "sample_hz") -> int:
    """Check that a sample rate of audio is in 1,000..768,000 Hz, and return it."""
    if not MIN_HZ <= sample_hz <= MAX_HZ:
        raise ValueError(f"{name} must be in {MIN_HZ}..{MAX_HZ} Hz, got {sample_hz}")
    return sample_hz


def check_channels(channels: int | None) -> None:
    """Check that a number of channels is in 1..1,024; None is allowed."""
    if channels is not None and not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"channels must be in 1..{MAX_CHANNELS}, got {channels}")


def check_dtype(wave: Any, name: str = "wave") -> None:
    """Check that `wave` is a float tensor of any shape."""
    if not isinstance(wave, Tensor):
        advice = "; convert it with torch.from_numpy" if type(wave).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(wave).__name__}{advice}")
    if not wave.is_floating_point():
        advice = "" if wave.is_complex() or wave.dtype == torch.bool else "; divide integers by their full scale"
        raise ValueError(f"{name} must be a float tensor with values in -1..1, got {wave.dtype}{advice}")
    if wave.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {wave.layout}; convert it with .to_dense()")


def check_samples(wave: Any, name: str = "wave") -> None:
    """Check that `wave` of any shape is a float tensor with finite samples of at most `MAX_AMPLITUDE`.

    The values are not checked while the caller is compiled, exported or traced.
    """
    check_dtype(wave, name)
    if is_traced() or not wave.numel():
        return
    # Unlike isfinite().all(), the two extremes need no second copy of a long recording.
    low, high = (float(extreme) for extreme in torch.aminmax(wave.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"{name} contains NaN or infinite samples; replace them first, e.g. with torch.nan_to_num")
    if max(-low, high) > MAX_AMPLITUDE:
        raise ValueError(f"{name} must have values in -1..1, got samples from {low:.4g} to {high:.4g}; scale it first")


def checked_wave(
    wave: Any,
    channels: int = 1,
    *,
    lengths: Tensor | None = None,
    device: torch.device | None = None,
    may_be_empty: bool = False,
    name: str = "wave",
) -> Tensor:
    """Check a wave `[n]`, `[b, n]` or `[b, c, n]`, and return it as `[b, c, n]`; `[n]` is a batch of one item.

    A wave of more than one channel must be `[b, c, n]`.

    Args:
        lengths: Number of samples of each item `[b]`, after which the item has padding of any value; None if no item is
            padded.
        device: Device on which `wave` must be; None for any device.
        may_be_empty: Whether the wave may have no samples.
    """
    check_dtype(wave, name)
    shape = list(wave.shape)
    if channels == 1 and len(shape) in (1, 2):
        wave = rearrange(wave, "n -> 1 1 n" if len(shape) == 1 else "b n -> b 1 n")
    if wave.ndim != 3 or wave.shape[1] != channels or not len(wave) or not (may_be_empty or wave.shape[-1]):
        shapes = "[n], [b, n] or [b, 1, n]" if channels == 1 else f"[b, {channels}, n]"
        raise ValueError(f"{name} must be {shapes} and not empty, got shape {shape}{_shape_advice(shape, channels)}")
    if device is not None and wave.device != device:
        raise ValueError(f"{name} is on {wave.device}, the model on {device}; move one of them with .to(...)")
    real = wave
    if lengths is not None:
        mask = length_mask(checked_lengths(lengths, wave), wave.shape[-1])
        real = wave.detach().masked_fill(~rearrange(mask, "b n -> b 1 n"), 0.0)
    check_samples(real, name)
    return wave


def mono_waves(
    wave: Any, lengths: Tensor | None = None, device: torch.device | None = None, name: str = "wave"
) -> Tensor:
    """Check a mono wave as `checked_wave` does, and return it as `[b, n]`."""
    return rearrange(checked_wave(wave, lengths=lengths, device=device, name=name), "b 1 n -> b n")


def split_batch(waves: Tensor, name: str = "wave") -> list[Tensor]:
    """Return the waves of the items of `waves [n]` (one item), `[b, n]` or `[b, c, n]`."""
    if waves.ndim not in (1, 2, 3):
        raise ValueError(f"{name} must be [n], [b, n] or [b, c, n], got shape {list(waves.shape)}")
    return [waves] if waves.ndim == 1 else list(waves)


def one_mono_wave(wave: Any, name: str = "wave") -> Tensor:
    """Check one mono recording `[n]`, which may have a batch axis and a channel axis of size 1; return it as `[n]`."""
    waves = mono_waves(wave, name=name)
    if len(waves) != 1:
        raise ValueError(
            f"{name} must be one recording [n], got shape {list(wave.shape)}; pass one item at a time, or mix channels "
            "down with wave.mean(dim=0)"
        )
    return waves[0]


def with_channels(wave: Tensor, channels: int | None, name: str = "wave") -> Tensor:
    """Average, keep or repeat the channels of `wave [..., c, n]` to obtain `channels` channels; None keeps them."""
    num_channels = wave.shape[-2]
    if channels is None or channels == num_channels:
        return wave
    if channels == 1:
        return wave.mean(dim=-2, keepdim=True)
    if num_channels == 1:
        return wave.repeat_interleave(channels, dim=-2)
    raise ValueError(f"{name} has {num_channels} channels, need 1 or {channels}; mix the channels down first")


def _shape_advice(shape: list[int], channels: int) -> str:
    """Return advice on a wrong wave shape for an error message, or an empty string if the cause is not known."""
    if len(shape) == 3 and shape[2] == channels != shape[1]:
        return "; samples are the last axis: wave.transpose(1, 2)"
    if len(shape) == 3 and channels == 1 and shape[1] > 1:
        return "; mix the channels down: wave.mean(dim=1)"
    if channels > 1 and shape and shape[0] == channels and len(shape) == 2:
        return "; add the batch axis: wave.unsqueeze(0)"
    if channels > 1 and (len(shape) in (1, 2) or shape[1:2] == [1]):
        return f"; repeat the channel with wave.reshape(-1, 1, n).repeat(1, {channels}, 1)"
    return ""
