"""Network of vq-wav2vec (arXiv:1910.05453) that computes codes: convolutions and a quantizer."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.semantic.pretrained.convolutions import Moments, moments_of
from audiolm_pytorch.semantic.windows import ReceptiveField

__all__ = ["ACTIVATIONS", "ConvFeatures", "GumbelQuantizer", "KMeansQuantizer", "VQWav2Vec"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
# Longer waves are convolved in chunks of this length: 30 s at 16 kHz take 200 MB in the first layer.
_SAMPLES_PER_CHUNK = 480_000


class _ConvLayer(nn.Module):
    """Convolution without padding and bias, followed by a norm over all channels and times, and by an activation."""

    def __init__(self, dim_in: int, layer: list[int], activation: str) -> None:
        super().__init__()
        dim, kernel, stride = layer
        self.conv = nn.Conv1d(dim_in, dim, kernel, stride, bias=False)
        self.norm = nn.GroupNorm(1, dim)
        self.activation = ACTIVATIONS[activation]
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        """Convert features `[b, c, n]` to `[b, d, t]`; for a chunk of a wave, pass the moments of the whole wave."""
        y = self.conv(x)
        if moments is None:
            y = self.norm(y)
        else:
            y = (y - moments.mean) * (moments.variance + self.norm.eps).rsqrt()
            y = y * rearrange(self.norm.weight, "d -> d 1") + rearrange(self.norm.bias, "d -> d 1")
        return self.activation(y)


class ConvFeatures(nn.Module):
    """Convolutional feature extractor of wav2vec (arXiv:1904.05862, section 2.1).

    The output of every layer is normalised over the whole wave. Long waves are processed in chunks, which does not
    change the features, but needs three to six times the computation.

    Args:
        layers: Width, kernel size and stride of every convolution.
        log_compression: Whether features x are replaced by `log(1 + |x|)`.
    """

    @beartype
    def __init__(self, *, layers: list[list[int]], activation: str, log_compression: bool) -> None:
        super().__init__()
        self.config = dict(layers=layers, activation=activation, log_compression=log_compression)
        widths, kernels, strides = zip(*layers)
        self.dim: int = widths[-1]
        self.frames = ReceptiveField.of_convolutions(kernels, strides)
        self.log_compression = log_compression
        self.layers = nn.ModuleList(
            _ConvLayer(dim_in, layer, activation) for dim_in, layer in zip((1, *widths), layers)
        )

    def forward(self, wave: Tensor) -> Tensor:
        """Convert waves `[b, n]` without padding to features `[b, d, t]`."""
        x = rearrange(wave, "b n -> b 1 n")
        x = self._in_chunks(x) if wave.shape[1] > _SAMPLES_PER_CHUNK else nn.Sequential(*self.layers)(x)
        return x.abs().log1p() if self.log_compression else x

    def _in_chunks(self, x: Tensor) -> Tensor:
        """Compute the features of a long wave `[b, 1, n]` in chunks.

        Large outputs of layers are not stored, but computed again from the last stored output.
        """
        layers = cast(list[_ConvLayer], list(self.layers))
        before: list[tuple[_ConvLayer, Moments]] = []  # the layers since the kept output, which is x
        num_samples, stride = x.shape[-1], 1
        for layer in layers:
            chunk_frames = max(1, _SAMPLES_PER_CHUNK // stride)
            moments = moments_of((layer.conv(chunk) for chunk in _chunks(x, before, layer, chunk_frames)), (1, 2))
            next_stride = stride * prod(other.stride for other, _ in before) * layer.stride
            is_small = num_samples // next_stride <= _SAMPLES_PER_CHUNK // layers[0].stride
            if is_small or next_stride == self.frames.stride:
                x = torch.cat([layer(chunk, moments) for chunk in _chunks(x, before, layer, chunk_frames)], dim=-1)
                before, stride = [], next_stride
            else:
                before.append((layer, moments))
        return x


def _chunks(
    x: Tensor, before: list[tuple[_ConvLayer, Moments]], layer: _ConvLayer, chunk_frames: int
) -> Iterator[Tensor]:
    """Yield the input of `layer` in chunks; the input is computed from x by the layers in `before`."""
    layers = [*(other for other, _ in before), layer]
    frames = ReceptiveField.of_convolutions([each.kernel for each in layers], [each.stride for each in layers])
    total, step = frames.num_frames(x.shape[-1]), max(1, frames.num_frames(chunk_frames))
    for start in range(0, total, step):
        chunk = x[..., frames.span(start, min(start + step, total))]
        for other, moments in before:
            chunk = other(chunk, moments)
        yield chunk


class GumbelQuantizer(nn.Module):
    """Quantizer that selects the codes with the largest logits, like a Gumbel softmax without noise.

    Args:
        dim: Width of the features.
        groups: Number of groups; every frame has one code of each group.
        codes: Number of codes in a group.
        depth: Number of linear layers, with activations between them; hidden layers are twice as wide as the features.
    """

    @beartype
    def __init__(self, *, dim: int, groups: int, codes: int, depth: int, activation: str) -> None:
        super().__init__()
        self.config = dict(dim=dim, groups=groups, codes=codes, depth=depth, activation=activation)
        self.groups, self.codes = groups, codes
        self.activation = ACTIVATIONS[activation]
        widths = [dim, *(depth - 1) * [2 * dim], groups * codes]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def vectors(self, features: Tensor) -> Tensor:
        """Convert features `[b, d, t]` to the input `[b, t, d]` of `assign`."""
        return rearrange(features, "b d t -> b t d")

    def assign(self, vectors: Tensor) -> Tensor:
        """Compute the codes `[b, t, g]` int64 of frames `[b, t, d]`."""
        *inner, last = self.layers
        for layer in inner:
            vectors = self.activation(layer(vectors))
        return rearrange(last(vectors), "b t (g v) -> b t g v", g=self.groups).argmax(dim=-1)


class KMeansQuantizer(nn.Module):
    """Quantizer that selects the nearest codebook entry for each group of the projected and normalised features.

    The first three arguments are those of `GumbelQuantizer`; if `shared` is True, all groups use one codebook.
    """

    @beartype
    def __init__(self, *, dim: int, groups: int, codes: int, shared: bool) -> None:
        super().__init__()
        self.config = dict(dim=dim, groups=groups, codes=codes, shared=shared)
        self.groups, self.codes = groups, codes
        self.projection = nn.Conv1d(dim, dim, 1, groups=groups, bias=False)
        self.norm = nn.GroupNorm(groups, dim)
        self.codebook = nn.Parameter(torch.zeros(codes, 1 if shared else groups, dim // groups))

    def vectors(self, features: Tensor) -> Tensor:
        """Project features `[b, d, t]` to the input `[b, t, d]` of `assign`, and normalise the result over time."""
        return rearrange(self.norm(self.projection(features)), "b d t -> b t d")

    def assign(self, vectors: Tensor) -> Tensor:
        """Compute the codes `[b, t, g]` int64 of frames `[b, t, d]`."""
        points = rearrange(vectors, "b t (g d) -> g (b t) d", g=self.groups)
        books = rearrange(self.codebook.expand(-1, self.groups, -1), "v g d -> g v d")
        codes = torch.stack([nearest_centroid(part, book) for part, book in zip(points, books)])
        return rearrange(codes, "g (b t) -> b t g", b=len(vectors))


_QUANTIZERS = {"gumbel": GumbelQuantizer, "kmeans": KMeansQuantizer}


class VQWav2Vec(nn.Module):
    """vq-wav2vec network that converts waves to features, and features to codes."""

    @beartype
    def __init__(self, features: ConvFeatures, quantizer: GumbelQuantizer | KMeansQuantizer) -> None:
        super().__init__()
        self.features = features
        self.quantizer = quantizer
        self.frames = features.frames

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments of the feature extractor and the quantizer."""
        kind = next(name for name, cls in _QUANTIZERS.items() if isinstance(self.quantizer, cls))
        return {"features": self.features.config, "kind": kind, "quantizer": self.quantizer.config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VQWav2Vec":
        """Build a network with random weights from a `config`."""
        return cls(ConvFeatures(**config["features"]), _QUANTIZERS[config["kind"]](**config["quantizer"]))

    def vectors(self, wave: Tensor) -> Tensor:
        """Compute the input `[b, t, d]` of the quantizer for waves `[b, n]` without padding."""
        return self.quantizer.vectors(self.features(wave))

    def forward(self, wave: Tensor) -> Tensor:
        """Convert waves `[b, n]` without padding to codes `[b, t, g]` int64 in [0, codes)."""
        return self.quantizer.assign(self.vectors(wave))
