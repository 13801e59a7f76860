"""Low-rank updates of frozen linear layers (LoRA, arXiv:2106.09685), which can be merged into the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from audiolm_pytorch.checks.types import typed

__all__ = ["add_low_rank", "merge_low_rank", "merged_weights"]


class _LowRankUpdate(nn.Module):
    """Adds `scale * up @ down` to a weight `[rows, columns]`; the update is zero at first (sec. 4.1)."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = scale
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).to(weight.dtype)


@typed
def add_low_rank(module: nn.Module, rank: int, scale: float = 1.0) -> None:
    """Freeze all weights of a module, and add a trainable update of rank `rank` to every linear layer."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    module.requires_grad_(False)
    for layer in [layer for layer in module.modules() if isinstance(layer, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", _LowRankUpdate(layer.weight, rank, scale))


@typed
def merge_low_rank(module: nn.Module) -> None:
    """Add all low-rank updates of a module to its weights, and make all weights trainable again."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    module.requires_grad_(True)


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module by name as `merge_low_rank` would leave them, without a change of the module."""
    weights = {name: tensor for name, tensor in module.state_dict().items() if ".parametrizations." not in name}
    layer: Any
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            weights[f"{name}.weight"] = layer.weight.detach()
    return weights
