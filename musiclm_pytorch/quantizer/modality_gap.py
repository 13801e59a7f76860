"""Alignment of text latents with audio latents in a joint embedding (modality gap, arXiv:2203.02053)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed

__all__ = ["Alignment", "align_texts"]

# Strength of the ridge regression in clips. With data of this number of clips, a direction of average variance moves
# half-way. On held-out captions of models with 50 to 4,000 clips, this is as good as the best value for each.
_PRIOR_CLIPS = 400.0
_ROWS_PER_CHUNK = 8192
# The latent of one text differs by rounding between batches, by about 1e-13 of the variance of audio.
_MIN_RELATIVE_VARIANCE = 1e-9


class Alignment(NamedTuple):
    """Means and linear map that align audio latents `a - audio_mean` and text latents `(t - text_mean) @ text_map`."""

    audio_mean: Tensor
    text_mean: Tensor
    text_map: Tensor


@typed
def align_texts(audio: Tensor, text: Tensor, clip_index: Tensor) -> Alignment:
    """Learn a map of text latents `[k, d]` to audio latents `[n, d]`; text i describes the audio row `clip_index[i]`.

    A ridge regression maps centred text latents to the centred latents of their audio. The regularisation pulls the
    linear map towards a scaled identity, not towards zero. The mapped text latents have the variance of the audio
    latents, because the codebooks of the quantizer are fitted to audio latents.
    """
    if (
        not len(text)
        or clip_index.shape != text.shape[:1]
        or not 0 <= int(clip_index.min()) <= int(clip_index.max()) < len(audio)
    ):
        raise ValueError(
            f"need at least one text, and for each a clip_index in 0..{len(audio) - 1}; "
            f"got texts {tuple(text.shape)} and clip_index {tuple(clip_index.shape)}"
        )
    audio_mean, text_mean = (latents.mean(dim=0, dtype=torch.float64) for latents in (audio, text))
    audio_variance = sum(float((part.double() - audio_mean).square().sum()) for part in audio.split(_ROWS_PER_CHUNK))
    audio_variance /= audio.numel()
    within, across = _second_moments(audio, audio_mean, text, text_mean, clip_index)
    identity = torch.eye(audio.shape[1], dtype=torch.float64)
    variance = float(within.diagonal().mean())
    if variance <= _MIN_RELATIVE_VARIANCE * audio_variance:  # all texts are the same
        return Alignment(audio_mean, text_mean, identity)
    text_map = identity * math.sqrt(audio_variance / variance)
    ridge = _PRIOR_CLIPS / len(clip_index.unique()) * variance
    text_map = text_map + torch.linalg.solve(within + ridge * identity, across - within @ text_map)
    mapped_variance = float((text_map.T @ within @ text_map).diagonal().mean())
    text_map = text_map * math.sqrt(audio_variance / mapped_variance) if mapped_variance > 0 else text_map
    return Alignment(audio_mean, text_mean, text_map)


def _second_moments(
    audio: Tensor, audio_mean: Tensor, text: Tensor, text_mean: Tensor, clip_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the covariances `[d, d]` of text latents with themselves and with their audio latents, in float64."""
    within = torch.zeros(text.shape[1], text.shape[1], dtype=torch.float64)
    across = torch.zeros_like(within)
    for texts, rows in zip(text.split(_ROWS_PER_CHUNK), clip_index.split(_ROWS_PER_CHUNK)):
        centred = texts.double() - text_mean
        within += centred.T @ centred
        across += centred.T @ (audio[rows].double() - audio_mean)
    return within / len(text), across / len(text)
