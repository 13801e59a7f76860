"""Fréchet and kernel distance, KL divergence and inception score against closed forms and independent computations."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, UnmetNeed
from musiclm_pytorch.evaluation.metrics.frechet import FrechetDistance, gaussian_frechet_distance
from musiclm_pytorch.evaluation.metrics.inception import InceptionScore, inception_score
from musiclm_pytorch.evaluation.metrics.kernel import KernelDistance
from musiclm_pytorch.evaluation.metrics.kl_divergence import KLDivergence, kl_divergence


class Rows(Extractor):
    """Features that are set by the test."""

    name, sample_hz = "rows", 8000

    def __call__(self, waves):
        raise NotImplementedError

    def posteriors(self, features):
        return features.softmax(dim=-1)


ROWS = Rows()


def clip_set(features, name="set", references=None, tmp="/nowhere") -> ClipSet:
    """A set of clips whose features are the rows of a tensor, or a list of windows `[w, d]`."""
    items = [
        AudioItem(path=_path(tmp, name, number), caption=None, labels={}, sample_hz=8000, num_samples=8000)
        for number in range(len(features))
    ]
    return ClipSet(name, items, {ROWS.name: list(features)}, references)


def _path(*parts):
    from pathlib import Path

    return Path("-".join(map(str, parts)))


def normal(count, dim, seed, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_closed_forms_of_the_frechet_distance():
    """N(0, I) and N(1, I) in 8 dimensions, and two Gaussians whose covariances do not commute."""
    eye = np.eye(8)
    assert gaussian_frechet_distance(np.zeros(8), eye, np.ones(8), eye) == pytest.approx(8.0, abs=1e-9)
    a, b = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.3], [-0.3, 3]])
    distance = gaussian_frechet_distance(np.array([0.0, 1.0]), a, np.array([1.0, 0.0]), b)
    assert distance == pytest.approx(2.92931185, abs=1e-8)
    assert gaussian_frechet_distance(np.zeros(2), a, np.zeros(2), a) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("count", [40, 5])
def test_frechet_distance_agrees_with_scipy(count):
    """Matrix root of scipy, also for covariances without full rank."""
    a, b = normal(count, 8, 0), 1.5 * normal(count + 3, 8, 1, shift=0.3)
    values = FrechetDistance(ROWS).measure(clip_set(a), clip_set(b), None)
    covariances = [np.cov(rows.numpy(), rowvar=False) for rows in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert values[0].value == pytest.approx(expected, abs=1e-5)
    assert values[0].low <= values[0].value <= values[0].high and values[0].count == count


def test_windows_count_as_rows():
    """A clip of three windows equals three clips of one window."""
    a, b = normal(30, 4, 0), normal(30, 4, 1)
    in_windows = clip_set(a.view(10, 3, 4))
    one = FrechetDistance(ROWS).measure(in_windows, clip_set(b), None)[0]
    assert one.value == pytest.approx(FrechetDistance(ROWS).measure(clip_set(a), clip_set(b), None)[0].value, abs=1e-9)
    assert "30 x" in one.note and one.count == 10


def naive_mmd(a, b, scale):
    """Loops over all pairs of different clips."""

    def kernel(x, y):
        return math.exp(-float(((x - y) ** 2).sum()) / (2 * scale))

    def within(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        values = [kernel(x, y) for i, j in pairs for x in rows[i] for y in rows[j]]
        return sum(values) / len(values)

    between = [kernel(x, y) for p in a for q in b for x in p for y in q]
    return within(a) + within(b) - 2 * sum(between) / len(between)


def test_kernel_distance_agrees_with_loops():
    """Clips of different numbers of windows; the scale is the median of squared distances of different real clips."""
    a = [normal(1 + n % 3, 4, n) for n in range(6)]
    b = [normal(1 + n % 2, 4, 10 + n, shift=1.0) for n in range(7)]
    squared = [
        float(((x - y) ** 2).sum()) for i, p in enumerate(b) for j, q in enumerate(b) if i != j for x in p for y in q
    ]
    value = KernelDistance(ROWS).measure(clip_set(a), clip_set(b), None)[0]
    assert value.value == pytest.approx(naive_mmd(a, b, float(np.median(squared))), abs=1e-9)


def test_kernel_distance_of_equal_distributions_is_about_zero():
    """The estimate is unbiased: its mean over many pairs of small sets is far below its deviation."""
    values = [
        KernelDistance(ROWS).weighted_distance(clip_set(normal(8, 4, s)), clip_set(normal(8, 4, 500 + s)))(
            np.ones(8), np.ones(8)
        )
        for s in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200)


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_floor_of_two_halves(metric):
    """Two halves of one set are near each other, a shifted set is not."""
    real = clip_set(normal(60, 4, 0), "real")
    floor, shifted = (
        metric(ROWS).floor(real, None)[0],
        metric(ROWS).measure(clip_set(normal(60, 4, 1, 2.0)), real, None)[0],
    )
    assert floor.high < shifted.low and floor.name.endswith("two halves of real")


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_degenerate_sets(metric):
    """Identical sets, equal clips, and single clips."""
    rows = normal(20, 4, 0)
    assert metric(ROWS).measure(clip_set(rows), clip_set(rows), None)[0].value <= 1e-9
    constant = clip_set(torch.zeros(5, 4))
    value = metric(ROWS).measure(constant, constant, None)[0]
    assert value.value == pytest.approx(0.0, abs=1e-12) and value.low <= value.value <= value.high
    with pytest.raises(UnmetNeed, match="at least 2"):
        metric(ROWS).measure(clip_set(rows[:1]), clip_set(rows), None)
    with pytest.raises(UnmetNeed, match="--real"):
        metric(ROWS).measure(clip_set(rows), None, None)
    with pytest.raises(UnmetNeed, match="4 clips"):
        metric(ROWS).floor(clip_set(rows[:3]), None)


def test_kl_divergence():
    """Closed form, scipy, zeros, and the pairing with real clips."""
    from scipy.stats import entropy

    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    assert float(kl_divergence(p, q)) == pytest.approx(0.58381470, abs=1e-8)
    assert float(kl_divergence(p, q)) == pytest.approx(entropy(p, q))
    assert math.isfinite(float(kl_divergence(p, np.array([1.0, 0.0, 0.0]))))
    logits = normal(6, 5, 0)
    real = clip_set(logits, "real")
    order = [3, 1, 5, 0, 2, 4]
    same = KLDivergence(ROWS).measure(clip_set(logits[order], references=order), real, None)[0]
    assert same.value == pytest.approx(0.0, abs=1e-12) and same.chance > 0.1
    with pytest.raises(UnmetNeed, match="reference"):
        KLDivergence(ROWS).measure(clip_set(logits), real, None)


def test_inception_score():
    """1 for equal posteriors, k for certain and different ones, and a loop for the rest."""
    assert inception_score(np.full((4, 3), 1 / 3)) == pytest.approx(1.0)
    assert inception_score(np.eye(3)) == pytest.approx(3.0, abs=1e-3)
    posteriors = normal(6, 5, 0).softmax(dim=1).numpy()
    mean = posteriors.mean(axis=0)
    loop = np.mean([sum(p * math.log(p / m) for p, m in zip(row, mean)) for row in posteriors])
    assert inception_score(posteriors) == pytest.approx(math.exp(loop))
    assert InceptionScore(ROWS).measure(clip_set(normal(1, 5, 0)), None, None)[0].value == pytest.approx(1.0)
