"""The loss balancer of EnCodec: weights that say how much of the gradient a loss gets, whatever its scale."""

from collections.abc import Mapping

import torch
from beartype import beartype
from torch import Tensor, nn

__all__ = ["LossBalancer"]


class LossBalancer(nn.Module):
    """Mixes losses by the gradients that they send into a wave (EnCodec, arXiv 2210.13438, section 3.4, eq. 4).

    The gradient of each loss with respect to the wave is divided by a running mean of its norm; the mix is the weighted
    mean of these. A loss that is not a function of the wave (such as a commitment loss) is added outside.

    The norm is that of the gradient of an item's own loss, root mean square over the batch (for losses that are means
    over the batch), so the mix acts as the gradient of a mean over the batch as well: accumulated batches count as one
    large batch. This is eq. 4 with R = 1 / sqrt(b). Of several processes each divides by the norms that it sees, and
    those of the first are kept.

    The means are buffers, hence in the checkpoint of the module that holds the balancer. They are corrected for their
    start, like Adam's, and pass over steps without a gradient or with one that is not finite: neither says anything
    about the scale of the loss.

    Args:
        weights: Name of each loss to its share; only their ratios matter. A loss of weight 0 is not differentiated.
        decay: Of the running means.

    Raises:
        ValueError: If a weight is negative, all are 0, or the decay is not in 0..1.
    """

    norm_sums: Tensor
    norm_counts: Tensor

    @beartype
    def __init__(self, weights: Mapping[str, float | int], decay: float = 0.999) -> None:
        super().__init__()
        if not any(weights.values()) or min(weights.values()) < 0 or not 0 <= decay < 1:
            raise ValueError(
                f"need weights of 0 or more, one of them above 0, and 0 <= decay < 1; got {dict(weights)} and {decay}"
            )
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.decay = decay
        self.register_buffer("norm_sums", torch.zeros(len(weights)))
        self.register_buffer("norm_counts", torch.zeros(len(weights)))

    @beartype
    def forward(self, losses: Mapping[str, Tensor], wave: Tensor) -> Tensor:
        """Make the loss whose gradient with respect to the wave is the mix.

        Args:
            losses: Scalars, functions of `wave` or constants; those of `weights` or some of them, which then share the
                gradient among themselves.
            wave: `[b, ...]`, what the losses were computed from, itself made by the generator.

        Returns:
            Scalar to differentiate once. Its value is the weighted mean of the losses; NaN if a loss or gradient is.

        Raises:
            ValueError: If a name is unknown, no loss has a weight, a loss does not depend on the wave, or the wave
                needs no gradient.
        """
        active = self._active(losses)
        if not wave.requires_grad:
            raise ValueError("the wave needs no gradient; call the balancer where the generator is differentiated")
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

    @property
    def running_norms(self) -> dict[str, Tensor]:
        """Mean gradient norm of every loss so far; 0 where there was none."""
        means = self.norm_sums / self.norm_counts.clamp(min=torch.finfo(torch.float32).tiny)
        return dict(zip(self.weights, means.unbind()))

    def _active(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the losses that have a weight."""
        unknown = sorted(set(losses) - set(self.weights))
        active = {name: loss for name, loss in losses.items() if self.weights.get(name)}
        if unknown or not active:
            raise ValueError(
                f"got losses {sorted(losses)}; need at least one with a weight above 0 and none that is not among "
                f"{self.weights}"
            )
        return active

    @torch.no_grad()
    def _running_norm(self, name: str, gradient: Tensor) -> Tensor:
        """Take a gradient into its running mean, and give the mean."""
        index = list(self.weights).index(name)
        norm = gradient.norm() * len(gradient) ** 0.5
        counts = torch.isfinite(norm) & (norm > 0)
        decay = torch.where(counts, self.decay, 1.0)
        self.norm_sums[index] = decay * self.norm_sums[index] + torch.where(counts, (1 - self.decay) * norm, 0.0)
        self.norm_counts[index] = decay * self.norm_counts[index] + torch.where(counts, 1 - self.decay, 0.0)
        # before the first gradient both are 0, and so is the gradient that is divided
        tiny = torch.finfo(torch.float32).tiny
        return (self.norm_sums[index] / self.norm_counts[index].clamp(min=tiny)).clamp(min=tiny)


def _gradient(name: str, loss: Tensor, wave: Tensor) -> Tensor | None:
    """Differentiate a loss with respect to the wave alone; None for a constant."""
    if not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, wave, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"the loss {name!r} does not depend on the wave; add it outside the balancer")
    return gradient.float()
