"""Collect the weights of a module as named tensors, and load named tensors into a module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.text import printable

__all__ = ["check_weights", "load_weights", "weights_of"]

_MAX_LISTED = 8


@typed
def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module by name, detached; no two of them share memory.

    Tied tensors (two names for one memory) are returned under the first name only; `load_weights` sets both names.
    Tensors whose memory overlaps in part are copied.
    """
    weights: dict[str, Tensor] = {}
    views: set[tuple[Any, ...]] = set()
    storages: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} of {type(module).__name__} is a {type(value).__name__}; only tensors can be saved"
            )
        if value.numel() == 0:
            weights[name] = value.detach()
            continue
        view, storage = _view_of(value), value.untyped_storage().data_ptr()
        if view not in views:
            weights[name] = value.detach().clone() if storage in storages else value.detach().contiguous()
        views.add(view)
        storages.add(storage)
    return weights


@typed
def load_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str = "the weights") -> None:
    """Copy the weights that `weights_of` returned into a module; dtypes and device of the module do not change.

    Weights on the meta device are replaced by tensors on the CPU. If names, shapes or kinds of numbers do not fit the
    module, the message of the ValueError starts with `where`, the weights' source.
    """
    check_weights(module, {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}, where)
    own = _own_weights(module)
    if not any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict(dict(weights), strict=False)
        return
    loaded: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in weights.items():
        value = tensor.to(own[name].dtype, copy=True)
        if isinstance(own[name], nn.Parameter):
            value = nn.Parameter(value, requires_grad=own[name].requires_grad)
        loaded[_view_of(own[name])] = value
    # Tied tensors become one tensor again.
    module.load_state_dict({name: loaded[_view_of(tensor)] for name, tensor in own.items()}, assign=True)


def check_weights(
    module: nn.Module, facts: Mapping[str, tuple[torch.dtype, Sequence[int]]], where: str = "the weights"
) -> None:
    """Check that weights with these dtypes and shapes by name fit a module; raise a ValueError if not."""
    own = _own_weights(module)
    filled_views = {_view_of(own[name]) for name in facts if name in own}
    missing = [name for name in own if name not in facts and _view_of(own[name]) not in filled_views]
    unexpected = [name for name in facts if name not in own]
    wrong = []
    for name in [name for name in facts if name in own]:
        dtype, shape = facts[name]
        if tuple(shape) != tuple(own[name].shape):
            wrong.append(f"{name} {tuple(shape)} instead of {tuple(own[name].shape)}")
        elif dtype.is_complex or dtype.is_floating_point != own[name].is_floating_point():
            wrong.append(f"{name} {dtype} instead of {own[name].dtype}")
    parts = (("missing", missing), ("not known to the module", unexpected), ("of another shape or type", wrong))
    faults = [f"{fault}: {_shortened(names)}" for fault, names in parts if names]
    if faults:
        raise ValueError(f"{where} do not fit {type(module).__name__}; " + "; ".join(faults))


def _own_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _view_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key for the memory of a tensor; tied tensors have equal keys, and empty tensors have different keys."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _shortened(names: list[str]) -> str:
    rest = len(names) - _MAX_LISTED
    return printable(", ".join(names[:_MAX_LISTED])) + (f" and {rest} more" if rest > 0 else "")
