"""Exponential moving average of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Running average of parameters, which can take their place for a while.

    ema-pytorch averages a deep copy of the whole model; here only the trained parameters are held twice, and they are
    checkpointed under their own names. Buffers are not averaged: those that training moves are averages already.

    Args:
        parameters: Name to parameter.
        decay: Weight of the past, 0 to 1; early on it is `(1 + step) / (10 + step)` where that is lower, so that the
            average forgets the untrained weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self.shadows = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def update(self, step: int) -> None:
        """Move the average towards the present weights.

        Args:
            step: Number of steps done.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        present: list[Tensor] = [parameter.detach() for parameter in self._parameters.values()]
        # The public name of the fused update over many tensors; a loop would cost a kernel launch each.
        get_ema_multi_avg_fn(decay)(list(self.shadows.values()), present, 0)

    def load(self, shadows: Mapping[str, Tensor]) -> None:
        """Take over a checkpointed average.

        Args:
            shadows: Name to tensor.

        Raises:
            ValueError: The names are others than those of the parameters.
        """
        if set(shadows) != set(self.shadows):
            raise ValueError(f"the averaged weights differ in {sorted(set(shadows) ^ set(self.shadows))[:8]}")
        for name, tensor in shadows.items():
            self.shadows[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module compute with the averages inside the block; memory is exchanged, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Swap the memory of parameters and averages."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.data, self.shadows[name] = self.shadows[name], parameter.data
