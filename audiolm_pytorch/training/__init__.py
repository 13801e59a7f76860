"""The training loop of all models; a task object describes the model, data and losses."""

from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from audiolm_pytorch.training.loop import TrainLoop as TrainLoop, TrainResult as TrainResult
    from audiolm_pytorch.training.optimizer import inverse_square_root as inverse_square_root
    from audiolm_pytorch.training.task import (
        LoopSettings as LoopSettings,
        LossOutput as LossOutput,
        Phase as Phase,
        Task as Task,
    )

globals().update(lazy_exports(__name__))
