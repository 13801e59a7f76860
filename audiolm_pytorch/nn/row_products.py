"""Norms and linear layers prepared for decoding, where a call has few rows and the weights are constant.

A product of few rows takes as long as reading the weights, so the order of the weights in memory decides its speed.
`F.linear` of torch 2.13 uses only one core for one row, and reads the weights at a third of the possible speed.
`tests/benchmarks/kernels.py` compares this file with plain torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from audiolm_pytorch.nn.layers import RMSNorm, is_plain

__all__ = ["RowProduct", "prepare_norm", "prepare_norm_and_product", "prepare_product"]

_MAX_ROWS = 16  # with more rows, the usual product is fast enough
_MIN_PACKED_ROWS, _MIN_PACKED_WEIGHTS = 3, 2**18  # below one of them, tiles are faster than the layout of oneDNN
_TILE_WIDTHS = (16, *range(32, 7, -1))  # columns of a tile; the first that divides the width of the output is used


def prepare_norm(norm: nn.Module, x: Tensor, out: Tensor) -> Callable[[], object]:
    """Return a function that normalises the rows in `x [b, d]` and writes the result into `out [b, d]`."""
    if not _is_plain_cpu(x) or not isinstance(norm, RMSNorm) or not is_plain(norm):
        return _prepare_call(norm, x, out)
    normalize, weight = _rms_norm(x, out, norm.eps), norm.weight.detach().float() * x.shape[-1] ** 0.5

    def normalize_and_scale() -> None:
        normalize()
        out.mul_(weight)

    return normalize_and_scale


def prepare_norm_and_product(
    norm: nn.Module, linear: nn.Linear, x: Tensor, normed: Tensor, out: Tensor
) -> Callable[[], object]:
    """Return a function that writes the normalised `x` into `normed`, and `linear(normed)` into `out`.

    On a CPU, the weights of the product include scale and shift of the norm; `normed` is neither scaled nor shifted.
    """
    scale: Tensor | None = None
    shift: Tensor | None = None
    is_folded = _is_plain_cpu(x) and is_plain(linear) and is_plain(norm)
    if is_folded and isinstance(norm, RMSNorm):
        normalize, scale = _rms_norm(x, normed, norm.eps), norm.weight.detach().float() * x.shape[-1] ** 0.5
    elif is_folded and isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
        normalize, scale = prepare_norm(plain, x, normed), norm.weight.detach().float()
        shift = None if norm.bias is None else norm.bias.detach().float()
    else:
        normalize = prepare_norm(norm, x, normed)
    product = prepare_product(linear, normed, out, scale=scale, shift=shift)

    def normalize_and_multiply() -> None:
        normalize()
        product()

    return normalize_and_multiply


def prepare_product(
    linear: nn.Linear, x: Tensor, out: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None
) -> Callable[[], object]:
    """Return a function that writes `linear(x)` into `out`; `RowProduct` documents `scale` and `shift`."""
    if not is_plain(linear):
        return _prepare_call(linear, x, out)
    return RowProduct(linear.weight, linear.bias, x, out, scale=scale, shift=shift)


def _prepare_call(module: nn.Module, x: Tensor, out: Tensor) -> Callable[[], object]:
    dtype = next((parameter.dtype for parameter in module.parameters()), x.dtype)
    return lambda: out.copy_(module(x.to(dtype)))


def _rms_norm(x: Tensor, out: Tensor, eps: float) -> Callable[[], object]:
    """Return a function that divides `x` by its L2 norm in 3 operators; `F.rms_norm` calls 8 operators on a CPU."""
    constant, length = x.new_tensor((x.shape[-1] * eps) ** 0.5), x.new_zeros(len(x), 1)

    def normalize() -> None:
        torch.linalg.vector_norm(x, 2, -1, True, out=length)
        torch.div(x, torch.hypot(length, constant, out=length), out=out)

    return normalize


class RowProduct:
    """A linear layer with constant weights; every call reads the rows in the tensor `x` and writes into `out`.

    On a CPU, the weights are stored in tiles of 16 columns `[dim_in, 16]`, which are multiplied in one batch. The
    partial sums of a tile stay in registers while its weights are read once, from the first to the last. Large weights
    of three to sixteen rows and bfloat16 weights are stored in the layout of oneDNN.

    Args:
        weight: `[dim_out, dim_in]`; later changes of `weight` may have no effect.
        bias: `[dim_out]`; None = no bias.
        x: Rows `[b, dim_in]`, read in every call.
        out: `[b, dim_out]`, written in every call.
        scale: `[dim_in]`, factor of the inputs, which becomes a part of the weights.
        shift: `[dim_in]`, added to the inputs after `scale`, which becomes a part of the bias.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        out: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self._x, self._out, self._packed = x, out, None
        self._packed_dtype = weight.dtype if weight.dtype == torch.bfloat16 else x.dtype
        weight, bias = weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype)
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        weight = weight if scale is None else weight * scale
        num_rows, width = len(x), len(weight)
        if _is_plain_cpu(x) and num_rows <= _MAX_ROWS:
            is_large = num_rows >= _MIN_PACKED_ROWS and weight.numel() >= _MIN_PACKED_WEIGHTS
            if (is_large or self._packed_dtype == torch.bfloat16) and _can_pack():
                self._bias = None if bias is None else bias.to(self._packed_dtype)
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self._packed_dtype), num_rows)
                return
            width = next((width for width in _TILE_WIDTHS if len(weight) % width == 0), width)
        self._bias, self._tiles = bias, weight.view(-1, width, weight.shape[1]).mT
        if width < len(weight):  # otherwise the weights of the model are used, and not copied
            self._tiles = self._tiles.contiguous()
        self._rows, self._out_tiles = x.expand(len(self._tiles), -1, -1), out.view(num_rows, -1, width).transpose(0, 1)
        self._is_copied = min(num_rows, len(self._tiles)) > 1  # else the results have the order of `out`
        self._results = torch.zeros_like(self._out_tiles, memory_format=torch.contiguous_format)
        self._results = self._results if self._is_copied else self._out_tiles

    def __call__(self) -> None:
        """Multiply."""
        if self._packed is not None:
            x = self._x.to(self._packed_dtype)
            self._out.copy_(torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], ""))
            return
        torch.bmm(self._rows, self._tiles, out=self._results)
        if self._is_copied:
            self._out_tiles.copy_(self._results)
        if self._bias is not None:
            self._out.add_(self._bias)


def _is_plain_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _can_pack() -> bool:
    """Whether the installed torch has the private oneDNN operators that pack weights."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
