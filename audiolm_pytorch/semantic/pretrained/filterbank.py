"""Front end of w2v-BERT 2.0: log-mel filterbanks, normalised over the whole wave and stacked in pairs."""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.hub import require_transformers
from audiolm_pytorch.semantic.windows import ReceptiveField

__all__ = ["Filterbank"]

# Window and hop of transformers' SeamlessM4TFeatureExtractor, which are not among its arguments.
_WINDOW_SAMPLES, _HOP_SAMPLES = 400, 160
# One minute at 16 kHz; the extractor keeps the spectra in float64.
_FRAMES_PER_CHUNK = 6000


class Filterbank:
    """Front end that computes the vectors of transformers' `SeamlessM4TFeatureExtractor` in bounded memory.

    A frame depends only on its 400 samples, so that processing long waves in chunks does not change the frames. Mean
    and variance of every band are computed over the whole wave. An incomplete last vector is dropped, while
    transformers fills it with zeros and masks it. A vector is the concatenation of `stride` frames.
    """

    @typed
    def __init__(self, *, sample_hz: int = 16_000, num_mels: int = 80, stride: int = 2) -> None:
        if min(sample_hz, num_mels) < 1 or stride < 2:
            raise ValueError(f"sample_hz {sample_hz} and num_mels {num_mels} must be >= 1, and stride {stride} >= 2")
        self.sample_hz, self.num_mels, self.stride = sample_hz, num_mels, stride
        self.dim = num_mels * stride
        # Frames are stacked here, after the normalisation over the whole wave.
        self._extractor = require_transformers().SeamlessM4TFeatureExtractor(
            feature_size=num_mels, num_mel_bins=num_mels, sampling_rate=sample_hz, stride=1
        )
        self.frames = ReceptiveField.of_convolutions((_WINDOW_SAMPLES, stride), (_HOP_SAMPLES, stride))

    def __call__(self, wave: Tensor) -> Tensor:
        """Compute vectors `[b, frames.num_frames(n), dim]` float32 of waves `[b, n]` without padding."""
        vectors = [self._vectors_of(item) for item in wave.detach().float().cpu().numpy()]
        return torch.from_numpy(np.stack(vectors)).to(wave.device)

    def _vectors_of(self, item: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        frames = ReceptiveField(_WINDOW_SAMPLES, _HOP_SAMPLES)
        total = frames.num_frames(len(item))
        spans = [frames.span(at, min(at + _FRAMES_PER_CHUNK, total)) for at in range(0, total, _FRAMES_PER_CHUNK)]
        # The memory order of the extractor, since the rounding of a mean depends on it.
        mels = np.asfortranarray(np.concatenate([self._log_mel(item[span]) for span in spans]))
        mels = (mels - mels.mean(0)) / np.sqrt(mels.var(0, ddof=1) + 1e-7)
        return rearrange(mels[: total // self.stride * self.stride], "(t k) m -> t (k m)", k=self.stride)

    def _log_mel(self, part: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        extracted = self._extractor(
            part, sampling_rate=self.sample_hz, do_normalize_per_mel_bins=False, padding=False, return_tensors="np"
        )
        return extracted["input_features"][0]
