"""MuLan's audio tower: an audio spectrogram transformer over log-(mel-)spectrogram patches of any length."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from audiolm_pytorch.audio import MelSpectrogram
from audiolm_pytorch.encoder import TransformerEncoder
from audiolm_pytorch.io import register

__all__ = ["AudioSpectrogramTransformer", "SpecAugment"]

# Magnitudes below this are silence: about -80 dB under a full-scale tone with the default window of 400 samples.
_LOG_FLOOR = 1e-2
# Least spread of a log spectrogram, in nepers: below it a clip is near-uniform noise or silence, not to be blown up.
_LEAST_SPREAD = 0.5


class LogSpectrogram(nn.Module):
    """Standardised log (mel) spectrogram of clips of unequal length, in which padding changes nothing.

    Each clip is brought to mean 0 and spread 1 over its own frames: a caption does not tell the recording level.

    Args:
        sample_hz: Sample rate of the waves in Hz.
        num_mels: Mel bands; None = the linear bins of the Fourier transform.
        n_fft: Size of the Fourier transform in samples.
        win_length: Samples of the window.
        hop_length: Samples a frame.
    """

    window: Tensor

    def __init__(self, sample_hz: int, num_mels: int | None, n_fft: int, win_length: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.num_bins = n_fft // 2 + 1 if num_mels is None else num_mels
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)
        self.mel = None
        if num_mels is not None:
            self.mel = MelSpectrogram(
                sample_hz=sample_hz,
                n_fft=n_fft,
                win_length=win_length,
                hop_length=hop_length,
                num_mels=num_mels,
                center=False,
            )

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Count the frames of clips of `num_samples [b]`: every hop that is begun."""
        return (num_samples + self.hop_length - 1) // self.hop_length

    def forward(self, wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log spectrogram, before it is standardised.

        Args:
            wavs: `[b, n]` float in about -1..1.
            lengths: `[b]` samples of each clip; the rest is ignored.

        Returns:
            Natural logs `[b, bins, f]` float32 and the frames of each clip `[b]`.
        """
        num_frames = self.num_frames(lengths)
        with torch.autocast(device_type=wavs.device.type, enabled=False):
            real = torch.arange(wavs.shape[-1], device=wavs.device) < lengths.unsqueeze(-1)
            # Zeros, not a reflection: the edge of a clip then does not depend on where the batch was padded to.
            left = self.n_fft // 2
            whole = int(num_frames.max()) * self.hop_length
            padded = F.pad(wavs.float() * real, (left, whole - wavs.shape[-1] + self.n_fft - left - 1))
            if self.mel is not None:
                magnitudes = self.mel(padded)
            else:
                spectrum = torch.stft(
                    padded,
                    self.n_fft,
                    self.hop_length,
                    self.win_length,
                    self.window.float(),
                    center=False,
                    return_complex=True,
                )
                magnitudes = spectrum.abs()
            return torch.log(magnitudes[..., : int(num_frames.max())] + _LOG_FLOOR), num_frames

    def standardise(self, logs: Tensor, num_frames: Tensor) -> Tensor:
        """Bring every clip of `[b, bins, f]` to mean 0 and spread 1 over its own frames; zeros elsewhere."""
        real = _first(num_frames, logs.shape[-1]).unsqueeze(1)
        count = (num_frames * self.num_bins).clamp(min=1).view(-1, 1, 1)
        mean = (logs * real).sum(dim=(1, 2), keepdim=True) / count
        centred = (logs - mean) * real
        spread = (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt()
        return centred / spread.clamp(min=_LEAST_SPREAD)


class SpecAugment(nn.Module):
    """Time stretch and masked bands of log spectrograms, in training only (SpecAugment, arXiv:1904.08779).

    The stretch is a linear interpolation of the log magnitudes, since no phase is kept.

    Args:
        stretch_factor: Each clip plays at a speed drawn between `stretch_factor` and its inverse; 1 = off.
        freq_mask_fraction: Widest masked band over all bins; 0 = off.
        time_mask_fraction: Longest masked stretch over the frames of a clip; 0 = off.
    """

    def __init__(self, stretch_factor: float, freq_mask_fraction: float, time_mask_fraction: float) -> None:
        super().__init__()
        if not 0.25 <= stretch_factor <= 4:
            raise ValueError(f"spec_aug_stretch_factor must be between 0.25 and 4 (1 = off), got {stretch_factor}")
        if not (0 <= freq_mask_fraction < 1 and 0 <= time_mask_fraction < 1):
            raise ValueError(f"mask fractions must be in [0, 1), got {freq_mask_fraction} and {time_mask_fraction}")
        self.stretch_factor = stretch_factor
        self.freq_mask_fraction = freq_mask_fraction
        self.time_mask_fraction = time_mask_fraction

    def stretch(self, logs: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Play each clip of `[b, bins, f]` at a random speed; one that grows beyond `f` frames loses its end."""
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
        """Set one band of bins and one stretch of frames of each standardised clip `[b, bins, f]` to 0, its mean."""
        if not self.training:
            return image
        bins = torch.full_like(num_frames, image.shape[1])
        in_band = _random_span(bins, self.freq_mask_fraction, image.shape[1])
        in_stretch = _random_span(num_frames, self.time_mask_fraction, image.shape[2])
        return image.masked_fill(in_band.unsqueeze(2) | in_stretch.unsqueeze(1), 0.0)


@register
class AudioSpectrogramTransformer(nn.Module):
    """One embedding per clip: the mean of a transformer's outputs over non-overlapping spectrogram patches.

    AST (arXiv:2104.01778) as in MuLan (arXiv:2208.12415, sec. 3.1), with the time of a patch as a rotary position and
    its band as a learned one, so that clips of any length go through. Clips shorter than a patch are padded to one.

    Args:
        dim: Width of the tokens and of the output.
        depth: Transformer blocks.
        heads: Attention heads.
        dim_head: Width of a head, even.
        patch_size: Bins and frames of a (square) patch.
        sample_hz: Sample rate of the waves in Hz.
        num_mels: Mel bands; None = the linear bins of the Fourier transform.
        spec_n_fft: Size of the Fourier transform in samples.
        spec_win_length: Samples of the window; None = `spec_n_fft`.
        spec_hop_length: Samples a frame; None = 2/5 of the window, which is 10 ms for 25 ms.
        spec_aug_stretch_factor: In training, each clip plays at a random speed between this and its inverse; 1 = off.
        spec_aug_freq_mask: In training, up to this fraction of the bins is masked; 0 = off.
        spec_aug_time_mask: In training, up to this fraction of the frames is masked; 0 = off.
        patch_dropout: Fraction of patches left out in training, which saves that much time (arXiv:2212.00794).
        ff_mult: Width of the feed-forward over `dim`.
        dropout: Probability of dropping in training.

    Raises:
        ValueError: If a number is out of range, or there are more mel bands than the Fourier transform resolves.
    """

    @beartype
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        patch_size: int = 16,
        sample_hz: int = 16_000,
        num_mels: int | None = None,
        spec_n_fft: int = 400,
        spec_win_length: int | None = None,
        spec_hop_length: int | None = None,
        spec_aug_stretch_factor: float | int = 1.0,
        spec_aug_freq_mask: float | int = 0.0,
        spec_aug_time_mask: float | int = 0.0,
        patch_dropout: float | int = 0.0,
        ff_mult: int = 4,
        dropout: float | int = 0.0,
    ) -> None:
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        win_length = spec_n_fft if spec_win_length is None else spec_win_length
        hop_length = max(1, 2 * win_length // 5) if spec_hop_length is None else spec_hop_length
        if not (1 <= win_length <= spec_n_fft and hop_length >= 1 and patch_size >= 1 and sample_hz >= 1):
            raise ValueError(
                "need 1 <= spec_win_length <= spec_n_fft and hop, patch_size and sample_hz >= 1, got "
                f"{win_length}, {spec_n_fft}, {hop_length}, {patch_size}, {sample_hz}"
            )
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout must be in [0, 1), got {patch_dropout}")
        self.dim, self.sample_hz, self.patch_size, self.patch_dropout = dim, sample_hz, patch_size, float(patch_dropout)
        self.spectrogram = LogSpectrogram(sample_hz, num_mels, spec_n_fft, win_length, hop_length)
        self.augment = SpecAugment(float(spec_aug_stretch_factor), float(spec_aug_freq_mask), float(spec_aug_time_mask))
        self.num_bands = math.ceil(self.spectrogram.num_bins / patch_size)
        self.to_tokens = nn.Linear(patch_size**2, dim)
        self.band_embedding = nn.Parameter(torch.randn(self.num_bands, dim) * 0.02)
        self.encoder = TransformerEncoder(dim, depth, heads, dim_head, ff_mult, float(dropout))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AudioSpectrogramTransformer":
        """Build from `config`; the weights are new."""
        return cls(**config)

    def forward(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips.

        Args:
            wavs: `[b, n]` float in about -1..1 at `sample_hz`.
            lengths: `[b]` samples of each clip, 1..n; what lies beyond is padding. None = all `n`.

        Returns:
            Tensor `[b, dim]` float32, not normalised; in eval mode each row is the same whatever else is in the batch.

        Raises:
            ValueError: If shapes do not fit, a clip is empty, or a sample is NaN or infinite.
        """
        lengths = _checked_lengths(wavs, lengths)
        logs, num_frames = self.spectrogram(wavs, lengths)
        logs, num_frames = self.augment.stretch(logs, num_frames)
        image = self.augment.mask(self.spectrogram.standardise(logs, num_frames), num_frames)
        tokens, columns, mask = self._patches(image, num_frames)
        full = bool(mask.all())
        encoded = self.encoder(tokens, None if full else mask, positions=columns).float() * mask.unsqueeze(-1)
        return reduce(encoded, "b t d -> b d", "sum") / mask.sum(dim=1, keepdim=True)

    def _patches(self, image: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[b, t, d]` of the patches, their columns in time `[b, t]`, and which of them are real `[b, t]`."""
        size = self.patch_size
        num_columns = math.ceil(image.shape[2] / size)
        image = F.pad(image, (0, num_columns * size - image.shape[2], 0, self.num_bands * size - image.shape[1]))
        patches = rearrange(image, "b (h p) (w q) -> b w h (p q)", p=size, q=size)
        tokens = rearrange(self.to_tokens(patches) + self.band_embedding, "b w h d -> b (w h) d")
        columns = repeat(torch.arange(num_columns, device=image.device), "w -> b (w h)", b=len(image), h=self.num_bands)
        mask = columns < ((num_frames + size - 1) // size).unsqueeze(1)
        if not self.training or self.patch_dropout == 0:
            return tokens, columns, mask
        kept = torch.ceil(mask.sum(dim=1) * (1 - self.patch_dropout)).long()
        order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1).argsort(dim=1, descending=True)
        order = order[:, : int(kept.max())]
        tokens = tokens.gather(1, repeat(order, "b t -> b t d", d=self.dim))
        return tokens, columns.gather(1, order), _first(kept, order.shape[1])


def _first(counts: Tensor, size: int) -> Tensor:
    """Mask `[b, size]` that is True at the first `counts [b]` places."""
    return torch.arange(size, device=counts.device) < counts.unsqueeze(1)


def _random_span(sizes: Tensor, fraction: float, size: int) -> Tensor:
    """Mask `[b, size]` of one random span inside the first `sizes [b]` places, up to `fraction` of them long."""
    width, start = torch.rand(2, len(sizes), device=sizes.device)
    widths = (width * (sizes * fraction + 1)).long().clamp(max=(sizes * fraction).long())
    starts = (start * (sizes - widths + 1)).long()
    places = torch.arange(size, device=sizes.device)
    return (places >= starts.unsqueeze(1)) & (places < (starts + widths).unsqueeze(1))


def _checked_lengths(wavs: Tensor, lengths: Tensor | None) -> Tensor:
    """Lengths `[b]` in samples on the device of `wavs`, or ValueError that says what is wrong with either."""
    if wavs.ndim != 2 or not wavs.is_floating_point() or wavs.numel() == 0:
        raise ValueError(f"wavs must be float [b, n] with b, n >= 1, got {wavs.dtype} {tuple(wavs.shape)}")
    if not torch.isfinite(wavs).all():
        raise ValueError("wavs hold NaN or infinite samples")
    if lengths is None:
        return torch.full((len(wavs),), wavs.shape[1], device=wavs.device)
    if lengths.shape != wavs.shape[:1] or int(lengths.min()) < 1 or int(lengths.max()) > wavs.shape[1]:
        raise ValueError(
            f"lengths must be {len(wavs)} numbers of samples in 1..{wavs.shape[1]}, got {lengths.tolist()}"
        )
    return lengths.to(wavs.device)
