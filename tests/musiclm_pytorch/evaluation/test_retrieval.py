"""Retrieval: ranks, average precision, ties, and chance levels."""

import numpy as np
import torch

from musiclm_pytorch.evaluation.retrieval import retrieval


def relevance_of(captions):
    """Equal captions describe each other's clips."""
    return torch.tensor([[caption == other for other in captions] for caption in captions])


def test_retrieval_of_perfect_reversed_and_constant_models():
    """Perfect similarities retrieve everything, reversed and constant ones nothing."""
    captions = [f"clip {i}" for i in range(20)]
    relevant = relevance_of(captions)
    perfect = {metric.name: metric for metric in retrieval(torch.eye(20), relevant).metrics("t")}
    assert perfect["t / R@1"].value == perfect["t / mAP"].value == 1.0
    assert perfect["t / median rank"].value == 1.0
    assert retrieval(-torch.eye(20), relevant).ranks.tolist() == [20] * 20
    assert retrieval(torch.zeros(20, 20), relevant).ranks.tolist() == [20] * 20


def test_retrieval_counts_any_clip_with_the_same_caption():
    """Both clips of a caption are right, and precision averages over both."""
    relevant = relevance_of(["same", "same", "other"])
    similarities = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.0, 0.2, 0.1]])
    result = retrieval(similarities, relevant)
    assert result.ranks.tolist() == [1, 1, 2]
    assert np.allclose(result.average_precisions, [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, 1 / 2])


def test_retrieval_chance_is_that_of_random_orders():
    """Chance levels, with shared captions, are the averages over random similarities."""
    captions = [f"caption {i // 2}" if i < 6 else f"caption {i}" for i in range(15)]
    relevant = relevance_of(captions)
    generator = torch.Generator().manual_seed(0)
    results = [retrieval(torch.rand(15, 15, generator=generator), relevant) for _ in range(400)]
    # 6000 queries: standard errors of 0.006 and 0.003; five of them leave one false alarm in a million
    for cutoff in (1, 5):
        recall = np.mean([result.ranks <= cutoff for result in results])
        assert abs(recall - results[0].chance_recall(cutoff)) < 0.032
    precision = np.mean([result.average_precisions for result in results])
    assert abs(precision - results[0].chance_precision()) < 0.016
    assert results[0].chance_recall(100) == 1.0
