"""One training loop, and a task object for each thing that is trained."""

from audiolm_pytorch.training.loop import TrainLoop, TrainResult
from audiolm_pytorch.training.task import LoopSettings, LossOutput, Phase, Task

__all__ = ["LoopSettings", "LossOutput", "Phase", "Task", "TrainLoop", "TrainResult"]
