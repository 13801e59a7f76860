"""Write small random files in the layout of `vq-wav2vec.pt` and `vq-wav2vec_kmeans.pt`, and compute their codes.

The names of weights are those of fairseq's sources. The codes are computed in float64 by the formulas of the paper,
without the library.
"""

import argparse
from collections import OrderedDict
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.published_files import fairseq_classes

WIDTH = 16
# kernels and strides of the published models
LAYERS = [(WIDTH, 10, 5), (WIDTH, 8, 4), (WIDTH, 4, 2), (WIDTH, 4, 2), (WIDTH, 4, 2), *[(WIDTH, 1, 1)] * 3]
CODES = 12


def vq_settings(**changes: Any) -> dict[str, Any]:
    """The `args` of the published models (vq_type "gumbel" or "kmeans"), narrow."""
    settings = {
        "_name": "wav2vec",
        "activation": "gelu",
        "agg_zero_pad": False,
        "aggregator": "cnn",
        "combine_groups": True,
        "conv_aggregator_layers": f"[({WIDTH}, 2, 1), ({WIDTH}, 3, 1)]",
        "conv_feature_layers": str(LAYERS),
        "log_compression": True,
        "no_conv_bias": False,
        "offset": "auto",
        "prediction_steps": 12,
        "project_features": "none",
        "skip_connections_agg": True,
        "skip_connections_feat": False,
        "vq_depth": 2,
        "vq_dim": 0,
        "vq_gamma": 0.25,
        "vq_groups": 2,
        "vq_temp": "(2.0,0.5,0.999995)",
        "vq_type": "gumbel",
        "vq_vars": CODES,
    }
    return settings | changes


def vq_state(settings: dict[str, Any], seed: int = 0) -> "OrderedDict[str, Tensor]":
    """All weights of fairseq's Wav2VecModel for these settings: extractor, quantizer, aggregator, predictor."""
    generator = torch.Generator().manual_seed(seed)
    state: OrderedDict[str, Tensor] = OrderedDict()

    def put(name: str, *shape: int, around: float = 0.0, spread: float = 0.3) -> None:
        state[name] = around + spread * torch.randn(*shape, generator=generator)

    def put_linear(name: str, before: int, after: int) -> None:
        put(f"{name}.weight", after, before, spread=sqrt(2 / before))
        put(f"{name}.bias", after)

    def put_norm(name: str, width: int) -> None:
        put(f"{name}.weight", width, around=1.0)
        put(f"{name}.bias", width)

    before = 1
    for place, (width, kernel, _) in enumerate(LAYERS):
        put(f"feature_extractor.conv_layers.{place}.0.weight", width, before, kernel, spread=1 / sqrt(before * kernel))
        put_norm(f"feature_extractor.conv_layers.{place}.2", width)
        before = width
    groups, codes, depth = settings["vq_groups"], settings["vq_vars"], settings["vq_depth"]
    num_books = 1 if settings["combine_groups"] else groups
    if settings["vq_type"] == "gumbel":
        put("vector_quantizer.vars", 1, num_books * codes, WIDTH // groups)
        if depth == 1:
            put_linear("vector_quantizer.weight_proj", WIDTH, groups * codes)
        else:
            for place in range(depth - 1):
                put_linear(f"vector_quantizer.weight_proj.{place}.0", WIDTH if place == 0 else 2 * WIDTH, 2 * WIDTH)
            put_linear(f"vector_quantizer.weight_proj.{depth - 1}", 2 * WIDTH, groups * codes)
    else:
        put("vector_quantizer.embedding", codes, num_books, WIDTH // groups, spread=1.0)
        put("vector_quantizer.projection.0.weight", WIDTH, WIDTH // groups, 1)
        put("vector_quantizer.projection.1.weight", WIDTH, around=1.0)
        put("vector_quantizer.projection.1.bias", WIDTH)
    for place, kernel in enumerate((2, 3)):
        put(f"feature_aggregator.conv_layers.{place}.1.weight", WIDTH, WIDTH, kernel)
        put(f"feature_aggregator.conv_layers.{place}.1.bias", WIDTH)
        put_norm(f"feature_aggregator.conv_layers.{place}.3", WIDTH)
    put("wav2vec_predictions.project_to_steps.weight", WIDTH, WIDTH, 1, 12)
    put("wav2vec_predictions.project_to_steps.bias", WIDTH)
    # Without the mean over channels, more than a few codes are used.
    for name in state:
        if name.startswith(("vector_quantizer.weight_proj", "vector_quantizer.projection.0")) and "weight" in name[-6:]:
            state[name] -= state[name].mean(dim=1, keepdim=True)
    return state


def write_vq_wav2vec(
    path: Path,
    settings: dict[str, Any],
    *,
    state: "dict[str, Tensor] | None" = None,
    cfg: bool = False,
    legacy: bool = True,
) -> Path:
    """Write a checkpoint as fairseq's trainer did in 2019: `args` in a Namespace, meters as objects of fairseq.

    Args:
        path: The file.
        settings: `vq_settings(...)`.
        state: The `model` entry; None = `vq_state(settings)`.
        cfg: Settings under `cfg`, as later releases write them, instead of `args`.
        legacy: The file format of torch before 1.6 instead of a zip archive.
    """
    task = dict(data="/checkpoint/librispeech", sample_rate=16000, normalize=False, max_sample_size=150000)
    with fairseq_classes() as classes:
        meter = classes["Dictionary"]()
        meter.__dict__.update(val=1.5, sum=3.0, count=2)
        checkpoint = {
            "args": None if cfg else argparse.Namespace(arch="wav2vec", task="audio_pretraining", **task, **settings),
            "model": vq_state(settings) if state is None else state,
            "optimizer_history": [{"criterion_name": "Wav2vecCriterion", "num_updates": 400000}],
            "extra_state": {"train_iterator": {"epoch": 3}, "train_meters": OrderedDict(train_loss=meter)},
            "last_optimizer_state": {"state": {}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        }
        if cfg:
            checkpoint["cfg"] = {"task": {"_name": "audio_pretraining", **task}, "model": settings}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path


def naive_codes(state: dict[str, Tensor], settings: dict[str, Any], wave: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [t, g] of one wave [n], and the vectors [t, d] that they are decided from, in float64."""
    weights = {name: tensor.double() for name, tensor in state.items()}

    def activation(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / sqrt(2))) / 2 if settings["activation"] == "gelu" else x * (x > 0)

    def normalised(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        x = centred / (centred.pow(2).mean() + 1e-5).sqrt()
        return x * weights[f"{name}.weight"][:, None] + weights[f"{name}.bias"][:, None]

    x = wave.double()[None]
    for place, (_, kernel, stride) in enumerate(LAYERS):
        name = f"feature_extractor.conv_layers.{place}"
        y = torch.einsum("ock,ctk->ot", weights[f"{name}.0.weight"], x.unfold(1, kernel, stride))
        x = activation(normalised(y, f"{name}.2"))
    if settings["log_compression"]:
        x = (1 + x.abs()).log()
    groups = settings["vq_groups"]
    if settings["vq_type"] == "gumbel":
        depth = settings["vq_depth"]
        names = [f"{place}.0" for place in range(depth - 1)] + [f"{depth - 1}"] if depth > 1 else [""]
        logits = x.T
        for place, name in enumerate(names):
            name = "vector_quantizer.weight_proj" + (f".{name}" if name else "")
            logits = logits @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            logits = activation(logits) if place < depth - 1 else logits
        return torch.stack([part.argmax(dim=1) for part in logits.chunk(groups, dim=1)], dim=1), x.T
    width = WIDTH // groups
    vectors, codes = [], []
    for group in range(groups):
        rows = slice(group * width, (group + 1) * width)
        y = weights["vector_quantizer.projection.0.weight"][rows, :, 0] @ x[rows]
        y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
        scale, shift = (weights[f"vector_quantizer.projection.1.{name}"][rows, None] for name in ("weight", "bias"))
        vectors.append((y * scale + shift).T)
        book = weights["vector_quantizer.embedding"][:, 0 if settings["combine_groups"] else group]
        codes.append(torch.tensor([int((book - vector).norm(dim=1).argmin()) for vector in vectors[-1]]))
    return torch.stack(codes, dim=1), torch.cat(vectors, dim=1)
