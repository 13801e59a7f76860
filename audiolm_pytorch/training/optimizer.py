"""Optimizer step of a training phase, with gradient averaging over processes, clipping, and skipping of NaN losses."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.text import logger_named, one_line
from audiolm_pytorch.training.distributed import (
    PersistentBuffers,
    broadcast_tensors,
    data_parallel,
    mean_over_processes,
    unaveraged_gradients,
)
from audiolm_pytorch.training.precision import LossScale, autocast
from audiolm_pytorch.training.sharding import Sharding, local_part, shard_as, total_norm
from audiolm_pytorch.training.task import LoopSettings, OptimizerChoice, Phase, PhaseLoss, ScheduleChoice

if TYPE_CHECKING:
    import accelerate

__all__ = ["PhaseOptimizer", "inverse_square_root", "learning_rate_at"]

logger = logger_named(__name__)


class PhaseOptimizer:
    """Optimizer and learning rate schedule of a training phase.

    The default optimizer is AdamW (arXiv:1711.05101), with linear warm-up and cosine decay of the learning rate.

    Args:
        names: Name of each trainable parameter of the task's module.
        buffers: Persistent buffers of the task's module.
    """

    def __init__(
        self,
        phase: Phase,
        names: Mapping[nn.Parameter, str],
        buffers: PersistentBuffers,
        settings: LoopSettings,
        accelerator: "accelerate.Accelerator",
        sharding: Sharding | None = None,
    ) -> None:
        self.phase, self._sharding = phase, sharding
        self._settings, self._accelerator, self._buffers = settings, accelerator, buffers
        parameters = {parameter: None for module in phase.modules for parameter in module.parameters()}
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        num_outside = sum(parameter not in names for parameter in self._parameters)
        if num_outside or not self._parameters:
            raise ValueError(
                f"phase {phase.name!r} needs one or more trainable parameters, all in the task's module; got "
                f"{len(self._parameters)} parameters, {num_outside} of them outside of the task's module"
            )
        self._names = [names[parameter] for parameter in self._parameters]
        self._loss_module = data_parallel(PhaseLoss(phase), accelerator) if sharding is None else sharding.loss
        self.loss_scale = LossScale() if settings.precision == "fp16" else None
        choices: list[Any] = [settings.optimizer, settings.schedule]
        optimizer, schedule = [choice.get(phase.name) if isinstance(choice, dict) else choice for choice in choices]
        self._is_default = optimizer is None and schedule is None
        self.optimizer = self._create_optimizer(optimizer)
        self._scheduler = None if schedule is None else self._create_scheduler(schedule)

    def _create_optimizer(self, choice: OptimizerChoice | None) -> Optimizer:
        if choice is None:
            # one elementwise kernel for all tensors, hence deterministic; on other devices torch chooses
            fused = True if self._accelerator.device.type in ("cpu", "cuda") else None
            settings = self._settings
            choice = partial(
                AdamW, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=fused
            )
        optimizer = choice if isinstance(choice, Optimizer) else choice(self._groups())
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
        optimizer.load_state_dict(optimizer.state_dict())  # moves the state of an optimizer object to the device
        members = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if {parameter for parameter in members if parameter.requires_grad} != set(self._parameters):
            raise ValueError(
                f"the {type(optimizer).__name__} of phase {self.phase.name!r} must have exactly the trainable "
                f"parameters of the phase ({', '.join(self._names[:3])}, ...); for several phases, pass a dict by phase"
            )
        for group in optimizer.param_groups:
            # a resumed run has Python numbers, from which a schedule computes other rates than from numpy's float32
            group.update({name: value.item() for name, value in group.items() if isinstance(value, np.generic)})
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: tensors with two or more dimensions; and vectors, scalars without weight decay.

        Scalars have a group of their own, because they are not sharded, and optimizers compute a group in one call.
        """
        matrices = [parameter for parameter in self._parameters if parameter.ndim >= 2]
        others = [[parameter for parameter in self._parameters if parameter.ndim == ndim] for ndim in (1, 0)]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            *({"params": params, "weight_decay": 0.0} for params in others),
        ]
        return [group for group in groups if group["params"]]

    def _create_scheduler(self, choice: ScheduleChoice) -> LRScheduler:
        scheduler = choice if isinstance(choice, LRScheduler) else choice(self.optimizer)
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            name = type(scheduler).__name__
            raise TypeError(f"schedule must return an LRScheduler whose step() needs no metric, got {name}")
        if scheduler.optimizer is not self.optimizer:
            raise ValueError(f"schedule changes another optimizer; create it with that of phase {self.phase.name!r}")
        return scheduler

    def _set_learning_rate(self, step: int) -> None:
        if self._scheduler is not None:
            if step > self.phase.first_step:
                self._advance_schedule(step)
            return
        settings = self._settings
        limits: dict[str, Any] = {"warmup_steps": settings.warmup_steps, "num_train_steps": settings.num_train_steps}
        for group in self.optimizer.param_groups:
            peak, final_fraction = group["initial_lr"], settings.final_lr_fraction
            group["lr"] = learning_rate_at(step, peak=peak, final_fraction=final_fraction, **limits)

    def _advance_schedule(self, step: int) -> None:
        if self._scheduler is None:
            return
        with warnings.catch_warnings():
            # a resumed optimizer has not stepped yet
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            try:
                self._scheduler.step()
            except ValueError as error:  # OneCycleLR after its last step
                raise ValueError(
                    f"the schedule {type(self._scheduler).__name__} of phase {self.phase.name!r} has no learning rate "
                    f"for step {step} ({one_line(error)}); pass a schedule for all steps of the phase"
                ) from error

    def step(self, batches: Sequence[Any], step: int) -> list[dict[str, Tensor | float]] | None:
        """Train the parameters of the phase for one step.

        Returns:
            The metrics of each batch, or None if the loss or the gradients are not finite. If the result is None, the
            step changes neither parameters nor buffers.
        """
        self._set_learning_rate(step)
        before = self._buffers.copy()
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        metrics: list[dict[str, Tensor | float]] = []
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, start=1):
            # gradients are averaged in the backward pass of the last batch
            with nullcontext() if number == len(batches) else unaveraged_gradients(self._loss_module):
                loss, values = self._loss(batch, step)
                loss = loss * (scale / len(batches))
                # gradients of other phases' parameters are not computed; sharded parameters are no leaves of the graph
                self._accelerator.backward(loss, **({} if self._sharding else {"inputs": self._parameters}))
            metrics.append(values)
        if self._sharding is not None:
            self._sharding.finish_gradients()
        losses = torch.stack([torch.as_tensor(values["loss"]).float() for values in metrics])
        loss = mean_over_processes(self._accelerator, losses.sum())
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        grad_norm = total_norm(gradients).to(loss.device) / scale
        # the only wait for the device in a step
        is_finite = bool(torch.isfinite(torch.stack([loss.float(), grad_norm.float()])).all())
        if self.loss_scale is not None:
            self.loss_scale.update(is_finite)
        if not is_finite:
            self.optimizer.zero_grad(set_to_none=True)
            self._buffers.restore(before)
            return None
        factor = (self._settings.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0) / scale
        for gradient in gradients:
            local_part(gradient).mul_(factor.to(gradient.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        broadcast_tensors(self._accelerator, self._buffers.tensors())
        metrics[-1]["grad_norm"] = grad_norm.detach()
        return metrics

    def _loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Compute the loss and the metrics of the phase in the precision of the settings."""
        with autocast(self._settings.precision, self._accelerator.device):
            loss, metrics = self._loss_module(batch, step)
            return loss, metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return optimizer tensors by `parameter name/state name`, and all other state as JSON-compatible data."""
        states = {
            f"{name}/{state_name}": value.detach() if isinstance(value, Tensor) else value
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for state_name, value in self.optimizer.state.get(parameter, {}).items()
        }
        tensors = {name: value for name, value in states.items() if isinstance(value, Tensor)}
        if self._is_default:
            return tensors, {}
        name = f"the {type(self.optimizer).__name__} of phase {self.phase.name!r}"
        state_dict = self.optimizer.state_dict()
        if len(state_dict) > 2 or not all(isinstance(key, int) for key in state_dict["state"]):
            raise ValueError(f"a checkpoint cannot store {name}, because a part of its state belongs to no parameter")
        rest = {
            "class": type(self.optimizer).__qualname__,
            "values": {key: value for key, value in states.items() if key not in tensors},
            "groups": [{**group, "params": None} for group in state_dict["param_groups"]],
            "schedule": None if self._scheduler is None else self._scheduler.state_dict(),
        }
        return tensors, _encoded(rest, name)

    def load_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], *, is_changed: bool) -> None:
        """Restore the optimizer state that `state` returned; tensors of other phases are ignored.

        If the choice of the optimizer or schedule has changed since then, only the state of the parameters is restored,
        and only for an optimizer of the same class. `restart_schedule` has to follow.
        """
        state: dict[nn.Parameter, dict[str, Any]] = {}
        parameters = dict(zip(self._names, self._parameters, strict=True))
        saved = _decoded(rest) if rest else {}
        values = {**tensors, **saved.get("values", {})}
        groups = self.optimizer.state_dict()["param_groups"]
        if is_changed:
            before, now = saved["class"] if saved else AdamW.__qualname__, type(self.optimizer).__qualname__
            if before != now:
                logger.warning("phase %r: %s starts without the state of %s", self.phase.name, now, before)
                values = {}
        else:
            for group, of_checkpoint in zip(groups, saved.get("groups", groups), strict=True):
                group.update(of_checkpoint, params=group["params"])
        for key, value in values.items():
            name, _, state_name = key.rpartition("/")
            if name in parameters:
                parameter = parameters[name]
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # files hold contiguous tensors, the fused step needs the memory order of the parameter
                    empty = torch.empty_like(parameter, dtype=value.dtype).detach()
                    value = empty.copy_(shard_as(parameter, value))
                state.setdefault(parameter, {})[state_name] = value
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # load_state_dict moves tensors to the device, apart from those that stay on the CPU
        self.optimizer.load_state_dict(
            {
                "state": {index: state[parameter] for index, parameter in enumerate(ordered) if parameter in state},
                "param_groups": groups,
            }
        )
        if self._scheduler is not None and not is_changed:
            self._scheduler.load_state_dict(saved["schedule"])

    def restart_schedule(self, num_steps: int) -> None:
        """Advance a new schedule to where it would be after the first `num_steps` steps of the run."""
        for step in range(self.phase.first_step + 1, num_steps):
            self._advance_schedule(step)

    def choice(self, settings: Mapping[str, Any]) -> list[Any]:
        """Return what the settings of a run (see `LoopSettings.fixed`) say on optimizer and schedule of the phase."""
        choices: list[Any] = [settings.get("optimizer"), settings.get("schedule")]
        by_phase = [isinstance(one, dict) and not {"function", "class"} & one.keys() for one in choices]
        choices = [one.get(self.phase.name) if by else one for one, by in zip(choices, by_phase, strict=True)]
        if choices[0] is None:
            choices[0] = [settings.get(name) for name in ("learning_rate", "weight_decay", "betas")]
        return choices


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, num_train_steps: int, final_fraction: float = 0.0
) -> float:
    """Return the learning rate: linear warm-up, then cosine decay (SGDR without restarts, arXiv:1608.03983, eq. 5).

    Steps count from 0. The learning rate of step 0 is `peak / warmup_steps`, not 0, so that step 0 has an effect. From
    the last step on, the learning rate is `peak * final_fraction`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    last_step = max(num_train_steps - 1, warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (last_step - warmup_steps))
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress)))


@typed
def inverse_square_root(optimizer: Optimizer, warmup_steps: int) -> LRScheduler:
    """Build a schedule for `LoopSettings(schedule=partial(inverse_square_root, warmup_steps=3000))`.

    After a linear warm-up, the learning rate is proportional to the inverse square root of the step (arXiv:1706.03762,
    eq. 3). The peak is the learning rate of the optimizer.
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1))))


def _encoded(value: Any, name: str) -> Any:
    """Encode optimizer state for JSON; a dict becomes `{"dict": [[key, value], ...]}`, as JSON keys must be strings."""
    if isinstance(value, dict):
        kind = "Counter" if isinstance(value, Counter) else "dict"  # MultiStepLR has a Counter
        return {kind: [[key, _encoded(item, f"{key} of {name}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encoded(item, name) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"a checkpoint cannot store {name} of type {type(value).__name__}; use a number or a string")


def _decoded(value: Any) -> Any:
    """Decode the optimizer state that `_encoded` returned."""
    if isinstance(value, dict):
        [(kind, items)] = value.items()
        return Counter(dict(items)) if kind == "Counter" else dict(_decoded(items))
    return [_decoded(item) for item in value] if isinstance(value, list) else value
