"""FSDP2: the weights, gradients, EMA and optimizer state of a task, sharded over the processes of a run."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.training.blocks import transformers_of
from audiolm_pytorch.training.distributed import gradient_group
from audiolm_pytorch.training.task import Phase, PhaseLoss, Task

if TYPE_CHECKING:
    import accelerate

__all__ = ["Sharding", "from_local", "gathered", "is_sharded", "local_part", "shard_as", "total_norm"]

_SHARDED: WeakSet[nn.Module] = WeakSet()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether every process holds a part of a tensor."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds, with the same memory; return others unchanged."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def shard_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Shard a whole tensor of equal shape on all processes as a parameter is sharded, without communication."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def from_local(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the sharded tensor of which every process holds a `part`, with the shape of a parameter."""
    if not isinstance(parameter, DTensor):
        return part
    place: dict[str, Any] = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
    return DTensor.from_local(part, **place, run_check=False, shape=parameter.shape, stride=parameter.stride())


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather sharded tensors one after another, on the CPU of the processes with `keep`; the others return nothing."""
    whole = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = value
    return whole


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together; sharded gradients count with their parts on all processes."""
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    parts = [local_part(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    if not parts:
        return norm
    squares = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(squares)
    return (squares + norm.to(squares.device).square()).sqrt()


class Sharding:
    """Shards the parameters of a task over all processes; the module is sharded or plain, with the same parameters.

    Every transformer block is a unit, whose weights are gathered while the block is computed. All other parameters,
    also those of blocks in `Phase.optional`, are one unit, which is gathered for the whole step. Scalars are not
    sharded.

    Attributes:
        loss: The loss of the phase, which gathers weights and shards gradients.
    """

    def __init__(self, task: Task, accelerator: "accelerate.Accelerator") -> None:
        if len(task.phases) != 1:
            names = [phase.name for phase in task.phases]
            raise ValueError(f"fsdp=True is for tasks with one phase, but {task.name} has {names}; set fsdp=False")
        if not _SHARDED.isdisjoint(task.module.modules()):
            raise ValueError(
                f"the module of {task.name} was trained with fsdp=True before in this process, which torch allows only "
                "once; load the module again"
            )
        phase, group = task.phases[0], gradient_group(accelerator)
        self._task, self._group = task, group
        self._weight_names = list(weights_of(task.module))
        before = dict(task.module.named_parameters())
        self._modules = list(task.module.modules())
        attributes = [set(vars(module)) for module in self._modules]
        self._other = [(type(module), _state_of(module)) for module in self._modules]
        options: dict[str, Any] = {"mesh": DeviceMesh.from_group(group, accelerator.device.type)}
        if scalars := {parameter for parameter in before.values() if parameter.ndim == 0}:
            options["ignored_params"] = scalars  # needs torch 2.7
        self.loss = _ShardedLoss(phase, accelerator.device)
        for block in self.loss.blocks:
            fully_shard(block, **options)
        fully_shard(self.loss, **options)
        _SHARDED.update(self._modules)
        self._added = [vars(module).keys() - own for module, own in zip(self._modules, attributes, strict=True)]
        after = dict(task.module.named_parameters())
        self._sharded = {name: after[name] for name, parameter in before.items() if after[name] is not parameter}
        self._plain = {name: before[name] for name in self._sharded}
        self._is_plain = False
        self._free()

    def finish_gradients(self) -> None:
        """Average gradients of scalars, and remove gradients of parameters that no process has used in the step."""
        used = self.loss.used
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._group)
        for parameter, is_used in zip(self.loss.common_parameters(), used.tolist(), strict=True):
            if not is_used:
                parameter.grad = None
            elif not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self._group)
                parameter.grad /= dist.get_world_size()
        used.zero_()

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the module by the names of `weights_of`; parameters are sharded."""
        state = self._task.module.state_dict()
        return {name: state[name].detach() for name in self._weight_names}

    @contextmanager
    def plain(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Use the module with whole weights inside a `with` statement; `weights`, sharded, replace its own."""
        self.release(weights)
        try:
            yield
        finally:
            self.resume()

    def release(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Make the module plain again, with whole weights on every process."""
        for name, parameter in self._plain.items():
            source = cast(DTensor, (weights or {}).get(name, self._sharded[name]))
            parameter.data = source.full_tensor().detach()
        self._exchange()
        self._is_plain = True

    def resume(self) -> None:
        """Shard the module as before `release`, if it was called."""
        if self._is_plain:
            self._exchange()
            self._free()
            self._is_plain = False

    def _exchange(self) -> None:
        """Exchange the parameters, hooks and classes of the sharded modules and those of the plain modules."""
        for index, module in enumerate(self._modules):
            names = [name for name in vars(module) if _is_state(name) or name in self._added[index]]
            current = type(module), {name: vars(module).pop(name) for name in names}
            module.__class__, state = self._other[index]
            vars(module).update(state)
            self._other[index] = current

    def _free(self) -> None:
        """Free the memory of the whole weights."""
        for parameter in self._plain.values():
            parameter.data = parameter.data.new_empty(0)


class _ShardedLoss(PhaseLoss):
    """Loss of a phase in which all parameters outside of sharded blocks have a gradient on every process.

    FSDP2 reduces the gradients of a unit together, which fails if a parameter has a gradient on some processes only.

    Attributes:
        blocks: Transformer blocks to shard.
        used: Whether the loss has used each of the `common_parameters` in this step, on this process.
    """

    def __init__(self, phase: Phase, device: torch.device) -> None:
        super().__init__(phase)
        optional = {part for module in phase.optional for part in module.modules()}
        stacks = [transformer for transformer in transformers_of(self.parts) if transformer not in optional]
        self.blocks = [block for transformer in stacks for block in transformer.blocks]
        in_blocks = {part for block in self.blocks for part in block.modules()}
        places = {
            parameter: (module, name)
            for module in self.parts.modules()
            if module not in in_blocks
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        self._places = list(places.values())
        self.used = torch.zeros(len(places), dtype=torch.uint8, device=device)

    def common_parameters(self) -> list[Tensor]:
        """Return the trainable parameters outside of sharded blocks; they are whole inside `forward`."""
        return [getattr(module, name) for module, name in self._places]

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, and the metrics without gradients."""
        loss, metrics = super().forward(batch, step)
        parameters, leaves = self.common_parameters(), _leaves(loss)
        is_used = [id(parameter) in leaves for parameter in parameters]
        self.used |= torch.tensor(is_used, dtype=torch.uint8, device=self.used.device)
        for parameter, used in zip(parameters, is_used, strict=True):
            if not used:
                loss = loss + parameter.flatten()[:0].sum()
        return loss, metrics


def _leaves(loss: Tensor) -> set[int]:
    """Return the ids of the parameters in the graph of a loss."""
    leaves, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        left += [following for following, _ in node.next_functions]
    return leaves


def _is_state(name: str) -> bool:
    """Whether an attribute of a module contains its parameters or its hooks."""
    return name == "_parameters" or "_hooks" in name


def _state_of(module: nn.Module) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in vars(module).items() if _is_state(name)}
