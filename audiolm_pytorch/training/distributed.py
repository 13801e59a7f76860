"""What several processes have to agree on: gradients, buffers and metrics."""

import atexit
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import accelerate

__all__ = [
    "PersistentBuffers",
    "average_gradients",
    "broadcast_tensors",
    "merge_means",
    "create_accelerator",
    "to_device",
]

_BUCKET_NUMEL = 2**25  # 128 MiB of float32: few collectives, and little memory beside the gradients


def create_accelerator() -> "accelerate.Accelerator":
    """Make an Accelerator for a loop that was handed none; its process group ends with the process.

    Ending it with the training would leave a second training of the same process without one. Several processes on a
    machine without a GPU form a group too; accelerate alone would leave each of them to itself.
    """
    from accelerate import Accelerator

    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu)
    if accelerator.num_processes > 1:
        atexit.register(accelerator.end_training)
    return accelerator


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch; unlike accelerate's `send_to_device` this enters dataclasses as well.

    Args:
        batch: Any nesting of dataclasses, dicts, lists and tuples.
        device: Where to.

    Returns:
        The same nesting; the batch itself where nothing has to move.
    """
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor | nn.Module):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        values = {item.name: to_device(getattr(batch, item.name), device) for item in fields(batch) if item.init}
        return replace(batch, **values)
    return batch


def average_gradients(
    accelerator: "accelerate.Accelerator", parameters: Sequence[nn.Parameter], loss: Tensor
) -> Tensor:
    """Replace each gradient by its mean over the processes.

    DistributedDataParallel averages inside the forward of the module it wraps; a phase's loss is any closure over raw
    modules, so the gradients are averaged explicitly after the backward pass. A parameter without a gradient on one
    process counts as zero there; without one on any process it stays without, as it would in a single process.

    Args:
        accelerator: Of the run.
        parameters: In the same order on every process.
        loss: Scalar of this process.

    Returns:
        The mean loss over the processes, so that all of them judge a step alike.
    """
    if accelerator.num_processes == 1:
        return loss
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=loss.device)
    agreed = accelerator.reduce(torch.cat([present, loss.detach().float().reshape(1)]), reduction="mean")
    used = [parameter for parameter, share in zip(parameters, agreed[:-1].tolist(), strict=True) if share > 0]
    for bucket in _buckets(used):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = accelerator.reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), reduction="mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    return agreed[-1]


def broadcast_tensors(accelerator: "accelerate.Accelerator", tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors by those of the first process, bit for bit.

    Args:
        accelerator: Of the run.
        tensors: In the same order and of the same shapes on every process.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for bucket in _buckets(tensors):
            parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in bucket]
            received = broadcast(torch.cat(parts)).split([part.numel() for part in parts])
            for tensor, part in zip(bucket, received, strict=True):
                # A slice of the bucket may start anywhere; a copy of its own is aligned for the wider type.
                tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))


class PersistentBuffers:
    """The checkpointed buffers of a module, which its forward may change (codebooks, running statistics).

    Args:
        module: The module of a task.
    """

    def __init__(self, module: nn.Module) -> None:
        saved = set(module.state_dict())
        paths = [name.rpartition(".") for name, _ in module.named_buffers() if name in saved]
        self._slots = [(module.get_submodule(owner), name) for owner, _, name in paths]

    def tensors(self) -> list[Tensor]:
        """Look the buffers up anew: a forward may assign another tensor instead of writing into the old one."""
        return [getattr(owner, name) for owner, name in self._slots]

    def copy(self) -> list[Tensor]:
        """Copy the values."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Write copied values back.

        Args:
            values: As given by `copy`.
        """
        with torch.no_grad():
            for tensor, value in zip(self.tensors(), values, strict=True):
                tensor.copy_(value)


def merge_means(accelerator: "accelerate.Accelerator", values: dict[str, list[float]]) -> dict[str, float]:
    """Average every metric over all its values on all processes; the names may differ between processes.

    Args:
        accelerator: Of the run.
        values: Metric name to the values seen by this process.

    Returns:
        Metric name to mean.
    """
    per_rank = [values]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        per_rank = gather_object([values])
    merged: dict[str, list[float]] = {}
    for one in per_rank:
        for name, numbers in one.items():
            merged.setdefault(name, []).extend(numbers)
    return {name: sum(numbers) / len(numbers) for name, numbers in merged.items() if numbers}


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbouring tensors of one type up to a size."""
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
