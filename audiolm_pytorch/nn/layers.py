"""Layers of the transformers, all without biases: projection, normalisation, gated feed-forward layer, positions."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["GatedFeedForward", "Projection", "RMSNorm", "RelativePositions", "RotaryPositions", "rotate"]

# A product with at most 16 rows is limited by reading the weights, and torch 2.13's float32 kernel reads them on one
# core. A batched product of parts of the weights uses all cores (one row, 512 x 2730, two cores: 95 us, not 240 us).
_MAX_SPLIT_ROWS = 16
_MAX_PARTS = 32


class Projection(nn.Linear):
    """A linear layer without bias that uses all CPU cores also for a single row."""

    @beartype
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, bias=False)
        self._num_parts = max(parts for parts in range(1, _MAX_PARTS + 1) if dim_out % parts == 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim_in]` to `[..., dim_out]`."""
        num_rows = x.numel() // self.in_features
        if num_rows > _MAX_SPLIT_ROWS or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.weight)
        parts = self.weight.view(self._num_parts, -1, self.in_features)
        out = torch.bmm(x.reshape(1, num_rows, self.in_features).expand(self._num_parts, -1, -1), parts.mT)
        return out.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


def _is_differentiated_eagerly() -> bool:
    """Whether to use the backward passes of this file; torch.compile has its own."""
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
        grad_weight = (grads[0] * unit).flatten(0, -2).sum(0)
        grad_unit = grads[0] * weight.to(x.dtype)
        # The component along x only changes the norm, which is divided out.
        along = (grad_unit * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad_unit, unit, along, value=-1).mul_(inverse), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467, eq. 4) with a learned scale."""

    eps = 1e-6  # added to the mean square

    @beartype
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., d]` over the last axis."""
        if not _is_differentiated_eagerly():
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)
        return _RootMeanSquareNorm.apply(x, self.weight, self.eps)


def _gated(halves: Tensor) -> Tensor:
    """`value * silu(gate)` of the two halves of `[..., 2 h]`."""
    value, gate = halves.chunk(2, dim=-1)
    return F.silu(gate) * value


class _GatedProjection(torch.autograd.Function):
    """Projection of `value * silu(gate)` that stores half as much for the backward pass as autograd."""

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
    """Feed-forward layer with a SiLU gate (SwiGLU, arXiv:2002.05202, eq. 6).

    Args:
        dim: Width of inputs and outputs.
        hidden_dim: Width of the hidden layer.
        dropout: Dropout probability of hidden values.
    """

    @beartype
    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = Projection(dim, 2 * hidden_dim)
        self.down = Projection(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x [..., d]`; the shape stays the same."""
        halves = self.up(x)
        # `_GatedProjection` cannot reproduce dropout in its backward pass, and packed weights have no gradient.
        is_dropping = self.dropout.p > 0 and self.training
        if isinstance(self.down, Projection) and _is_differentiated_eagerly() and not is_dropping:
            return _GatedProjection.apply(halves, self.down.weight)
        gated = _gated(halves)
        return self.down(self.dropout(gated) if is_dropping else gated)


class RotaryPositions(nn.Module):
    """Cosines and sines of rotary position embeddings (RoFormer, arXiv:2104.09864, eq. 15).

    Args:
        dim_head: Width of a head; must be even.
        base: Longest wavelength in positions, divided by 2 pi.
    """

    @beartype
    def __init__(self, dim_head: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim_head % 2:
            raise ValueError(f"rotary positions rotate pairs of values, so dim_head must be even; got {dim_head}")
        self.dim_head = dim_head
        self.base = base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cosines and sines `[..., n, dim_head]` float32 of integer positions `[..., n]`, for `rotate`."""
        exponents = torch.arange(0, self.dim_head, 2, device=positions.device, dtype=torch.float32) / self.dim_head
        angles = positions.unsqueeze(-1).float() * self.base**-exponents
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (value i, value i + d / 2) of `x [..., d]` with the cosines and sines of `RotaryPositions`."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


class RelativePositions(nn.Module):
    """Learned bias for causal attention by the distance from row to key (T5, arXiv:1910.10683, sec. 2.1).

    Distances are grouped into buckets; all distances in a bucket share a bias per head. Half of the buckets contain one
    distance each, the other buckets contain logarithmically growing ranges. As in T5, there are 32 buckets, and the
    last one contains all distances from 128 on.
    """

    num_buckets = 32
    max_distance = 128

    @beartype
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias = nn.Embedding(self.num_buckets, heads)

    def buckets(self, distances: Tensor) -> Tensor:
        """Index of the bucket of each distance, int64; negative distances count as 0."""
        exact = self.num_buckets // 2
        distances = distances.clamp(min=0)
        scale = (self.num_buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distances.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distances < exact, distances, far.clamp(max=self.num_buckets - 1))

    def forward(self, positions: Tensor, num_keys: int) -> Tensor:
        """Compute the bias `[b or 1, h, n, num_keys]` of rows at `positions [b or 1, n]` for keys from 0 on."""
        by_distance = self.bias(self.buckets(torch.arange(num_keys, device=positions.device)))
        distances = positions.unsqueeze(-1) - torch.arange(num_keys, device=positions.device)
        # All distances are below the number of keys. The caller masks later keys.
        return rearrange(by_distance[distances.clamp(min=0)], "b n k h -> b h n k")
