"""Contrastive losses between audio and text latents: softmax, decoupled softmax and sigmoid, exact over processes."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.saving.modules import register
from musiclm_pytorch.mulan.distributed import gather_batch, gather_counts, own_rank

__all__ = ["SigmoidContrastiveLearning", "SoftmaxContrastiveLearning"]

# Similarity of a pair that must not count. Not -inf: the gradient of a row without any finite entry would be NaN.
_NEVER = -1e30


@dataclass(frozen=True, eq=False)
class _Pairs:
    """All pairs of the `b` clips and `k` texts of all processes.

    Attributes:
        similarities: `[b, k]` over the temperature.
        clip_index: `[k]` int64, the row of the clip that a text describes.
        contrast: `[b, k]` bool, True where the text says something else than every text of the clip.
    """

    similarities: Tensor
    clip_index: Tensor
    contrast: Tensor


class _ContrastiveLoss(nn.Module, ABC):
    """A learned temperature, and the similarities of all pairs of the global batch.

    Under data parallelism every process computes the loss of the joined batch. Gradients that arrive at gathered
    latents are summed over processes, and data parallelism averages the gradients of parameters: both together give
    exactly what one process gets from the joined batch. Every process must therefore compute the loss, or none.

    Args:
        init_temperature: Temperature at the start; learned from there.
        min_temperature: The temperature is never used below this, so that similarities stay below its inverse.

    Raises:
        ValueError: If not 0 < `min_temperature` <= `init_temperature` < infinity.
    """

    @beartype
    def __init__(self, init_temperature: float = 0.1, min_temperature: float = 0.01) -> None:
        super().__init__()
        if not 0 < min_temperature <= init_temperature < math.inf:
            raise ValueError(
                f"need 0 < min_temperature <= init_temperature, got {min_temperature} and {init_temperature}"
            )
        self.config: dict[str, Any] = {"init_temperature": init_temperature, "min_temperature": min_temperature}
        self.min_temperature = min_temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(init_temperature)))

    @property
    def temperature(self) -> Tensor:
        """The temperature in use, a scalar in [min_temperature, 1 / min_temperature]."""
        bound = abs(math.log(self.min_temperature))
        bounded = self.log_temperature.clamp(-bound, bound)
        # the gradient passes a bound that was reached; otherwise the temperature could never come back from it
        return (self.log_temperature + (bounded - self.log_temperature).detach()).exp()

    @beartype
    def forward(
        self,
        audio_latents: Tensor,
        text_latents: Tensor,
        captions: Tensor | None = None,
        clip_index: Tensor | None = None,
    ) -> Tensor:
        """Loss of clips and of the texts that describe them, in the batch of all processes.

        All texts of a clip are its matches. A text that says the same as one of them, but belongs to another clip, is
        neither match nor contrast.

        Args:
            audio_latents: `[b, d]` unit norm.
            text_latents: `[k, d]` unit norm.
            captions: `[k]` integers, equal where two texts are the same. None = all differ.
            clip_index: `[k]` integers, the row in `audio_latents` that a text describes; every row needs at least one.
                None = one text a clip, in the same order.

        Returns:
            Scalar in nats, the same on every process.

        Raises:
            ValueError: If shapes do not fit, or there is a clip without a text or a text without a clip.
        """
        clip_index = _checked_owners(audio_latents, text_latents, captions, clip_index)
        with torch.autocast(device_type=audio_latents.device.type, enabled=False):
            return self._loss(self._pairs(audio_latents, text_latents, captions, clip_index))

    @abstractmethod
    def _loss(self, pairs: _Pairs) -> Tensor:
        """The loss itself, of similarities in at least float32."""

    def _pairs(self, audio: Tensor, text: Tensor, captions: Tensor | None, clip_index: Tensor) -> _Pairs:
        """Gather the batch of all processes, and find out which texts are held against which clips."""
        clips, texts = gather_counts(audio, text)
        if sum(clips) == 0:
            raise ValueError("a batch without clips has no loss")
        audio, text = gather_batch(_at_least_float32(audio), clips), gather_batch(_at_least_float32(text), texts)
        similarities = audio @ text.T / self.temperature.to(audio.dtype)
        # rows are numbered from the first clip of the first process
        clip_index = gather_batch(clip_index + sum(clips[: own_rank()]), texts)
        if captions is None:
            numbers = torch.arange(len(text), device=text.device)
        else:
            numbers = gather_batch(captions.to(text.device), texts).unique(return_inverse=True)[1]
        said_of = torch.zeros(similarities.shape, dtype=torch.bool, device=text.device)
        said_of[clip_index, numbers] = True
        return _Pairs(similarities, clip_index, ~said_of[:, numbers])


@register
class SoftmaxContrastiveLearning(_ContrastiveLoss):
    """Cross entropy over the batch in both directions (MuLan, arXiv:2208.12415, sec. 3.4; CLIP, arXiv:2103.00020).

    Audio to text asks of each text of a clip whether it is told from the texts of other clips, and averages over the
    texts of a clip, then over clips; the other texts of the clip are no contrasts. Text to audio asks of each text
    whether its clip is told from the others, and averages over texts. The loss is the mean of both. At chance it is
    `ln b` with one text a clip, and `(ln(1 + c (b - 1)) + ln b) / 2` with `c`.

    Args:
        init_temperature: Temperature at the start (MuLan: 0.1); learned from there.
        min_temperature: The temperature is never used below this.
        decoupled: Leave the match itself out of the denominator (arXiv:2110.06848, eq. 5), which helps small batches.
            Items without anything to contrast with then count 0.

    Raises:
        ValueError: If not 0 < `min_temperature` <= `init_temperature` < infinity.
    """

    @beartype
    def __init__(
        self, init_temperature: float = 0.1, min_temperature: float = 0.01, *, decoupled: bool = False
    ) -> None:
        super().__init__(init_temperature, min_temperature)
        self.config["decoupled"] = decoupled
        self.decoupled = decoupled

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SoftmaxContrastiveLearning":
        """Build from `config`; the temperature starts anew."""
        return cls(**config)

    def _loss(self, pairs: _Pairs) -> Tensor:
        clip_index, num_clips = pairs.clip_index, len(pairs.similarities)
        matches = pairs.similarities.gather(0, clip_index.unsqueeze(0)).squeeze(0)
        contrasts = pairs.similarities.masked_fill(~pairs.contrast, _NEVER)
        to_text = self._surprise(
            contrasts.logsumexp(dim=1)[clip_index] - matches, pairs.contrast.any(dim=1)[clip_index]
        )
        to_audio = self._surprise(contrasts.logsumexp(dim=0) - matches, pairs.contrast.any(dim=0))
        texts_of_clip = clip_index.bincount(minlength=num_clips)[clip_index]
        return ((to_text / texts_of_clip).sum() / num_clips + to_audio.mean()) / 2

    def _surprise(self, excess: Tensor, has_contrast: Tensor) -> Tensor:
        """Negative log-probability of matches, of the excess `[k]` of the log-sum of their contrasts over them."""
        if self.decoupled:
            return excess.where(has_contrast, 0.0)
        return -F.logsigmoid(-excess)


@register
class SigmoidContrastiveLearning(_ContrastiveLoss):
    """Every pair on its own a yes-or-no question (SigLIP, arXiv:2303.15343, algorithm 1).

    The losses of all pairs of a clip and a text are summed, and divided by the number of clips.

    Args:
        init_temperature: Temperature at the start (SigLIP: 0.1); learned from there.
        min_temperature: The temperature is never used below this.
        init_bias: Learned bias at the start (SigLIP: -10, since almost all pairs do not match).

    Raises:
        ValueError: If not 0 < `min_temperature` <= `init_temperature` < infinity.
    """

    @beartype
    def __init__(
        self, init_temperature: float = 0.1, min_temperature: float = 0.01, *, init_bias: float = -10.0
    ) -> None:
        super().__init__(init_temperature, min_temperature)
        self.config["init_bias"] = init_bias
        self.bias = nn.Parameter(torch.tensor(init_bias))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SigmoidContrastiveLearning":
        """Build from `config`; temperature and bias start anew."""
        return cls(**config)

    def _loss(self, pairs: _Pairs) -> Tensor:
        logits = pairs.similarities + self.bias.to(pairs.similarities.dtype)
        clips = torch.arange(len(logits), device=logits.device)
        match = pairs.clip_index == clips.unsqueeze(1)
        losses = -F.logsigmoid(torch.where(match, logits, -logits))
        return losses.masked_fill(~(match | pairs.contrast), 0.0).sum() / len(logits)


def _checked_owners(audio: Tensor, text: Tensor, captions: Tensor | None, clip_index: Tensor | None) -> Tensor:
    """Owners `[k]` int64 on the device of the latents, or ValueError that says what does not fit."""
    if audio.ndim != 2 or text.ndim != 2 or audio.shape[1] != text.shape[1]:
        raise ValueError(
            f"audio and text latents must be [b, d] and [k, d], got {tuple(audio.shape)} and {tuple(text.shape)}"
        )
    if captions is not None and captions.shape != text.shape[:1]:
        raise ValueError(f"captions must be [{len(text)}] numbers, one a text, got {tuple(captions.shape)}")
    if clip_index is None:
        if len(audio) != len(text):
            raise ValueError(
                f"got {len(audio)} clips and {len(text)} texts, need one text a clip; "
                "with several, give `clip_index`, the row of the clip that each text describes"
            )
        return torch.arange(len(text), device=audio.device)
    if clip_index.shape != text.shape[:1] or clip_index.is_floating_point():
        raise ValueError(f"clip_index must be [{len(text)}] integers, got {clip_index.dtype} {tuple(clip_index.shape)}")
    if sorted(set(clip_index.tolist())) != list(range(len(audio))):
        raise ValueError(
            f"clip_index must name rows 0..{len(audio) - 1}, each at least once, since every clip needs a text; "
            f"got {clip_index.tolist()}"
        )
    return clip_index.to(audio.device, torch.int64)


def _at_least_float32(latents: Tensor) -> Tensor:
    """Float32 for half precision; float64 stays."""
    return latents if latents.dtype == torch.float64 else latents.float()
