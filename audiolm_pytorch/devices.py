"""Where a module computes."""

from itertools import chain

import torch
from torch import nn

__all__ = ["device_of"]


def device_of(module: object) -> torch.device:
    """Where the weights of a module are, or its buffers if it has none; the CPU for what has neither."""
    tensors = chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
