"""Exponential moving average (EMA) of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["WeightEMA"]


class WeightEMA:
    """EMA of parameters, kept by ema-pytorch, which can take the place of the weights for a while.

    ema-pytorch receives a list of the trained parameters and not the module, since it copies what it averages, and
    frozen parts must not be copied. Buffers are not averaged; those that training changes are averages already.

    Args:
        parameters: Name to parameter.
        decay: Weight of the past, 0 to 1. Early on it is `(1 + step) / (10 + step)` where that is lower, so that the
            untrained weights are forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        from ema_pytorch import EMA

        self.decay = decay
        self._names = list(parameters)
        trained = nn.ParameterList(parameters.values())
        self._ema = EMA(trained, beta=decay, include_online_model=False, use_foreach=True)

    def update(self, step: int) -> None:
        """Move the average towards the present weights, after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self._ema.update_moving_average(self._ema.ema_model, self._ema.model, decay)

    def weights(self) -> dict[str, Tensor]:
        """Averaged weights by parameter name; they share memory with the average."""
        return {name: weight.detach() for name, weight in zip(self._names, self._ema.ema_model, strict=True)}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Restore checkpointed weights; raises a ValueError if the names differ."""
        if set(weights) != set(self._names):
            raise ValueError(f"the averaged weights differ in {sorted(set(weights) ^ set(self._names))[:8]}")
        for name, weight in self.weights().items():
            weight.copy_(weights[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module compute with the average inside the block; memory is exchanged, not copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._ema.model, self._ema.ema_model, strict=True):
                parameter.data, weight.data = weight.data, parameter.data
