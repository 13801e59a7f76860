"""Front end of BEST-RQ: normalised log-mel vectors, one per token, that do not depend on padding."""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.padding import checked_lengths, length_mask
from audiolm_pytorch.audio.waves import mono_waves
from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import typed

__all__ = ["StackedLogMel"]

# Mel frames that are computed at a time; 30,000 (five minutes by default) need 200 MB.
_FRAMES_PER_CHUNK = 30_000


class StackedLogMel(nn.Module):
    """Front end that normalises log-mel frames by corpus statistics, and stacks several frames to a vector per token.

    Token i covers samples `[i * downsample_factor, (i + 1) * downsample_factor)`. The last token is padded with zeros,
    so that a wave of n samples has `ceil(n / downsample_factor)` tokens. Samples after the end of an item are set to
    zero, so that the vectors of an item do not depend on the batch.

    Args:
        floor: Lower bound of the mel magnitudes; 1e-2 is 88 dB below a full-scale sine at n_fft 1024.
    """

    @typed
    def __init__(
        self,
        *,
        sample_hz: int = 16_000,
        num_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 160,
        frames_per_token: int = 4,
        floor: float = 1e-2,
    ) -> None:
        super().__init__()
        if min(sample_hz, num_mels, hop_length, frames_per_token) < 1 or floor <= 0:
            raise ValueError(
                f"sample_hz {sample_hz}, num_mels {num_mels}, hop_length {hop_length}, frames_per_token "
                f"{frames_per_token} and floor {floor} must be positive"
            )
        if n_fft < hop_length:
            raise ValueError(f"n_fft {n_fft} is smaller than hop_length {hop_length}, which skips samples; raise n_fft")
        self.sample_hz, self.num_mels, self.floor = sample_hz, num_mels, floor
        self.n_fft, self.hop_length, self.frames_per_token = n_fft, hop_length, frames_per_token
        # Width of the vector of a token, and samples per token.
        self.dim, self.downsample_factor = num_mels * frames_per_token, hop_length * frames_per_token
        self.mel = MelSpectrogram(
            sample_hz=sample_hz, n_fft=n_fft, hop_length=hop_length, num_mels=num_mels, power=1.0, center=False
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(num_mels))
        self.register_buffer("std", torch.ones(num_mels))

    def num_frames(self, num_samples: int) -> int:
        """Return the number of tokens of a wave; raise a ValueError if the wave is shorter than a token."""
        if num_samples < self.downsample_factor:
            raise ValueError(
                f"a wave of {num_samples} samples is shorter than one token: at least {self.downsample_factor} samples "
                f"at {self.sample_hz} Hz are needed; pass a longer wave"
            )
        return -(-num_samples // self.downsample_factor)

    def checked_lengths(self, wave: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the lengths of the items in samples, `[b]` int64; raise a ValueError if an item is too short."""
        whole = torch.full(wave.shape[:1], wave.shape[1], device=wave.device)
        lengths = checked_lengths(whole if lengths is None else lengths, wave)
        self.num_frames(wave.shape[1] if is_traced() or not len(lengths) else int(lengths.min()))
        return lengths

    def log_mel(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Pad waves `[b, n]` to whole tokens, and compute log-mel frames `[b, f, num_mels]` without normalisation."""
        num_mel_frames = self.num_frames(wave.shape[-1]) * self.frames_per_token
        wave = wave.float().masked_fill(~length_mask(lengths, wave.shape[-1]), 0.0)
        # Window i is centred on hop i. Items in a longer batch have zeros on the right too.
        left = (self.n_fft - self.hop_length) // 2
        right = (num_mel_frames - 1) * self.hop_length + self.n_fft - left - wave.shape[-1]
        with torch.autocast(wave.device.type, enabled=False):
            padded = nn.functional.pad(wave, (left, right))
            chunks = [padded]
            if not is_traced():  # the number of chunks would become a constant
                starts = range(0, num_mel_frames * self.hop_length, _FRAMES_PER_CHUNK * self.hop_length)
                chunk_samples = (_FRAMES_PER_CHUNK - 1) * self.hop_length + self.n_fft
                chunks = [padded[:, start : start + chunk_samples] for start in starts]
            parts = [self.mel(chunk).clamp(min=self.floor).log() for chunk in chunks]
            return rearrange(torch.cat(parts, dim=-1), "b m f -> b f m")

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convert waves (see `mono_waves`) to normalised vectors `[b, t, dim]` float32 and a mask `[b, t]` bool.

        The mask is False at padding, where the vectors are zero.
        """
        wave = mono_waves(wave, lengths)
        lengths = self.checked_lengths(wave, lengths)
        frames = (self.log_mel(wave, lengths) - self.mean) / self.std
        stacked = rearrange(frames, "b (t k) m -> b t (k m)", k=self.frames_per_token)
        mask = length_mask(-(-lengths // self.downsample_factor), stacked.shape[1])
        return stacked.masked_fill(~rearrange(mask, "b t -> b t 1"), 0.0), mask

    @torch.no_grad()
    def fit(self, waves: Iterable[Tensor]) -> None:
        """Compute mean and standard deviation of every mel band from a few minutes of waves `[n]` or `[b, n]`."""
        count = 0
        total = torch.zeros(self.num_mels, dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros_like(total)
        for wave in waves:
            batch = mono_waves(wave).to(self.mean.device)
            frames = rearrange(self.log_mel(batch, self.checked_lengths(batch, None)), "b f m -> (b f) m").double()
            count += len(frames)
            total += frames.sum(dim=0)
            squares += frames.square().sum(dim=0)
        if not count:
            raise ValueError("got no waves; pass at least one wave for the statistics")
        mean = total / count
        # A silent band varies by rounding noise only, which a division would amplify.
        std = (squares / count - mean.square()).clamp(min=0.0).sqrt().clamp(min=1e-2)
        self.mean.copy_(mean)
        self.std.copy_(std)
