"""Augmentations of training data: words and tags of captions as in MusicGen, and mixed clips as in AudioGen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.lm.training_data import WaveBatch
from audiolm_pytorch.nn.module_state import check_shares

__all__ = ["Mixing", "TextAugmentation"]

_STARTS_PER_SECOND = 25  # 40 ms are a whole number of samples at every rate of crops


@typed
@dataclass(frozen=True, kw_only=True)
class TextAugmentation:
    """Merges tags into captions, and leaves out words, as the training of MusicGen in audiocraft does.

    Merged tags follow the caption in random order, for example "A calm song. bpm: 80. genre: jazz".

    Attributes:
        word_dropout: Probability that a word is left out.
        merge_prob: Probability that tags are merged.
        drop_caption_prob: Probability that merged tags replace the caption.
        drop_tag_prob: Probability that a merged tag is left out.
        tags: Names of the labels that are tags.
    """

    word_dropout: float = 0.3
    merge_prob: float = 0.25
    drop_caption_prob: float = 0.5
    drop_tag_prob: float = 0.5
    tags: tuple[str, ...] = ("key", "bpm", "genre", "moods", "instrument", "keywords")

    def __post_init__(self) -> None:
        check_shares(**{name: value for name, value in vars(self).items() if name != "tags"})

    def __call__(self, caption: str | None, tags: Sequence[str], rng: np.random.Generator) -> str | None:
        """Return the augmented caption, or None if no word is left; `tags` are texts like `genre: jazz`."""
        if rng.random() < self.merge_prob:
            merged = [tag for tag in tags if tag.partition(": ")[0] in self.tags and rng.random() >= self.drop_tag_prob]
            rng.shuffle(merged)
            is_dropped = bool(merged) and rng.random() < self.drop_caption_prob
            parts = merged if caption is None or is_dropped else [caption.rstrip(" ."), *merged]
            caption = ". ".join(parts)
        words = [word for word in (caption or "").split() if rng.random() >= self.word_dropout]
        return " ".join(words) or None


@typed
@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Adds a random other clip of the batch to a clip, and joins their captions (AudioGen, arXiv:2209.15352).

    Attributes:
        probability: Probability that a clip is mixed with another one.
        snr_db: Lowest and highest ratio of the loudness of the clip and the added clip, in decibels.
        min_overlap: Smallest share of the clip that the added clip overlaps.
    """

    probability: float = 0.5
    snr_db: tuple[float, float] = (-5.0, 5.0)
    min_overlap: float = 0.5

    def __post_init__(self) -> None:
        check_shares(probability=self.probability, min_overlap=self.min_overlap)
        if not self.snr_db[0] <= self.snr_db[1]:
            raise ValueError(f"snr_db must be (lowest, highest), got {self.snr_db}")

    def __call__(self, batch: WaveBatch, rng: np.random.Generator) -> WaveBatch:
        """Return a batch with mixed waves and captions; the lengths of the clips do not change."""
        crops = batch.crops
        num_items, hz = len(batch.captions), max(crops.waves)
        waves, captions = {rate: wave.clone() for rate, wave in crops.waves.items()}, list(batch.captions)
        for item in range(num_items):
            partner = (item + 1 + int(rng.integers(max(1, num_items - 1)))) % num_items
            snr_db, start_share = rng.uniform(*self.snr_db), rng.uniform(0, 1 - self.min_overlap)
            if rng.random() >= self.probability or partner == item:
                continue
            # with numpy, whose sum does not depend on the number of threads
            clips = [_clip(crops.waves[hz], crops.lengths[hz], index).numpy() for index in (item, partner)]
            levels = [float(np.std(clip, dtype=np.float64)) for clip in clips]
            if min(levels) == 0:
                continue
            gain = levels[0] / levels[1] * 10 ** (-snr_db / 20)
            start_step = int(start_share * int(crops.lengths[hz][item]) / hz * _STARTS_PER_SECOND)
            for rate, mixed in waves.items():
                added = gain * _clip(crops.waves[rate], crops.lengths[rate], partner)
                target = _clip(mixed, crops.lengths[rate], item)[..., start_step * rate // _STARTS_PER_SECOND :]
                target[..., : added.shape[-1]] += added[..., : target.shape[-1]]
            peak = max(float(wave[item].abs().max()) for wave in waves.values())
            for wave in waves.values():
                wave[item] /= max(1.0, peak)
            texts = dict.fromkeys(text for text in (batch.captions[item], batch.captions[partner]) if text)
            captions[item] = " ".join(texts) or None
        return replace(batch, crops=replace(crops, waves=waves), captions=captions)


def _clip(waves: Tensor, lengths: Tensor, index: int) -> Tensor:
    """Return the wave of one clip without padding, `[n]` or `[c, n]`, in the memory of the batch."""
    return waves[index, ..., : int(lengths[index])]
