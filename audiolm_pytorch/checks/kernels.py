"""Compare the kernels of a device with numpy in float64, to find devices with silently wrong results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.checks.types import typed

__all__ = ["KernelCheck", "check_kernels", "relative_error"]

# Products of a GPU may be rounded to 10 bits (TF32), which is an error of up to 0.001.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class KernelCheck:
    """Result of a check: its name, the error relative to the largest value, and whether the error is small.

    `detail` is the place of the first error in a module, or the message of an operator that the device lacks.
    """

    name: str
    error: float
    is_right: bool
    detail: str = ""


@typed
def check_kernels(device: str | torch.device) -> list[KernelCheck]:
    """Check the kernels that the models use on a device, in float32."""
    return [_check(name, *functions, torch.device(device)) for name, functions in _KERNELS.items()]


def relative_error(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Return the largest difference of two arrays, relative to the largest expected value; NaN becomes infinity."""
    left, right = (
        value.detach().to("cpu", torch.float64).numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
        for value in (found, expected)
    )
    if left.shape != right.shape or not np.isfinite(left).all():
        return float("inf")
    return float(abs(left - right).max() / max(abs(right).max(), 1e-12))


def _check(
    name: str,
    inputs: Callable[[np.random.Generator], tuple[Any, ...]],
    compute: Callable[..., Tensor],
    expect: Callable[..., np.ndarray],
    device: torch.device,
) -> KernelCheck:
    arrays = inputs(np.random.default_rng(0))
    tensors = [torch.from_numpy(array).to(device) if isinstance(array, np.ndarray) else array for array in arrays]
    try:
        error = relative_error(compute(*tensors), expect(*(_float64(array) for array in arrays)))
    except (RuntimeError, NotImplementedError) as missing:  # the device has no such operator
        return KernelCheck(name, float("inf"), False, " ".join(str(missing).split())[:200])
    return KernelCheck(name, error, error <= TOLERANCE)


def _float64(array: Any) -> Any:
    return array.astype(np.float64) if isinstance(array, np.ndarray) and array.dtype == np.float32 else array


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: Any = None) -> np.ndarray:
    """Attention of queries `[b, h, n, d]`; `bias` is added to the scores, or is a bool mask, or None = causal."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(part, groups, axis=1) for part in (keys, values))
    scores = queries @ keys.swapaxes(2, 3) * queries.shape[-1] ** -0.5
    if bias is None:
        bias = np.tril(np.ones(scores.shape[-2:], dtype=bool))
    scores = np.where(bias, scores, -np.inf) if bias.dtype == bool else scores + bias
    return _softmax(scores) @ values


def _conv(wave: np.ndarray, weight: np.ndarray, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """Convolution of `wave [b, c, n]` by `weight [o, c, k]`, as a sum over the positions of the kernel."""
    num = (wave.shape[2] - dilation * (weight.shape[2] - 1) - 1) // stride + 1
    parts = [
        np.einsum("oc,bcn->bon", weight[..., k], wave[..., k * dilation :][..., : num * stride : stride][..., :num])
        for k in range(weight.shape[2])
    ]
    return np.asarray(sum(parts))


def _transposed_conv(wave: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """Transposed convolution of `wave [b, c, n]` by `weight [c, o, k]`."""
    out = np.zeros((len(wave), weight.shape[1], (wave.shape[2] - 1) * stride + weight.shape[2]))
    for k in range(weight.shape[2]):
        out[..., k : k + wave.shape[2] * stride : stride] += np.einsum("co,bcn->bon", weight[..., k], wave)
    return out


def _scattered(values: Tensor, index: Tensor) -> Tensor:
    """Write rows into a part of a larger tensor through a transposed view, as a cache of keys does."""
    cache = torch.zeros(len(values), 2 * values.shape[1], values.shape[2], device=values.device)
    cache[:, 1::2].scatter_(1, index, values)
    return cache.transpose(1, 2)[:, :, 1::2]


def _scattered_by_numpy(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    out = np.zeros_like(values)
    np.put_along_axis(out, index, values, axis=1)
    return out.swapaxes(1, 2)


def _heads(rng: np.random.Generator, keys: int = 4) -> tuple[np.ndarray, ...]:
    """Queries of four heads, and keys and values of `keys` heads, transposed from rows as in a transformer."""
    return tuple(_normal(rng, 2, 37, heads, 16).swapaxes(1, 2) for heads in (4, keys, keys))


def _permuted(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    index = np.stack([np.stack([rng.permutation(12) for _ in range(5)], axis=1) for _ in range(3)])
    return _normal(rng, 3, 12, 5), index


def _layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5))


# Name -> inputs, the computation of torch, and that of numpy.
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., np.ndarray]]] = {
    "matrix product": (
        lambda r: (_normal(r, 65, 130), _normal(r, 130, 70)),
        lambda a, b: torch.matmul(a, b),
        np.matmul,
    ),
    "matrix product of a transposed matrix": (
        lambda r: (_normal(r, 3, 65, 130), _normal(r, 3, 70, 130)),
        lambda a, b: torch.baddbmm(torch.ones(70, device=a.device), a, b.mT),
        lambda a, b: a @ b.swapaxes(1, 2) + 1,
    ),
    "softmax": (lambda r: (10 * _normal(r, 9, 1030),), lambda x: x.softmax(-1), _softmax),
    "causal attention": (
        _heads,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        _attention,
    ),
    "attention with a mask": (
        lambda r: (*_heads(r), np.tril(r.random((2, 1, 37, 37)) < 0.7) | np.eye(37, dtype=bool)),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        _attention,
    ),
    "attention with a bias": (
        lambda r: (*_heads(r), _normal(r, 1, 4, 37, 37)),
        lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        _attention,
    ),
    "attention of shared keys": (
        lambda r: _heads(r, 2),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        _attention,
    ),
    "layer norm": (lambda r: (3 + _normal(r, 7, 192),), lambda x: F.layer_norm(x, (192,)), _layer_norm),
    "convolution": (
        lambda r: (_normal(r, 2, 8, 203), _normal(r, 12, 8, 7)),
        lambda x, w: F.conv1d(x, w, dilation=3),
        lambda x, w: _conv(x, w, dilation=3),
    ),
    "strided convolution": (
        lambda r: (_normal(r, 2, 8, 203), _normal(r, 12, 8, 10)),
        lambda x, w: F.conv1d(x, w, stride=5),
        lambda x, w: _conv(x, w, stride=5),
    ),
    "transposed convolution": (
        lambda r: (_normal(r, 2, 8, 41), _normal(r, 8, 12, 10)),
        lambda x, w: F.conv_transpose1d(x, w, stride=5),
        lambda x, w: _transposed_conv(x, w, 5),
    ),
    "Fourier transform": (
        lambda r: (_normal(r, 5, 400),),
        lambda x: torch.fft.rfft(x, n=1024).abs(),
        lambda x: abs(np.fft.rfft(x, n=1024)),
    ),
    "activations": (
        lambda r: (3 * _normal(r, 500),),
        lambda x: torch.cat((F.silu(x), F.elu(x), x.sin(), x.tanh())),
        lambda x: np.concatenate((x / (1 + np.exp(-x)), np.where(x > 0, x, np.expm1(x)), np.sin(x), np.tanh(x))),
    ),
    "embedding": (
        lambda r: (r.integers(1030, size=(3, 50)), _normal(r, 1030, 24)),
        lambda ids, table: F.embedding(ids, table),
        lambda ids, table: table[ids],
    ),
    "sorting": (
        lambda r: (_normal(r, 7, 1030),),
        lambda x: torch.cat((x.sort(-1, descending=True).values, x.topk(20, dim=-1).values), dim=-1),
        lambda x: np.concatenate((np.sort(x)[:, ::-1], np.sort(x)[:, ::-1][:, :20]), axis=-1),
    ),
    "nearest codes": (
        lambda r: (_normal(r, 90, 32), _normal(r, 1030, 32)),
        lambda x, codes: torch.cdist(x, codes).argmin(-1),
        lambda x, codes: ((x[:, None] - codes) ** 2).sum(-1).argmin(-1),
    ),
    "running sums": (
        lambda r: (_normal(r, 7, 1030), r.integers(2**40, size=(7, 90))),
        lambda x, ids: torch.cat((x.cumsum(-1), (ids.cumsum(-1) % 997).to(x.dtype)), dim=-1),
        lambda x, ids: np.concatenate((x.cumsum(-1), ids.cumsum(-1) % 997), axis=-1),
    ),
    "writes into a cache": (_permuted, _scattered, _scattered_by_numpy),
    "selection by a mask": (
        lambda r: (_normal(r, 40, 30), r.random((40, 30)) < 0.4),
        lambda x, mask: x.T[mask.T],
        lambda x, mask: x.T[mask.T],
    ),
}
