"""Operations across the processes of a run: average gradients and metrics, broadcast tensors, share work."""

import atexit
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from audiolm_pytorch.training.tracking import check_trackers

if TYPE_CHECKING:
    import accelerate

__all__ = [
    "PersistentBuffers",
    "broadcast_tensors",
    "create_accelerator",
    "data_parallel",
    "gradient_group",
    "map_over_processes",
    "map_tensors",
    "mean_over_processes",
    "merge_means",
    "shared_errors",
    "to_device",
    "unaveraged_gradients",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

_TRAININGS = count()
_BUCKET_NUMEL = 2**25  # 128 MiB of float32: few collectives, and little memory beside the gradients


def create_accelerator(
    track: Sequence[str] = (), folder: Path | None = None, timeout_seconds: float | None = None
) -> "accelerate.Accelerator":
    """Create an Accelerator for a training loop, with a process group that stays open until the process ends.

    The process group stays open because a second training in the same process needs the group again. Processes on a
    machine without a GPU also form a process group, while accelerate would treat each process as a separate run.

    Args:
        track: Names of accelerate's trackers, such as "tensorboard", which training loops start and end.
        folder: Folder of the files of trackers.
        timeout_seconds: How long a process waits for the other processes before it raises an error; None = 1800.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    timeout_seconds = 1800.0 if timeout_seconds is None else timeout_seconds
    if timeout_seconds <= 0:
        raise ValueError(f"timeout_seconds must be above 0, got {timeout_seconds}")
    check_trackers(track)

    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))
    accelerator = Accelerator(cpu=on_cpu, log_with=list(track) or None, project_dir=folder, kwargs_handlers=[timeout])
    if accelerator.num_processes > 1:
        atexit.register(accelerator.end_training)
    return accelerator


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in nested dataclasses, dicts, lists and tuples to a device.

    Unlike `send_to_device` of accelerate, this function also moves tensors in dataclasses. If the device is a CPU, the
    batch is returned unchanged. A copy from page-locked memory to a GPU does not block.
    """
    if device.type == "cpu":
        return batch
    return map_tensors(batch, lambda part: part.to(device, non_blocking=device.type == "cuda"))


def map_tensors(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every tensor, and every module, in nested dataclasses, dicts, lists and tuples."""
    if isinstance(batch, Tensor | nn.Module):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, function) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        values = {item.name: map_tensors(getattr(batch, item.name), function) for item in fields(batch) if item.init}
        return replace(batch, **values)
    return batch


def data_parallel(module: nn.Module, accelerator: "accelerate.Accelerator") -> nn.Module:
    """Wrap a module that computes a loss, so that its backward pass averages the gradients over the processes.

    DistributedDataParallel sends the gradients of the last layers while those of the first layers are computed. If a
    parameter has a gradient on only some processes, the other processes use a zero gradient. The wrapper has a process
    group of its own, as a loss may use collective operations in its backward pass (MuLaN), whose order beside those of
    the gradients can differ between processes.
    """
    if accelerator.num_processes == 1:
        return module
    with warnings.catch_warnings():
        # newer versions of torch have another name for broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            process_group=gradient_group(accelerator),
            find_unused_parameters=True,
            broadcast_buffers=False,
        )


def gradient_group(accelerator: "accelerate.Accelerator") -> Any:
    """Return the process group of all gradients, with the timeout of the Accelerator."""
    return _gradient_group(dist.group.WORLD, getattr(accelerator.init_handler, "timeout", None))


@cache
def _gradient_group(world: Any, timeout: timedelta | None) -> Any:
    """Create the process group of all gradients, once for each group of all processes."""
    return dist.new_group(timeout=timeout)


def unaveraged_gradients(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a module of `data_parallel` accumulates gradients without averaging."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def shared_errors(accelerator: "accelerate.Accelerator") -> Iterator[None]:
    """Raise the first error of any process in a `with` statement on all processes.

    When a process fails, operations of the others with it fail too, at the latest after the timeout of the process
    group. Their errors are replaced by one with the message of the first process that failed.
    """
    if accelerator.num_processes == 1:
        yield
        return
    key = f"first error of training {next(_TRAININGS)}"
    try:
        yield
    except Exception as error:  # of any kind: data sets and losses are code of the user
        own = f"process {accelerator.process_index} failed: {type(error).__name__}: {error}"
        try:
            first = dist.distributed_c10d._get_default_store().compare_set(key, "", own).decode()
        except RuntimeError:  # the process that keeps the store has ended
            first = own
        if first != own:
            raise RuntimeError(first) from error
        raise


def mean_over_processes(accelerator: "accelerate.Accelerator", value: Tensor) -> Tensor:
    """Return the mean of a scalar over the processes."""
    if accelerator.num_processes == 1:
        return value
    mean: Tensor = accelerator.reduce(value.detach().float(), reduction="mean")
    return mean


def map_over_processes(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the results of a function for all items, each computed on one process, in the same order on every process.

    The function must not use collective operations, and returns numbers, or tensors on the CPU. An error on one process
    is an error on all of them.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    if size == 1:
        return [function(item) for item in items]
    own: list[Result] = []
    failure: Exception | None = None
    try:
        own = [function(item) for item in items[rank::size]]
    except Exception as error:  # of any kind; the other processes wait for this one
        failure = error
    shares: list[tuple[list[Result], str | None]] = [([], None)] * size
    dist.all_gather_object(shares, (own, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for number, (_, message) in enumerate(shares):
        if message is not None:
            raise RuntimeError(f"process {number} failed: {message}")
    return [shares[number % size][0][number // size] for number in range(len(items))]


def broadcast_tensors(accelerator: "accelerate.Accelerator", tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with the tensors of the first process; all processes must pass equal shapes in equal order."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for bucket in _buckets(tensors):
            parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in bucket]
            received = broadcast(torch.cat(parts)).split([part.numel() for part in parts])
            for tensor, part in zip(bucket, received, strict=True):
                # a slice of the bucket may start anywhere; its copy is aligned for the wider type
                tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))


class PersistentBuffers:
    """Persistent buffers of a module (codebooks, running statistics), which a forward pass may change."""

    def __init__(self, module: nn.Module) -> None:
        saved = set(module.state_dict())
        paths = [name.rpartition(".") for name, _ in module.named_buffers() if name in saved]
        self._slots = [(module.get_submodule(parent), name) for parent, _, name in paths]

    def tensors(self) -> list[Tensor]:
        """Return the current buffers; each call looks them up again, because a forward pass may assign a new tensor."""
        return [getattr(parent, name) for parent, name in self._slots]

    def copy(self) -> list[Tensor]:
        """Return a copy of each buffer."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Set the buffers to the values that `copy` returned."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors(), values, strict=True):
                tensor.copy_(value)


def merge_means(accelerator: "accelerate.Accelerator", values: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean of every metric over all processes; a metric may be missing on some processes."""
    per_process = [values]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        per_process = gather_object([values])
    merged: dict[str, list[float]] = {}
    for metrics in per_process:
        for name, numbers in metrics.items():
            merged.setdefault(name, []).extend(numbers)
    return {name: sum(numbers) / len(numbers) for name, numbers in merged.items() if numbers}


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbouring tensors of equal dtype into buckets of limited size."""
    bucket: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        if bucket and (numel + tensor.numel() > _BUCKET_NUMEL or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, numel = [], 0
        bucket.append(tensor)
        numel += tensor.numel()
    if bucket:
        yield bucket
