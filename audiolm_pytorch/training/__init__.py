"""The training loop of all models; a task object describes the model, data and losses."""

from audiolm_pytorch.training.loop import TrainLoop, TrainResult
from audiolm_pytorch.training.task import LoopSettings, LossOutput, Phase, Task

__all__ = ["LoopSettings", "LossOutput", "Phase", "Task", "TrainLoop", "TrainResult"]
