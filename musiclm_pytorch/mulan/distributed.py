"""The batch of all processes: rows gathered so that gradients flow back to the process that they came from."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather_batch", "gather_counts", "own_rank"]


def _many_processes() -> bool:
    """Whether there is anybody to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """Rank of this process; 0 where there is one."""
    return dist.get_rank() if _many_processes() else 0


def gather_counts(*parts: Tensor) -> list[list[int]]:
    """Count the rows that every process holds.

    Args:
        parts: Tensors `[b, ...]`, as many on every process; each `b` may differ between processes.

    Returns:
        For each of `parts` the number of its rows on each process, in the order of their ranks.
    """
    own = torch.tensor([len(part) for part in parts], device=parts[0].device)
    if not _many_processes():
        return [[count] for count in own.tolist()]
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return torch.stack(counts, dim=1).tolist()


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all processes; backward gives each process the summed gradient of its own rows."""

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


def gather_batch(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Join the rows of all processes, in the order of their ranks; differentiable.

    In backward the gradients that all processes have for a row are summed, and handed to the process it came from.

    Args:
        rows: `[b, ...]`; `b` may differ between processes.
        counts: Rows of each process, where `gather_counts` told them before. None = they are asked for.

    Returns:
        `[sum of b, ...]`, the same on every process; `rows` itself where there is one process.
    """
    if not _many_processes():
        return rows
    return _GatherRows.apply(rows, gather_counts(rows)[0] if counts is None else counts)
