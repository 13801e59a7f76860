"""Prediction targets and random masks for training BEST-RQ (arXiv:2202.01855)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed

__all__ = ["Decorrelation", "RandomProjectionQuantizer", "TokenTargets", "sample_span_mask"]

# Directions with less variance are rounding noise, which must not be scaled to unit variance.
_MIN_VARIANCE = 1e-4
_SUBSPACE_ROUNDS = 8


class RandomProjectionQuantizer(nn.Module):
    """Frozen random projection, followed by a search for the nearest random vector (arXiv:2202.01855, equation 1).

    Projection and codebooks depend on `seed` only. If the input is not normalised, most codes never occur.
    """

    @typed
    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int = 16, num_targets: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        if min(dim, codebook_dim, num_targets) < 1 or codebook_size < 2:
            raise ValueError(
                f"dim {dim}, codebook_dim {codebook_dim} and num_targets {num_targets} must be >= 1, "
                f"codebook_size {codebook_size} must be >= 2"
            )
        generator = torch.Generator().manual_seed(seed)
        bound = (6 / (dim + codebook_dim)) ** 0.5  # Xavier uniform, as in the paper
        projection = (torch.rand(num_targets, dim, codebook_dim, generator=generator) * 2 - 1) * bound
        codebook = torch.randn(num_targets, codebook_size, codebook_dim, generator=generator)
        self.projection: Tensor
        self.codebook: Tensor
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(codebook, dim=-1))

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Quantize vectors `[..., dim]` to codes `[..., num_targets]`, in float32 even under autocast."""
        with torch.autocast(frames.device.type, enabled=False):
            # The nearest unit vector has the largest inner product, whatever the norm of the projection.
            projected = torch.einsum("... d, q d e -> ... q e", frames.float(), self.projection)
            return torch.einsum("... q e, q v e -> ... q v", projected, self.codebook).argmax(dim=-1)


class Decorrelation(nn.Module):
    """PCA whitening: a projection on the directions of largest variance, scaled to unit variance.

    Neighbouring mel bands and frames are correlated, so that a random projection of frames depends mostly on loudness.
    After whitening, differences in pitch have as much weight as differences in loudness. Before `fit`, the directions
    are random and orthonormal.
    """

    @typed
    def __init__(self, dim: int, num_directions: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= num_directions <= dim:
            raise ValueError(f"num_directions must lie in 1..{dim}, got {num_directions}")
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(dim, num_directions, generator=generator))
        self.mean: Tensor
        self.basis: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", basis)

    def forward(self, vectors: Tensor) -> Tensor:
        """Project vectors `[..., dim]` to decorrelated vectors `[..., num_directions]` in float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Compute the directions of largest variance from batches of vectors `[m, dim]`, in one pass."""
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        products = total.new_zeros(len(total), len(total))
        for batch in batches:
            vectors = batch.to(self.mean)
            count += len(vectors)
            total += vectors.sum(dim=0, dtype=torch.float64)
            products += vectors.T @ vectors
        if not count:
            raise ValueError("got no vectors; decorrelation needs at least one vector")
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        # Subspace iteration finds the few directions; a full decomposition of a few thousand takes half a minute.
        basis, rounded = self.basis, covariance.float()
        for _ in range(_SUBSPACE_ROUNDS):
            basis, _ = torch.linalg.qr(rounded @ basis)
        basis = basis.double()
        variances, rotation = torch.linalg.eigh(basis.T @ covariance @ basis)
        self.mean.copy_(mean)
        self.basis.copy_((basis @ rotation / variances.clamp(min=_MIN_VARIANCE).sqrt()).flip(1))


class TokenTargets(nn.Module):
    """Quantizes the vectors of a token and its neighbours to codes, which are the targets of masked prediction.

    Args:
        reach_tokens: Number of neighbours on each side that a target also describes; 0 in the paper.
        num_directions: Number of directions of `Decorrelation`; None means no decorrelation, as in the paper.
    """

    @typed
    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int = 16,
        num_targets: int = 1,
        reach_tokens: int = 0,
        num_directions: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reach_tokens < 0:
            raise ValueError(f"reach_tokens must not be negative, got {reach_tokens}")
        self.reach_tokens = reach_tokens
        width = dim * (2 * reach_tokens + 1)
        self.decorrelation = None if num_directions is None else Decorrelation(width, num_directions, seed)
        self.quantizer = RandomProjectionQuantizer(
            width if num_directions is None else num_directions, codebook_size, codebook_dim, num_targets, seed
        )

    def neighbourhoods(self, frames: Tensor, selected: Tensor) -> Tensor:
        """Return `[m, (2 * reach_tokens + 1) * dim]`: m tokens where `selected [b, t]` is True, with neighbours.

        Neighbours outside of `frames [b, t, dim]` are zero, which is the mean of the corpus.
        """
        reach = self.reach_tokens
        around = F.pad(frames, (0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1)
        return rearrange(around[selected], "m d r -> m (r d)")

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit the decorrelation, if any, to pairs of frames `[b, t, dim]` and masks `[b, t]` (False at padding)."""
        if self.decorrelation is not None:
            self.decorrelation.fit(self.neighbourhoods(frames, mask) for frames, mask in batches)

    @torch.no_grad()
    def forward(self, frames: Tensor, selected: Tensor) -> Tensor:
        """Compute targets `[m, q]` (m tokens where `selected [b, t]` is True, q codebooks) of `frames [b, t, dim]`."""
        vectors = self.neighbourhoods(frames, selected)
        return self.quantizer(vectors if self.decorrelation is None else self.decorrelation(vectors))


def sample_span_mask(
    valid: Tensor, start_prob: float, span_tokens: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a mask of tokens to hide; a hidden span starts at each real token with probability `start_prob`.

    `valid` is True at real tokens, the returned mask is True at hidden tokens, and both are `[b, t]` bool. Every item
    must have a real token; at least one token of every item is hidden.
    """
    num_items, num_tokens = valid.shape
    starts = torch.rand(num_items, num_tokens, generator=generator) < start_prob
    counts = valid.sum(dim=1).cpu()
    # Every item has at least one span; without any, its forward pass would be wasted.
    first = (torch.rand(num_items, generator=generator) * counts).long().clamp(max=num_tokens - 1)
    starts[torch.arange(num_items), first] = True
    reach = F.pad(starts.float(), (span_tokens - 1, 0)).unsqueeze(1)
    spans = F.max_pool1d(reach, kernel_size=span_tokens, stride=1).squeeze(1) > 0
    return spans.to(valid.device) & valid
