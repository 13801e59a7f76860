"""What a contrastive loss is worth that knows nothing, and an alarm for a training that does not get below it."""

import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beartype import beartype
from torch import nn

from musiclm_pytorch.mulan.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning

__all__ = ["ChanceWatch", "TextUse", "chance_loss"]

logger = logging.getLogger(__name__)

# A loss above this share of that of guessing has learnt nothing worth the name.
_STUCK_SHARE = 0.98
# Steps after the warm-up that a training has to leave it in, and over which the loss is averaged.
_JUDGED_STEPS = 100


class ChanceWatch:
    """Says in the log, once, that a contrastive training is no better than guessing.

    Called with each row of metrics as it is written (`TrainLoop(on_row=...)`). From 100 steps after the warm-up on, the
    mean loss of the last 100 steps is compared with the row's `chance`, e.g. ln(batch size): embeddings that say
    nothing of the clips stay there for as long as one lets them.

    Args:
        warmup_steps: Steps in which the learning rate rises.
        phase: Name of the phase whose loss is watched.
    """

    @beartype
    def __init__(self, warmup_steps: int, phase: str) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
        self.first_judged_step, self.phase = warmup_steps + _JUDGED_STEPS, phase
        self.warning: str | None = None
        self._step = 0
        self._rows: deque[tuple[int, int, float]] = deque()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Look at one row of metrics."""
        loss, chance = row.get("loss"), row.get("chance")
        if row["phase"] != self.phase or loss is None or chance is None:
            return
        before, step = self._step, int(row["step"])
        if step <= before:
            return  # a run that went back to its checkpoint
        # a row holds the mean of the steps since the one before it
        self._step = step
        self._rows.append((step, step - before, float(loss)))
        while self._rows[0][0] <= step - _JUDGED_STEPS:
            self._rows.popleft()
        if step >= self.first_judged_step and self.warning is None:
            self._judge(float(chance))

    def _judge(self, chance: float) -> None:
        """Warn where the mean loss is that of guessing."""
        num_steps = sum(count for _, count, _ in self._rows)
        mean = sum(count * loss for _, count, loss in self._rows) / num_steps
        # written so that a loss that is no number is no good one either
        if mean < _STUCK_SHARE * chance:
            return
        if chance > 0:
            seen = f"the mean loss of the last {num_steps} steps is {mean:.3f}, and guessing gives {chance:.3f}"
            advice = (
                "the embeddings tell nothing apart. See that the files are not silent and hold what their captions "
                "say, that both towers are being trained, and try another learning rate, a longer warm-up or larger "
                "batches"
            )
        else:
            seen = "the clips of a batch have nothing that they could be told apart from"
            advice = "give batches of two clips or more, with captions that differ"
        self.warning = f"{self.phase} training, step {self._step}: {seen}: {advice}"
        logger.warning(self.warning)


@dataclass(frozen=True)
class TextUse:
    """How the texts of a data set are spread over its clips.

    Attributes:
        num_clips: Clips of the data.
        texts_per_clip: Texts of a clip, on average.
        clips_per_text: Clips that a text describes, on average over all texts of all clips.
    """

    num_clips: int
    texts_per_clip: float
    clips_per_text: float

    @classmethod
    @beartype
    def of(cls, texts: Sequence[Sequence[str]]) -> "TextUse":
        """Count the texts of clips; case and white space do not matter.

        Args:
            texts: Those of each clip, at least one each.
        """
        of_clips = [{" ".join(text.lower().split()) for text in own} for own in texts]
        clips_with = Counter(text for own in of_clips for text in own)
        num_texts = clips_with.total()
        return cls(len(texts), num_texts / len(texts), sum(count**2 for count in clips_with.values()) / num_texts)

    def shared(self, batch_clips: int) -> float:
        """Probability that a text of a clip describes another clip of a batch of two or more, too."""
        # the other clips of a batch are some of the others of the data, unless these do not suffice and are repeated
        drawn = max(batch_clips, self.num_clips)
        return (self.clips_per_text * drawn / self.num_clips - 1) / (drawn - 1)


@beartype
def chance_loss(loss: nn.Module | None, batch_clips: int, texts: TextUse) -> float:
    """Loss of embeddings that are all alike: ln of the batch size where each clip has one text, of its own.

    Args:
        loss: The loss module. Other ones than ours are taken for a softmax in both directions.
        batch_clips: Clips of a step, of all processes together.
        texts: What describes them.

    Returns:
        Loss in nats, 0 where there is nothing to contrast with. Of the sigmoid loss it is that of the best constant
        answer.
    """
    other_clips = (batch_clips - 1) * (1 - texts.shared(batch_clips)) if batch_clips > 1 else 0.0
    matches, contrasts = texts.texts_per_clip, texts.texts_per_clip * other_clips
    if contrasts <= 0:
        return 0.0
    if isinstance(loss, SigmoidContrastiveLearning):
        pairs = matches + contrasts
        return matches * math.log(pairs / matches) + contrasts * math.log(pairs / contrasts)
    # the decoupled loss does not count the match among the candidates
    match = 0 if isinstance(loss, SoftmaxContrastiveLearning) and loss.decoupled else 1
    return (math.log(match + other_clips) + math.log(match + contrasts)) / 2
