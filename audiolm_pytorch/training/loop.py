"""The one training loop: steps, accumulation, schedule, averaging, checkpoints and metrics for any task."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from beartype import beartype
from torch import nn

from audiolm_pytorch.saving.files import read_json, read_weights
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.rng import preserve_rng
from audiolm_pytorch.training.run import LiveRun, RowWatch, TrainResult, check_same_run, identity_of
from audiolm_pytorch.training.task import LoopSettings, Phase, Task

if TYPE_CHECKING:
    import accelerate

__all__ = ["TrainLoop", "TrainResult"]


class TrainLoop:
    """Trains a task in a folder, from wherever the folder's checkpoint stands.

    Data order, noise and learning rate are pure functions of the seed and the step, so a run that was killed and
    resumed gives the same weights bit for bit as one that was not (same machine, same number of processes and threads).
    All processes must see the folder; the first one writes it.

    Args:
        task: What is trained.
        settings: Numbers of the run.
        folder: Of the run: `metrics.jsonl`, `checkpoint/`, `samples/`, and at the end `model.safetensors` and
            `finished.json`. Nothing is written before `train`.
        accelerator: Shared by all trainings of a program, which then calls `end_training`; None makes one in `train`.
        watch: Called with every row of metrics on the first process, e.g. to warn; after a resume first with the rows
            that are there already.

    Raises:
        ValueError: The phases do not fit, or the Accelerator does what the settings say already.
    """

    @beartype
    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        folder: str | Path,
        accelerator: "accelerate.Accelerator | None" = None,
        watch: RowWatch | None = None,
    ) -> None:
        self.task, self.settings, self.folder, self._watch = task, settings, Path(folder), watch
        _check_phases(task.phases)
        if accelerator is not None:
            _check_accelerator(accelerator)
        self._accelerator = accelerator
        self._live: LiveRun | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run in the folder has done all its steps."""
        return (self.folder / "finished.json").is_file()

    @beartype
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Run to the end, or for some steps; then write a checkpoint.

        Args:
            stop_after_steps: Steps to do in this call at most; None runs to the end.

        Returns:
            Where the run stands now.

        Raises:
            ValueError: The folder holds a run of other settings; the message shows the difference.
            RuntimeError: The loss was not finite in 10 steps in a row.
        """
        if stop_after_steps is not None and stop_after_steps < 1:
            raise ValueError(f"stop_after_steps is {stop_after_steps}; it must be 1 or more, or None")
        accelerator = self._running_accelerator()
        if self.is_finished:
            finished = read_json(self.folder / "finished.json")
            identity = identity_of(self.task, self.settings, accelerator)
            check_same_run(self.folder, finished["step"], finished["run"], identity, self.task)
            return TrainResult(finished["step"], finished["metrics"])
        with preserve_rng():
            try:
                if self._live is None:
                    self._live = LiveRun(self.task, self.settings, self.folder, accelerator, self._watch)
                result = self._live.advance(stop_after_steps)
            except BaseException:
                # What is in memory may be half a step; the checkpoint is whole.
                self._live = None
                raise
        if result.step == self.settings.num_train_steps:
            self._live = None
        return result

    def train_and_save(self, save: Callable[[], object], stop_after_steps: int | None = None) -> TrainResult:
        """Train as `train` does; once the run is finished, load its weights into the task's module and save them.

        Args:
            save: Writes what the run was for; called on the first process only.
            stop_after_steps: As for `train`.

        Returns:
            Where the run stands now.
        """
        result = self.train(stop_after_steps)
        if self.is_finished:
            self.final_module()
            self.on_main_process(save)
        return result

    def final_module(self) -> nn.Module:
        """Load the weights of the finished run (the averaged ones, if there are) into the task's module.

        Returns:
            The task's module in eval mode.

        Raises:
            ValueError: The run is not finished.
        """
        if not self.is_finished:
            raise ValueError(f"the run in {self.folder} is not finished; call train() until it is")
        path = self.folder / "model.safetensors"
        load_weights(self.task.module, read_weights(path)[0], where=str(path))
        return self.task.module.eval()

    def on_main_process(self, job: Callable[[], object]) -> None:
        """Do something on the first process only, such as saving; the others wait until it is done.

        Args:
            job: Called without arguments; every process must come here.
        """
        accelerator = self._running_accelerator()
        if accelerator.is_main_process:
            job()
        accelerator.wait_for_everyone()

    def _running_accelerator(self) -> "accelerate.Accelerator":
        """Give the Accelerator that was handed in, or the loop's own."""
        if self._accelerator is None:
            self._accelerator = create_accelerator()
        return self._accelerator


def _check_phases(phases: tuple[Phase, ...]) -> None:
    """Refuse phases that share parameters or names."""
    names = [phase.name for phase in phases]
    if not names or len(set(names)) < len(names) or "valid" in names or any("/" in name for name in names):
        raise ValueError(
            f"a task needs one or more phases of different names other than 'valid', without '/'; got {names}"
        )
    owners: dict[nn.Parameter, str] = {}
    for phase in phases:
        for parameter in {one for module in phase.modules for one in module.parameters() if one.requires_grad}:
            if parameter in owners:
                raise ValueError(
                    f"the phases {owners[parameter]!r} and {phase.name!r} share a parameter of shape "
                    f"{tuple(parameter.shape)}; each parameter belongs to one optimizer"
                )
            owners[parameter] = phase.name


def _check_accelerator(accelerator: "accelerate.Accelerator") -> None:
    """Refuse an Accelerator that would scale losses a second time."""
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"the Accelerator accumulates over {accelerator.gradient_accumulation_steps} steps; leave it at 1 and set "
            "LoopSettings.grad_accum_every"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError('the Accelerator uses fp16; leave it at "no" and set LoopSettings.precision to "bf16"')
