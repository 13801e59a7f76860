"""One batch spread over several processes: draws, sums and samples that come out as if one process held it all."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["from_first_process", "joined_mean", "joined_sample", "own_share", "sum_over_processes"]


def own_share() -> tuple[int, int]:
    """Number of this process among those that share the work, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if _is_joined() else (0, 1)


def from_first_process(tensor: Tensor) -> Tensor:
    """The tensor, holding on every process what it holds on the first."""
    if _is_joined():
        dist.broadcast(tensor, src=0)
    return tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The tensor, holding on every process the sum over all of them (changed in place)."""
    if _is_joined():
        dist.all_reduce(tensor)
    return tensor


def joined_mean(total: Tensor, count: int) -> Tensor:
    """Mean over the rows of all processes, given the sum and the number of those of this process.

    The gradient is that of the process's own mean: averaged over the processes, as data-parallel training does, it is
    the gradient of the joined mean, and no collective runs in the backward pass.
    """
    own = total / count
    if not _is_joined():
        return own
    joined = sum_over_processes(total.detach().clone()) / sum_over_processes(own.new_tensor(float(count)))
    return own + (joined - own.detach())


def joined_sample(rows: Tensor, count: int) -> Tensor:
    """Different rows drawn at random from the rows of all processes; the same on every process.

    Args:
        rows: `[n, d]`, the rows of this process; n may differ between processes.
        count: Rows wanted.

    Returns:
        `[m, d]` with m <= count: equal rows (silence) are given once, and there are no more than there are.
    """
    rank, sizes = _rank_and_sizes(len(rows), rows.device)
    chosen = from_first_process(torch.randperm(sum(sizes), device=rows.device)[:count])
    own = chosen - sum(sizes[:rank])
    is_own = (own >= 0) & (own < len(rows))
    sample = rows.new_zeros(len(chosen), rows.shape[-1])
    sample[is_own] = rows[own[is_own]]
    return torch.unique(sum_over_processes(sample), dim=0)


def _rank_and_sizes(size: int, device: torch.device) -> tuple[int, list[int]]:
    """The number of this process and the sizes that all processes hold."""
    if not _is_joined():
        return 0, [size]
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    sizes[dist.get_rank()] = size
    return dist.get_rank(), sum_over_processes(sizes).tolist()


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
