"""The training loop: trains a task, writes checkpoints to a folder, and resumes interrupted runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.training.checkpoint import CheckpointFolder
from audiolm_pytorch.training.distributed import create_accelerator, shared_errors
from audiolm_pytorch.training.freezing import frozen_parameters
from audiolm_pytorch.training.run import OnRow, TrainingRun, TrainResult, check_same_run, run_config
from audiolm_pytorch.training.run_folder import claimed_folder, read_record
from audiolm_pytorch.training.task import LoopSettings, Phase, Task

if TYPE_CHECKING:
    import accelerate

__all__ = ["RUN_FILES", "TrainLoop", "TrainResult"]

# Files and folders by which the folder of a run is recognised.
RUN_FILES = {
    **dict.fromkeys(("checkpoint", "checkpoint.previous", "checkpoint.new"), ("step",)),
    **dict.fromkeys(("finished.json", "kmeans.json"), ("format_version", "run")),
}


class TrainLoop:
    """Training loop of a task, which writes checkpoints and results to a folder and can resume an interrupted run.

    Data order and noise depend only on the seed and the step. A resumed run has the same weights, bit for bit, as an
    uninterrupted run (on the same machine, with the same numbers of processes and threads). All processes need access
    to the folder; only the first process writes to it.

    Args:
        folder: Output folder for `metrics.jsonl`, `loss.svg`, `checkpoint/`, `checkpoint.previous/`, `samples/`, and at
            the end `finished.json`. The constructor writes nothing to the folder.
        accelerator: Accelerator that several trainings can share; the caller must call its `end_training`. If
            `accelerator` is None, `train` creates an Accelerator.
        on_row: Function that receives every row of metrics, on the first process. When a run is resumed, `on_row` first
            receives the rows of earlier steps.
    """

    @typed
    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        folder: str | Path,
        accelerator: "accelerate.Accelerator | None" = None,
        on_row: OnRow | None = None,
    ) -> None:
        self.task, self.settings, self.folder, self._on_row = task, settings, Path(folder), on_row
        _check_phases(task.phases)
        names = {phase.name for phase in task.phases}
        for choice in (settings.optimizer, settings.schedule):
            if isinstance(choice, dict) and not names.issuperset(choice):
                raise ValueError(
                    f"{task.name} has phases {sorted(names)}, but an optimizer or schedule is set for {sorted(choice)}"
                )
        if accelerator is not None:
            _check_accelerator(accelerator)
        self._accelerator = accelerator
        self._run: TrainingRun | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run in the folder has completed all its steps."""
        return (self.folder / "finished.json").is_file()

    @typed
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train to the end of the run, or for at most `stop_after_steps` steps, then write a checkpoint.

        A folder with a run of other settings raises a ValueError that lists the differences. A loss or gradients that
        are not finite in 10 steps in a row raise a RuntimeError.
        """
        _check_stop_after(stop_after_steps)
        with self._claimed_folder(), preserve_rng():
            return self._train(stop_after_steps)

    def _train(self, stop_after_steps: int | None) -> TrainResult:
        accelerator = self._running_accelerator()
        if self.is_finished:
            finished = read_record(self.folder / "finished.json", step=int, run=dict, metrics=dict)
            config = run_config(self.task, self.settings, accelerator)
            step, run = finished["step"], finished["run"]
            # changes are logged when the run continues
            if not check_same_run(self.folder, step, run, config, self.settings, log=False):
                return TrainResult(finished["step"], finished["metrics"])
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (self.folder / "finished.json").unlink()
            accelerator.wait_for_everyone()
        try:
            with frozen_parameters(self.task.module, self.settings.freeze):
                if self._run is None or not self._run.is_current():
                    self._run = TrainingRun(self.task, self.settings, self.folder, accelerator, self._on_row)
                result = self._run.advance(stop_after_steps)
        except BaseException:
            # the state in memory may be that of half a step; the checkpoint is complete
            self._run = None
            raise
        if result.step == self.settings.num_train_steps:
            self._run = None
        return result

    def train_and_save(self, save: Callable[[], object], stop_after_steps: int | None = None) -> TrainResult:
        """Call `train`; at the end of the run, load the final weights and call `save` on the first process."""
        _check_stop_after(stop_after_steps)
        with self._claimed_folder(), preserve_rng():
            result = self._train(stop_after_steps)
            if self.is_finished:
                self.final_module()
                self.on_main_process(save)
        return result

    @contextmanager
    def _claimed_folder(self) -> Iterator[None]:
        """Claim the folder on the first process while the other processes wait; errors are those of all processes."""
        accelerator = self._running_accelerator()
        claim = claimed_folder(self.folder, RUN_FILES) if accelerator.is_main_process else nullcontext()
        with shared_errors(accelerator), claim:
            accelerator.wait_for_everyone()
            yield

    def final_module(self) -> nn.Module:
        """Return the task's module in eval mode with the final weights of a finished run (the EMA if there is one)."""
        if not self.is_finished:
            raise ValueError(f"the run in {self.folder} is not finished; call train() until the run is finished")
        checkpoints = CheckpointFolder(self.folder)
        tensors = checkpoints.read().tensors
        weights = {**tensors["model"], **tensors.get("ema", {})}
        load_weights(self.task.module, weights, where=f"the weights in {checkpoints.path}")
        return self.task.module.eval()

    def on_main_process(self, job: Callable[[], object]) -> None:
        """Call `job` on the first process while the other processes wait; every process must call this method."""
        accelerator = self._running_accelerator()
        if accelerator.is_main_process:
            job()
        accelerator.wait_for_everyone()

    def _running_accelerator(self) -> "accelerate.Accelerator":
        if self._accelerator is None:
            self._accelerator = create_accelerator()
        return self._accelerator


def _check_stop_after(stop_after_steps: int | None) -> None:
    if stop_after_steps is not None and stop_after_steps < 1:
        raise ValueError(f"stop_after_steps is {stop_after_steps}; it must be 1 or more, or None")


def _check_phases(phases: tuple[Phase, ...]) -> None:
    """Check that no two phases share a name or a parameter."""
    names = [phase.name for phase in phases]
    if not names or len(set(names)) < len(names) or "valid" in names or any("/" in name for name in names):
        raise ValueError(
            f"a task needs phases with distinct names, without '/' and not 'valid'; got phases with the names {names}"
        )
    phase_of: dict[nn.Parameter, str] = {}
    for phase in phases:
        for parameter in {parameter for module in phase.modules for parameter in module.parameters()}:
            if parameter.requires_grad and parameter in phase_of:
                raise ValueError(
                    f"the phases {phase_of[parameter]!r} and {phase.name!r} share a parameter of shape "
                    f"{tuple(parameter.shape)}; pass each parameter to one phase"
                )
            phase_of[parameter] = phase.name


def _check_accelerator(accelerator: "accelerate.Accelerator") -> None:
    """Check that an Accelerator neither uses fp16 nor accumulates gradients."""
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"the Accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; use 1, "
            "and set LoopSettings.grad_accum_every"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError('the Accelerator has mixed_precision="fp16"; pass "no", and set LoopSettings.precision="fp16"')
