"""Melodies as conditions: the dominant pitch class of every frame of a wave."""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.audio.waves import check_rate, mono_waves
from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.metrics.chroma import chroma_filters

__all__ = ["ChromaConditioner"]


class ChromaConditioner:
    """Computes one-hot vectors of the dominant pitch class, the melody condition of MusicGen (arXiv:2306.05284).

    A frame is the largest of 12 chroma bins (from C) of a spectrum over `n_fft` samples. Silence is class C. A melody
    of fewer than `num_frames` frames is repeated, and a longer one is cut.

    Args:
        num_frames: Number of frames of the condition, 235 for 30 s.
        sample_hz: Sample rate of the waves.
        n_fft: Length of a frame in samples; frames start every quarter of this length.
    """

    num_classes = 12

    @typed
    def __init__(self, num_frames: int = 235, sample_hz: int = 32_000, n_fft: int = 2**14) -> None:
        if num_frames < 1 or n_fft < 4 or n_fft % 4:
            raise ValueError(f"need num_frames >= 1 and n_fft a multiple of 4, got {num_frames} and {n_fft}")
        check_rate(sample_hz)
        self.num_frames, self.sample_hz, self.n_fft, self.hop_samples = num_frames, sample_hz, n_fft, n_fft // 4
        self._filters: Tensor | None = None

    @typed
    def __call__(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the one-hot vectors `[b, num_frames, 12]` float32 of waves `[b, n]` with `lengths [b]` samples."""
        waves = mono_waves(waves, lengths, name="melody")
        melodies = torch.zeros(len(waves), self.num_frames, self.num_classes, device=waves.device)
        for items, part in items_by_length(waves, lengths):
            melodies[items] = self.expand(self.frames(part))
        return melodies

    def frames(self, waves: Tensor) -> Tensor:
        """Return the one-hot vectors `[b, f, 12]` of all frames of waves `[b, n]` without padding."""
        if self._filters is None:
            self._filters = torch.from_numpy(chroma_filters(self.sample_hz, self.n_fft)).float()
        missing = max(self.n_fft - waves.shape[1], 0)
        waves = F.pad(waves.float(), (missing // 2, missing - missing // 2))
        window = torch.hann_window(self.n_fft, device=waves.device)
        spectrum = torch.stft(waves, self.n_fft, self.hop_samples, window=window, return_complex=True)
        energies = self._filters.to(waves.device) @ spectrum.abs().square()
        return F.one_hot(energies.argmax(dim=1), self.num_classes).to(waves.dtype)

    def expand(self, frames: Tensor) -> Tensor:
        """Repeat or cut frames `[b, f, 12]` to `num_frames` frames."""
        repeats = ceil(self.num_frames / frames.shape[1])
        return frames.repeat(1, repeats, 1)[:, : self.num_frames]
