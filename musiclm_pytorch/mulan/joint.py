"""Base class of joint embeddings, which embed audio of any length and texts as unit vectors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.audio.units import samples_in
from audiolm_pytorch.audio.waves import mono_waves, one_mono_wave
from audiolm_pytorch.checks.types import described, typed
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["JointEmbedding", "average_latents"]


class JointEmbedding(SavedModule, ABC):
    """Base class of models that embed audio and text as unit vectors in one space, such as `MuLaN`.

    Args:
        window_seconds: Length of the windows into which longer audio is divided, a whole number of samples; 10 s in
            MusicLM (arXiv:2301.11325, sec. 3.2).
        window_stride_seconds: Time between the starts of two windows; 1 s in MusicLM.
    """

    pipeline_tag = "feature-extraction"
    published: ClassVar[Mapping[str, str]] = {"clap": "ClapMuLaN"}
    held_as = "mulan"  # of a quantizer
    # Below a model, a finished run, and a run whose MuLaN is trained.
    subfolders = ("", "quantizer", "model/quantizer", "mulan/model", "mulan", "model")

    @typed
    def __init__(
        self,
        *,
        dim_latent: int,
        sample_hz: int,
        window_seconds: float = 10.0,
        window_stride_seconds: float = 1.0,
    ) -> None:
        super().__init__()
        if dim_latent < 1 or not 0 < window_seconds < inf or not 0 < window_stride_seconds < inf:
            raise ValueError(
                f"dim_latent, window_seconds and window_stride_seconds must be positive and finite, got {dim_latent}, "
                f"{window_seconds} and {window_stride_seconds}"
            )
        self.dim_latent, self.sample_hz = dim_latent, sample_hz
        self.window_seconds, self.window_stride_seconds = float(window_seconds), float(window_stride_seconds)
        self.window_samples = samples_in(self.window_seconds, sample_hz)
        self.window_stride_samples = samples_in(self.window_stride_seconds, sample_hz)

    @abstractmethod
    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed whole clips at `sample_hz`, not split into windows, as `[b, dim_latent]` float32 of unit norm.

        The clips are `[n]`, `[b, n]` or `[b, 1, n]`. `lengths [b]` are the numbers of samples of the clips, 1..n;
        None = every clip has `n` samples.
        """

    @abstractmethod
    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed one text, several texts, or token ids `[b, t]` (-1 past the end), as `[b, dim_latent]` of unit norm.

        An empty text raises a ValueError.
        """

    @typed
    def window_latents(self, wav: Tensor, *, max_batch: int = 32) -> Tensor:
        """Embed every window of one recording `[n]` as `[w, dim_latent]` of unit norm, `max_batch` windows at a time.

        A recording shorter than a window is embedded as one window. Samples after the last full window are left out.
        """
        wav = one_mono_wave(wav, name="wav")
        check_positive(max_batch=max_batch)
        if len(wav) <= self.window_samples:
            return self.get_audio_latents(wav.unsqueeze(0))
        windows = wav.unfold(0, self.window_samples, self.window_stride_samples)
        return torch.cat([self.get_audio_latents(part) for part in windows.split(max_batch)])

    @typed
    def get_long_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed recordings `[b, n]` of any length as the average over their windows; see `get_audio_latents`."""
        wavs = mono_waves(wavs, lengths, name="wavs")
        if wavs.shape[1] <= self.window_samples:
            return self.get_audio_latents(wavs, lengths)
        sizes = [wavs.shape[1]] * len(wavs) if lengths is None else checked_lengths(lengths, wavs).tolist()
        return torch.stack([average_latents(self.window_latents(wav[:size])) for wav, size in zip(wavs, sizes)])


@typed
def average_latents(latents: Tensor) -> Tensor:
    """Average unit vectors `[..., w, d]` over windows, and normalise the average `[..., d]` to unit norm."""
    if not latents.is_floating_point() or latents.ndim < 2 or not latents.shape[-2]:
        raise ValueError(f"latents must be floats [..., w, d] with w >= 1, got {described(latents)}")
    return F.normalize(latents.mean(dim=-2), dim=-1)
