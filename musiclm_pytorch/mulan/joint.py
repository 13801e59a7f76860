"""What every joint embedding of audio and text offers: unit vectors of clips, of texts, and of audio of any length."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.audio.units import samples_in

__all__ = ["JointEmbedding", "average_latents"]


class JointEmbedding(nn.Module, ABC):
    """Audio and text in one space of unit vectors; the base of `MuLaN` and of pretrained models in its place.

    Args:
        dim_latent: Width of the common space.
        sample_hz: Sample rate in Hz at which waves are read.
        window_seconds: Longer audio is embedded window by window (MusicLM, arXiv:2301.11325, sec. 3.2: 10 s).
        window_stride_seconds: From the start of one window to that of the next (MusicLM: 1 s).

    Raises:
        ValueError: If a number is out of range, or a window is no whole number of samples.
    """

    @beartype
    def __init__(
        self,
        *,
        dim_latent: int,
        sample_hz: int,
        window_seconds: float | int = 10.0,
        window_stride_seconds: float | int = 1.0,
    ) -> None:
        super().__init__()
        if dim_latent < 1 or window_seconds <= 0 or window_stride_seconds <= 0:
            raise ValueError(
                "dim_latent, window_seconds and window_stride_seconds must be positive, got "
                f"{dim_latent}, {window_seconds}, {window_stride_seconds}"
            )
        self.dim_latent, self.sample_hz = dim_latent, sample_hz
        self.window_seconds, self.window_stride_seconds = float(window_seconds), float(window_stride_seconds)
        self.window_samples = samples_in(self.window_seconds, sample_hz)
        self.window_stride_samples = samples_in(self.window_stride_seconds, sample_hz)

    @abstractmethod
    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips, each as one piece.

        Args:
            wavs: `[b, n]` float at `sample_hz`.
            lengths: `[b]` samples of each clip, 1..n. None = all `n`.

        Returns:
            `[b, dim_latent]` float32, unit norm.
        """

    @abstractmethod
    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts.

        Args:
            texts: One text, several, or ids `[b, t]` with -1 past the end of a text.

        Returns:
            `[b, dim_latent]` float32, unit norm.

        Raises:
            ValueError: If a text is empty.
        """

    @beartype
    def window_latents(self, wav: Tensor, *, max_batch: int = 32) -> Tensor:
        """Embed every window of one recording.

        Args:
            wav: `[n]` float at `sample_hz`.
            max_batch: Windows embedded at a time, which bounds the memory.

        Returns:
            `[w, dim_latent]` float32, unit norm. Windows are `window_seconds` long and begin every
            `window_stride_seconds`; a shorter recording is one window, a last stride that is not full is left out.
        """
        if wav.ndim != 1:
            raise ValueError(f"wav must be one recording [n], got {tuple(wav.shape)}")
        if len(wav) <= self.window_samples:
            return self.get_audio_latents(wav.unsqueeze(0))
        windows = wav.unfold(0, self.window_samples, self.window_stride_samples)
        return torch.cat([self.get_audio_latents(part) for part in windows.split(max_batch)])

    @beartype
    def get_long_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed recordings of any length by the average over their windows (MusicLM, sec. 3.2).

        Args:
            wavs: `[b, n]` float at `sample_hz`.
            lengths: `[b]` samples of each recording, 1..n. None = all `n`.

        Returns:
            `[b, dim_latent]` float32, unit norm; `get_audio_latents` where no recording is longer than a window.

        Raises:
            ValueError: If shapes or lengths do not fit.
        """
        if wavs.ndim != 2:
            raise ValueError(f"wavs must be recordings [b, n], got {tuple(wavs.shape)}")
        if wavs.shape[1] <= self.window_samples:
            return self.get_audio_latents(wavs, lengths)
        sizes = [wavs.shape[1]] * len(wavs) if lengths is None else checked_lengths(lengths, wavs).tolist()
        return torch.stack([average_latents(self.window_latents(wav[:size])) for wav, size in zip(wavs, sizes)])


def average_latents(latents: Tensor) -> Tensor:
    """Average unit vectors `[..., w, d]` over windows and bring the result `[..., d]` back to unit norm."""
    return F.normalize(latents.mean(dim=-2), dim=-1)
