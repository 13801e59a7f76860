"""Functions that concatenate the batches of all processes, with gradients for the rows of each process."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather_batch", "gather_counts", "own_rank"]


def _has_other_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """Return the rank of this process, which is 0 if there is only one process."""
    return dist.get_rank() if _has_other_processes() else 0


def gather_counts(*parts: Tensor) -> list[list[int]]:
    """Return, for each tensor `[b, ...]`, the number of rows on every process."""
    counts = torch.tensor([len(part) for part in parts], device=parts[0].device)
    if not _has_other_processes():
        return [[count] for count in counts.tolist()]
    gathered = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, counts)
    return torch.stack(gathered, dim=1).tolist()


class _GatherRows(torch.autograd.Function):
    """Concatenates tensors of all processes; backward returns the gradient of the local rows, summed over processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows))).contiguous()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None


def gather_batch(rows: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the rows `[b, ...]` of all processes with gradients; process `i` has `counts[i]` rows."""
    return _GatherRows.apply(rows, counts) if _has_other_processes() else rows
