"""Contrastive losses (softmax, decoupled softmax, sigmoid) of audio and text latents in the batch of all processes."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.checks.types import described, typed
from audiolm_pytorch.saving.modules import SavedModule, register
from musiclm_pytorch.mulan.distributed import gather_batch, gather_counts, own_rank

__all__ = ["ContrastiveLoss", "SigmoidContrastiveLearning", "SoftmaxContrastiveLearning"]

# Similarity of a pair that does not count. With -inf, the gradient of a row without any finite entry would be NaN.
_EXCLUDED = -1e30


class _Pairs(NamedTuple):
    """Similarities `[b, k]` of b clips and k texts, gathered from all processes: cosines divided by the temperature.

    `clip_index [k]` is the row of the clip that each text describes. `contrast [b, k]` is True where the text differs
    from every text of the clip. `negatives [b, m]` are the similarities to m hard negatives, and `own_negative [b, m]`
    is True where the hard negative belongs to the clip.
    """

    similarities: Tensor
    clip_index: Tensor
    contrast: Tensor
    negatives: Tensor
    own_negative: Tensor


class ContrastiveLoss(SavedModule, ABC):
    """Base class of contrastive losses, which computes the scaled similarities of all pairs in the global batch.

    Every process computes the loss of the batch of all processes, so all processes must call the loss together.
    Gradients of gathered latents are summed over processes, and data parallelism averages the gradients of parameters.
    The averaged gradient over processes equals the gradient of a single process that has the whole batch. The learned
    temperature is limited to the range from `min_temperature` to `1 / min_temperature`.
    """

    @typed
    def __init__(self, init_temperature: float = 0.1, min_temperature: float = 0.01) -> None:
        super().__init__()
        if not 0 < min_temperature <= init_temperature < math.inf:
            raise ValueError(
                f"min_temperature must be in (0, init_temperature = {init_temperature}], got {min_temperature}"
            )
        self.config: dict[str, Any] = {"init_temperature": init_temperature, "min_temperature": min_temperature}
        self.init_temperature, self.min_temperature = init_temperature, min_temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(init_temperature)))

    @property
    def temperature(self) -> Tensor:
        """Current temperature, a scalar in [min_temperature, 1 / min_temperature]."""
        bound = abs(math.log(self.min_temperature))
        bounded = self.log_temperature.clamp(-bound, bound)
        # The gradient ignores the bounds, so that the temperature can leave them again.
        return (self.log_temperature + (bounded - self.log_temperature).detach()).exp()

    @typed
    def forward(
        self,
        audio_latents: Tensor,
        text_latents: Tensor,
        captions: Tensor | None = None,
        clip_index: Tensor | None = None,
        negative_latents: Tensor | None = None,
        negative_index: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss (nats) of clips and the texts that describe them, a scalar that is equal on all processes.

        A clip matches all its texts. A pair of a clip and a text of another clip is left out if the text is equal to
        a text of the clip. The latents `[b, d]` of clips and `[k, d]` of texts have unit norm. A hard negative is a
        false text of one clip, and is contrasted with this clip only, since it may describe another clip.

        Args:
            captions: `[k]` integers that are equal for equal texts; None = all texts differ.
            clip_index: `[k]` integers, the row in `audio_latents` that each text describes, with at least one text for
                every row; None = one text per clip, in the order of the clips.
            negative_latents: Latents `[m, d]` of hard negatives; None = no hard negatives. All processes must pass hard
                negatives, or none.
            negative_index: `[m]` integers, the row in `audio_latents` to which each hard negative belongs.
        """
        clip_index = _checked_clip_index(audio_latents, text_latents, captions, clip_index)
        if (negative_latents is None) != (negative_index is None):
            raise ValueError("got only one of negative_latents and negative_index; pass both or neither")
        if negative_latents is not None and negative_index is not None:
            _check_negatives(audio_latents, negative_latents, negative_index)
        with torch.autocast(device_type=audio_latents.device.type, enabled=False):
            negatives = (negative_latents, negative_index)
            return self._loss(self._pairs(audio_latents, text_latents, captions, clip_index, *negatives))

    @abstractmethod
    def chance(self, num_clips: int, texts_per_clip: float, negatives_per_clip: float = 0.0) -> float:
        """Loss (nats) of a model that guesses: its latents are all equal, while all texts differ.

        The loss is 0 for one clip without hard negatives.
        """

    @abstractmethod
    def _loss(self, pairs: _Pairs) -> Tensor:
        """Compute the loss from similarities in float32 or float64."""

    def _pairs(
        self,
        audio: Tensor,
        text: Tensor,
        captions: Tensor | None,
        clip_index: Tensor,
        negatives: Tensor | None,
        negative_index: Tensor | None,
    ) -> _Pairs:
        """Gather the latents of all processes, and mark the pairs of clips and texts that must not match."""
        clips, texts = gather_counts(audio, text)
        if sum(clips) == 0:
            raise ValueError("the batch has no clips; the loss needs at least one clip")
        audio, text = gather_batch(_single_or_double(audio), clips), gather_batch(_single_or_double(text), texts)
        temperature = self.temperature.to(audio.dtype)
        similarities = audio @ text.T / temperature
        # Rows count from the first clip of the first process.
        first_row = sum(clips[: own_rank()])
        clip_index = gather_batch(clip_index + first_row, texts)
        if captions is None:
            numbers = torch.arange(len(text), device=text.device)
        else:
            numbers = gather_batch(captions.to(text.device), texts).unique(return_inverse=True)[1]
        describes = torch.zeros(similarities.shape, dtype=torch.bool, device=text.device)
        describes[clip_index, numbers] = True
        no_negatives = similarities.new_empty(len(similarities), 0)
        pairs = _Pairs(similarities, clip_index, ~describes[:, numbers], no_negatives, no_negatives.bool())
        if negatives is None or negative_index is None:
            return pairs
        (counts,) = gather_counts(negatives)
        false_texts = gather_batch(_single_or_double(negatives), counts)
        rows = gather_batch(negative_index.to(audio.device) + first_row, counts)
        own_negative = rows == torch.arange(len(audio), device=audio.device).unsqueeze(1)
        return pairs._replace(negatives=audio @ false_texts.T / temperature, own_negative=own_negative)


def _check_negatives(audio: Tensor, negatives: Tensor, index: Tensor) -> None:
    """Check that each hard negative `[m, d]` has the row of a clip in `index`."""
    if negatives.ndim != 2 or negatives.shape[1] != audio.shape[1] or not negatives.is_floating_point():
        raise ValueError(f"negative_latents must be floats [m, {audio.shape[1]}], got {described(negatives)}")
    is_integer = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if index.shape != negatives.shape[:1] or not is_integer or ((index < 0) | (index >= len(audio))).any():
        raise ValueError(
            f"negative_index must be [{len(negatives)}] integers in 0..{len(audio) - 1}, the row of the clip of each "
            f"hard negative, got {index.tolist()}"
        )


def _single_or_double(latents: Tensor) -> Tensor:
    """Convert half precision to float32; float64 stays."""
    return latents if latents.dtype == torch.float64 else latents.float()


@register
class SoftmaxContrastiveLearning(ContrastiveLoss):
    """Contrastive loss by cross entropy in both directions, audio to text and text to audio (arXiv:2208.12415).

    The audio-to-text loss is the cross entropy of each text against the texts of other clips and the hard negatives of
    the clip, averaged over the texts of a clip and then over clips. The text-to-audio loss is the cross entropy of the
    clip of each text against other clips, averaged over texts. The total loss is the mean of the audio-to-text loss and
    the text-to-audio loss.

    Args:
        decoupled: Whether to leave the matching pair out of the denominator (arXiv:2110.06848, eq. 5), which helps
            small batches; if True, a clip or text without non-matching pairs has loss 0.
    """

    @typed
    def __init__(
        self, init_temperature: float = 0.1, min_temperature: float = 0.01, *, decoupled: bool = False
    ) -> None:
        super().__init__(init_temperature, min_temperature)
        self.config["decoupled"] = decoupled
        self.decoupled = decoupled

    def chance(self, num_clips: int, texts_per_clip: float, negatives_per_clip: float = 0.0) -> float:
        """Loss (nats) of a model whose latents are all equal, e.g. `ln num_clips` for one text per clip."""
        match, other_clips = 0 if self.decoupled else 1, num_clips - 1
        to_audio, to_text = match + other_clips, match + texts_per_clip * other_clips + negatives_per_clip
        return (math.log(to_audio or 1) + math.log(to_text or 1)) / 2

    def _loss(self, pairs: _Pairs) -> Tensor:
        clip_index, num_clips = pairs.clip_index, len(pairs.similarities)
        matches = pairs.similarities.gather(0, clip_index.unsqueeze(0)).squeeze(0)
        contrasts = pairs.similarities.masked_fill(~pairs.contrast, _EXCLUDED)
        negatives = pairs.negatives.masked_fill(~pairs.own_negative, _EXCLUDED)
        false_texts = torch.cat((contrasts, negatives), dim=1).logsumexp(dim=1)[clip_index]
        has_contrast = (pairs.contrast.any(dim=1) | pairs.own_negative.any(dim=1))[clip_index]
        to_text = self._cross_entropy(false_texts - matches, has_contrast)
        to_audio = self._cross_entropy(contrasts.logsumexp(dim=0) - matches, pairs.contrast.any(dim=0))
        texts_of_clip = clip_index.bincount(minlength=num_clips)[clip_index]
        return ((to_text / texts_of_clip).sum() / num_clips + to_audio.mean()) / 2

    def _cross_entropy(self, excess: Tensor, has_contrast: Tensor) -> Tensor:
        """Compute the cross entropy `[k]` of k matching pairs; `excess` is `logsumexp(contrasts) - match`."""
        if self.decoupled:
            return excess.where(has_contrast, 0.0)
        return -F.logsigmoid(-excess)


@register
class SigmoidContrastiveLearning(ContrastiveLoss):
    """Contrastive loss by binary classification of every pair of clip and text (SigLIP, arXiv:2303.15343).

    The losses of all pairs are summed and divided by the number of clips.

    Args:
        init_bias: Initial value of the learned bias; -10 in SigLIP, since almost all pairs do not match.
    """

    @typed
    def __init__(
        self, init_temperature: float = 0.1, min_temperature: float = 0.01, *, init_bias: float = -10.0
    ) -> None:
        super().__init__(init_temperature, min_temperature)
        if abs(init_bias) == float("inf"):
            raise ValueError(f"init_bias must be finite, got {init_bias}")
        self.config["init_bias"] = self.init_bias = init_bias
        self.bias = nn.Parameter(torch.tensor(float(init_bias)))

    def chance(self, num_clips: int, texts_per_clip: float, negatives_per_clip: float = 0.0) -> float:
        """Loss (nats) of a model whose latents are all equal and whose bias is optimal."""
        contrasts = texts_per_clip * (num_clips - 1) + negatives_per_clip
        if contrasts == 0:
            return 0.0
        pairs = texts_per_clip + contrasts
        return texts_per_clip * math.log(pairs / texts_per_clip) + contrasts * math.log(pairs / contrasts)

    def _loss(self, pairs: _Pairs) -> Tensor:
        logits = pairs.similarities + self.bias.to(pairs.similarities.dtype)
        clips = torch.arange(len(logits), device=logits.device)
        match = pairs.clip_index == clips.unsqueeze(1)
        losses = -F.logsigmoid(torch.where(match, logits, -logits)).masked_fill(~(match | pairs.contrast), 0.0)
        negatives = -F.logsigmoid(-pairs.negatives - self.bias.to(logits.dtype)).masked_fill(~pairs.own_negative, 0.0)
        return (losses.sum() + negatives.sum()) / len(logits)


def _checked_clip_index(audio: Tensor, text: Tensor, captions: Tensor | None, clip_index: Tensor | None) -> Tensor:
    """Check the arguments; return the clip index of each of k texts, `[k]` int64, on the device of `audio`."""
    has_shapes = audio.ndim == 2 and text.ndim == 2 and audio.shape[1] == text.shape[1]
    if not has_shapes or not audio.is_floating_point() or not text.is_floating_point():
        raise ValueError(
            f"need floats audio_latents [b, d] and text_latents [k, d], got {described(audio)} and {described(text)}"
        )
    if captions is not None and captions.shape != text.shape[:1]:
        raise ValueError(f"captions must be [{len(text)}] numbers, one per text, got {tuple(captions.shape)}")
    if clip_index is None:
        if len(audio) != len(text):
            raise ValueError(
                f"audio_latents of {len(audio)} clips and text_latents of {len(text)} texts without clip_index; "
                "pass one text per clip, or pass clip_index with the row of the clip that each text describes"
            )
        return torch.arange(len(text), device=audio.device)
    if clip_index.shape != text.shape[:1] or clip_index.is_floating_point():
        raise ValueError(f"clip_index must be [{len(text)}] integers, got {clip_index.dtype} {tuple(clip_index.shape)}")
    if sorted(set(clip_index.tolist())) != list(range(len(audio))):
        raise ValueError(
            f"clip_index must contain each of 0..{len(audio) - 1} at least once, since every clip needs a text; "
            f"got {clip_index.tolist()}"
        )
    return clip_index.to(audio.device, torch.int64)
