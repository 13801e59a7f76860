"""Broadcast, sums, means and random samples over the batches of all processes of a distributed training."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["distributed_mean", "distributed_sample", "from_first_process", "rank_and_count", "sum_over_processes"]


def rank_and_count() -> tuple[int, int]:
    """Return the index of this process and the number of processes; (0, 1) without `torch.distributed`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_first_process(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with the values that the tensor has on the first process."""
    if rank_and_count()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with its sum over all processes."""
    if rank_and_count()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def distributed_mean(total: Tensor, count: int) -> Tensor:
    """Compute the mean over the rows of all processes, from the sum and the number of rows of each process.

    The backward pass needs no communication; each process computes the gradient of the mean over its own rows.
    Data-parallel training averages the gradients of all processes to the gradient of the mean over all rows.
    """
    own = total / count
    if rank_and_count()[1] == 1:
        return own
    overall = sum_over_processes(total.detach().clone()) / sum_over_processes(own.new_tensor(float(count)))
    return own + (overall - own.detach())


def distributed_sample(rows: Tensor, count: int) -> Tensor:
    """Draw distinct random rows from the rows `[n, d]` of all processes; every process receives the same rows.

    The number n of rows can differ between processes. The result has fewer than `count` rows if too few differ.
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
