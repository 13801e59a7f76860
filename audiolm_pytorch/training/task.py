"""Inputs of the training loop: a task (module, data and losses) and the settings of the run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from multiprocessing import get_all_start_methods
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.samples import Sample

__all__ = ["LoopSettings", "LossOutput", "Phase", "PhaseLoss", "Task"]

# These settings decide how batches are loaded, when files are written, where tensors are stored, and what is computed
# twice. They have no influence on the weights, except for the rounding of sums over processes.
_FREE_TO_CHANGE = (
    "checkpoint_blocks",
    "fsdp",
    "sharded_checkpoints",
    "num_workers",
    "checkpoint_every_seconds",
    "checkpoint_every_steps",
    "validate_every",
    "sample_every",
    "log_every",
    "allow_changed",
)

# Settings that have no effect beside an optimizer or a schedule.
_REPLACED = {
    "optimizer": ("learning_rate", "weight_decay", "betas"),
    "schedule": ("warmup_steps", "final_lr_fraction"),
}

OptimizerChoice = Optimizer | Callable[[list[dict[str, Any]]], Optimizer]
ScheduleChoice = LRScheduler | Callable[[Optimizer], LRScheduler]


@trainer_arguments()
@typed
@dataclass(frozen=True)
class LoopSettings:
    """Settings of a training run.

    Args:
        num_train_steps: Optimizer steps of the whole run.
        batch_size: Items per forward pass and process; a step has `batch_size * grad_accum_every * processes` items.
        learning_rate: Peak learning rate of the schedule (see `learning_rate_at`).
        warmup_steps: Number of steps of linear warm-up.
        final_lr_fraction: Learning rate of the last step as a fraction of the peak.
        weight_decay: Decoupled weight decay (AdamW, arXiv 1711.05101) of tensors with two or more dimensions.
        betas: Decay rates of the two moments in AdamW.
        optimizer: Replacement for AdamW: a function like `partial(torch.optim.SGD, lr=0.1)`, an optimizer object, or a
            dict of functions or objects by phase name. An optimizer function receives two parameter groups: tensors
            with two or more dimensions, and vectors with `weight_decay=0`.
        schedule: Replacement for warm-up and cosine decay: a function like `partial(OneCycleLR, max_lr=0.1,
            total_steps=1000)`, an LRScheduler object, or a dict of functions or objects by phase name. A schedule
            advances once per step of its phase. The default schedule uses the learning rates of the optimizer as peaks.
        grad_accum_every: Number of batches whose gradients are averaged in a step.
        max_grad_norm: Maximum norm of the gradients of a phase; larger gradients are scaled down.
        precision: "fp32", or "bf16" or "fp16" to compute the loss under autocast. With "fp16", the loss is scaled up,
            so that small gradients do not become zero; a step whose gradients overflow is skipped and halves the scale.
        checkpoint_blocks: Whether transformer blocks store only their inputs, and are computed again in the backward
            pass, see `Transformer`. The result does not depend on it.
        compile: Whether transformer blocks are compiled with `torch.compile`.
        fsdp: Whether several processes share weights, gradients, EMA and optimizer state by FSDP2 (`fully_shard`)
            instead of holding all of them each; for tasks with one phase. Before and after `train`, and in validation,
            every process holds all weights. After an error, the module cannot be used. A run can continue with another
            value.
        sharded_checkpoints: With `fsdp`, every process writes its own part of a checkpoint. Such a checkpoint can be
            continued by any number of processes.
        ema_decay: Decay of the EMA of the weights; None disables the EMA.
        freeze: Names of parameters that are not trained, or parts of their names between dots, e.g. `("embedding",
            "blocks.0")`; see `frozen_parameters`.
        seed: Seed of the data order and of all random numbers in training.
        num_workers: Worker processes that load batches ahead of the training, for each training process; 0 loads every
            batch when it is needed. The result does not depend on `num_workers`. Workers save time if decoding is slow
            (compressed files, resampling) and the machine has free CPU cores; token shards rarely need them.
        sample_every: Steps between audible samples, which follow a validation; None = with every validation. The
            last step always has samples.
        checkpoint_every_steps: Steps between additional checkpoints; None writes checkpoints by time only.
        allow_changed: Names of settings that may differ from those of the interrupted or finished run to continue, e.g.
            `("batch_size", "num_train_steps")`. By default every difference is an error. A changed optimizer starts
            with its own settings and keeps the state of the parameters if its class is the same; a changed schedule is
            built again and advanced to the current step.
    """

    num_train_steps: int
    batch_size: int
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_lr_fraction: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: OptimizerChoice | dict[str, OptimizerChoice] | None = None
    schedule: ScheduleChoice | dict[str, ScheduleChoice] | None = None
    grad_accum_every: int = 1
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint_blocks: bool = False
    compile: bool = False
    fsdp: bool = False
    sharded_checkpoints: bool = False
    ema_decay: float | None = None
    freeze: tuple[str, ...] = ()
    seed: int = 0
    num_workers: int = 0
    checkpoint_every_seconds: float = 120.0
    checkpoint_every_steps: int | None = None
    validate_every: int = 500
    sample_every: int | None = None
    log_every: int = 20
    allow_changed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_train_steps", "batch_size", "grad_accum_every", "validate_every", "log_every"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("checkpoint_every_steps", "sample_every"):
            every = getattr(self, name)
            _need(every is None or every >= 1, name, every, "1 or more, or None")
        for name in ("learning_rate", "max_grad_norm", "checkpoint_every_seconds"):
            _need(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("warmup_steps", "weight_decay", "seed", "num_workers"):
            _need(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _need(self.num_workers == 0 or "fork" in get_all_start_methods(), "num_workers", self.num_workers,
              "0 on this system, which cannot fork processes")  # fmt: skip
        _need(self.fsdp or not self.sharded_checkpoints, "sharded_checkpoints", True, "False without fsdp")
        _need(0 <= self.final_lr_fraction <= 1, "final_lr_fraction", self.final_lr_fraction, "from 0 to 1")
        _need(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to below 1")
        _need(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "between 0 and 1, or None")
        for choice, names in _REPLACED.items():
            is_replaced = getattr(self, choice) is not None and not isinstance(getattr(self, choice), dict)
            for name in names if is_replaced else ():
                value = getattr(self, name)
                _need(value == getattr(LoopSettings, name), name, value, f"left out, because {choice} replaces it")

    def fixed(self) -> dict[str, Any]:
        """Return the JSON-compatible settings that must not change when a run is resumed."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _FREE_TO_CHANGE}
        for name in [name for name in ("optimizer", "schedule", "compile", "freeze") if not values[name]]:
            del values[name]
        return dict(json.loads(json.dumps(values, default=_described)))


def _described(value: Any) -> Any:
    """Describe an optimizer or a schedule by name and arguments, as JSON-compatible data."""
    if isinstance(value, partial):
        return {"function": value.func, "args": value.args, **value.keywords}
    if isinstance(value, Optimizer):
        return {"class": type(value), **value.defaults}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _need(holds: bool, name: str, value: object, range_text: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {range_text}")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Result of the loss function of a training phase.

    Args:
        metrics: Additional metrics by name, one scalar each; gradients of the metrics are not used.
    """

    loss: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Phase:
    """Phase of a training step, with the modules that one optimizer trains and the loss of the modules.

    Args:
        modules: Submodules of the task's module, whose parameters no other phase may train.
        loss: Function of `(batch, step)` that computes the loss; it may call the modules any number of times.
        optional: Those submodules of `modules` that the loss of some batches does not call.
    """

    name: str
    modules: tuple[nn.Module, ...]
    loss: Callable[[Any, int], LossOutput]
    first_step: int = 0
    optional: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        _need(self.first_step >= 0, f"first_step of phase {self.name!r}", self.first_step, "0 or more")


class PhaseLoss(nn.Module):
    """Loss and metrics of a phase as one module, whose parameters are those of the phase's modules."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.parts, self._phase = nn.ModuleList(phase.modules), phase

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, and the metrics without gradients."""
        output = self._phase.loss(batch, step)
        return output.loss, _scalars({"loss": output.loss, **output.metrics})


def _scalars(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Convert metrics to scalars without gradients; a tensor of shape `[1]` is also accepted."""
    scalars: dict[str, Tensor | float] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; return one number, e.g. the mean")
        scalars[name] = value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
    return scalars


@runtime_checkable
class Task(Protocol):
    """Interface of a task for `TrainLoop`, which defines a module to train, data, losses and validation.

    A task may have an attribute `config`, a JSON-compatible description that must not change when a run is resumed.
    """

    @property
    def name(self) -> str:
        """Name of the task in messages and checkpoints."""

    @property
    def module(self) -> nn.Module:
        """Module that contains all trained parameters; checkpoints store the weights of the module.

        The training loop moves the module to the device and calls its `train()` and `eval()`. A frozen submodule must
        override `train` to stay in eval mode.
        """

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases of each training step in order, e.g. one for a language model, two for a codec with discriminators.

        All phases receive the same batch objects, so that a phase can store results in a batch for a later phase.
        """

    @property
    def num_items(self) -> int:
        """Number of items in the data set."""

    @property
    def chance(self) -> dict[str, float]:
        """Chance levels of metrics, such as `{"loss": math.log(512)}`, which are written beside the metrics."""

    def batch(self, indices: list[tuple[int, int]]) -> Any:
        """Build a batch from (epoch, item index) pairs; only the pairs and the random generators may affect the batch.

        A batch contains tensors on the CPU in nested dataclasses, dicts, lists and tuples. With `num_workers`, a forked
        process calls this method, which must not use a GPU then; changes of the task are lost.
        """

    def validate(self) -> dict[str, float]:
        """Return validation metrics, computed on every process in eval mode, with EMA weights and without gradients.

        With `map_over_processes`, every process evaluates a share of the items, and all return the same metrics.
        """

    def samples(self, step: int) -> Sequence[Sample]:
        """Return audio that shows what the module has learned; called after validations on the first process only."""

    def before_training(self) -> None:
        """Prepare `module` before step 0, e.g. by k-means on the data; a resumed run does not call this method."""
