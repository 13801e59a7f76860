"""Linear layers prepared for decoding, where each call has few rows and constant weights: the tricks for CPUs.

A product of few rows is limited by reading the weights. torch 2.13 reads them on one core for one row, and computes two
to sixteen rows slowly. `tests/benchmarks/products.py` compares the products of this file with `F.linear`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from audiolm_pytorch.nn.layers import RMSNorm

__all__ = ["Normalize", "RowProduct", "prepare"]

_MAX_ROWS = 16  # with more rows, the usual product is fast enough
_MIN_SPLIT_WEIGHTS = 2**17  # smaller weights are read faster by one core

# Writes the normalised rows of its first argument into its second argument.
Normalize = Callable[[Tensor, Tensor], object]


def prepare(norm: nn.Module, linear: nn.Linear, num_rows: int) -> tuple[Normalize, "RowProduct"]:
    """Prepare a norm and the linear layer that follows it for rows `[num_rows, d]`.

    On a CPU, scale and shift of the norm become a part of the weights of the linear layer.
    """
    if linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32:
        if isinstance(norm, RMSNorm):
            dim = norm.weight.shape[0]
            return _rms_norm(dim, norm.eps), RowProduct(
                linear.weight, linear.bias, num_rows, scale=norm.weight * dim**0.5
            )
        if isinstance(norm, nn.LayerNorm):
            plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
            return _module_norm(plain), RowProduct(
                linear.weight, linear.bias, num_rows, scale=norm.weight, shift=norm.bias
            )
    return _module_norm(norm), RowProduct(linear.weight, linear.bias, num_rows)


def _module_norm(norm: nn.Module) -> Normalize:
    def normalize(x: Tensor, out: Tensor) -> None:
        out.copy_(norm(x))

    return normalize


def _rms_norm(dim: int, eps: float) -> Normalize:
    """Division by `sqrt(dim)` times the root mean square in three operators; `F.rms_norm` has eight on a CPU."""
    constant = torch.tensor((dim * eps) ** 0.5)

    def normalize(x: Tensor, out: Tensor) -> None:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        torch.div(x, torch.hypot(length, constant, out=length), out=out)

    return normalize


class RowProduct:
    """A linear layer with constant weights for `num_rows` rows, which writes into a tensor that the caller allocates.

    On a CPU in float32, one row is multiplied with one part of the weights on each core. For two to sixteen rows, the
    weights are stored in the layout of oneDNN.

    Args:
        weight: `[dim_out, dim_in]`. Later changes may have no effect.
        bias: `[dim_out]`; None = no bias.
        num_rows: Number of rows of every call.
        scale: `[dim_in]`, factor of the inputs, which becomes a part of the weights.
        shift: `[dim_in]`, added to the inputs after `scale`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        num_rows: int,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        weight = (weight if scale is None else weight * scale).detach()
        self._bias, self._num_parts, self._packed = None if bias is None else bias.detach(), 1, None
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            if num_rows == 1 and weight.numel() >= _MIN_SPLIT_WEIGHTS:
                threads = torch.get_num_threads()
                self._num_parts = max(parts for parts in range(1, threads + 1) if len(weight) % parts == 0)
            elif 1 < num_rows <= _MAX_ROWS and _can_pack():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        # `[parts, dim_in, dim_out / parts]`, or `[dim_in, dim_out]` if there is one part.
        self._weight = weight.mT if self._num_parts == 1 else weight.view(self._num_parts, -1, weight.shape[1]).mT

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Write the product of rows `x [num_rows, dim_in]` into `out [num_rows, dim_out]`."""
        if self._packed is not None:
            out.copy_(torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], ""))
            return
        if self._num_parts == 1:
            torch.mm(x, self._weight, out=out)
        else:
            rows = x.unsqueeze(0).expand(self._num_parts, -1, -1)
            torch.bmm(rows, self._weight, out=out.view(self._num_parts, 1, -1))
        if self._bias is not None:
            out.add_(self._bias)


def _can_pack() -> bool:
    """Whether the installed torch has the private oneDNN operators that pack weights."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
