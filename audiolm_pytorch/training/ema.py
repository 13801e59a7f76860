"""Exponential moving average (EMA) of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from audiolm_pytorch.training.sharding import from_local, local_part, shard_as

__all__ = ["WeightEMA"]


class WeightEMA:
    """Exponential moving average (EMA) of trained parameters, computed by ema-pytorch.

    The EMA covers only the trained parameters, because a copy of the module would also contain frozen weights. Buffers
    are not averaged, because buffers that training changes are already averages. Of a sharded parameter, every process
    averages its part.

    Args:
        decay: Weight of the previous average, from 0 to 1. In early steps, the smaller value `(1 + step) / (10 + step)`
            replaces `decay`, so that the initial weights soon lose their influence.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        from ema_pytorch import EMA

        self.decay = decay
        self._parameters = dict(parameters)
        trained = nn.ParameterList(local_part(parameter) for parameter in parameters.values())
        self._ema = EMA(trained, beta=decay, include_online_model=False, use_foreach=True)

    def update(self, step: int) -> None:
        """Update the EMA with the current weights; `step` is the number of completed steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self._ema.update_moving_average(self._ema.ema_model, self._ema.model, decay)

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights by parameter name; the tensors share memory with the EMA."""
        pairs = zip(self._parameters.items(), self._ema.ema_model, strict=True)
        return {name: from_local(parameter, weight.detach()) for (name, parameter), weight in pairs}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load averaged weights from a checkpoint; raise a ValueError if the parameter names differ."""
        if differing := sorted(set(weights) ^ set(self._parameters)):
            raise ValueError(f"EMA and module need equal parameter names, but differ in {differing[:8]}")
        for name, weight in self.weights().items():
            weight.copy_(shard_as(weight, weights[name]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the EMA as the weights of the module inside a `with` statement; memory is exchanged, not copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._ema.model, self._ema.ema_model, strict=True):
                parameter.data, weight.data = weight.data, parameter.data
