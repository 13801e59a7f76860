"""Parts of transformer blocks: root mean square normalisation and feed-forward layers."""

from collections.abc import Callable
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from audiolm_pytorch.checks.types import typed

__all__ = ["Dropout", "FeedForward", "GatedFeedForward", "NormFactory", "RMSNorm", "is_plain", "norm_factory"]


def _is_differentiated_eagerly() -> bool:
    """Whether to use the backward passes of this file: not under torch.compile, which generates its own."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RootMeanSquareNorm(torch.autograd.Function):
    """`x / rms(x) * weight` with a backward pass that takes less than half the time of autograd on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        grad_weight = (grads[0] * unit).reshape(-1, len(weight)).sum(0)
        grad_unit = grads[0] * weight.to(x.dtype)
        # The component along x only changes the norm, which is divided out.
        along = (grad_unit * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad_unit, unit, along, value=-1).mul_(inverse), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467, eq. 4) with a learned scale."""

    eps = 1e-6  # added to the mean square

    @typed
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., d]` over the last axis."""
        if not _is_differentiated_eagerly():
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)
        return _RootMeanSquareNorm.apply(x, self.weight, self.eps)


# Creates the norm of vectors of a width.
NormFactory = Callable[[int], nn.Module]


def norm_factory(norm: Literal["rms", "layer"] | NormFactory) -> NormFactory:
    """Return the factory of a norm: `RMSNorm`, `nn.LayerNorm`, or the passed factory."""
    if norm == "rms":
        return RMSNorm
    return nn.LayerNorm if norm == "layer" else norm


class Dropout(nn.Dropout):
    """Dropout that is faster on a CPU, as one random number masks 8 values; `p` is rounded to a multiple of 1/256."""

    def forward(self, x: Tensor) -> Tensor:
        """Set random values of `x [...]` to zero and scale the others, in training mode."""
        num_dropped = round(self.p * 256)  # of 256 values of a byte
        if not self.training or not 0 < num_dropped < 256 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        numbers = torch.empty(ceil(x.numel() / 8), dtype=torch.int64).random_(-(2**63), None)
        is_kept = numbers.view(torch.uint8)[: x.numel()] >= num_dropped
        return x * is_kept.to(x.dtype).mul_(256 / (256 - num_dropped)).view_as(x)


def _gated(halves: Tensor) -> Tensor:
    """Return `value * silu(gate)`; `halves` is the concatenation of `value` and `gate` along the last axis."""
    value, gate = halves.chunk(2, dim=-1)
    return F.silu(gate) * value


class _GatedProjection(torch.autograd.Function):
    """Projection of `value * silu(gate)`; for the backward pass, it stores half as many values as autograd."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(halves, weight)
        return F.linear(_gated(halves), weight.to(halves.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        halves, weight = ctx.saved_tensors
        value, gate = halves.chunk(2, dim=-1)
        activated = F.silu(gate)
        grad = grads[0] @ weight.to(halves.dtype)
        grad_halves = torch.empty_like(halves)
        grad_value, grad_gate = grad_halves.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_value)
        product = activated.mul_(value)
        grad_weight = grads[0].reshape(-1, len(weight)).T @ product.reshape(-1, weight.shape[1])
        torch.ops.aten.silu_backward.grad_input(grad.mul_(value), gate, grad_input=grad_gate)
        return grad_halves, grad_weight.to(weight.dtype)


class GatedFeedForward(nn.Module):
    """Feed-forward layer with a SiLU gate and without biases (SwiGLU, arXiv:2002.05202, eq. 6)."""

    @typed
    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x [..., d]`; the shape stays the same."""
        halves = self.up(x)
        # `_GatedProjection` cannot reproduce dropout in its backward pass.
        is_dropping = self.dropout.p > 0 and self.training
        if _is_differentiated_eagerly() and not is_dropping and is_plain(self.down):
            return _GatedProjection.apply(halves, self.down.weight)
        gated = _gated(halves)
        return self.down(self.dropout(gated) if is_dropping else gated)


class FeedForward(nn.Module):
    """Feed-forward layer with one hidden layer, for example that of GPT-2, T5 and MusicGen.

    Args:
        activation: `gelu`, `gelu_tanh` (the approximation of GPT-2), or `relu`.
    """

    @typed
    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        gelu = nn.GELU("tanh" if activation == "gelu_tanh" else "none")
        self.activation = nn.ReLU() if activation == "relu" else gelu
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x [..., d]`; the shape stays the same."""
        return self.down(self.dropout(self.activation(self.up(x))))


def is_plain(module: nn.Module) -> bool:
    """Whether the weights of a layer determine its output: it has no hooks and is no subclass (e.g. with adapters)."""
    kinds = (nn.Linear, nn.LayerNorm, RMSNorm, GatedFeedForward, FeedForward)
    return type(module) in kinds and not module._forward_hooks and not module._forward_pre_hooks
