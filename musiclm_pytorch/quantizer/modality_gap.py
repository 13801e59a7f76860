"""Where texts lie beside audio in a joint embedding, and what brings them to where audio is."""

import math
from typing import NamedTuple

import torch
from beartype import beartype
from torch import Tensor

__all__ = ["DEFAULT_RIDGE_CLIPS", "Alignment", "align_texts"]

# Measured on held-out captions, with maps learned from 50 to 4,000 clips: as good as the best strength for each number
# of clips, and with 50 no worse than centring alone at naming the instrument.
DEFAULT_RIDGE_CLIPS = 400.0
_ROWS_AT_ONCE = 8192
# The same text in batches of other sizes differs by rounding, some 1e-13 of the variance of audio: that says nothing.
_LEAST_VARIANCE = 1e-9


class Alignment(NamedTuple):
    """What brings audio `a` and texts `t` together: `a - audio_mean` and `(t - text_mean) @ text_map`.

    Attributes:
        audio_mean: `[d]` float64.
        text_mean: `[d]` float64.
        text_map: `[d, d]` float64.
    """

    audio_mean: Tensor
    text_mean: Tensor
    text_map: Tensor


@beartype
def align_texts(
    audio: Tensor,
    text: Tensor,
    clip_index: Tensor,
    *,
    centre: bool = True,
    ridge: float | int | None = DEFAULT_RIDGE_CLIPS,
) -> Alignment:
    """Learn from pairs how texts are brought to where audio is.

    Audio and texts stand apart in a joint embedding, often by more than one recording from another (the modality gap,
    arXiv:2203.02053), and what one caption says of a recording is not all there is to hear. Two remedies, each of
    which can be left out: each modality has a mean and a scale of its own; and texts go through a linear map, learned
    by regression of what distance is left. Regression alone would draw texts towards the middle (they know less than
    audio, and few pairs teach little): texts stay where they are unless pairs say otherwise, and keep the spread of
    audio, for which codebooks are made.

    Args:
        audio: `[n, d]` latents.
        text: `[k, d]` latents.
        clip_index: `[k]` int64, the row of the audio that each text describes.
        centre: Give texts a mean and a scale of their own; otherwise they are treated as audio is.
        ridge: How many clips' evidence the assumption weighs that texts need no map: with so many clips, a direction
            of average variance moves half-way. None = no map.

    Returns:
        The alignment.

    Raises:
        ValueError: If there is no text or an owner is none, or `ridge` is not positive.
    """
    if ridge is not None and not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge is a number of clips and must be positive, got {ridge}")
    if (
        not len(text)
        or clip_index.shape != text.shape[:1]
        or not 0 <= int(clip_index.min()) <= int(clip_index.max()) < len(audio)
    ):
        raise ValueError(
            f"need texts, each of one of {len(audio)} audio latents; got clip_index {tuple(clip_index.shape)}"
        )
    audio_mean = audio.mean(dim=0, dtype=torch.float64)
    text_mean = text.mean(dim=0, dtype=torch.float64) if centre else audio_mean
    audio_variance = sum(float((part.double() - audio_mean).square().sum()) for part in audio.split(_ROWS_AT_ONCE))
    audio_variance /= audio.numel()
    within, across = _second_moments(audio, audio_mean, text, text_mean, clip_index)
    identity = torch.eye(audio.shape[1], dtype=torch.float64)
    variance = float(within.diagonal().mean())
    if variance <= _LEAST_VARIANCE * audio_variance:  # one text only: there is nothing to scale or to learn
        return Alignment(audio_mean, text_mean, identity)
    text_map = identity * (math.sqrt(audio_variance / variance) if centre else 1.0)
    if ridge is not None:
        strength = ridge / len(clip_index.unique()) * variance
        text_map = text_map + torch.linalg.solve(within + strength * identity, across - within @ text_map)
        mapped_variance = float((text_map.T @ within @ text_map).diagonal().mean())
        text_map = text_map * math.sqrt(audio_variance / mapped_variance) if mapped_variance > 0 else text_map
    return Alignment(audio_mean, text_mean, text_map)


def _second_moments(
    audio: Tensor, audio_mean: Tensor, text: Tensor, text_mean: Tensor, clip_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean products `[d, d]` of centred texts with themselves, and with their audio, in float64."""
    within = torch.zeros(text.shape[1], text.shape[1], dtype=torch.float64)
    across = torch.zeros_like(within)
    for texts, rows in zip(text.split(_ROWS_AT_ONCE), clip_index.split(_ROWS_AT_ONCE)):
        centred = texts.double() - text_mean
        within += centred.T @ centred
        across += centred.T @ (audio[rows].double() - audio_mean)
    return within / len(text), across / len(text)
