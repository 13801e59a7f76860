"""How much of its codebooks a codec uses."""

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["code_usage"]


def code_usage(codes: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """Share of the codes in use and perplexity (as a share of the codebook) of every level.

    Args:
        codes: `[..., q]` int64; negative entries are left out.
        codebook_size: Codes per level.

    Returns:
        `usage [q]` and `perplexity [q]`, each in 0..1.
    """
    levels = rearrange(codes, "... q -> q (...)")
    counts = torch.stack([torch.bincount(level[level >= 0], minlength=codebook_size) for level in levels]).float()
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=-1)
    return {"usage": (counts > 0).float().mean(dim=-1), "perplexity": entropy.exp() / codebook_size}
