"""Positions of transformers: rotary, relative and sinusoidal positions, and a bias of cosine waves."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed

__all__ = ["RelativePositions", "RotaryPositions", "SinusoidalPositions", "WavePositionBias", "rotate"]

_BASE = 10_000.0  # longest wavelength in positions, divided by 2 pi


class RotaryPositions(nn.Module):
    """Cosines and sines of rotary position embeddings (RoFormer, arXiv:2104.09864, eq. 15)."""

    @typed
    def __init__(self, dim_head: int) -> None:
        super().__init__()
        if dim_head % 2:
            raise ValueError(f"rotary positions rotate pairs of values, so dim_head must be even; got {dim_head}")
        self.dim_head = dim_head

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cosines and sines `[..., n, dim_head]` float32 of integer positions `[..., n]`, for `rotate`."""
        exponents = torch.arange(0, self.dim_head, 2, device=positions.device, dtype=torch.float32) / self.dim_head
        angles = positions.unsqueeze(-1).float() * _BASE**-exponents
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (value i, value i + d / 2) of `x [..., d]` with the cosines and sines of `RotaryPositions`."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


class RelativePositions(nn.Module):
    """Learned bias for causal attention by the distance from row to key (T5, arXiv:1910.10683, sec. 2.1).

    Distances are grouped into buckets; all distances in a bucket share a bias per head. Half of the buckets contain one
    distance each, the other buckets contain logarithmically growing ranges of distances. As in T5, there are 32
    buckets, and the last one contains all distances from 128 on.
    """

    num_buckets = 32
    max_distance = 128

    @typed
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias = nn.Embedding(self.num_buckets, heads)

    def buckets(self, distances: Tensor) -> Tensor:
        """Index (int64) of the bucket that contains each distance; negative distances count as 0."""
        exact = self.num_buckets // 2
        distances = distances.clamp(min=0)
        scale = (self.num_buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distances.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distances < exact, distances, far.clamp(max=self.num_buckets - 1))

    def forward(self, positions: Tensor, num_keys: int) -> Tensor:
        """Compute the bias `[b or 1, h, n, num_keys]` of rows at `positions [b or 1, n]` for keys at 0..num_keys-1."""
        by_distance = self.bias(self.buckets(torch.arange(num_keys, device=positions.device)))
        distances = positions.unsqueeze(-1) - torch.arange(num_keys, device=positions.device)
        # All distances are below the number of keys. The caller masks later keys.
        return rearrange(by_distance[distances.clamp(min=0)], "b n k h -> b h n k")


class SinusoidalPositions(nn.Module):
    """Position embeddings of sines and cosines (arXiv:1706.03762, sec. 3.5), which are added to the inputs of a stack.

    The first half of an embedding consists of the cosines, the second half of the sines, as in MusicGen.
    """

    @typed
    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2 or dim < 4:
            raise ValueError(f"sinusoidal positions need an even dim of at least 4, got {dim}")
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        """Compute the embeddings `[..., n, dim]` float32 of integer positions `[..., n]`."""
        exponents = torch.arange(self.dim // 2, device=positions.device, dtype=torch.float32) / (self.dim // 2 - 1)
        angles = positions.unsqueeze(-1).float() / _BASE**exponents
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class WavePositionBias(nn.Module):
    """Learned attention bias that depends on the offset of two positions, for any number of axes and any length.

    A dynamic position bias (CrossFormer, arXiv:2108.00154, sec. 3.3) evaluates a small network for every pair of
    tokens. This class uses a sum of cosine waves with learned amplitudes, frequencies and phases,
    `bias(p - q) = sum_r a_r cos(f_r (p - q) + o_r)`. Because `cos(x - y) = cos x cos y + sin x sin y`, the bias is
    the inner product of a query vector and a key vector of `2 num_waves` values. The bias therefore needs no matrix of
    all pairs, works in fused attention, and allows other positions in every item (dropped patches).
    """

    @typed
    def __init__(self, heads: int, num_axes: int = 1, num_waves: int = 8) -> None:
        super().__init__()
        if min(heads, num_axes, num_waves) < 1:
            raise ValueError(
                f"heads, num_axes and num_waves must be >= 1, got heads={heads}, num_axes={num_axes}, "
                f"num_waves={num_waves}"
            )
        self.num_axes = num_axes
        # Wavelengths from 2 to 128 positions in random directions. The bias starts at 0.
        directions = F.normalize(torch.randn(heads, num_waves, num_axes), dim=-1)
        # An explicit device: transformers replaces linspace for a while, and a device context may keep the replacement.
        wavelengths = 2.0 ** torch.linspace(1, 7, num_waves, device=directions.device)
        self.frequencies = nn.Parameter(directions * (2 * torch.pi / wavelengths).unsqueeze(-1))
        self.phases = nn.Parameter(torch.zeros(heads, num_waves))
        self.amplitudes = nn.Parameter(torch.zeros(heads, num_waves))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute two tensors `[b or 1, h, t, 2 num_waves]` float32 from positions `[b or 1, t, num_axes]`.

        The inner products of the first tensor (queries) and the second tensor (keys) are the bias `[b or 1, h, t, t]`.
        """
        phases = torch.einsum("b t a, h w a -> b h t w", positions.float(), self.frequencies.float())
        shifted = phases + rearrange(self.phases.float(), "h w -> h 1 w")
        amplitudes = rearrange(self.amplitudes.float(), "h w -> h 1 w")
        queries = torch.cat((amplitudes * shifted.cos(), amplitudes * shifted.sin()), dim=-1)
        return queries, torch.cat((phases.cos(), phases.sin()), dim=-1)
