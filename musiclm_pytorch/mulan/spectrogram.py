"""Input of the audio tower: standardised log spectrograms, and their augmentation in training."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.padding import length_mask
from audiolm_pytorch.checks.tracing import is_traced

__all__ = ["LogSpectrogram", "SpecAugment", "log_spectrogram"]

# MuLan's audio: 25 ms windows every 10 ms, 128 mel bands (arXiv:2208.12415, sec. 3.1; arXiv:2104.01778, sec. 2.1). The
# transform is longer than the window; otherwise the lowest bands would lie between two of its bins.
_WINDOW_SECONDS, _TRANSFORM_SECONDS, _NUM_MELS = 0.025, 0.064, 128
# Magnitudes below this are silence; it is about -80 dB under a full-scale tone with the default window of 400 samples.
_LOG_FLOOR = 1e-2
# In nepers. A clip with less spread is silence or uniform noise, which must not be amplified.
_MIN_SPREAD = 0.5


class LogSpectrogram(nn.Module):
    """Computes log spectrograms of clips of unequal length, in mel bands, or in linear bins with `num_mels=None`.

    The spectrogram of a clip does not depend on the padding of the clip.
    """

    def __init__(self, sample_hz: int, num_mels: int | None, n_fft: int, win_length: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.num_bins = n_fft // 2 + 1 if num_mels is None else num_mels
        self.mel = None
        if num_mels is not None:
            sizes: dict[str, Any] = {"n_fft": n_fft, "win_length": win_length, "hop_length": hop_length}
            self.mel = MelSpectrogram(sample_hz=sample_hz, num_mels=num_mels, center=False, **sizes)

    def forward(self, wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute spectrograms `[b, bins, f]` (natural log, float32) of waves `[b, n]`, and the frame counts `[b]`."""
        num_frames = (lengths + self.hop_length - 1) // self.hop_length  # the last one may be partly filled
        with torch.autocast(device_type=wavs.device.type, enabled=False):
            real = length_mask(lengths, wavs.shape[-1])
            # Padding with zeros, not by reflection, does not depend on the length of the batch.
            left = self.n_fft // 2
            longest = -(-wavs.shape[-1] // self.hop_length) if is_traced() else int(num_frames.max())
            whole = longest * self.hop_length
            padded = F.pad(wavs.float().masked_fill(~real, 0.0), (left, whole - wavs.shape[-1] + self.n_fft - left - 1))
            if self.mel is not None:
                magnitudes = self.mel(padded)
            else:
                window = torch.hann_window(self.win_length, dtype=torch.float32, device=wavs.device)
                sizes = self.n_fft, self.hop_length, self.win_length
                magnitudes = torch.stft(padded, *sizes, window, center=False, return_complex=True).abs()
            return torch.log(magnitudes[..., :longest] + _LOG_FLOOR), num_frames

    def standardise(self, logs: Tensor, num_frames: Tensor) -> Tensor:
        """Normalise each spectrogram of `[b, bins, f]` to mean 0 and standard deviation 1; padding frames become 0.

        The normalisation removes the loudness of the recording, which captions do not describe.
        """
        real = length_mask(num_frames, logs.shape[-1]).unsqueeze(1)
        count = (num_frames * self.num_bins).clamp(min=1).view(-1, 1, 1)
        mean = (logs * real).sum(dim=(1, 2), keepdim=True) / count
        centred = (logs - mean) * real
        spread = (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt()
        return centred / spread.clamp(min=_MIN_SPREAD)


class SpecAugment(nn.Module):
    """Stretches log spectrograms in time and masks parts of them, in training only (SpecAugment, arXiv:1904.08779).

    Log magnitudes are stretched by linear interpolation, since the phase is unknown. See `AudioSpectrogramTransformer`
    for the arguments.
    """

    def __init__(self, stretch_factor: float, freq_mask_fraction: float, time_mask_fraction: float) -> None:
        super().__init__()
        if not 0.25 <= stretch_factor <= 4:
            raise ValueError(f"spec_aug_stretch_factor must be between 0.25 and 4 (1 = off), got {stretch_factor}")
        if not (0 <= freq_mask_fraction < 1 and 0 <= time_mask_fraction < 1):
            raise ValueError(
                "spec_aug_freq_mask and spec_aug_time_mask must be in [0, 1), "
                f"got {freq_mask_fraction} and {time_mask_fraction}"
            )
        self.stretch_factor = stretch_factor
        self.freq_mask_fraction = freq_mask_fraction
        self.time_mask_fraction = time_mask_fraction

    def stretch(self, logs: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Change the speed of each spectrogram of `[b, bins, f]` at random, and cut longer results to `f` frames."""
        if not self.training or self.stretch_factor == 1:
            return logs, num_frames
        exponent = torch.empty(len(logs), 1, device=logs.device).uniform_(-1, 1)
        speed = self.stretch_factor**exponent
        stretched = (num_frames / speed.squeeze(1)).long().clamp(min=1, max=logs.shape[-1])
        last = (num_frames - 1).unsqueeze(1)
        at = torch.minimum(torch.arange(int(stretched.max()), device=logs.device) * speed, last)
        lower = at.long()
        upper = torch.minimum(lower + 1, last)
        bins = logs.shape[1]
        below, above = (logs.gather(2, repeat(i, "b f -> b bins f", bins=bins)) for i in (lower, upper))
        return torch.lerp(below, above, (at - lower).unsqueeze(1)), stretched

    def mask(self, image: Tensor, num_frames: Tensor) -> Tensor:
        """In training, set a random band of bins and a random span of frames of each spectrogram `[bins, f]` to 0."""
        if not self.training:
            return image
        bins = torch.full_like(num_frames, image.shape[1])
        in_band = _random_span(bins, self.freq_mask_fraction, image.shape[1])
        in_stretch = _random_span(num_frames, self.time_mask_fraction, image.shape[2])
        return image.masked_fill(in_band.unsqueeze(2) | in_stretch.unsqueeze(1), 0.0)


def log_spectrogram(
    sample_hz: int,
    num_mels: int | Literal["auto"] | None,
    n_fft: int | None,
    win_length: int | None,
    hop_length: int | None,
) -> LogSpectrogram:
    """Build the spectrogram of an `AudioSpectrogramTransformer` from the arguments that its docstring explains."""
    if num_mels == "auto":
        num_mels = _NUM_MELS if n_fft is None else None
    if win_length is None:
        win_length = round(_WINDOW_SECONDS * sample_hz) if n_fft is None else n_fft
    n_fft = max(win_length, round(_TRANSFORM_SECONDS * sample_hz)) if n_fft is None else n_fft
    hop_length = max(1, 2 * win_length // 5) if hop_length is None else hop_length
    if not (1 <= win_length <= n_fft and hop_length >= 1):
        raise ValueError(
            "need 1 <= spec_win_length <= spec_n_fft and spec_hop_length >= 1, got "
            f"spec_win_length {win_length}, spec_n_fft {n_fft} and spec_hop_length {hop_length}"
        )
    return LogSpectrogram(sample_hz, num_mels, n_fft, win_length, hop_length)


def _random_span(sizes: Tensor, fraction: float, size: int) -> Tensor:
    """Mark a random span in each row i of a mask `[b, size]`: at most `fraction` of the first `sizes[i]` positions."""
    width, start = torch.rand(2, len(sizes), device=sizes.device)
    widths = (width * (sizes * fraction + 1)).long().clamp(max=(sizes * fraction).long())
    starts = (start * (sizes - widths + 1)).long()
    places = torch.arange(size, device=sizes.device)
    return (places >= starts.unsqueeze(1)) & (places < (starts + widths).unsqueeze(1))
