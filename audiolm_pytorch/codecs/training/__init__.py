"""Training of codecs: losses, the task for the training loop, and the trainer."""

from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.codecs.training.task import MEL_ONLY, CodecLossWeights, CodecTask
from audiolm_pytorch.codecs.training.trainer import SoundStreamTrainer

__all__ = [
    "MEL_ONLY",
    "CodecLossWeights",
    "CodecTask",
    "MultiScaleMelLoss",
    "SoundStreamTrainer",
]
