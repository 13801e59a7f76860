"""Semantic tokenizer vq-wav2vec (arXiv:1910.05453), loaded from its published checkpoints."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.audio.units import exact_div
from audiolm_pytorch.checks.types import named, typed
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.semantic.pretrained.fairseq import FairseqCheckpoint, build_for, conv_layers_of, read_fairseq
from audiolm_pytorch.semantic.windows import Moments, ReceptiveField, moments_of

__all__ = ["FairseqVQWav2Vec", "VQWav2Vec"]

# Parts that codes do not depend on: the context network and its projection, the contrastive heads, and the vectors of
# the Gumbel codebook, which only the context network reads.
_UNUSED = ("feature_aggregator.", "project_features.", "wav2vec_predictions.", "vector_quantizer.vars")
_NAMES = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight)", r"features.layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(weight|bias)", r"features.layers.\1.norm.\2"),
    # One linear layer, or several: all but the last are in a block with an activation.
    (r"vector_quantizer\.weight_proj\.(weight|bias)", r"quantizer.layers.0.\1"),
    (r"vector_quantizer\.weight_proj\.(\d+)\.(?:0\.)?(weight|bias)", r"quantizer.layers.\1.\2"),
    (r"vector_quantizer\.projection\.0\.(weight)", r"quantizer.projection.\1"),
    (r"vector_quantizer\.projection\.1\.(weight|bias)", r"quantizer.norm.\1"),
    (r"vector_quantizer\.embedding", "quantizer.codebook"),
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
# Longer waves are convolved in chunks of this length: 30 s at 16 kHz take 200 MB in the first layer.
_SAMPLES_PER_CHUNK = 480_000


class _ConvLayer(nn.Module):
    """Convolution without padding and bias, followed by a norm over all channels and times, and by an activation."""

    def __init__(self, dim_in: int, layer: list[int], activation: str) -> None:
        super().__init__()
        dim, kernel, stride = layer
        self.conv = nn.Conv1d(dim_in, dim, kernel, stride, bias=False)
        self.norm = nn.GroupNorm(1, dim)
        self.activation = _ACTIVATIONS[activation]
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        """Convert features `[b, c, n]` to `[b, d, t]`; a chunk needs the `moments` (mean, variance) of its wave."""
        y = self.conv(x)
        if moments is None:
            y = self.norm(y)
        else:
            y = (y - moments.mean) * (moments.variance + self.norm.eps).rsqrt()
            y = y * rearrange(self.norm.weight, "d -> d 1") + rearrange(self.norm.bias, "d -> d 1")
        return self.activation(y)


class ConvFeatures(nn.Module):
    """Convolutional feature extractor of wav2vec (arXiv:1904.05862, section 2.1).

    The output of every layer is normalised over the whole wave. Long waves are processed in chunks, which needs three
    to six times the computation of a single pass, and returns the same features. With `log_compression`, features x are
    replaced by `log(1 + |x|)`. The list `layers` has width, kernel size and stride of every convolution.
    """

    @typed
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

    The logits are computed by `depth` linear layers, whose hidden layers are twice as wide as the features.
    """

    @typed
    def __init__(self, *, dim: int, groups: int, codes: int, depth: int, activation: str) -> None:
        super().__init__()
        self.config = dict(dim=dim, groups=groups, codes=codes, depth=depth, activation=activation)
        self.groups, self.codes = groups, codes
        self.activation = _ACTIVATIONS[activation]
        widths = [dim, *(depth - 1) * [2 * dim], groups * codes]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def vectors(self, features: Tensor) -> Tensor:
        """Convert features `[b, d, t]` to the input `[b, t, d]` of `assign`."""
        return rearrange(features, "b d t -> b t d")

    def assign(self, vectors: Tensor) -> Tensor:
        """Compute the codes `[b, t, g]` int64 (g groups) of frames `[b, t, d]`."""
        *inner, last = self.layers
        for layer in inner:
            vectors = self.activation(layer(vectors))
        return rearrange(last(vectors), "b t (g v) -> b t g v", g=self.groups).argmax(dim=-1)


class KMeansQuantizer(nn.Module):
    """Quantizer that selects the nearest codebook entry for each group of the projected and normalised features.

    If `shared` is True, all groups use one codebook.
    """

    @typed
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
        """Compute the codes `[b, t, g]` int64 (g groups) of frames `[b, t, d]`."""
        points = rearrange(vectors, "b t (g d) -> g (b t) d", g=self.groups)
        books = rearrange(self.codebook.expand(-1, self.groups, -1), "v g d -> g v d")
        codes = torch.stack([nearest_centroid(part, book) for part, book in zip(points, books)])
        return rearrange(codes, "g (b t) -> b t g", b=len(vectors))


_QUANTIZERS = {"gumbel": GumbelQuantizer, "kmeans": KMeansQuantizer}


class VQWav2Vec(nn.Module):
    """vq-wav2vec network that converts waves to features, and features to codes."""

    def __init__(self, features: ConvFeatures, quantizer: GumbelQuantizer | KMeansQuantizer) -> None:
        super().__init__()
        self.features, self.quantizer, self.frames = features, quantizer, features.frames

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
        """Convert waves `[b, n]` without padding to codes `[b, t, g]` int64 (g groups)."""
        return self.quantizer.assign(self.vectors(wave))


@register
class FairseqVQWav2Vec(SemanticTokenizer):
    """vq-wav2vec tokenizer (arXiv:1910.05453): a convolutional network with two codes every 10 ms.

    The published `vq-wav2vec.pt` (Gumbel softmax) and `vq-wav2vec_kmeans.pt` have two groups of 320 codes, and a frame
    every 160 samples at 16 kHz. Each frame becomes two successive tokens; the token id of code v in group g is
    `g * 320 + v`. No code in the file is run, and fairseq is not needed.

    Model card. The model was trained on crops of up to 9.4 s of English audiobooks (LibriSpeech); measure how well its
    tokens describe music. The norms of the model use the whole item, so tokens depend slightly on its length. Codes
    were compared with a second implementation of the paper on files with random weights in the published format. THE
    PUBLISHED FILES THEMSELVES WERE NOT AVAILABLE FOR TESTS. Licence: MIT (fairseq, code and models).

    Args:
        checkpoint_path: A fairseq checkpoint, or a `VQWav2Vec` network.
        target_sample_hz: Sample rate of the model; another rate than that in the file raises a ValueError.
    """

    @typed
    def __init__(
        self,
        checkpoint_path: str | Path | VQWav2Vec,
        target_sample_hz: int = 16_000,
        seq_len_multiple_of: int | None = None,
    ) -> None:
        super().__init__()
        if target_sample_hz < 1 or (seq_len_multiple_of is not None and seq_len_multiple_of < 1):
            raise ValueError(
                "target_sample_hz and seq_len_multiple_of must be at least 1, got "
                f"{target_sample_hz} and {seq_len_multiple_of}"
            )
        network = checkpoint_path
        if not isinstance(network, VQWav2Vec):
            checkpoint = read_fairseq(network)
            if checkpoint.sample_hz != target_sample_hz:
                raise ValueError(
                    f"target_sample_hz is {target_sample_hz}, but {network} needs {checkpoint.sample_hz} Hz; pass "
                    f"target_sample_hz={checkpoint.sample_hz}, and input_sample_hz={target_sample_hz} with the waves"
                )
            network = _network_of(checkpoint)
        self.network = network.requires_grad_(False)
        self.target_sample_hz, self.seq_len_multiple_of = target_sample_hz, seq_len_multiple_of
        self.groups = network.quantizer.groups
        self.codebook_size = self.groups * network.quantizer.codes
        self.downsample_factor = exact_div(network.frames.stride, self.groups, "samples a frame over groups")
        self.train(False)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able config of the network, with `target_sample_hz` and `seq_len_multiple_of`."""
        return {
            "network": self.network.config,
            "target_sample_hz": self.target_sample_hz,
            "seq_len_multiple_of": self.seq_len_multiple_of,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FairseqVQWav2Vec":
        """Build a tokenizer with random weights from its `config`, without the published file."""
        return cls(VQWav2Vec.from_config(config["network"]), config["target_sample_hz"], config["seq_len_multiple_of"])

    def fingerprint(self) -> str:
        """Return a hash of everything that the tokens depend on."""
        return fingerprint_of(self)

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of tokens of a wave, which is 194 for one second in the published models."""
        frames = self.network.frames
        num_tokens = self.groups * frames.num_frames(self.cut_samples(num_samples))
        if not num_tokens:
            cut = f" (lengths are cut to multiples of {self.seq_len_multiple_of})" if self.seq_len_multiple_of else ""
            raise ValueError(
                f"audio of {num_samples} samples is too short: a frame needs {frames.reach} samples at "
                f"{self.target_sample_hz} Hz{cut}; pass a longer wave, or add silence"
            )
        return num_tokens

    @named
    @torch.no_grad()
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves as in `SemanticTokenizer`; tokens are ordered by frame, then by group."""
        wave, lengths = self.checked_waves(wave, input_sample_hz, lengths, device_of(self.network))
        wave = wave.to(next(self.network.parameters()).dtype)
        ids = torch.full((len(wave), self.num_frames(wave.shape[1])), -1, dtype=torch.int64, device=wave.device)
        offsets = torch.arange(self.groups, device=wave.device) * self.network.quantizer.codes
        with torch.autocast(wave.device.type, enabled=False):
            for rows, part in items_by_length(wave, lengths):
                num_tokens = self.num_frames(part.shape[1])
                codes = self.network(part[:, : self.cut_samples(part.shape[1])])
                ids[rows, :num_tokens] = rearrange(codes + offsets, "r t g -> r (t g)")
        return ids


def _network_of(checkpoint: FairseqCheckpoint) -> VQWav2Vec:
    """Build the network that computes the codes of a published checkpoint, in eval mode and float32."""
    weights = checkpoint.renamed_weights(_NAMES, _UNUSED)
    if not any(name.startswith("quantizer.") for name in weights):
        raise ValueError(
            f"{checkpoint.source} has no vq-wav2vec: the weights vector_quantizer.* are missing; pass "
            "vq-wav2vec.pt or vq-wav2vec_kmeans.pt"
        )
    network = build_for(checkpoint, lambda: _build_network(checkpoint, weights))
    load_weights(network, weights, checkpoint.source)
    return network.eval()


def _build_network(checkpoint: FairseqCheckpoint, weights: dict[str, Tensor]) -> VQWav2Vec:
    """Build the network for the settings; the sizes of the quantizer are read from the shapes of its weights.

    Settings that a checkpoint lacks get the defaults of fairseq. A checkpoint must contain the strides, which cannot be
    read from shapes, and `log_compression`, whose default differs between releases of fairseq.
    """
    activation = checkpoint.setting("activation", str, _ACTIVATIONS, default="relu")
    checkpoint.setting("skip_connections_feat", bool, (False,), default=False)  # no published model has them
    features = ConvFeatures(
        layers=conv_layers_of(checkpoint.model.get("conv_feature_layers")),
        activation=activation,
        log_compression=checkpoint.setting("log_compression", bool, (False, True)),
    )
    dim, groups = features.dim, checkpoint.setting("vq_groups", int, range(1, features.dim + 1), default=2)
    codebook = weights.get("quantizer.codebook")
    if codebook is not None:
        if codebook.ndim != 3 or dim % groups or not codebook.numel():
            raise ValueError(
                f"a codebook of shape {tuple(codebook.shape)} does not fit {dim} channels in {groups} groups"
            )
        is_shared = codebook.shape[1] == 1
        return VQWav2Vec(features, KMeansQuantizer(dim=dim, groups=groups, codes=len(codebook), shared=is_shared))
    depth = sum(re.fullmatch(r"quantizer\.layers\.\d+\.bias", name) is not None for name in weights)
    last = weights.get(f"quantizer.layers.{depth - 1}.bias", torch.empty(0))
    if last.ndim != 1 or not last.numel() or len(last) % groups:
        raise ValueError(f"{last.numel()} logits cannot be divided into {groups} groups of codes")
    codes = len(last) // groups
    return VQWav2Vec(features, GumbelQuantizer(dim=dim, groups=groups, codes=codes, depth=depth, activation=activation))
