"""Probes: how much a simple reader finds in frozen features or in the tokens cut from them.

A linear probe says what a linear map finds in one vector (Alain & Bengio, arXiv:1610.01644); a token probe what one
token alone tells; a histogram what a bag of tokens tells, without their order.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor

__all__ = ["LinearProbe", "TokenProbe", "fit_linear_probe", "histogram", "token_probe"]

_ROWS_AT_ONCE = 32_768
# A dimension that moves less than float32 rounds its mean holds noise: it is not blown up to unit variance.
_LEAST_STD_OVER_MEAN = 1e-6


@dataclass(frozen=True)
class LinearProbe:
    """A fitted multinomial logistic regression.

    Attributes:
        weight: `[d, c]`, for standardised features.
        bias: `[c]`.
        mean: `[d]` of the training features.
        std: `[d]` of the training features.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Likeliest class `[m]` int64 of each of the features `[m, d]`."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be [m, {len(self.mean)}], got {tuple(features.shape)}")
        parts = features.float().split(_ROWS_AT_ONCE)
        logits = [torch.addmm(self.bias, (part - self.mean) / self.std, self.weight) for part in parts]
        return torch.cat(logits).argmax(dim=-1)


@beartype
def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    l2: float | int = 1e-4,
    max_iterations: int = 60,
    class_weights: Tensor | None = None,
) -> LinearProbe:
    """Fit a linear classifier by full-batch L-BFGS from zero: no seed, no step size.

    Args:
        features: `[m, d]`, finite; standardised per dimension inside.
        labels: `[m]` int, in 0..num_classes - 1.
        num_classes: Classes, c.
        l2: Weight of the squared norm of the weights in the loss (mean cross-entropy in nats).
        max_iterations: Iterations at most.
        class_weights: `[c]` weight of each class in the loss; None = all frames alike.

    Returns:
        The probe.

    Raises:
        ValueError: If shapes do not fit, a label is none of the classes, or a feature is not finite.
    """
    _check_labels(features, labels, num_classes)
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"features must be finite [m, d], got {tuple(features.shape)}; is the encoder broken?")
    if l2 < 0 or max_iterations < 1:
        raise ValueError(f"need l2 >= 0 and max_iterations >= 1, got {l2} and {max_iterations}")
    features, labels = features.detach().float(), labels.long()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = std.maximum(mean.abs() * _LEAST_STD_OVER_MEAN)
    std = torch.where(std > 0, std, torch.ones_like(std))
    standardised = (features - mean).div_(std)
    weight = torch.zeros(features.shape[1], num_classes, device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(bias, standardised, weight)
        loss = F.cross_entropy(logits, labels, weight=class_weights) + l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), mean, std)


@dataclass(frozen=True)
class TokenProbe:
    """The class that each token stands for.

    Attributes:
        class_of_token: `[k]` int64.
    """

    class_of_token: Tensor

    def predict(self, ids: Tensor) -> Tensor:
        """The class of every token of `ids` (int64, any shape)."""
        return self.class_of_token[ids]


@beartype
def token_probe(
    ids: Tensor, labels: Tensor, num_tokens: int, num_classes: int, *, smoothing: float | int = 0.5
) -> TokenProbe:
    """Take for every token the class that it meets most often.

    Args:
        ids: `[m]` int64, in 0..num_tokens - 1.
        labels: `[m]` int, in 0..num_classes - 1.
        num_tokens: Different tokens, k.
        num_classes: Classes.
        smoothing: Occurrences added to every token, spread like the classes overall: what a token that was never met
            stands for, and what decides between classes that it met equally often.

    Returns:
        The probe.

    Raises:
        ValueError: If shapes do not fit, or an id or a label is out of range.
    """
    _check_labels(ids, labels, num_classes)
    if ids.ndim != 1 or int(ids.min()) < 0 or int(ids.max()) >= num_tokens:
        raise ValueError(f"ids must be [m] within 0..{num_tokens - 1}, got {tuple(ids.shape)} up to {int(ids.max())}")
    pairs = ids.long() * num_classes + labels.long()
    counts = rearrange(pairs.bincount(minlength=num_tokens * num_classes), "(k c) -> k c", c=num_classes).double()
    return TokenProbe((counts + smoothing * counts.sum(dim=0) / len(labels)).argmax(dim=-1))


@beartype
def histogram(ids: Tensor, num_tokens: int) -> Tensor:
    """Square roots of the shares of the tokens in a sequence: histograms that a linear map can compare.

    The inner product of two of them is the Bhattacharyya coefficient of the distributions (Hellinger kernel).

    Args:
        ids: `[..., t]` int64, in 0..num_tokens - 1; -1 is left out.
        num_tokens: Different tokens, k.

    Returns:
        `[..., k]` float32, of unit norm; zero where a sequence holds no token.

    Raises:
        ValueError: If an id is out of range.
    """
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < num_tokens:
        raise ValueError(f"ids must lie within 0..{num_tokens - 1} (or be -1), got {int(ids.min())}..{int(ids.max())}")
    counts = torch.zeros(*ids.shape[:-1], num_tokens, device=ids.device)
    counts.scatter_add_(-1, ids.clamp(min=0), (ids >= 0).float())
    return (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1.0)).sqrt()


def _check_labels(inputs: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise unless there is one label, of a known class, for each of at least one input."""
    if labels.ndim != 1 or len(inputs) != len(labels) or not len(labels) or labels.is_floating_point():
        raise ValueError(f"need one int label for each input and at least one, got {len(labels)} for {len(inputs)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
