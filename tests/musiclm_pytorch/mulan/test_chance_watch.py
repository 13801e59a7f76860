import logging
import math
import random

import pytest
import torch

from musiclm_pytorch.mulan import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.chance_watch import ChanceWatch

CHANCE = math.log(512)


def _watch(losses: dict[int, float | None], warmup_steps: int = 100, chance: float = CHANCE) -> ChanceWatch:
    """A watch after rows with these losses."""
    watch = ChanceWatch(warmup_steps, phase="mulan")
    for step, loss in losses.items():
        watch({"step": step, "phase": "mulan", "loss": loss, "chance": chance})
    return watch


@torch.no_grad()
def _measured_chance(loss: torch.nn.Module, texts: list[list[str]], batch_clips: int, batches: int = 200) -> float:
    """Mean loss of equal embeddings over many batches drawn without repetition."""
    numbers = {text: number for number, text in enumerate({text for own in texts for text in own})}
    draw, values = random.Random(0), []
    for _ in range(batches):
        rows = draw.sample(range(len(texts)), batch_clips)
        captions = torch.tensor([numbers[text] for row in rows for text in texts[row]])
        clip_index = torch.tensor([place for place, row in enumerate(rows) for _ in texts[row]])
        values.append(loss(torch.zeros(batch_clips, 4), torch.zeros(len(clip_index), 4), captions, clip_index))
    return float(torch.stack(values).mean())


def test_loss_stuck_at_chance_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """Users saw 6.236 at batch 512 for a whole run (ln 512 = 6.238): one warning with both numbers, then silence."""
    with caplog.at_level(logging.WARNING):
        watch = _watch({step: 6.236 for step in range(20, 1000, 20)})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert watch.warning == caplog.records[0].getMessage()
    assert "step 200" in watch.warning and "6.236" in watch.warning and "6.238" in watch.warning
    assert "captions" in watch.warning and "learning rate" in watch.warning


@pytest.mark.parametrize("loss", [CHANCE * 0.981, CHANCE, 9.0, math.nan, math.inf])
def test_loss_that_is_not_below_chance_warns(loss: float) -> None:
    """At chance, above it, NaN and infinity."""
    assert _watch({step: loss for step in range(20, 400, 20)}).warning is not None


@pytest.mark.parametrize(
    "losses",
    [
        {step: CHANCE * 0.979 for step in range(20, 400, 20)},
        # stuck through the warm-up, then down: the mean of the last hundred steps is what counts
        {step: CHANCE if step <= 100 else CHANCE - 0.01 * (step - 100) for step in range(20, 400, 20)},
        {step: CHANCE for step in range(20, 200, 20)},  # too early
        {1000: CHANCE - 1},  # one row a thousand steps
        {step: None for step in range(20, 400, 20)},
    ],
)
def test_loss_that_falls_or_is_too_early_does_not_warn(losses: dict[int, float | None]) -> None:
    """No warning for a loss below chance, or before enough steps."""
    assert _watch(losses).warning is None


def test_other_rows_are_ignored() -> None:
    """Rows of validation, of other phases, and of steps before a resume do not count."""
    watch = ChanceWatch(0, phase="mulan")
    for step in range(100, 600, 100):
        watch({"step": step, "phase": "valid", "recall_at_1": 0.0})
        watch({"step": step, "phase": "other", "loss": CHANCE, "chance": CHANCE})
        watch({"step": step, "phase": "mulan", "loss": 1.0, "chance": CHANCE})
        watch({"step": step // 2, "phase": "mulan", "loss": CHANCE, "chance": CHANCE})
    assert watch.warning is None


def test_rows_are_weighted_by_their_steps() -> None:
    """A row of one step (the first of a run) does not outweigh one of 99."""
    assert _watch({1: 0.1, 100: CHANCE}, warmup_steps=0).warning is not None
    assert _watch({99: 0.1, 100: CHANCE}, warmup_steps=0).warning is None


def test_batches_without_contrasts_are_reported() -> None:
    """With one clip per batch, or one caption for all clips, the loss is 0."""
    warning = _watch({step: 0.0 for step in range(20, 400, 20)}, chance=0.0).warning
    assert warning is not None and "two clips" in warning


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("texts_per_clip", [1, 2, 3])
def test_chance_is_the_loss_of_equal_embeddings(texts_per_clip: int, decoupled: bool) -> None:
    """Oracle: the loss module itself, on a batch of different texts."""
    texts = [[f"text {number} of {clip}" for number in range(texts_per_clip)] for clip in range(16)]
    loss = SoftmaxContrastiveLearning(decoupled=decoupled)
    expected = _measured_chance(loss, texts, batch_clips=16, batches=1)
    assert loss.chance(16, texts_per_clip) == pytest.approx(expected, rel=1e-5)
    if texts_per_clip == 1 and not decoupled:
        assert loss.chance(16, 1) == pytest.approx(math.log(16))


@pytest.mark.parametrize("loss", [SoftmaxContrastiveLearning(), SoftmaxContrastiveLearning(decoupled=True)])
def test_chance_counts_hard_negatives(loss: SoftmaxContrastiveLearning) -> None:
    """Oracle: the loss module itself, on equal latents with two hard negatives per clip, also for a single clip."""
    for num_clips in (1, 4):
        same = torch.ones(3 * num_clips, 4) / 2
        value = loss(same[:num_clips], same[:num_clips], None, None, same[num_clips:], torch.arange(2 * num_clips) // 2)
        assert loss.chance(num_clips, 1, 2) == pytest.approx(value.item(), rel=1e-5)


def test_chance_of_the_sigmoid_loss_is_that_of_the_best_constant() -> None:
    """Oracle: the lowest loss of equal embeddings over all biases."""
    texts = [[f"text {clip}", f"other {clip}"] for clip in range(16)]
    values = []
    for bias in torch.linspace(-6, 0, 61).tolist():
        values.append(_measured_chance(SigmoidContrastiveLearning(init_bias=bias), texts, batch_clips=8, batches=1))
    assert SigmoidContrastiveLearning().chance(8, 2) == pytest.approx(min(values), rel=1e-3)


@pytest.mark.parametrize("loss", [SoftmaxContrastiveLearning(), SigmoidContrastiveLearning()])
def test_one_clip_has_no_contrast(loss: torch.nn.Module) -> None:
    """The loss of a batch of one clip is 0."""
    assert loss.chance(1, 1.0) == 0
