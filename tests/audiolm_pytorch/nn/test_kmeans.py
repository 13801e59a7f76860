"""Mini-batch k-means over portions: as good as sklearn's on vectors in memory, exact statistics, exact assignment."""

import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from audiolm_pytorch.data.shards import write_shards
from audiolm_pytorch.nn import kmeans as kmeans_module
from audiolm_pytorch.nn.kmeans import (
    Normalised,
    cluster_epoch,
    first_centroids,
    mini_batch_size,
    nearest_centroid,
    vector_statistics,
)
from audiolm_pytorch.semantic import ClusterUsage, features
from audiolm_pytorch.semantic.features import FeatureShards


class Portions:
    """Vectors in memory, read in portions of a few hundred."""

    def __init__(self, vectors: np.ndarray, rows: int = 700) -> None:
        self.vectors, self.rows, self.num_vectors = vectors, rows, len(vectors)

    def portions(self, order=None):
        places = np.arange(self.num_vectors) if order is None else np.random.default_rng(order).permutation(len(self))
        for start in range(0, self.num_vectors, self.rows):
            yield self.vectors[places[start : start + self.rows]].copy()

    def __len__(self) -> int:
        return self.num_vectors


def sounds(num_vectors: int, num_kinds: int, dim: int, seed: int = 0) -> np.ndarray:
    """Vectors like those of sound: kinds of very unequal frequency and spread in a few directions, and silence."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_kinds + 1)
    centres = random.standard_normal((num_kinds, 12)) @ random.standard_normal((12, dim))
    kinds = random.choice(num_kinds, num_vectors, p=shares / shares.sum())
    spread = random.gamma(2.0, 0.4, (num_kinds, 1))[kinds]
    vectors = centres[kinds] + spread * random.standard_normal((num_vectors, dim)) + 5.0
    vectors[: num_vectors // 10] = vectors[0]
    return random.permutation(vectors).astype(np.float32)


def inertia(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, in float64."""
    vectors, centroids = vectors.astype(np.float64), centroids.astype(np.float64)
    distances = np.square(vectors).sum(1)[:, None] - 2 * vectors @ centroids.T + np.square(centroids).sum(1)
    return float(distances.min(axis=1).sum())


def fitted(source: Portions, num_clusters: int, seed: int, num_epochs: int = 10) -> tuple[Normalised, np.ndarray]:
    """The steps of the job, one after another."""
    mean, std, start = vector_statistics(source, num_clusters, seed)
    vectors = Normalised(source, mean, std)
    centroids = first_centroids((start - mean) / std, num_clusters, seed)
    for epoch in range(num_epochs):
        centroids = cluster_epoch(vectors, centroids, (seed, epoch))
    return vectors, centroids


@pytest.mark.parametrize(
    ("num_vectors", "num_clusters"),
    [(8000, 8), pytest.param(8000, 100, marks=pytest.mark.slow), pytest.param(40_000, 1024, marks=pytest.mark.slow)],
)
def test_as_good_as_sklearn_on_all_vectors(num_vectors, num_clusters):
    """Guards quality: distortion at most 2% above MiniBatchKMeans.fit on the same normalised vectors in memory."""
    from sklearn.cluster import MiniBatchKMeans

    vectors = sounds(num_vectors, 300, 24)
    _, centroids = fitted(Portions(vectors), num_clusters, seed=0)
    normalised = ((vectors - vectors.mean(0)) / vectors.std(0)).astype(np.float32)
    settings = dict(random_state=0, n_init=3, batch_size=2048, max_no_improvement=30)
    reference = MiniBatchKMeans(num_clusters, **settings).fit(normalised).cluster_centers_
    # Fewer clusters in use would show as well: unused ones take no distortion away.
    assert inertia(normalised, centroids) <= 1.02 * inertia(normalised, reference)
    assert (
        len(np.unique(nearest_centroid(torch.from_numpy(normalised), torch.from_numpy(centroids))))
        > 0.97 * num_clusters
    )


def test_finds_clusters_that_are_there():
    """Guards against nonsense: well separated clusters are found, each one once, whatever the portions."""
    random = np.random.default_rng(0)
    centres = 20 * random.standard_normal((12, 6))
    kinds = random.integers(0, 12, 3000)
    vectors = (centres[kinds] + random.standard_normal((3000, 6))).astype(np.float32)
    for rows in (170, 3000):
        source, centroids = fitted(Portions(vectors, rows), 12, seed=1, num_epochs=4)
        normalised = np.concatenate(list(source.portions()))
        ids = nearest_centroid(torch.from_numpy(normalised), torch.from_numpy(centroids)).numpy()
        assert len({(kind, found) for kind, found in zip(kinds, ids)}) == 12
        usage = ClusterUsage.of(source, centroids)
        assert usage.used == 12 and usage.explained > 0.97


def test_statistics_are_exact_in_portions():
    """Guards mean and spread: large means do not cancel, unequal portions weigh what they should, constants stay."""
    random = np.random.default_rng(0)
    vectors = (random.standard_normal((5001, 5)) * [1, 1e-2, 1e3, 0.3, 0] + [0, 100, 5, -2e3, 7]).astype(np.float32)
    exact = vectors.astype(np.float64)
    for rows in (1, 700, 5001):
        found = vector_statistics(Portions(vectors[:900] if rows == 1 else vectors, rows), 10, seed=0)
        exact_part = exact[:900] if rows == 1 else exact
        np.testing.assert_allclose(found.mean, exact_part.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.std[:4], exact_part.std(0)[:4], rtol=1e-5)
        assert found.std[4] == 1
    source = Normalised(Portions(vectors), found.mean, found.std)
    normalised = np.concatenate(list(source.portions())).astype(np.float64)
    np.testing.assert_allclose(normalised.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(normalised.std(0)[:4], 1, atol=1e-3)


def test_the_start_is_drawn_evenly_and_by_seed(monkeypatch):
    """Guards the first centroids: every vector at most once, from all over the data, another draw by another seed."""
    monkeypatch.setattr(kmeans_module, "_MIN_START_VECTORS", 1)
    vectors = np.arange(10_000, dtype=np.float32)[:, None] * [[1, -1]]
    first, second, other = (vector_statistics(Portions(vectors), 20, seed).start[:, 0] for seed in (0, 0, 1))
    assert len(first) == 320 == len(set(first.tolist())) and (np.diff(first) > 0).all()
    assert (first == second).all() and (first != other).any()
    counts = np.histogram(first, 10, (0, 10_000))[0]
    assert counts.min() > 10 and counts.max() < 60
    assert len(vector_statistics(Portions(vectors[:50]), 20, 0).start) == 50


def test_an_epoch_is_a_pure_function():
    """Guards resuming: the same centroids and seed give the same bits, after other work, with any thread limit."""
    from threadpoolctl import threadpool_limits

    source = Portions(sounds(3000, 50, 8))
    mean, std, start = vector_statistics(source, 30, 0)
    vectors, begin = Normalised(source, mean, std), (start[:30] - mean) / std
    before = begin.copy()
    first = cluster_epoch(vectors, begin, (0, 1))
    np.random.default_rng().standard_normal(10)
    np.random.seed(5)
    with threadpool_limits(limits=3):
        second = cluster_epoch(vectors, begin, (0, 1))
    assert first.tobytes() == second.tobytes() and (begin == before).all()
    assert first.tobytes() != cluster_epoch(vectors, begin, (0, 2)).tobytes()


def test_rare_clusters_are_not_taken_away():
    """Guards against sklearn's reassignment, which moves clusters of a hundredth of the largest one's size."""
    random = np.random.default_rng(0)
    loud = 30 * random.standard_normal((20, 4))
    vectors = np.concatenate([np.zeros((15_000, 4)), np.repeat(loud, 3, axis=0)]).astype(np.float32)
    vectors += 0.01 * random.standard_normal(vectors.shape).astype(np.float32)
    source, centroids = fitted(Portions(random.permutation(vectors)), 21, seed=0)
    usage = ClusterUsage.of(source, centroids)
    assert usage.used == 21 and usage.explained > 0.999


def test_usage_is_what_counting_gives():
    """Guards the report against its definitions; clusters that nobody falls into do not count."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((1500, 3)).astype(np.float32)
    centroids = np.concatenate([random.standard_normal((5, 3)), np.full((2, 3), 99.0)]).astype(np.float32)
    usage = ClusterUsage.of(Portions(vectors), centroids)
    distances = np.square(vectors[:, None] - centroids).sum(-1)
    shares = np.bincount(distances.argmin(1), minlength=7)[:5] / 1500
    assert (usage.num_tokens, usage.num_clusters, usage.used) == (1500, 7, 5)
    assert usage.perplexity == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert usage.explained == pytest.approx(1 - distances.min(1).sum() / np.square(vectors).sum(), abs=1e-5)


def test_equal_vectors_are_no_error():
    """Guards silence: one vector many times leaves clusters empty, and everything finite."""
    source = Portions(np.full((200, 4), 3.0, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors, centroids = fitted(source, 6, seed=0)
    usage = ClusterUsage.of(vectors, centroids)
    assert np.isfinite(centroids).all() and usage.used == 1 and usage.explained == 1.0


@pytest.mark.parametrize(("num_points", "num_centroids"), [(1, 1), (0, 3), (7, 1000), (1025, 3), (3000, 257)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_assignment_is_the_nearest_in_float64(num_points, num_centroids, offset, monkeypatch):
    """Guards the chunked product against brute force in float64, over sizes that chunks do not divide."""
    monkeypatch.setattr(kmeans_module, "_MAX_ROWS", 1024)
    monkeypatch.setattr(kmeans_module, "_MAX_DISTANCES", 100_000)
    generator = torch.Generator().manual_seed(num_points)
    points = torch.randn(num_points, 16, generator=generator) + offset
    centroids = torch.randn(num_centroids, 16, generator=generator) + offset
    ids = nearest_centroid(points, centroids)
    assert ids.shape == (num_points,) and ids.dtype == torch.int64
    distances = (points.double()[:, None] - centroids.double()).square().sum(dim=-1)
    least = distances.min(dim=1).values
    # Where float32 cannot tell two centroids apart, either is right: the terms are as large as the squared norms.
    rounding = 1e-6 * (points.double().square().sum(dim=-1) + centroids.double().square().sum(dim=-1).max())
    assert (distances.gather(1, ids[:, None])[:, 0] <= least + rounding).all()
    if num_centroids > 1 and offset == 0.0:
        clear = distances.topk(2, dim=1, largest=False).values.diff(dim=1)[:, 0] > rounding
        assert clear.double().mean() > 0.99 or not num_points
        assert torch.equal(ids[clear], distances.argmin(dim=1)[clear])


@pytest.mark.slow
def test_vectors_on_disk_are_read_once_in_a_seeded_order_and_little_memory(tmp_path, monkeypatch):
    """Guards portions: every vector once, orders by seed, crops mixed; memory does not hold all of them at once."""
    dim, frames, num_crops = 32, 100, 400
    random = np.random.default_rng(0)
    crops = random.standard_normal((num_crops, frames, dim)).astype(np.float32)
    write_shards(tmp_path, lambda number: {"features": crops[number]}, num_crops, {"of": "test"}, 16)
    monkeypatch.setattr(features, "_PORTION_BYTES", 2**18)
    monkeypatch.setattr(kmeans_module, "_MIN_START_VECTORS", 1)
    shards = FeatureShards(tmp_path, {"of": "test"}, num_crops * frames, dim, min_rows=500)
    stored = np.concatenate(list(shards.portions()))
    assert (stored == crops.reshape(-1, dim)).all()
    assert len(shards._shards._open) == 1  # pages of mapped files are memory of the process, too
    first, again, other = (np.concatenate(list(shards.portions(order))) for order in ((0, 1), (0, 1), (0, 2)))
    assert (first == again).all() and (first != other).any()
    assert (np.sort(first[:, 0]) == np.sort(stored[:, 0])).all()
    head = {int(np.flatnonzero(stored[:, 0] == value)[0]) // frames for value in first[:200, 0]}
    assert len(head) > 10
    with pytest.raises(ValueError, match="another origin"):
        FeatureShards(tmp_path, {"of": "others"}, num_crops * frames, dim, min_rows=500)
    del stored, first, again, other
    fitted(shards, 16, seed=0, num_epochs=1)  # imports do not count
    tracemalloc.start()
    source, centroids = fitted(shards, 16, seed=0, num_epochs=1)
    ClusterUsage.of(source, centroids)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < crops.nbytes / 2


def test_batches_follow_the_number_of_clusters():
    """Guards the first call of sklearn and noise: a batch has more vectors than there are clusters."""
    assert [mini_batch_size(count) for count in (2, 512, 1024, 10_000)] == [1024, 1024, 2048, 20_000]
