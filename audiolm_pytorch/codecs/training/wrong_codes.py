"""Wrong codes that a decoder receives in training, so that it tolerates the mistakes of a language model."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.quantizers.base import ResidualLevels
from audiolm_pytorch.training.arguments import trainer_arguments

__all__ = ["WrongCodes"]


@trainer_arguments()
@typed
@dataclass(frozen=True)
class WrongCodes:
    """Replaces some codes by wrong ones before they are decoded in training, while the target wave stays clean.

    Without such training, the decoder turns a single wrong code of a language model into an audible burst.

    Args:
        item_share: Share of the items of a batch that receive wrong codes.
        max_code_share: Largest share of wrong codes; each item and level draws a share from 0 to this share.
        near_share: Share of the wrong codes that are one of the `num_near` codes nearest to the correct code, as a
            language model's mistakes often are; the other wrong codes are drawn from the whole codebook.
        num_near: Number of codes from which a near code is drawn.
    """

    item_share: float = 0.5
    max_code_share: float = 0.4
    near_share: float = 0.5
    num_near: int = 16

    def __post_init__(self) -> None:
        shares = (self.item_share, self.max_code_share, self.near_share)
        if not all(0 <= share <= 1 for share in shares) or self.num_near < 1:
            raise ValueError(f"shares must be in 0..1 and num_near 1 or more, got {self}")

    @torch.no_grad()
    def replaced(self, quantizer: ResidualLevels, codes: Tensor) -> Tensor:
        """Return codes `[b, f, q]` with wrong codes; random numbers come from the global generator."""
        num_items, _, num_levels = codes.shape
        coin = torch.rand(num_items, 1, 1, device=codes.device) < self.item_share
        share = torch.rand(num_items, 1, num_levels, device=codes.device) * self.max_code_share
        is_wrong = coin & (torch.rand(codes.shape, device=codes.device) < share)
        is_near = torch.rand(codes.shape, device=codes.device) < self.near_share
        wrong = torch.randint(quantizer.codebook_size, codes.shape, device=codes.device)
        rank = torch.randint(min(self.num_near, quantizer.codebook_size - 1), codes.shape, device=codes.device)
        for level in range(num_levels):
            chosen = (is_wrong & is_near)[..., level]
            codebook = quantizer.codebook(level).float()
            distances = torch.cdist(codebook[codes[..., level][chosen]], codebook)
            nearest = distances.topk(min(self.num_near + 1, quantizer.codebook_size), largest=False).indices[:, 1:]
            wrong[..., level][chosen] = nearest.gather(1, rearrange(rank[..., level][chosen], "m -> m 1"))[:, 0]
        return torch.where(is_wrong, wrong, codes)
