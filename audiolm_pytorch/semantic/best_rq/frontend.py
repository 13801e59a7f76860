"""The front end of the self-supervised encoder: a wave becomes normalised log-mel tokens that nothing leaks into."""

from collections.abc import Iterable

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.padding import length_mask
from audiolm_pytorch.audio.units import frames_covering

__all__ = ["StackedLogMel"]

# Spectra of an hour at once would take gigabytes: 30,000 mel frames (five minutes by default) take 200 MB.
_FRAMES_AT_ONCE = 30_000


class StackedLogMel(nn.Module):
    """Log-mel frames, normalised by fixed statistics of the corpus and stacked into one vector per token.

    Token i covers samples `[i * downsample_factor, (i + 1) * downsample_factor)`; a last, partly filled token is
    completed with zeros. So a wave gives `ceil(n / downsample_factor)` tokens, and lengths agree with a codec that
    covers its input, too. The statistics are fitted once and stored: nothing is computed over an utterance or a batch,
    and every sample past an item's length counts as zero, so an item gives the same tokens alone and in a batch.

    Args:
        sample_hz: Rate of the waves (Hz).
        num_mels: Mel bands.
        n_fft: Samples of the analysis window.
        hop_length: Samples between mel frames.
        frames_per_token: Mel frames stacked into a token.
        floor: Magnitude below which a band counts as silent; 1e-2 lies 88 dB under a full-scale sine at n_fft 1024.

    Raises:
        ValueError: If a number is out of range, or a mel band would hold no frequency of the window.
    """

    @beartype
    def __init__(
        self,
        *,
        sample_hz: int = 16_000,
        num_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 160,
        frames_per_token: int = 4,
        floor: float | int = 1e-2,
    ) -> None:
        super().__init__()
        if min(sample_hz, num_mels, hop_length, frames_per_token) < 1 or floor <= 0:
            raise ValueError("sample_hz, num_mels, hop_length, frames_per_token and floor must be positive")
        if n_fft < hop_length:
            raise ValueError(
                f"n_fft {n_fft} is shorter than hop_length {hop_length}: samples would be skipped; raise n_fft"
            )
        self.sample_hz = sample_hz
        self.num_mels = num_mels
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.frames_per_token = frames_per_token
        self.floor = floor
        self.mel = MelSpectrogram(
            sample_hz=sample_hz, n_fft=n_fft, hop_length=hop_length, num_mels=num_mels, power=1.0, center=False
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(num_mels))
        self.register_buffer("std", torch.ones(num_mels))

    @property
    def dim(self) -> int:
        """Numbers per token."""
        return self.num_mels * self.frames_per_token

    @property
    def downsample_factor(self) -> int:
        """Samples per token."""
        return self.hop_length * self.frames_per_token

    def num_frames(self, num_samples: int) -> int:
        """Tokens that cover a wave.

        Args:
            num_samples: Length of the wave at `sample_hz`, at least one whole token.

        Returns:
            `ceil(num_samples / downsample_factor)`.

        Raises:
            ValueError: If the wave is shorter than one token.
        """
        if num_samples < self.downsample_factor:
            raise ValueError(
                f"a wave of {num_samples} samples is shorter than one token: at least {self.downsample_factor} samples "
                f"at {self.sample_hz} Hz are needed; pass a longer wave"
            )
        return frames_covering(num_samples, self.downsample_factor)

    def checked_lengths(self, wave: Tensor, lengths: Tensor | None) -> Tensor:
        """Lengths `[b]` int64 (samples) on the wave's device, None = all of it; ValueError if they do not fit."""
        if wave.ndim != 2 or not wave.is_floating_point():
            raise ValueError(f"wave must be float [b, n], got {wave.dtype} {tuple(wave.shape)}")
        num_items, num_samples = wave.shape
        if lengths is None:
            self.num_frames(num_samples)
            return torch.full((num_items,), num_samples, device=wave.device)
        if lengths.shape != (num_items,) or lengths.is_floating_point():
            raise ValueError(f"lengths must be int [{num_items}], got {lengths.dtype} {tuple(lengths.shape)}")
        lengths = lengths.to(device=wave.device, dtype=torch.int64)
        if num_items:
            self.num_frames(int(lengths.min()))
            if int(lengths.max()) > num_samples:
                raise ValueError(f"lengths reach {int(lengths.max())} samples, but the wave holds {num_samples}")
        return lengths

    def log_mel(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Log-mel frames before normalisation: wave `[b, n]`, lengths `[b]` -> `[b, f, m]`, whole tokens."""
        num_mel_frames = self.num_frames(wave.shape[-1]) * self.frames_per_token
        wave = wave.float().masked_fill(~length_mask(lengths, wave.shape[-1]), 0.0)
        # Window i is centred on hop i. The zeros on the right are what an item in a longer batch has there, too.
        left = (self.n_fft - self.hop_length) // 2
        right = (num_mel_frames - 1) * self.hop_length + self.n_fft - left - wave.shape[-1]
        with torch.autocast(wave.device.type, enabled=False):
            padded = nn.functional.pad(wave, (left, max(0, right)))
            parts = []
            for start in range(0, num_mel_frames, _FRAMES_AT_ONCE):
                last = min(start + _FRAMES_AT_ONCE, num_mel_frames) - 1
                mel = self.mel(padded[:, start * self.hop_length : last * self.hop_length + self.n_fft])
                parts.append(mel.clamp(min=self.floor).log())
            return rearrange(torch.cat(parts, dim=-1), "b m f -> b f m")

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turn waves into token vectors.

        Args:
            wave: `[b, n]`, float, at `sample_hz`.
            lengths: `[b]` int, samples that belong to each item; None = all of them.

        Returns:
            Vectors `[b, t, dim]` float32, zero where the mask `[b, t]` bool (second) is False.

        Raises:
            ValueError: If shapes do not fit or an item is shorter than one token.
        """
        lengths = self.checked_lengths(wave, lengths)
        frames = (self.log_mel(wave, lengths) - self.mean) / self.std
        stacked = rearrange(frames, "b (t k) m -> b t (k m)", k=self.frames_per_token)
        mask = length_mask(-(-lengths // self.downsample_factor), stacked.shape[1])
        return stacked.masked_fill(~rearrange(mask, "b t -> b t 1"), 0.0), mask

    @torch.no_grad()
    def fit(self, waves: Iterable[Tensor]) -> None:
        """Set the statistics to the mean and standard deviation of every band over a corpus.

        Args:
            waves: Waves `[n]` or `[b, n]` without padding, at `sample_hz`; a few minutes of sound are enough.

        Raises:
            ValueError: If there is no wave.
        """
        count = 0
        total = torch.zeros(self.num_mels, dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros_like(total)
        for wave in waves:
            batch = (wave.unsqueeze(0) if wave.ndim == 1 else wave).to(self.mean.device)
            frames = rearrange(self.log_mel(batch, self.checked_lengths(batch, None)), "b f m -> (b f) m").double()
            count += len(frames)
            total += frames.sum(dim=0)
            squares += frames.square().sum(dim=0)
        if not count:
            raise ValueError("statistics need at least one wave, got none")
        mean = total / count
        # A band that never sounds has no spread; dividing by its rounding noise would blow it up.
        std = (squares / count - mean.square()).clamp(min=0.0).sqrt().clamp(min=1e-2)
        self.mean.copy_(mean)
        self.std.copy_(std)
