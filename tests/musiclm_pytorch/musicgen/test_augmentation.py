"""Augmentations of texts and waves, the start of stereo models, and the schedule of AudioGen."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch.data.batches import CropBatch
from audiolm_pytorch.data.captions import tags_in
from audiolm_pytorch.lm.training_data import WaveBatch
from audiolm_pytorch.training import inverse_square_root
from musiclm_pytorch import MusicGen
from musiclm_pytorch.musicgen.augmentation import Mixing, TextAugmentation
from musiclm_pytorch.musicgen.stereo import stereo_from_mono
from tests.helpers.small_codecs import tiny_codec


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(count)]


def test_words_are_left_out_in_order_and_at_the_rate() -> None:
    """Word dropout keeps the order of words; 0 changes nothing, and 1 leaves no text."""
    caption = " ".join(f"w{number:02}" for number in range(50))
    augment = TextAugmentation(word_dropout=0.3, merge_prob=0)
    results = [(augment(caption, [], rng) or "").split() for rng in rngs(100)]
    assert all(words == sorted(words) for words in results)
    assert 0.67 < np.mean([len(words) for words in results]) / 50 < 0.73
    assert replace(augment, word_dropout=0.0)(caption, [], rngs(1)[0]) == caption
    assert replace(augment, word_dropout=1.0)(caption, [], rngs(1)[0]) is None


def test_tags_are_merged_at_their_rates() -> None:
    """In half of the merged texts tags replace the caption; each tag is in half of them; other labels never are."""
    tags = tags_in({"genre": "jazz", "bpm": 80.0, "moods": ["calm", "sad"], "tune": "x", "drums": True, "key": None})
    assert tags == ["genre: jazz", "bpm: 80", "moods: calm, sad", "tune: x"]
    augment = TextAugmentation(word_dropout=0, merge_prob=1)
    texts = [augment("A calm song.", tags, rng) or "" for rng in rngs(1000)]
    assert not any("tune" in text for text in texts)
    assert 0.45 < np.mean(["bpm: 80" in text for text in texts]) < 0.55
    # A text without tags, of which there is an eighth, keeps its caption.
    assert 0.51 < np.mean(["A calm song" in text for text in texts]) < 0.61
    assert {"A calm song. genre: jazz. bpm: 80", "A calm song. bpm: 80. genre: jazz"} <= set(texts)
    assert replace(augment, merge_prob=0.0)("A calm song.", tags, rngs(1)[0]) == "A calm song."


def batch_of(waves: torch.Tensor, captions: list[Any]) -> WaveBatch:
    """The same clips at 100 and at 200 Hz."""
    lengths = {100: torch.full((len(waves),), waves.shape[1]), 200: torch.full((len(waves),), 2 * waves.shape[1])}
    crops = CropBatch({100: waves, 200: waves.repeat_interleave(2, 1)}, lengths, torch.zeros(len(waves)).bool())
    return WaveBatch(crops, captions, [{}] * len(waves), torch.empty(0, dtype=torch.long))


def test_mixing_adds_another_clip_at_the_loudness_ratio() -> None:
    """The added clip has the requested ratio and overlap at every rate; captions are joined, and clips not clipped."""
    waves = 0.1 * torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    for seed, rng in enumerate(rngs(20)):
        mixed = Mixing(probability=1.0, snr_db=(6.0, 6.0))(batch_of(waves, ["a", "b"]), rng)
        assert mixed.captions == ["a b", "b a"], seed
        added = mixed.crops.waves[100][0] - waves[0]
        start = int(added.nonzero()[0])
        assert start <= 200 and start % 4 == 0
        ratio = waves[0].std() / (added[start:].std() * waves[1].std() / waves[1][: 400 - start].std())
        assert 20 * ratio.log10() == pytest.approx(6, abs=0.05)
        torch.testing.assert_close(mixed.crops.waves[200], mixed.crops.waves[100].repeat_interleave(2, 1))
    loud = Mixing(probability=1.0)(batch_of(10 * waves, ["a", "a"]), rngs(1)[0])
    assert float(loud.crops.waves[100].abs().max()) <= 1
    assert loud.captions == ["a", "a"]
    same = Mixing(probability=0.0)(batch_of(waves, ["a", None]), rngs(1)[0])
    assert torch.equal(same.crops.waves[100], waves) and same.captions == ["a", None]
    alone = Mixing(probability=1.0)(batch_of(waves[:1], ["a"]), rngs(1)[0])
    assert torch.equal(alone.crops.waves[100], waves[:1])


def test_stereo_start_predicts_as_the_mono_model_for_equal_channels() -> None:
    """Equal channels have the loss of the mono model on one channel, for each level."""
    torch.manual_seed(0)
    mono = MusicGen(codec=tiny_codec().eval(), dim=32, depth=2, heads=2, max_seconds=1)
    stereo = stereo_from_mono(mono)
    codes = torch.randint(16, (2, 20, 2))
    both = codes.repeat_interleave(2, dim=2)
    losses = []
    for model, ids in ((mono, codes), (stereo, both)):
        packed = model.transformer.layout.pack({"acoustic": ids}, {"acoustic": torch.tensor([20, 7])})
        result = model.transformer(packed)
        losses.append(result.per_stream)
        of_levels = [result.per_stream[f"acoustic.{level}"] for level in range(ids.shape[2])]
        torch.testing.assert_close(result.loss, torch.stack(of_levels).mean())  # each over its own cells, as published
    for level in range(4):
        torch.testing.assert_close(losses[1][f"acoustic.{level}"], losses[0][f"acoustic.{level // 2}"])
    assert stereo(num_samples=1, seconds=0.2, seed=0).shape[1] == 2
    with pytest.raises(ValueError, match="need a mono model, got 2 channels"):
        stereo_from_mono(stereo)


def test_inverse_square_root_schedule() -> None:
    """Linear to the peak after the warm-up, then half of the peak after four times as many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = partial(inverse_square_root, warmup_steps=10)(optimizer)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.01) and rates[9] == pytest.approx(0.1) and rates[39] == pytest.approx(0.05)
    assert max(rates) == rates[9]
