"""Bounds for building a module from the config in a file, and global state that building leaves unchanged."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, prod
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["build_within", "preserve_rng"]

_RANDOM_INITS = (nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.kaiming_uniform_)
_FACTORIES = (
    *(torch.arange, torch.empty, torch.eye, torch.full, torch.hann_window, torch.linspace, torch.ones, torch.rand),
    *(torch.randint, torch.randn, torch.randperm, torch.zeros),
)
# Constructors create tables besides the weights, for example mel filters. The weights of the largest possible model
# have fewer values than these allowances, multiplied by the number of values and of tensors in its file.
_VALUES_PER_WEIGHT, _EXTRA_VALUES = 2, 2**24
_TENSORS_PER_WEIGHT, _EXTRA_TENSORS = 20, 2000


def _empty_range(*bounds: Any, **options: Any) -> torch.Tensor:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return torch.empty(max(0, ceil((end - start) / step)), **options)


# Functions with results of the same size. Their meta versions import torch's compiler, a second of computing time.
_SAME_SIZE: dict[Any, Any] = {
    torch.rand: torch.empty,
    torch.randn: torch.empty,
    torch.arange: _empty_range,
    torch.hann_window: lambda length, **options: torch.empty(length, **options),
    torch.linspace: lambda start, end, steps, **options: torch.empty(steps, **options),
    torch.eye: lambda rows, columns=None, **options: torch.empty(rows, columns or rows, **options),
}
_lock = RLock()  # the default dtype and the random generators belong to the whole process


class _Construction(TorchFunctionMode):
    """Context in which constructors create weights on the meta device, and can create only a limited number of tensors.

    Weights need no memory and no random values, because values from a file replace them. Other tensors are created on
    the CPU. A config that needs more than the file can contain raises a ValueError before the memory is allocated.

    Args:
        shapes: Shapes of the tensors in the file with the weights.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._values_left = _VALUES_PER_WEIGHT * sum(map(prod, shapes.values())) + _EXTRA_VALUES
        self._tensors_left = _TENSORS_PER_WEIGHT * len(shapes) + _EXTRA_TENSORS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_INITS:
            return kwargs["tensor"]
        if func not in _FACTORIES:
            return func(*args, **kwargs)
        options = {name: value for name, value in kwargs.items() if name != "generator"}
        on_meta = _SAME_SIZE.get(func, func)(*args, **{**options, "device": "meta"})
        self._values_left -= on_meta.numel()
        self._tensors_left -= 1
        if min(self._values_left, self._tensors_left) < 0:
            raise ValueError("its sizes need far more values or layers than the file of the weights contains")
        if func is torch.empty:
            return on_meta
        return func(*args, **{**kwargs, "device": "cpu"})


@contextmanager
def build_within(shapes: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Build modules for weights of these shapes: in float32, on the meta device, without a change of global state."""
    with _lock, preserve_rng(), _Construction(shapes):
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the states of the global random generators after a `with` statement."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
