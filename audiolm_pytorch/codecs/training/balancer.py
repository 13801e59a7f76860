"""Loss balancer of EnCodec, in which the weight of a loss is its share of the gradient, for any scale of the loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed

__all__ = ["LossBalancer"]

_TINY = torch.finfo(torch.float32).tiny


class LossBalancer(nn.Module):
    """Combines losses by their gradients with respect to a wave (EnCodec, arXiv 2210.13438, section 3.4, eq. 4).

    The gradient of each loss is divided by a running mean of its norm; the result is the weighted mean of the scaled
    gradients. A loss that does not depend on the wave, such as a commitment loss, must be added outside the balancer.

    Losses must be means over the batch. The gradient norm of a loss is the root mean square of the gradient norms of
    the batch items. The reference norm R of eq. 4 is 1 / sqrt(b), so that accumulated batches act as one large batch.
    In a distributed run each process has its own running means; checkpoints store the means of the first process.

    The running means of the gradient norms are buffers, with the bias correction of Adam. A step in which the gradient
    of a loss is missing or not finite does not change the running mean of this loss.

    Only the ratios of the `weights` matter. No gradient is computed for a loss of weight 0.
    """

    norm_sums: Tensor
    norm_counts: Tensor

    @typed
    def __init__(self, weights: Mapping[str, float], decay: float = 0.999) -> None:
        super().__init__()
        if not any(weights.values()) or min(weights.values()) < 0 or not 0 <= decay < 1:
            raise ValueError(
                f"need weights of 0 or more, at least one above 0, and 0 <= decay < 1, got {weights=} and {decay=}"
            )
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.decay = decay
        self.register_buffer("norm_sums", torch.zeros(len(weights)))
        self.register_buffer("norm_counts", torch.zeros(len(weights)))

    @typed
    def forward(self, losses: Mapping[str, Tensor], wave: Tensor) -> Tensor:
        """Return the weighted mean of the losses; its gradient is the weighted mean of the rescaled gradients.

        The weight of a missing loss is distributed over the other losses. The output `wave [b, ...]` of the generator
        must require a gradient.
        """
        unknown = sorted(set(losses) - set(self.weights))
        active = {name: loss for name, loss in losses.items() if self.weights.get(name)}
        if unknown or not active:
            raise ValueError(
                f"got losses {sorted(losses)}; pass at least one loss with a weight above 0, and only losses with "
                f"weights in {self.weights}"
            )
        if not wave.requires_grad:
            raise ValueError("wave must require a gradient; call the balancer with gradients enabled")
        share = 1.0 / sum(self.weights[name] for name in active)
        with torch.autocast(wave.device.type, enabled=False):
            mix = torch.zeros_like(wave, dtype=torch.float32)
            value = mix.new_zeros(())
            for name, loss in active.items():
                value = value + share * self.weights[name] * loss.detach().float()
                gradient = _gradient(name, loss, wave)
                if gradient is not None:
                    mix = mix + share * self.weights[name] * gradient / self._running_norm(name, gradient)
            product = (wave.float() * mix).sum()
            return value + (product - product.detach())

    @torch.no_grad()
    def _running_norm(self, name: str, gradient: Tensor) -> Tensor:
        """Update and return the running mean of the gradient norm of a loss."""
        index = list(self.weights).index(name)
        norm = gradient.norm() * len(gradient) ** 0.5
        counts = torch.isfinite(norm) & (norm > 0)
        decay = torch.where(counts, self.decay, 1.0)
        self.norm_sums[index] = decay * self.norm_sums[index] + torch.where(counts, (1 - self.decay) * norm, 0.0)
        self.norm_counts[index] = decay * self.norm_counts[index] + torch.where(counts, 1 - self.decay, 0.0)
        # before the first gradient both are 0, and so is the gradient that is divided
        return (self.norm_sums[index] / self.norm_counts[index].clamp(min=_TINY)).clamp(min=_TINY)


def _gradient(name: str, loss: Tensor, wave: Tensor) -> Tensor | None:
    """Return the gradient of a loss with respect to the wave; None if the loss is a constant."""
    if not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, wave, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"the loss {name!r} does not depend on the wave; add it outside the balancer")
    return gradient.float()
