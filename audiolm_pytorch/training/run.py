"""Execution of a training run: steps, validations, metrics and checkpoints."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.batches import BatchPlan
from audiolm_pytorch.saving.files import write_json
from audiolm_pytorch.saving.text import logger_named, one_line
from audiolm_pytorch.saving.weights import load_weights, weights_of
from audiolm_pytorch.training.blocks import block_settings
from audiolm_pytorch.training.checkpoint import Checkpoint, CheckpointFolder
from audiolm_pytorch.training.distributed import PersistentBuffers, broadcast_tensors, merge_means, to_device
from audiolm_pytorch.training.ema import WeightEMA
from audiolm_pytorch.training.loading import loaded_batches
from audiolm_pytorch.training.loss_curve import write_loss_curve
from audiolm_pytorch.training.optimizer import PhaseOptimizer
from audiolm_pytorch.training.precision import LossScale, autocast
from audiolm_pytorch.training.rng import seed_rng
from audiolm_pytorch.training.run_folder import changed_settings, read_record
from audiolm_pytorch.training.samples import write_samples
from audiolm_pytorch.training.sharding import Sharding, gathered
from audiolm_pytorch.training.stopping import StopRequest, end_by_signal, stop_signals
from audiolm_pytorch.training.task import LoopSettings, Task
from audiolm_pytorch.training.tracking import (
    MetricsFile,
    MetricWindow,
    ProgressLog,
    finite_or_none,
    progress_bar,
    running_trackers,
)

if TYPE_CHECKING:
    import accelerate

__all__ = ["OnRow", "TrainResult", "TrainingRun", "check_same_run", "run_config"]

OnRow = Callable[[Mapping[str, Any]], None]

_FORMAT_VERSION = 1
_MAX_SKIPS_IN_A_ROW = 10

logger = logger_named(__name__, every_process=True)  # each process names its own batches


@dataclass(frozen=True)
class TrainResult:
    """Result of a call of `TrainLoop.train`.

    Attributes:
        step: Number of completed steps since the run began.
        metrics: Latest value of every metric by name (`<phase>.<name>` or `valid.<name>`); None replaces NaN.
    """

    step: int
    metrics: dict[str, float | None] = field(default_factory=dict)


@typed
@dataclass(eq=False)
class _Progress:
    """Progress of a training run, which a checkpoint stores as JSON.

    Attributes:
        item_offset: Offset of the data order, so that a run that continues with another number of items per step begins
            with the item after the last one of the checkpoint.
    """

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skips_in_a_row: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    item_offset: int = 0


class TrainingRun:
    """Training run of a `TrainLoop`, either new or restored from a checkpoint."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        folder: Path,
        accelerator: "accelerate.Accelerator",
        on_row: OnRow | None = None,
    ) -> None:
        self.task, self.settings, self.folder, self.accelerator = task, settings, folder, accelerator
        self.on_row = on_row
        self.progress, self.window = _Progress(), MetricWindow()
        self.config = run_config(task, settings, accelerator)
        self.metrics_file = MetricsFile(folder / "metrics.jsonl")
        self.checkpoints = CheckpointFolder(folder)
        checkpoint = self.checkpoints.recovered() if accelerator.is_main_process else None
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process and self.checkpoints.path.exists():
            checkpoint = self.checkpoints.read()
        changes = []
        if checkpoint is not None:
            changes = check_same_run(folder, checkpoint.step, checkpoint.state.get("run"), self.config, settings)
        task.module.to(accelerator.device)
        if checkpoint is None:
            # without the rank: the preparation has to be the same on every process
            seed_rng(settings.seed, "before_training", device=accelerator.device)
            task.before_training()
        else:
            where = f"the weights in {self.checkpoints.path}"
            load_weights(task.module, checkpoint.tensors.get("model", {}), where=where)
        buffers = PersistentBuffers(task.module)
        broadcast_tensors(accelerator, [*task.module.parameters(), *buffers.tensors()])
        self.sharding = Sharding(task, accelerator) if settings.fsdp and accelerator.num_processes > 1 else None
        trained = {name: parameter for name, parameter in task.module.named_parameters() if parameter.requires_grad}
        names = {parameter: name for name, parameter in trained.items()}
        options: dict[str, Any] = {"settings": settings, "accelerator": accelerator, "sharding": self.sharding}
        self.optimizers = [PhaseOptimizer(phase, names, buffers, **options) for phase in task.phases]
        self.ema = None if settings.ema_decay is None else WeightEMA(trained, settings.ema_decay)
        if checkpoint is None:
            self._write_checkpoint()
        else:
            try:
                changed = self._restore(checkpoint)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                file = self.checkpoints.path / "state.json"
                raise ValueError(
                    f"{file} does not describe this run ({one_line(error)}); restore the checkpoint, or use another "
                    "folder"
                ) from error
            for optimizer in changed:
                optimizer.restart_schedule(checkpoint.step)
            self.progress.changes += [f"step {checkpoint.step}: {change}" for change in changes]
        self.plan = BatchPlan(
            task.num_items,
            settings.batch_size,
            settings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            offset=self.progress.item_offset,
        )

    def is_current(self) -> bool:
        """Whether the checkpoint in the folder is that of this run, and no other trainer has continued it."""
        try:
            return read_record(self.checkpoints.path / "state.json", step=int)["step"] == self.progress.step
        except (ValueError, OSError):
            return False

    def advance(self, stop_after_steps: int | None) -> TrainResult:
        """Train to the end of the run, or for `stop_after_steps` steps, and write a checkpoint."""
        settings, progress = self.settings, self.progress
        end = settings.num_train_steps
        if stop_after_steps is not None:
            end = min(end, progress.step + stop_after_steps)
        started = time.monotonic() - progress.seconds
        written_at = time.monotonic()
        if self.sharding is not None:
            self.sharding.resume()
        self.task.module.train()
        is_main = self.accelerator.is_main_process
        numbers = range(progress.step * settings.grad_accum_every, end * settings.grad_accum_every)
        pin_memory = settings.num_workers > 0 and self.accelerator.device.type == "cuda"
        with (
            stop_signals() as request,
            progress_bar(self.task.name, progress.step, settings.num_train_steps, is_main) as bar,
            loaded_batches(self.task.batch, self.plan, numbers, settings.num_workers, pin_memory) as batches,
            running_trackers(self.accelerator, self.folder, self.config["settings"]),
            block_settings(self.task.module, settings),
        ):
            log = ProgressLog(self.task.name, progress.step, settings.num_train_steps, is_main)
            while progress.step < end:
                self._step(batches)
                progress.seconds = time.monotonic() - started
                bar.update()
                if self._is_due(settings.log_every) or progress.step == 1:
                    self._log()
                    bar.set_postfix({name: value for name, value in progress.metrics.items() if name.endswith(".loss")})
                if self._is_due(settings.validate_every):
                    self._validate()
                every = settings.checkpoint_every_steps
                by_time = time.monotonic() - written_at >= settings.checkpoint_every_seconds
                if progress.step < end and (by_time or (every is not None and progress.step % every == 0)):
                    self._write_checkpoint()
                    written_at = time.monotonic()
                log.update(progress.step, progress.metrics)
                self._stop_if_requested(request)
        self._write_checkpoint()
        if progress.step == settings.num_train_steps:
            self._finish()
        if self.sharding is not None:
            self.sharding.release()
        self.accelerator.wait_for_everyone()
        return TrainResult(progress.step, dict(progress.metrics))

    def _stop_if_requested(self, request: StopRequest) -> None:
        """End with a checkpoint if any process has received a signal to stop."""
        number = request.number
        if self.accelerator.num_processes > 1:
            # all processes end after the same step; a signal that arrives now counts at the next step
            numbers = self.accelerator.reduce(torch.tensor([number], device=self.accelerator.device), reduction="sum")
            number = (number or signal.SIGTERM) if numbers.item() else 0
        if number:
            self._write_checkpoint()
            step = f"after step {self.progress.step} of {self.settings.num_train_steps} of the {self.task.name}"
            end_by_signal(number, f"{step}; a checkpoint is in {self.checkpoints.path}")

    def _step(self, loaded: Iterator[Any]) -> None:
        """Run one step of every phase that has begun; all phases use the same batches."""
        settings, step = self.settings, self.progress.step
        batches = [to_device(next(loaded), self.accelerator.device) for _ in range(settings.grad_accum_every)]
        seed_rng(settings.seed, step, self.accelerator.process_index, device=self.accelerator.device)
        for optimizer in self._begun(step):
            metrics = optimizer.step(batches, step)
            for batch_metrics in metrics or []:
                self.window.add(optimizer.phase.name, batch_metrics)
            self._count_skip(optimizer, metrics is None)
        self.progress.step = step + 1
        if self.ema is not None:
            self.ema.update(step + 1)

    def _begun(self, step: int) -> list[PhaseOptimizer]:
        return [optimizer for optimizer in self.optimizers if step >= optimizer.phase.first_step]

    def _count_skip(self, optimizer: PhaseOptimizer, skipped: bool) -> None:
        """Count a step skipped because of NaN or infinity; raise a RuntimeError after 10 skipped steps in a row.

        In float16, overflows are normal while the scale of the loss is above 1.
        """
        phase, scale = optimizer.phase.name, optimizer.loss_scale
        if not skipped:
            self.progress.skips_in_a_row[phase] = 0
            return
        self.progress.skipped += 1
        if scale is not None and scale.scale > 1:
            return
        in_a_row = self.progress.skips_in_a_row[phase] = self.progress.skips_in_a_row.get(phase, 0) + 1
        step, num_batches = self.progress.step, self.settings.grad_accum_every
        indices = [self.plan.indices(number) for number in range(step * num_batches, (step + 1) * num_batches)]
        reason = (
            f"loss or gradients of phase {phase!r} are not finite at step {step}, "
            f"(epoch, index) of the batches: {indices}"
        )
        if in_a_row >= _MAX_SKIPS_IN_A_ROW:
            raise RuntimeError(
                f"{reason}; {_MAX_SKIPS_IN_A_ROW} steps in a row were skipped. Lower the learning rate or check the "
                f"items; the last checkpoint is {self.checkpoints.path}"
            )
        logger.warning("%s; the step is skipped", reason)

    def _is_due(self, every: int) -> bool:
        """Return whether the current step is a multiple of `every`, or the last step of the run."""
        return self.progress.step % every == 0 or self.progress.step == self.settings.num_train_steps

    def _log(self) -> None:
        """Write a row of metrics per phase that has begun, with means over processes and steps since the last row."""
        means = merge_means(self.accelerator, self.window.read())
        self.window = MetricWindow()
        for optimizer in self._begun(self.progress.step - 1):
            prefix = f"{optimizer.phase.name}/"
            values = {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
            learning_rate = optimizer.optimizer.param_groups[0]["lr"]
            extra = {"learning_rate": learning_rate, "skipped": self.progress.skipped}
            self._report(optimizer.phase.name, values, extra)

    def _validate(self) -> None:
        """Validate the module with EMA weights on every process, because validation may use collective operations."""
        self.task.module.eval()
        seed_rng(self.settings.seed, "validate", device=self.accelerator.device)
        with self._weights_of_validation(), torch.no_grad():
            with autocast(self.settings.precision, self.accelerator.device):
                values = {name: float(value) for name, value in self.task.validate().items()}
            if values:
                self._report("valid", values, {})
            if self.accelerator.is_main_process:
                if self._is_due(self.settings.sample_every or self.settings.validate_every):
                    step = self.progress.step
                    write_samples(self.folder / "samples", self.task.samples(step), step, self.accelerator)
                write_loss_curve(self.folder / "loss.svg", {"": self.metrics_file.rows()}, self.task.name)
        self.accelerator.wait_for_everyone()
        self.task.module.train()

    @contextmanager
    def _weights_of_validation(self) -> Iterator[None]:
        """Use whole weights of the module inside a `with` statement, those of the EMA if there is one."""
        weights = {} if self.ema is None else self.ema.weights()
        # of a sharded module, the EMA exchanges only the parameters that are not sharded
        with nullcontext() if self.ema is None else self.ema.in_place():
            with nullcontext() if self.sharding is None else self.sharding.plain(weights):
                yield

    def _report(self, phase: str, values: dict[str, float], extra: dict[str, Any]) -> None:
        """Store the latest metrics of a phase, and write a row with the metrics and their chance levels."""
        self.progress.metrics.update({f"{phase}.{name}": finite_or_none(value) for name, value in values.items()})
        if not self.accelerator.is_main_process:
            return
        chance = {
            "chance" if name == "loss" else f"{name}_chance": self.task.chance[name]
            for name in values
            if name in self.task.chance
        }
        row = {"step": self.progress.step, "phase": phase, **values, **chance, **extra}
        self.metrics_file.write({**row, "seconds": round(self.progress.seconds, 3)})
        if self.on_row is not None:
            self.on_row(row)
        if self.accelerator.trackers:
            numbers = {f"{phase}/{name}": value for name, value in {**values, **extra}.items()}
            self.accelerator.log(numbers, step=self.progress.step)

    def _write_checkpoint(self) -> None:
        """Write a checkpoint on the first process; apart from sharded tensors, the state is equal on all processes."""
        is_main, sharding = self.accelerator.is_main_process, self.sharding
        if not is_main and sharding is None:
            return
        tensors = {"model": weights_of(self.task.module) if sharding is None else sharding.weights(), "optimizer": {}}
        optimizers = {}
        for optimizer in self.optimizers:
            phase_tensors, optimizers[optimizer.phase.name] = optimizer.state()
            tensors["optimizer"].update(phase_tensors)
        if self.ema is not None:
            tensors["ema"] = self.ema.weights()
        if self.settings.sharded_checkpoints and sharding is not None:
            self.checkpoints.write_shards(Checkpoint(self.progress.step, tensors, self._state(optimizers)))
            return
        tensors = {name: gathered(part, keep=is_main) for name, part in tensors.items()}
        if is_main:
            self.checkpoints.write(Checkpoint(self.progress.step, tensors, self._state(optimizers)))

    def _state(self, optimizers: dict[str, Any]) -> dict[str, Any]:
        """Return the state of the run without tensors, which a checkpoint of the first process stores."""
        scales = {one.phase.name: vars(one.loss_scale) for one in self.optimizers if one.loss_scale is not None}
        run = {"run": self.config, "progress": vars(self.progress), "window": self.window.state()}
        run |= {"loss_scales": scales} if scales else {}
        return {**run, "optimizers": optimizers, "metrics_file": self.metrics_file.state()}

    def _restore(self, checkpoint: Checkpoint) -> list[PhaseOptimizer]:
        """Restore the state of the run from a checkpoint, except for the weights of the module.

        Returns:
            The optimizers with another choice of optimizer or schedule, whose schedules have to be restarted.
        """
        before, now = checkpoint.state["run"]["settings"], self.config["settings"]
        changed = [optimizer for optimizer in self.optimizers if optimizer.choice(before) != optimizer.choice(now)]
        for optimizer in self.optimizers:
            rest = checkpoint.state["optimizers"][optimizer.phase.name]
            optimizer.load_state(checkpoint.tensors["optimizer"], rest, is_changed=optimizer in changed)
            if optimizer.loss_scale is not None:
                scale = checkpoint.state.get("loss_scales", {}).get(optimizer.phase.name, {})
                optimizer.loss_scale = LossScale(**scale)
        if self.ema is not None and before["ema_decay"] is not None:
            self.ema.load(checkpoint.tensors["ema"])
        self.progress = _Progress(**checkpoint.state["progress"])
        if self.progress.step != checkpoint.step:
            raise ValueError(f"the progress is of step {self.progress.step}, the checkpoint of step {checkpoint.step}")
        num_more = _items_per_step(checkpoint.state["run"]) - _items_per_step(self.config)
        self.progress.item_offset += self.progress.step * num_more
        if self.accelerator.is_main_process:
            self.window.load_state(checkpoint.state["window"])
            self.metrics_file.remove_after(checkpoint.step, checkpoint.state["metrics_file"])
            if self.on_row is not None:
                for row in self.metrics_file.rows():
                    self.on_row(row)
        return changed

    def _finish(self) -> None:
        """Write the file that marks the run as finished; the final weights are in the checkpoint."""
        if not self.accelerator.is_main_process:
            return
        self.checkpoints.remove_previous()
        progress = self.progress
        finished: dict[str, Any] = {"format_version": _FORMAT_VERSION, "step": progress.step}
        finished |= {"seconds": progress.seconds, "run": self.config, "metrics": progress.metrics}
        write_json(self.folder / "finished.json", finished, sealed=True)


def _items_per_step(config: Mapping[str, Any]) -> int:
    settings = config["settings"]
    return int(settings["batch_size"] * settings["grad_accum_every"] * config["num_processes"])


def run_config(task: Task, settings: LoopSettings, accelerator: "accelerate.Accelerator") -> dict[str, Any]:
    """Return a JSON-compatible description of a run, which must not change when the run is resumed."""
    phases = [
        phase.name if phase.first_step == 0 else f"{phase.name} from step {phase.first_step}" for phase in task.phases
    ]
    return {
        "task": task.name,
        "phases": phases,
        "num_items": task.num_items,
        "num_processes": accelerator.num_processes,
        "settings": settings.fixed(),
        **getattr(task, "config", {}),
    }


def check_same_run(
    folder: Path, step: int, found: Any, expected: dict[str, Any], settings: LoopSettings, log: bool = True
) -> list[str]:
    """Check that the run in a folder has the expected `run_config`, and return the allowed differences."""
    changes = changed_settings(folder, found, expected, settings.allow_changed, f" (step {step})", log)
    fixed = [line for line in changes if line.startswith(("task:", "phases:"))]
    if fixed or settings.num_train_steps < step:
        raise ValueError(
            f"{folder} contains a run of {step} steps that cannot be continued with num_train_steps="
            f"{settings.num_train_steps}{''.join(f', {line}' for line in fixed)}; use another folder"
        )
    return changes
