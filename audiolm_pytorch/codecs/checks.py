"""What every codec asks of the audio and the codes that it is given."""

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["check_covered", "checked_audio", "checked_codes"]


def checked_audio(wave: Tensor, channels: int, sample_hz: int, may_be_empty: bool = False) -> Tensor:
    """Refuse audio that a codec cannot mean.

    Args:
        wave: `[b, n]` or `[b, c, n]`.
        channels: Channels of the codec.
        sample_hz: Rate of the codec (Hz), for the message.
        may_be_empty: Whether n may be 0, as in the parts of a stream.

    Returns:
        The wave as `[b, c, n]`.

    Raises:
        ValueError: If rank, channels, length or type are wrong, or a sample is NaN or infinite.
    """
    given = list(wave.shape)
    if wave.ndim == 2:
        wave = rearrange(wave, "b n -> b 1 n")
    if wave.ndim != 3 or wave.shape[1] != channels or not (may_be_empty or wave.shape[-1]):
        shapes = f"[b, n] or [b, {channels}, n]" if channels == 1 else f"[b, {channels}, n]"
        raise ValueError(
            f"audio must be {shapes} with n > 0 samples at {sample_hz} Hz, got {given}{_mend(given, channels)}"
        )
    if not wave.is_floating_point():
        raise ValueError(
            f"audio must be floating point in [-1, 1], got {wave.dtype}; divide integers by their full scale"
        )
    # the two extremes tell, and unlike isfinite().all() take no second copy of a long recording
    if wave.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(wave.detach())):
        raise ValueError("audio holds NaN or infinite samples; clean it first, e.g. with torch.nan_to_num")
    return wave


def checked_codes(codes: Tensor, num_quantizers: int, codebook_size: int) -> Tensor:
    """Refuse codes that are not of a codec.

    Args:
        codes: `[b, f, q']`.
        num_quantizers: Levels of the codec; q' may be any from 1 to that.
        codebook_size: Codes per level.

    Returns:
        The codes.

    Raises:
        ValueError: If the shape is wrong or a code lies outside the codebooks (-1 marks padding).
    """
    if codes.ndim != 3 or not 1 <= codes.shape[-1] <= num_quantizers:
        raise ValueError(f"codes must be [b, f, 1..{num_quantizers}], got {list(codes.shape)}")
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be whole numbers, got {codes.dtype}")
    if codes.numel() and (codes.min() < 0 or codes.max() >= codebook_size):
        raise ValueError(
            f"codes must lie in 0..{codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}; cut padding off"
        )
    return codes


def check_covered(num_samples: int | None, covered: int, num_frames: int) -> None:
    """Refuse to decode more samples than the codes hold.

    Args:
        num_samples: Samples wanted; None for all.
        covered: Samples that the frames decode to.
        num_frames: Frames there are.

    Raises:
        ValueError: If there are fewer, or a negative number is wanted.
    """
    if num_samples is not None and not 0 <= num_samples <= covered:
        raise ValueError(f"{num_frames} frames cover {covered} samples, {num_samples} were asked for")


def _mend(shape: list[int], channels: int) -> str:
    """How audio `[…]` of a wrong shape could be made right, to end a message with; empty where that is not plain."""
    if len(shape) == 1:
        return "; give it the axis of the batch: wave.unsqueeze(0)"
    if len(shape) == 3 and shape[2] == channels != shape[1]:
        return "; samples come last: wave.transpose(1, 2)"
    if len(shape) == 3 and channels == 1 and shape[1] > 1:
        return "; mix the channels down: wave.mean(dim=1)"
    if channels > 1 and (len(shape) == 2 or shape[1:2] == [1]):
        return f"; repeat the one channel: wave.view(len(wave), 1, -1).repeat(1, {channels}, 1)"
    return ""
