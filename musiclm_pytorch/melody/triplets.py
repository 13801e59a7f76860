"""Semi-hard triplet loss."""

import torch
from torch import Tensor

__all__ = ["semi_hard_triplet_loss"]


def semi_hard_triplet_loss(latents: Tensor, positives: Tensor, is_negative: Tensor, margin: float = 0.2) -> Tensor:
    """Compute the triplet loss of FaceNet (arXiv:1503.03832, sec. 3.1) with semi-hard negatives, as in MusicLM.

    The negative of an anchor is the nearest one that is farther away than its positive, or the farthest one if all are
    nearer than its positive. Distances are squared.

    Args:
        latents: Unit vectors `[n, d]`; each is an anchor.
        positives: Index of the positive of each anchor, `[n]`.
        is_negative: Mask `[n, n]` of the negatives of each anchor; an anchor without negatives is left out.
    """
    distances = 2 - 2 * latents @ latents.T
    to_positive = distances.gather(1, positives.unsqueeze(1))
    is_farther = is_negative & (distances.detach() > to_positive.detach())
    nearest = distances.masked_fill(~is_farther, torch.inf).amin(dim=1)
    farthest = distances.masked_fill(~is_negative, -torch.inf).amax(dim=1)
    to_negative = torch.where(is_farther.any(dim=1), nearest, farthest)
    losses = (to_positive.squeeze(1) - to_negative + margin).clamp(min=0)
    has_negatives = is_negative.any(dim=1)
    return losses.where(has_negatives, losses.new_zeros(())).sum() / has_negatives.sum().clamp(min=1)
