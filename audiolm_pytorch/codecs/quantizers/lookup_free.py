"""Residual lookup-free quantization: a code is the signs of a few coordinates (arXiv 2310.05737)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor
from vector_quantize_pytorch import ResidualLFQ

from audiolm_pytorch.codecs.quantizers.distributed import joined_mean
from audiolm_pytorch.codecs.quantizers.scalar import ScalarLevels
from audiolm_pytorch.saving.modules import register

__all__ = ["ResidualLookupFreeQuantizer"]


@register
class ResidualLookupFreeQuantizer(ScalarLevels):
    """Residual quantization by signs: level k adds or subtracts `2**-k` in each of `log2(codebook_size)` coordinates.

    Nothing is looked up when encoding and no code can die, but coordinates can come to share their sign in all frames.
    The entropy loss of arXiv 2310.05737 (section 3.1) works against it: frames should be sure of their code, and all
    codes be used. It is computed here, not in vector-quantize-pytorch 1.32, which leaves out the other processes' part.

    Args:
        dim: Width of the frames.
        codebook_size: Codes per level, a power of 2.
        num_quantizers: Levels.
        entropy_weight: Of the entropy loss, which is the share of a codebook's information left unused, 0..1.
        temperature: How far from zero a coordinate counts as sure of its sign, in units of the level's step.
        level_dropout: Share of the training batches in which trailing levels are left out at random.

    Raises:
        ValueError: If `codebook_size` is not a power of 2.
    """

    bound = 2.0

    @beartype
    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int = 1024,
        num_quantizers: int = 8,
        entropy_weight: float = 0.1,
        temperature: float = 1.0,
        level_dropout: float = 0.5,
    ) -> None:
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            lower = 2 ** max(1, math.floor(math.log2(max(codebook_size, 2))))
            raise ValueError(
                f"a lookup-free codebook holds a power of 2 of codes, got {codebook_size}; take {lower} or {2 * lower}"
            )
        config: dict[str, Any] = dict(
            dim=dim,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            entropy_weight=entropy_weight,
            temperature=temperature,
            level_dropout=level_dropout,
        )
        rvq = ResidualLFQ(dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers)
        super().__init__(rvq, codebook_size, config)
        self.train()

    def train(self, mode: bool = True) -> "ResidualLookupFreeQuantizer":
        """Set the mode; the layers stay in eval mode, in which they only take signs."""
        super().train(mode)
        self.rvq.eval()
        return self

    def codebook(self, level: int) -> Tensor:
        """Code vectors of a level, `[v, codebook_dim]`."""
        return self.rvq.layers[level].codebook

    def level_loss(self, residual: Tensor, level: int) -> Tensor | float:
        """Weighted entropy loss of a level: 0 when frames are sure of their codes and the codes in uniform use."""
        if self.config["entropy_weight"] == 0:
            return 0.0
        logits = rearrange(residual, "b f d -> (b f) d") * (2 ** (level + 1) / self.config["temperature"])
        positive = logits.sigmoid()
        # of independent signs: the entropies of a frame's coordinates add up
        unsure = positive * F.softplus(-logits) + (1 - positive) * F.softplus(logits)
        # the probability of a code is a product over coordinates, so the mean over frames is one matrix product
        half = logits.shape[-1] // 2
        total = _code_probabilities(positive[:, :half]).t() @ _code_probabilities(positive[:, half:])
        used = joined_mean(total, len(logits))
        spread = -(used * used.clamp(min=1e-12).log()).sum()
        unused_share = 1 + (unsure.sum(dim=-1).mean() - spread) / math.log(self.codebook_size)
        return self.config["entropy_weight"] * unused_share

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        return self.rvq.layers[level](residual).indices.long()


def _code_probabilities(positive: Tensor) -> Tensor:
    """Probabilities `[n, 2**d]` of all sign patterns of d independent coordinates, from those of a plus, `[n, d]`."""
    patterns = positive.new_ones(len(positive), 1)
    for plus in positive.split(1, dim=-1):
        patterns = torch.cat([patterns * (1 - plus), patterns * plus], dim=-1)
    return patterns
