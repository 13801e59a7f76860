"""Masked prediction without an encoder: which tokens are hidden, and what the answer is (arXiv:2202.01855)."""

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

__all__ = ["RandomProjectionQuantizer", "sample_span_mask"]


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
