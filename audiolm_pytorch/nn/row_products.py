"""Norms and linear layers prepared for decoding, where a call has few rows and the weights are constant.

A product of few rows can be as fast as reading the weights. For one row, `F.linear` of torch 2.13 uses only one core;
for 2 to 16 rows, it is also slow. `tests/benchmarks/kernels.py` compares this file with plain torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from audiolm_pytorch.nn.layers import RMSNorm, is_plain

__all__ = ["RowProduct", "prepare_norm", "prepare_norm_and_product", "prepare_product"]

_MAX_ROWS = 16  # with more rows, the usual product is fast enough
_MIN_SPLIT_WEIGHTS = 2**17  # one core multiplies one row with fewer weights faster than several cores
_MIN_PACKED_WEIGHTS = 2**18  # for fewer weights, the operator of oneDNN has too much overhead


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

    For one row in float32 on a CPU, every core multiplies the row with a part of the weights. For two to sixteen rows,
    and for bfloat16 weights, the weights are stored in the layout of oneDNN.

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
        num_rows, num_parts, self._packed = len(x), 1, None
        self._packed_dtype = weight.dtype if weight.dtype == torch.bfloat16 else x.dtype
        weight, bias = weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype)
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        weight = weight if scale is None else weight * scale
        self._x, self._out, self._bias = x, out, bias
        if _is_plain_cpu(x) and num_rows <= _MAX_ROWS:
            is_large = num_rows > 1 and weight.numel() >= _MIN_PACKED_WEIGHTS
            if (is_large or self._packed_dtype == torch.bfloat16) and _can_pack():
                self._bias = None if bias is None else bias.to(self._packed_dtype)
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self._packed_dtype), num_rows)
                return
            if num_rows > 1 or weight.numel() >= _MIN_SPLIT_WEIGHTS:
                num_parts = max(parts for parts in range(1, torch.get_num_threads() + 1) if len(weight) % parts == 0)
        # Each part of the weights is multiplied with the same rows. One row needs no copy of the results.
        self._rows, self._weight = x.expand(num_parts, -1, -1), weight.view(num_parts, -1, weight.shape[1]).mT
        self._out_parts = out.view(num_rows, num_parts, -1).transpose(0, 1)
        self._is_copied = min(num_rows, num_parts) > 1
        self._results = torch.zeros_like(self._out_parts, memory_format=torch.contiguous_format)
        self._results = self._results if self._is_copied else self._out_parts

    def __call__(self) -> None:
        """Multiply."""
        if self._packed is not None:
            x = self._x.to(self._packed_dtype)
            self._out.copy_(torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], ""))
            return
        torch.bmm(self._rows, self._weight, out=self._results)
        if self._is_copied:
            self._out_parts.copy_(self._results)
        if self._bias is not None:
            self._out.add_(self._bias)


def _is_plain_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _can_pack() -> bool:
    """Whether the installed torch has the private oneDNN operators that pack weights."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
