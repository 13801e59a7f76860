"""Features of clips from a joint embedding of audio and text, such as MuLan or CLAP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from musiclm_pytorch.evaluation.metric import Extractor

__all__ = ["JointEmbedder"]

_TEXTS_PER_BATCH = 50


class JointEmbedder(Extractor):
    """Embeddings `[b, d]` of unit norm of clips, and of texts in the same space, by a `JointEmbedding`."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name, self.sample_hz = model, name, model.sample_hz
        self.windows = f"mean of windows of {model.window_seconds:g} s"

    def __call__(self, waves: Tensor) -> Tensor:
        """Embed waves `[b, n]`."""
        return self.model.get_long_audio_latents(waves.to(device_of(self.model))).float()

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return part_fingerprint(self.model)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors `[b, d]` on the CPU."""
        parts = [list(texts[first : first + _TEXTS_PER_BATCH]) for first in range(0, len(texts), _TEXTS_PER_BATCH)]
        return torch.cat([self.model.get_text_latents(part).float().cpu() for part in parts])
