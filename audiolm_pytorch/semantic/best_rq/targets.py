"""Masked prediction without an encoder: which tokens are hidden, and what the answer is (arXiv:2202.01855)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

__all__ = ["Decorrelation", "RandomProjectionQuantizer", "TokenTargets", "sample_span_mask"]

# Directions that hardly vary hold rounding noise, and unit variance would make it as loud as the rest.
_LEAST_VARIANCE = 1e-4
_SUBSPACE_ROUNDS = 8


class RandomProjectionQuantizer(nn.Module):
    """Frozen targets: project to a few dimensions at random, name the nearest random code (arXiv:2202.01855, eq. 1).

    Everything is a buffer drawn from a generator of its own, so a seed fixes the targets whatever else is random. The
    input must be normalised, or most codes stay unused (sec. 3.1).

    Args:
        dim: Width of the input vectors.
        codebook_size: Codes per codebook, V.
        codebook_dim: Width of the projection.
        num_targets: Codebooks, each with a projection of its own.
        seed: Seed of projections and codebooks.
    """

    @beartype
    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int = 16, num_targets: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        if min(dim, codebook_dim, num_targets) < 1 or codebook_size < 2:
            raise ValueError("dim, codebook_dim and num_targets must be >= 1 and codebook_size >= 2")
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
        """Name every vector, `[..., dim]` -> `[..., num_targets]` int64, in float32: bfloat16 would move targets."""
        with torch.autocast(frames.device.type, enabled=False):
            # The nearest of unit vectors has the greatest inner product; the length of the projection does not matter.
            projected = torch.einsum("... d, q d e -> ... q e", frames.float(), self.projection)
            return torch.einsum("... q e, q v e -> ... q v", projected, self.codebook).argmax(dim=-1)


class Decorrelation(nn.Module):
    """The directions in which vectors vary most, each with unit variance (whitened principal components).

    Neighbouring mel bands and frames say nearly the same, so a random projection of them hears little but loudness:
    after whitening, what tells one pitch from another weighs as much.

    Args:
        dim: Width of the vectors.
        num_directions: Directions kept, at most `dim`; orthonormal ones at random until `fit` has seen vectors.
        seed: Seed of these.

    Raises:
        ValueError: If there are more directions than dimensions.
    """

    @beartype
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
        """Decorrelate, `[..., dim]` -> `[..., num_directions]`, in float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Take the directions from vectors `[m, dim]`, read once.

        Raises:
            ValueError: If there are no vectors.
        """
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        products = total.new_zeros(len(total), len(total))
        for batch in batches:
            vectors = batch.to(self.mean)
            count += len(vectors)
            total += vectors.sum(dim=0, dtype=torch.float64)
            products += vectors.T @ vectors
        if not count:
            raise ValueError("decorrelation needs at least one vector, got none")
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        # Subspace iteration: all directions of a few thousand dimensions would take half a minute, for a few of them.
        basis, rounded = self.basis, covariance.float()
        for _ in range(_SUBSPACE_ROUNDS):
            basis, _ = torch.linalg.qr(rounded @ basis)
        basis = basis.double()
        variances, rotation = torch.linalg.eigh(basis.T @ covariance @ basis)
        self.mean.copy_(mean)
        self.basis.copy_((basis @ rotation / variances.clamp(min=_LEAST_VARIANCE).sqrt()).flip(1))


class TokenTargets(nn.Module):
    """What masked prediction has to name at every token: codes of its decorrelated surroundings.

    Args:
        dim: Width of the vectors of the front end.
        codebook_size: Codes per codebook, V.
        codebook_dim: Width of the random projection.
        num_targets: Codebooks, q.
        reach_tokens: Tokens on each side that a target describes, too; 0 = as in arXiv:2202.01855.
        num_directions: Directions that are left of them (see `Decorrelation`); None = all as they are, as there.
        seed: Seed of everything random.
    """

    @beartype
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

    def surroundings(self, frames: Tensor, chosen: Tensor) -> Tensor:
        """Vectors of the chosen tokens and of their neighbours in one.

        Args:
            frames: `[b, t, dim]`, zero where there is no token.
            chosen: `[b, t]` bool.

        Returns:
            `[m, (2 * reach_tokens + 1) * dim]`; beyond the ends lies zero, the mean of the corpus.
        """
        reach = self.reach_tokens
        around = F.pad(frames, (0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1)
        return rearrange(around[chosen], "m d r -> m (r d)")

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit the decorrelation, if there is one, to frames `[b, t, dim]` and masks `[b, t]` of real tokens."""
        if self.decorrelation is not None:
            self.decorrelation.fit(self.surroundings(frames, mask) for frames, mask in batches)

    @torch.no_grad()
    def forward(self, frames: Tensor, chosen: Tensor) -> Tensor:
        """Name the chosen tokens: frames `[b, t, dim]`, chosen `[b, t]` bool -> `[m, q]` int64."""
        vectors = self.surroundings(frames, chosen)
        return self.quantizer(vectors if self.decorrelation is None else self.decorrelation(vectors))


def sample_span_mask(
    valid: Tensor, start_prob: float, span_tokens: int, generator: torch.Generator | None = None
) -> Tensor:
    """Choose the tokens to hide: every real token starts a span with a fixed probability; spans may overlap.

    Args:
        valid: `[b, t]` bool, True where a token is real; every item holds at least one.
        start_prob: Probability that a span starts at a token.
        span_tokens: Length of a span, cut at the end of the item.
        generator: CPU generator; None = the global one.

    Returns:
        `[b, t]` bool, a subset of `valid` with at least one token in each item.
    """
    num_items, num_tokens = valid.shape
    starts = torch.rand(num_items, num_tokens, generator=generator) < start_prob
    counts = valid.sum(dim=1).cpu()
    # An item without a span would add nothing but cost its forward pass: one start is always given.
    sure = (torch.rand(num_items, generator=generator) * counts).long().clamp(max=num_tokens - 1)
    starts[torch.arange(num_items), sure] = True
    reach = F.pad(starts.float(), (span_tokens - 1, 0)).unsqueeze(1)
    spans = F.max_pool1d(reach, kernel_size=span_tokens, stride=1).squeeze(1) > 0
    return spans.to(valid.device) & valid
