"""Pitch classes against the filters of transformers, and of tones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.metric import ClipSet, UnmetNeed
from musiclm_pytorch.evaluation.metrics.chroma import ChromaSimilarity, PitchClasses, chroma_filters


def tone(midi: int, seconds: float = 1.0) -> torch.Tensor:
    time = torch.arange(int(seconds * 32_000)) / 32_000
    return 0.3 * torch.sin(2 * math.pi * 440 * 2 ** ((midi - 69) / 12) * time)


@pytest.mark.slow
def test_filters_agree_with_transformers():
    """`chroma_filter_bank`, which follows librosa, with the settings of MusicGen."""
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.chroma_filter_bank(num_frequency_bins=16_384, num_chroma=12, sampling_rate=32_000, tuning=0)
    filters = chroma_filters(32_000, 16_384)
    assert filters.shape == (12, 8193)
    assert np.allclose(filters, expected[:, :8193], atol=1e-6)


def test_class_of_tones():
    """C is class 0; the number of frames is that of hops, rounded up."""
    waves = torch.stack([tone(midi) for midi in (60, 69, 71)])
    classes = PitchClasses()(waves)
    assert classes.shape == (3, math.ceil(32_000 / 4096))
    assert [row.mode().values.item() for row in classes] == [0, 9, 11]
    assert PitchClasses()(torch.zeros(1, 1000)).tolist() == [[0]]


def test_share_of_equal_frames_counts_frames_of_all_clips():
    """Long clips have more weight; the chance pairs a clip with the next real clip."""
    metric = ChromaSimilarity()

    def clips(name, rows, references=None):
        items = [AudioItem(Path(f"{name}{n}"), None, {}, 1, 1) for n in range(len(rows))]
        return ClipSet(name, items, {metric.extractor.name: [torch.tensor(row) for row in rows]}, references)

    real = clips("real", [[1, 1, 1, 1, 1, 1], [2, 2]])
    value = metric.measure(clips("a", [[1, 1, 1, 0, 0, 0], [2, 5]], [0, 1]), real, None)[0]
    assert value.value == pytest.approx(4 / 8) and value.chance == 0.0
    with pytest.raises(UnmetNeed, match="reference"):
        metric.measure(clips("a", [[1]]), real, None)
