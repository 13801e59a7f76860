"""A training run in memory: what happens in a step, when something is reported, and what a checkpoint holds."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from audiolm_pytorch.data.batches import BatchPlan
from audiolm_pytorch.saving.files import write_json, write_weights
from audiolm_pytorch.saving.weights import load_weights, weights_of
from audiolm_pytorch.training.checkpoint import Checkpoint, CheckpointFolder, differences
from audiolm_pytorch.training.distributed import PersistentBuffers, broadcast_tensors, merge_means, to_device
from audiolm_pytorch.training.ema import WeightAverage
from audiolm_pytorch.training.optimizer import PhaseOptimizer
from audiolm_pytorch.training.rng import seed_rng
from audiolm_pytorch.training.schedule import learning_rate_at
from audiolm_pytorch.training.task import LoopSettings, Phase, Task
from audiolm_pytorch.training.tracking import MetricsFile, MetricWindow, finite_or_none, progress_bar, with_chance

if TYPE_CHECKING:
    import accelerate

__all__ = ["LiveRun", "RowWatch", "TrainResult", "identity_of", "check_same_run"]

RowWatch = Callable[[Mapping[str, Any]], None]

_FORMAT_VERSION = 1
_SKIPS_ALLOWED = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a call of `train` ended.

    Args:
        step: Number of steps done since the run began.
        metrics: Newest value of every metric, as `<phase>.<name>` and `valid.<name>`; None where it was not finite.
    """

    step: int
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(eq=False)
class _Progress:
    """What changes as a run goes on, apart from tensors; JSON-able."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skips_in_a_row: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)


class LiveRun:
    """A run with everything in memory: made by the first `train` of a `TrainLoop`."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        folder: Path,
        accelerator: "accelerate.Accelerator",
        watch: RowWatch | None = None,
    ) -> None:
        self.task, self.settings, self.folder, self.accelerator = task, settings, folder, accelerator
        self.watch = watch
        self.progress, self.window = _Progress(), MetricWindow()
        self.identity = identity_of(task, settings, accelerator)
        self.metrics_file = MetricsFile(folder / "metrics.jsonl")
        self.checkpoints = CheckpointFolder(folder)
        self.plan = BatchPlan(
            task.num_items,
            settings.batch_size,
            settings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        if accelerator.is_main_process:
            self.checkpoints.recover()
        accelerator.wait_for_everyone()
        checkpoint = self.checkpoints.read() if self.checkpoints.path.exists() else None
        if checkpoint is not None:
            check_same_run(folder, checkpoint.step, checkpoint.state["run"], self.identity, task)
        task.module.to(accelerator.device)
        if checkpoint is None:
            # The same on every process: what it does with random numbers must not depend on the rank.
            seed_rng(settings.seed, "before_training", device=accelerator.device)
            task.before_training()
        else:
            load_weights(task.module, checkpoint.tensors["model"], where=f"the weights in {self.checkpoints.path}")
        broadcast_tensors(accelerator, [*task.module.parameters(), *PersistentBuffers(task.module).tensors()])
        names = {parameter: name for name, parameter in task.module.named_parameters() if parameter.requires_grad}
        buffers = PersistentBuffers(task.module)
        self.phases = [PhaseOptimizer(phase, names, buffers, settings, accelerator) for phase in task.phases]
        trained = {name: parameter for parameter, name in names.items()}
        self.average = None if settings.ema_decay is None else WeightAverage(trained, settings.ema_decay)
        if checkpoint is None:
            self._write_checkpoint()
        else:
            self._continue(checkpoint)

    def advance(self, stop_after_steps: int | None) -> TrainResult:
        """Do the steps of one call of `train`."""
        settings, progress = self.settings, self.progress
        end = settings.num_train_steps
        if stop_after_steps is not None:
            end = min(end, progress.step + stop_after_steps)
        started = time.monotonic() - progress.seconds
        written_at = time.monotonic()
        self.task.module.train()
        with progress_bar(
            self.task.name, progress.step, settings.num_train_steps, self.accelerator.is_main_process
        ) as bar:
            while progress.step < end:
                self._step()
                progress.seconds = time.monotonic() - started
                bar.update()
                if self._due(settings.log_every) or progress.step == 1:
                    self._log()
                    bar.set_postfix({name: value for name, value in progress.metrics.items() if name.endswith(".loss")})
                if self._due(settings.validate_every):
                    self._validate()
                every = settings.checkpoint_every_steps
                by_time = time.monotonic() - written_at >= settings.checkpoint_every_seconds
                if progress.step < end and (by_time or (every is not None and progress.step % every == 0)):
                    self._write_checkpoint()
                    written_at = time.monotonic()
        self._write_checkpoint()
        if progress.step == settings.num_train_steps:
            self._finish()
        self.accelerator.wait_for_everyone()
        return TrainResult(progress.step, dict(progress.metrics))

    def _step(self) -> None:
        """Do one step of every phase on the same batches."""
        settings, step = self.settings, self.progress.step
        seed_rng(settings.seed, step, self.accelerator.process_index, device=self.accelerator.device)
        micro_steps = range(step * settings.grad_accum_every, (step + 1) * settings.grad_accum_every)
        indices = [self.plan.indices(micro_step) for micro_step in micro_steps]
        batches = [to_device(self.task.batch(one), self.accelerator.device) for one in indices]
        rate = self._learning_rate()
        for phase in self._started(step):
            metrics = phase.step(batches, step, rate)
            for one in metrics or []:
                self.window.add(phase.phase.name, one)
            self._count_skip(phase.phase.name, metrics is None, indices)
        self.progress.step = step + 1
        if self.average is not None:
            self.average.update(step + 1)

    def _started(self, step: int) -> list[PhaseOptimizer]:
        """Give the phases that take part in a step."""
        return [phase for phase in self.phases if step >= phase.phase.first_step]

    def _learning_rate(self) -> float:
        """Look the learning rate of the present step up."""
        return learning_rate_at(
            self.progress.step,
            peak=self.settings.learning_rate,
            warmup_steps=self.settings.warmup_steps,
            num_train_steps=self.settings.num_train_steps,
            final_fraction=self.settings.final_lr_fraction,
        )

    def _count_skip(self, phase: str, skipped: bool, indices: list[list[tuple[int, int]]]) -> None:
        """Count steps whose loss or gradients were not finite; stop when they do not end."""
        if not skipped:
            self.progress.skips_in_a_row[phase] = 0
            return
        self.progress.skipped += 1
        in_a_row = self.progress.skips_in_a_row[phase] = self.progress.skips_in_a_row.get(phase, 0) + 1
        what = (
            f"loss or gradients of phase {phase!r} are not finite at step {self.progress.step}, "
            f"(epoch, index) of the batches: {indices}"
        )
        if in_a_row >= _SKIPS_ALLOWED:
            raise RuntimeError(
                f"{what}; the same in the {_SKIPS_ALLOWED - 1} steps before. Lower the learning rate or look at these "
                f"items; {self.checkpoints.path} holds the last checkpoint"
            )
        logger.warning("%s; the step is skipped", what)

    def _due(self, every: int) -> bool:
        """Tell whether something that happens at every so many steps, and at the end, happens now."""
        return self.progress.step % every == 0 or self.progress.step == self.settings.num_train_steps

    def _log(self) -> None:
        """Write a row for each phase that has begun: means since the last row, over all processes."""
        means = merge_means(self.accelerator, self.window.read())
        self.window = MetricWindow()
        for phase in self._started(self.progress.step - 1):
            prefix = f"{phase.phase.name}/"
            values = {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
            extra = {"learning_rate": phase.optimizer.param_groups[0]["lr"], "skipped": self.progress.skipped}
            self._report(phase.phase.name, values, extra)

    def _validate(self) -> None:
        """Measure with the averaged weights, on every process, since a validation may hold collective calls."""
        self.task.module.eval()
        seed_rng(self.settings.seed, "validate", device=self.accelerator.device)
        precision = torch.autocast(
            self.accelerator.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"
        )
        with nullcontext() if self.average is None else self.average.in_place(), torch.no_grad():
            with precision:
                values = {name: float(value) for name, value in self.task.validate().items()}
            if values:
                self._report("valid", values, {})
            if self.accelerator.is_main_process:
                samples = self.folder / "samples"
                samples.mkdir(parents=True, exist_ok=True)
                self.task.samples(samples, self.progress.step)
        self.accelerator.wait_for_everyone()
        self.task.module.train()

    def _report(self, phase: str, values: dict[str, float], extra: dict[str, Any]) -> None:
        """Remember the newest values and write them as a row."""
        self.progress.metrics.update({f"{phase}.{name}": finite_or_none(value) for name, value in values.items()})
        if not self.accelerator.is_main_process:
            return
        row = {"step": self.progress.step, "phase": phase, **with_chance(values, self.task.chance), **extra}
        self.metrics_file.write({**row, "seconds": round(self.progress.seconds, 3)})
        if self.watch is not None:
            self.watch(row)
        if self.accelerator.trackers:
            self.accelerator.log({f"{phase}/{name}": value for name, value in values.items()}, step=self.progress.step)

    def _write_checkpoint(self) -> None:
        """Write a checkpoint; all processes hold the same state, so the first one does it without the others."""
        if not self.accelerator.is_main_process:
            return
        tensors = {"model": weights_of(self.task.module), "optimizer": {}}
        for phase in self.phases:
            tensors["optimizer"].update(phase.state())
        if self.average is not None:
            tensors["ema"] = self.average.shadows
        state = {"run": self.identity, "progress": vars(self.progress), "window": self.window.state()}
        self.checkpoints.write(Checkpoint(self.progress.step, tensors, state))

    def _continue(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint, apart from the module's weights."""
        for phase in self.phases:
            phase.load_state(checkpoint.tensors["optimizer"])
        if self.average is not None:
            self.average.load(checkpoint.tensors["ema"])
        self.progress = _Progress(**checkpoint.state["progress"])
        if self.accelerator.is_main_process:
            self.window.load_state(checkpoint.state["window"])
            self.metrics_file.forget_after(checkpoint.step)
            if self.watch is not None:
                for row in self.metrics_file.rows():
                    self.watch(row)

    def _finish(self) -> None:
        """Write the weights that the run is for, and that it is over."""
        if not self.accelerator.is_main_process:
            return
        with nullcontext() if self.average is None else self.average.in_place():
            write_weights(self.folder / "model.safetensors", weights_of(self.task.module))
        progress = self.progress
        finished = {"format_version": _FORMAT_VERSION, "step": progress.step, "seconds": progress.seconds}
        write_json(self.folder / "finished.json", {**finished, "run": self.identity, "metrics": progress.metrics})


def identity_of(task: Task, settings: LoopSettings, accelerator: "accelerate.Accelerator") -> dict[str, Any]:
    """Give what must be the same when a run is resumed, as JSON holds it."""
    return {
        "task": task.name,
        "phases": [_phase_identity(phase) for phase in task.phases],
        "num_items": task.num_items,
        "num_processes": accelerator.num_processes,
        "settings": settings.decisive(),
        **getattr(task, "identity", {}),
    }


def _phase_identity(phase: Phase) -> str:
    """Name a phase, and when it begins unless that is at once."""
    return phase.name if phase.first_step == 0 else f"{phase.name} from step {phase.first_step}"


def check_same_run(folder: Path, step: int, there: dict[str, Any], here: dict[str, Any], task: Task) -> None:
    """Raise unless what a folder holds belongs to this run; what older releases did not write is not compared."""
    newer = getattr(task, "newer_identity", ())
    lines = differences(there, {name: value for name, value in here.items() if name in there or name not in newer})
    if lines:
        raise ValueError(
            f"{folder} holds a run that was started otherwise (step {step}): {'; '.join(lines)}. "
            "Give it the same settings to continue, or another folder to start anew"
        )
