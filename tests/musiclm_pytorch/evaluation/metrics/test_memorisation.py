"""Runs of shared tokens and transport costs against independent computations."""

from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from musiclm_pytorch.evaluation.metric import ClipSet, UnmetNeed
from musiclm_pytorch.evaluation.metrics.memorisation import (
    Memorisation,
    SemanticTokens,
    longest_shared_runs,
    matching_cost,
)
from tests.helpers.semantic_sounds import RATE_HZ


def tokens(*shape, seed=0, vocabulary=6) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def test_longest_shared_runs_agree_with_difflib():
    """Runs do not continue from one training clip into the next one."""
    queries, references = list(tokens(8, 40)), list(tokens(5, 40, seed=1))
    expected = [
        max(SequenceMatcher(None, q.tolist(), r.tolist(), autojunk=False).find_longest_match().size for r in references)
        for q in queries
    ]
    assert longest_shared_runs(queries, references).tolist() == expected
    assert longest_shared_runs([torch.tensor([1, 2, 3, 4])], [torch.tensor([1, 2]), torch.tensor([3, 4])]).tolist() == [
        2
    ]


def test_matching_cost_is_the_optimal_transport():
    """A linear programme over histograms has the same cost; equal histograms cost nothing; long clips are cut."""
    centroids = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    distances = torch.cdist(centroids, centroids).double().numpy()
    query = tokens(30)
    sums = np.concatenate([np.kron(np.eye(6), np.ones(6)), np.kron(np.ones(6), np.eye(6))])
    for reference in tokens(3, 30, seed=3):
        left, right = (torch.bincount(ids, minlength=6).double() / len(ids) for ids in (query, reference))
        exact = linprog(distances.ravel(), A_eq=sums, b_eq=np.concatenate([left, right])).fun
        assert matching_cost(query, reference, distances) == pytest.approx(exact, abs=1e-8)
        assert matching_cost(query[:20], reference, distances) == matching_cost(query[:20], reference[:20], distances)
    assert matching_cost(query, query.flip(0), distances) == pytest.approx(0.0, abs=1e-6)


def metric_and_sets() -> tuple[Memorisation, dict[str, ClipSet]]:

    sizes = dict(
        dim=16, depth=1, heads=1, dim_head=16, sample_hz=RATE_HZ, num_mels=20, n_fft=512, hop_length=RATE_HZ // 100
    )
    encoder = BestRQEncoder(**sizes)
    centroids = torch.randn(50, 16, generator=torch.Generator().manual_seed(4))
    extractor = SemanticTokens(KMeansTokenizer(encoder=encoder, layer=1, centroids=centroids))
    training = tokens(20, 60, seed=5, vocabulary=50)
    rows = {"training": training, "real": tokens(20, 60, seed=6, vocabulary=50), "copies": training[:10]}
    sets = {
        name: ClipSet(
            name,
            [AudioItem(Path(f"{name}{n}"), None, {}, 1, 1) for n in range(len(part))],
            {extractor.name: list(part)},
        )
        for name, part in rows.items()
    }
    return Memorisation(extractor, exact_seconds=1.0), sets


def test_copies_are_found_and_new_clips_are_not():
    """Exact and approximate matches of copied and of new tokens; the floor is that of real clips."""
    metric, sets = metric_and_sets()
    assert metric.extractor.seconds_per_token == pytest.approx(0.04)
    copies = {v.name.split(" / ")[2]: v for v in metric.measure(sets["copies"], sets["real"], sets["training"])}
    assert copies["exact matches of 1 s"].value == 1.0 and copies["approximate matches"].value == 1.0
    assert copies["longest shared run, seconds"].value == pytest.approx(60 * 0.04)
    real = {v.name.split(" / ")[2]: v for v in metric.floor(sets["real"], sets["training"])}
    assert real["exact matches of 1 s"].value == 0.0 and real["approximate matches"].value <= 0.05
    assert real["cost of the nearest training clip"].low > copies["cost of the nearest training clip"].high
    with pytest.raises(UnmetNeed, match="--training"):
        metric.measure(sets["real"], sets["real"], None)
