"""Copies of models for decoding, with weights of half the size."""

import copy
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.nn.layers import Projection, RMSNorm
from audiolm_pytorch.nn.module_state import device_of

__all__ = ["with_half_weights"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@beartype
def with_half_weights(model: ModuleT) -> ModuleT:
    """Copy a model for decoding, with bfloat16 weights: half the memory, and faster where reading weights is the limit.

    On a CPU the weights of projections are also laid out as oneDNN reads them, once instead of in every product (one
    row, 512 x 2730, two cores: 30 us; as torch keeps them 86 us; float32 95 us); norms, sums of branches and attention
    stay in float32 there, which is faster as well as finer.

    Args:
        model: A model of this package, e.g. a stage; it is left as it is.

    Returns:
        The copy, in eval mode. It cannot be trained, and where weights were laid out anew neither saved nor moved to
        another device (a ValueError says so): keep the original for that.
    """
    half = copy.deepcopy(model).to(torch.bfloat16).eval().requires_grad_(False)
    if device_of(half).type == "cpu" and torch.backends.mkldnn.is_available() and _can_pack():
        for module in list(half.modules()):
            if isinstance(module, RMSNorm):
                module.float()
            for name, child in module.named_children():
                if isinstance(child, Projection):
                    setattr(module, name, _PackedProjection(child.weight))
    return half


def _can_pack() -> bool:
    """Whether this torch has the operators by which its own compiler packs weights; they are no public promise."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _refusal(wish: str) -> ValueError:
    """The error for what cannot be done with packed weights."""
    return ValueError(f"half weights laid out for this CPU cannot be {wish}: do it with the original, then copy that")


class _PackedProjection(nn.Module):
    """A projection with weights in oneDNN's own layout, an opaque tensor that only its own operators can read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        # no buffer, as torch would try to move and save it
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PackedProjection":
        """Copy all but the weights, which never change."""
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise _refusal("pickled")

    def _save_to_state_dict(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse to be saved: without this, files would silently lack the weights."""
        raise _refusal("saved")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_PackedProjection":
        """Refuse to be moved, or to get another precision than the rest."""
        moved = fn(torch.empty(0, dtype=torch.bfloat16))
        if moved.device.type != "cpu" or moved.dtype != torch.bfloat16:
            raise _refusal(f"moved to {moved.device}, {moved.dtype}")
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim_in]` of any precision to `[..., dim_out]` bfloat16; sums of branches make it float32 again."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.packed, None, "none", [], "")
        return out
