"""Random draws, sums and samples over the batches of all processes, as if one process held them."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["distributed_mean", "distributed_sample", "from_first_process", "rank_and_count", "sum_over_processes"]


def rank_and_count() -> tuple[int, int]:
    """Index of this process and the number of processes; (0, 1) without `torch.distributed`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_first_process(tensor: Tensor) -> Tensor:
    """Overwrite the tensor with the values of the first process."""
    if rank_and_count()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Overwrite the tensor with its sum over all processes."""
    if rank_and_count()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def distributed_mean(total: Tensor, count: int) -> Tensor:
    """Mean over the rows of all processes, from the sum and the number of this process's rows.

    The gradient is that of the process's own mean. Data-parallel training averages it over the processes, which is the
    gradient of the mean over all rows; no collective runs in the backward pass.
    """
    own = total / count
    if rank_and_count()[1] == 1:
        return own
    overall = sum_over_processes(total.detach().clone()) / sum_over_processes(own.new_tensor(float(count)))
    return own + (overall - own.detach())


def distributed_sample(rows: Tensor, count: int) -> Tensor:
    """Different random rows of all processes, equal on every process.

    Args:
        rows: `[n, d]`, the rows of this process; n may differ between processes.
        count: Number of rows to draw.

    Returns:
        `[m, d]` with m <= count; fewer if there are too few different rows.
    """
    rank, num_processes = rank_and_count()
    sizes = torch.zeros(num_processes, dtype=torch.long, device=rows.device)
    sizes[rank] = len(rows)
    all_sizes = sum_over_processes(sizes).tolist()
    index = from_first_process(torch.randperm(sum(all_sizes), device=rows.device)[:count])
    index = index - sum(all_sizes[:rank])
    is_own = (index >= 0) & (index < len(rows))
    sample = rows.new_zeros(len(index), rows.shape[-1])
    sample[is_own] = rows[index[is_own]]
    return torch.unique(sum_over_processes(sample), dim=0)
