"""MuLaN: audio and text in one joint embedding, learned by contrast."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.io import build_module, module_spec, register
from audiolm_pytorch.units import samples_in
from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.losses import SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.text_tower import TextTransformer

__all__ = ["MuLaN", "average_latents"]


@register
class MuLaN(nn.Module):
    """Two towers with a common space of unit vectors (MuLan, arXiv:2208.12415).

    Args:
        audio_transformer: Embeds waves.
        text_transformer: Embeds texts.
        dim_latent: Width of the common space (MuLan: 128).
        loss: A module called as `loss(audio_latents, text_latents, captions)`; None = `SoftmaxContrastiveLearning()`.
        window_seconds: Longer audio is embedded window by window (MusicLM, arXiv:2301.11325, sec. 4.1: 10 s).
        window_stride_seconds: From the start of one window to that of the next (MusicLM: 1 s).

    Raises:
        ValueError: If a number is out of range, or a window is no whole number of samples.
    """

    @beartype
    def __init__(
        self,
        *,
        audio_transformer: AudioSpectrogramTransformer,
        text_transformer: TextTransformer,
        dim_latent: int = 128,
        loss: nn.Module | None = None,
        window_seconds: float | int = 10.0,
        window_stride_seconds: float | int = 1.0,
    ) -> None:
        super().__init__()
        if dim_latent < 1 or window_seconds <= 0 or window_stride_seconds <= 0:
            raise ValueError(
                "dim_latent, window_seconds and window_stride_seconds must be positive, got "
                f"{dim_latent}, {window_seconds}, {window_stride_seconds}"
            )
        self.dim_latent = dim_latent
        self.sample_hz = audio_transformer.sample_hz
        self.window_seconds = float(window_seconds)
        self.window_stride_seconds = float(window_stride_seconds)
        self._window_samples = samples_in(self.window_seconds, self.sample_hz)
        self._stride_samples = samples_in(self.window_stride_seconds, self.sample_hz)
        self.audio = audio_transformer
        self.text = text_transformer
        self.audio_to_latent = nn.Linear(audio_transformer.dim, dim_latent)
        self.text_to_latent = nn.Linear(text_transformer.dim, dim_latent)
        self.loss = SoftmaxContrastiveLearning() if loss is None else loss

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able, with a spec for every part."""
        return {
            "audio_transformer": module_spec(self.audio),
            "text_transformer": module_spec(self.text),
            "dim_latent": self.dim_latent,
            "loss": module_spec(self.loss),
            "window_seconds": self.window_seconds,
            "window_stride_seconds": self.window_stride_seconds,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MuLaN":
        """Build from `config`; the weights are new."""
        parts = {name: build_module(config[name]) for name in ("audio_transformer", "text_transformer", "loss")}
        return cls(**{**config, **parts})

    def forward(self, wavs: Tensor, texts: str | Sequence[str] | Tensor, lengths: Tensor | None = None) -> Tensor:
        """Contrastive loss of matching clips and texts.

        Two items with the same text are not held against each other.

        Args:
            wavs: `[b, n]` float at `sample_hz`.
            texts: `b` texts, or ids `[b, t]` with -1 past the end of a text.
            lengths: `[b]` samples of each clip, 1..n. None = all `n`.

        Returns:
            Scalar loss in nats.

        Raises:
            ValueError: If shapes do not fit, or there are not as many texts as clips.
        """
        ids = self.text.tokenize(texts)
        if len(ids) != len(wavs):
            raise ValueError(f"got {len(wavs)} clips and {len(ids)} texts, need one text a clip")
        audio_latents = self.get_audio_latents(wavs, lengths)
        return self.loss(audio_latents, self.get_text_latents(ids), _caption_numbers(ids))

    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips, each as one piece.

        Args:
            wavs: `[b, n]` float at `sample_hz`.
            lengths: `[b]` samples of each clip, 1..n. None = all `n`.

        Returns:
            `[b, dim_latent]` float32, unit norm.
        """
        return F.normalize(self.audio_to_latent(self.audio(wavs, lengths)).float(), dim=-1)

    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts.

        Args:
            texts: One text, several, or ids `[b, t]` with -1 past the end of a text.

        Returns:
            `[b, dim_latent]` float32, unit norm.

        Raises:
            ValueError: If a text is empty.
        """
        return F.normalize(self.text_to_latent(self.text(texts)).float(), dim=-1)

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
        if len(wav) <= self._window_samples:
            return self.get_audio_latents(wav.unsqueeze(0))
        windows = wav.unfold(0, self._window_samples, self._stride_samples)
        return torch.cat([self.get_audio_latents(part) for part in windows.split(max_batch)])

    @beartype
    def get_long_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed recordings of any length by the average over their windows (MusicLM, sec. 4.1).

        Args:
            wavs: `[b, n]` float at `sample_hz`.
            lengths: `[b]` samples of each recording, 1..n. None = all `n`.

        Returns:
            `[b, dim_latent]` float32, unit norm; `get_audio_latents` where no recording is longer than a window.
        """
        if wavs.ndim == 2 and wavs.shape[1] <= self._window_samples:
            return self.get_audio_latents(wavs, lengths)
        sizes = [wavs.shape[-1]] * len(wavs) if lengths is None else lengths.tolist()
        return torch.stack([average_latents(self.window_latents(wav[:size])) for wav, size in zip(wavs, sizes)])


def average_latents(latents: Tensor) -> Tensor:
    """Average unit vectors `[..., w, d]` over windows and bring the result `[..., d]` back to unit norm."""
    return F.normalize(latents.mean(dim=-2), dim=-1)


def _caption_numbers(ids: Tensor) -> Tensor:
    """One number `[b]` int64 a text, equal for equal texts on every process; chance of a false match 2^-63 a pair."""
    rows = (row[row >= 0] for row in ids.cpu())
    digests = (hashlib.blake2b(row.numpy().astype("<i8").tobytes(), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=ids.device)
