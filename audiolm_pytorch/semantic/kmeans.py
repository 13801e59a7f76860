"""The job that turns a trained encoder into a tokenizer: k-means over the hidden states of one layer."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.nearest import nearest_index
from audiolm_pytorch.semantic.protocol import FrameEncoder
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer

__all__ = ["ClusterUsage", "KMeansFit", "fit_kmeans"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterUsage:
    """How the clusters were used on the vectors they were fitted to.

    Attributes:
        num_tokens: Vectors.
        num_clusters: Clusters.
        used: Clusters that at least one vector falls into.
        perplexity: `exp(entropy)` of the usage: the number of equally used clusters that would be as diverse.
        explained: Share of the variance of the normalised vectors that the centroids explain, 0..1.
    """

    num_tokens: int
    num_clusters: int
    used: int
    perplexity: float
    explained: float


@dataclass(frozen=True)
class KMeansFit:
    """Result of `fit_kmeans`: the tokenizer, on the CPU, and how its clusters are used."""

    tokenizer: KMeansTokenizer
    usage: ClusterUsage


@beartype
def fit_kmeans(
    encoder: nn.Module,
    waves: Iterable[Tensor],
    *,
    layer: int,
    num_clusters: int,
    seed: int = 0,
    max_tokens: int = 200_000,
    max_epochs: int = 60,
) -> KMeansFit:
    """Cluster the hidden states of one layer into semantic tokens (AudioLM, arXiv:2209.03143, sec. III-B).

    A deterministic job: the same encoder, waves and seed give the same centroids on one machine. Each dimension is
    brought to zero mean and unit variance first, as in AudioLM. The tokenizer holds a copy of the encoder that ends at
    `layer`.

    Args:
        encoder: A `FrameEncoder` module.
        waves: Waves `[n]` or `[b, n]` without padding, at the encoder's rate, in an order that is not sorted by content
            (reading stops as soon as `max_tokens` tokens are there).
        layer: Layer whose hidden states are clustered, 1..encoder.depth.
        num_clusters: Centroids, k.
        seed: Seed of the initial centroids and of the mini-batches.
        max_tokens: Vectors to fit on; 200,000 of width 192 take 150 MB.
        max_epochs: Passes over them at most; k-means stops earlier when the centroids no longer move.

    Returns:
        A `KMeansFit`.

    Raises:
        TypeError: If the encoder is no `FrameEncoder`.
        ValueError: If there are fewer tokens than clusters, or they hold NaN or infinity.
    """
    if not isinstance(encoder, FrameEncoder):
        raise TypeError(f"{type(encoder).__name__} is no FrameEncoder: see audiolm_pytorch.semantic.protocol")
    if min(num_clusters, max_tokens, max_epochs) < 1:
        raise ValueError("num_clusters, max_tokens and max_epochs must be positive")
    vectors = _collect(encoder, waves, layer, max_tokens)
    if len(vectors) < num_clusters:
        raise ValueError(f"{len(vectors)} tokens cannot fill {num_clusters} clusters; pass more waves or ask for fewer")
    if not vectors.isfinite().all():
        raise ValueError(f"layer {layer} gives NaN or infinity: the encoder or the waves are broken")
    mean = vectors.mean(dim=0)
    std = vectors.std(dim=0, correction=0).clamp(min=1e-5)
    vectors.sub_(mean).div_(std)
    centroids = _cluster(vectors, num_clusters, seed, max_epochs)
    usage = _usage(vectors, centroids)
    logger.info("k-means of layer %d: %s", layer, usage)
    own_encoder = encoder.truncated(layer)
    if not isinstance(own_encoder, nn.Module):
        raise TypeError(f"truncated() of {type(encoder).__name__} must return a module")
    tokenizer = KMeansTokenizer(encoder=own_encoder.cpu(), layer=layer, centroids=centroids, mean=mean, std=std)
    return KMeansFit(tokenizer.eval(), usage)


@torch.no_grad()
def _collect(encoder: FrameEncoder, waves: Iterable[Tensor], layer: int, max_tokens: int) -> Tensor:
    """Hidden states `[m, d]` float32 on the CPU of the first `max_tokens` tokens, in eval mode."""
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"{type(encoder).__name__} is no module")
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    kept: list[Tensor] = []
    count = 0
    try:
        for wave in waves:
            batch = (wave.unsqueeze(0) if wave.ndim == 1 else wave).to(device)
            features, mask = encoder.features(batch, None, layer)
            kept.append(features[mask].float().cpu())
            count += len(kept[-1])
            if count >= max_tokens:
                break
    finally:
        encoder.train(was_training)
    if not kept:
        raise ValueError("k-means needs at least one wave, got none")
    return torch.cat(kept)[:max_tokens]


def _cluster(vectors: Tensor, num_clusters: int, seed: int, max_epochs: int) -> Tensor:
    """Centroids `[k, d]` of mini-batch k-means, k-means++ start; on one thread, whose sums have one order."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # k-means++ on a few dozen vectors per cluster is as good as on all of them and far quicker.
    init_size = min(len(vectors), 16 * num_clusters)
    kmeans = MiniBatchKMeans(
        num_clusters,
        random_state=seed,
        batch_size=min(len(vectors), max(4096, 4 * num_clusters)),
        max_iter=max_epochs,
        init_size=max(init_size, num_clusters),
        n_init=1,
        max_no_improvement=30,
    )
    with threadpool_limits(limits=1):
        kmeans.fit(vectors.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).float()


def _usage(vectors: Tensor, centroids: Tensor) -> ClusterUsage:
    """How vectors `[m, d]` spread over centroids `[k, d]`."""
    ids = nearest_index(vectors, centroids)
    counts = ids.bincount(minlength=len(centroids)).double()
    shares = counts[counts > 0] / counts.sum()
    perplexity = math.exp(float(-(shares * shares.log()).sum()))
    # Indexing all centroids at once would double the memory of the vectors: go in chunks.
    pairs = zip(vectors.split(8192), ids.split(8192), strict=True)
    error = sum(float((chunk - centroids[own]).square().sum(dtype=torch.float64)) for chunk, own in pairs)
    spread = float(vectors.square().sum(dtype=torch.float64))
    explained = 1.0 - error / spread if spread else 1.0
    return ClusterUsage(len(vectors), len(centroids), len(shares), perplexity, explained)
