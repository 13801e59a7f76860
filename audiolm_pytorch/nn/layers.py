"""Parts of the block stack: projection, normalisation, gated feed-forward, positions. No part has a bias."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["GatedFeedForward", "Projection", "RMSNorm", "RelativePositions", "RotaryPositions", "rotate"]

# A product with so few rows is bound by reading the weights, and torch 2.13's fp32 kernel for it reads them on one core
# (one row, 512 x 2730, two cores: 240 us; in parts: 95 us).
_FEW_ROWS = 16
_MOST_PARTS = 32


class Projection(nn.Linear):
    """A linear map without bias, which a CPU computes on all its cores for a single row too.

    Args:
        dim_in: Width in.
        dim_out: Width out.
    """

    @beartype
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, bias=False)
        self._num_parts = max(parts for parts in range(1, _MOST_PARTS + 1) if dim_out % parts == 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim_in]` to `[..., dim_out]`."""
        num_rows = x.numel() // self.in_features
        if num_rows > _FEW_ROWS or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.weight)
        parts = self.weight.view(self._num_parts, -1, self.in_features)
        out = torch.bmm(x.reshape(1, num_rows, self.in_features).expand(self._num_parts, -1, -1), parts.mT)
        return out.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


def _is_differentiated_eagerly() -> bool:
    """Whether backward passes written by hand help: torch.compile derives better ones, and cannot read all of ours."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RootMeanSquareNorm(torch.autograd.Function):
    """`x / rms(x) * weight` with a hand-written backward: less than half the time of composed operators on a CPU."""

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
        # the part along x only changes the length that is divided out
        along = (grad_unit * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad_unit, unit, along, value=-1).mul_(inverse), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467, eq. 4) with a learned scale.

    Args:
        dim: Width.
        eps: Added to the mean square, so that a zero vector stays zero.
    """

    @beartype
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., d]` over its last axis."""
        if not _is_differentiated_eagerly():
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)
        return _RootMeanSquareNorm.apply(x, self.weight, self.eps)


def _gated(halves: Tensor) -> Tensor:
    """`value * silu(gate)` of the two halves of `[..., 2 h]`."""
    value, gate = halves.chunk(2, dim=-1)
    return F.silu(gate) * value


class _GatedProjection(torch.autograd.Function):
    """Projects `value * silu(gate)`, keeping only the two halves for backward: half of what autograd keeps."""

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
        dim: Width in and out.
        hidden_dim: Width inside.
        dropout: Probability of dropping a hidden value.
    """

    @beartype
    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = Projection(dim, 2 * hidden_dim)
        self.down = Projection(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d]` to `[..., d]`."""
        halves = self.up(x)
        # what was dropped cannot be worked out again, and weights packed for decoding get no gradient
        is_dropping = self.dropout.p > 0 and self.training
        if isinstance(self.down, Projection) and _is_differentiated_eagerly() and not is_dropping:
            return _GatedProjection.apply(halves, self.down.weight)
        gated = _gated(halves)
        return self.down(self.dropout(gated) if is_dropping else gated)


class RotaryPositions(nn.Module):
    """Angles of rotary position embedding (RoFormer, arXiv:2104.09864, eq. 15). Has no state.

    Args:
        dim_head: Width of a head, even.
        base: Longest wavelength in positions, divided by 2 pi.

    Raises:
        ValueError: If `dim_head` is odd.
    """

    @beartype
    def __init__(self, dim_head: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim_head % 2:
            raise ValueError(f"rotary positions turn pairs of values: dim_head must be even, got {dim_head}")
        self.dim_head = dim_head
        self.base = base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors `[..., n, dim_head]` float32 for `rotate`, of integer positions `[..., n]`."""
        exponents = torch.arange(0, self.dim_head, 2, device=positions.device, dtype=torch.float32) / self.dim_head
        angles = positions.unsqueeze(-1).float() * self.base**-exponents
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (value i, value i + d/2) of `x [..., d]` by its angle.

    Args:
        x: Queries or keys.
        cos: Cosine of each value's angle, broadcastable to `[..., d]`.
        sin: Sine of each value's angle, of the first halves negative.

    Returns:
        The turned values in the precision of `x`.
    """
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


class RelativePositions(nn.Module):
    """Learned bias of attention by how far back a key lies (T5, arXiv:1910.10683, sec. 2.1), for causal attention.

    Distances share a bias in buckets: half of them for one distance each, the others for ever longer stretches.

    Args:
        heads: Attention heads h.
        num_buckets: Buckets; T5 has 32.
        max_distance: From here on all distances share the last bucket; T5 has 128.

    Raises:
        ValueError: If there are fewer than two buckets, or no distance is left for the longer ones.
    """

    @beartype
    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        if num_buckets < 2 or max_distance <= num_buckets // 2:
            raise ValueError(
                f"need num_buckets >= 2 and max_distance > num_buckets / 2, got {num_buckets} and {max_distance}"
            )
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.bias = nn.Embedding(num_buckets, heads)

    def buckets(self, distances: Tensor) -> Tensor:
        """Bucket of each distance, int64; what lies ahead counts as distance 0."""
        exact = self.num_buckets // 2
        distances = distances.clamp(min=0)
        scale = (self.num_buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distances.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distances < exact, distances, far.clamp(max=self.num_buckets - 1))

    def forward(self, positions: Tensor, num_keys: int) -> Tensor:
        """Bias `[b or 1, h, n, num_keys]` of queries at `positions [b or 1, n]` for keys at 0..num_keys - 1."""
        by_distance = self.bias(self.buckets(torch.arange(num_keys, device=positions.device)))
        distances = positions.unsqueeze(-1) - torch.arange(num_keys, device=positions.device)
        # every distance that occurs is below the number of keys; keys that lie ahead are masked by the caller
        return rearrange(by_distance[distances.clamp(min=0)], "b n k h -> b h n k")
