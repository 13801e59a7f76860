"""Training of stages: one task for all of them, and a trainer per stage that only says what it needs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.codecs.protocol import Codec
from audiolm_pytorch.conditioning import Conditioner, Conditioning
from audiolm_pytorch.data.manifest import AudioItem, training_items
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.io import save_module, weights_of, write_weights
from audiolm_pytorch.semantic.protocol import SemanticTokenizer
from audiolm_pytorch.stages.sources import ShardSource, StageSource, WaveSource
from audiolm_pytorch.stages.stages import (
    CoarseTransformer,
    FineTransformer,
    SemanticTransformer,
    StageTransformer,
)
from audiolm_pytorch.stages.token_model import TokenLoss
from audiolm_pytorch.stages.wrappers import check_fit
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult

__all__ = [
    "CoarseTransformerTrainer",
    "FineTransformerTrainer",
    "SemanticTransformerTrainer",
    "StageTask",
    "StageTrainer",
]

TABLE_FILE = "conditioning_table.safetensors"


class StageTask:
    """What the loop needs to train a stage, whichever it is.

    Args:
        transformer: The stage.
        train: Data to learn from.
        valid: Held-out data.
        audio_conditioner: Makes conditions; the table of the stage's namespace is trained with the stage.
        level_drop_prob: Probability that an item's trailing conditioning levels are dropped, from a random level on, so
            that the stage also follows codes whose last levels are wrong.
        valid_batch_size: Items of a validation batch.
        max_valid_items: At most this many items are validated on.

    Raises:
        ValueError: If a conditioner is missing or not wanted.
    """

    @beartype
    def __init__(
        self,
        transformer: StageTransformer,
        train: StageSource,
        valid: StageSource,
        *,
        audio_conditioner: Conditioner | None = None,
        level_drop_prob: float | int = 0.0,
        valid_batch_size: int = 16,
        max_valid_items: int = 128,
    ) -> None:
        if (transformer.cond_dim is None) != (audio_conditioner is None):
            raise ValueError(
                "a conditioner and a transformer with audio_text_condition=True need each other: give both or neither"
            )
        self.transformer, self.train, self.valid = transformer, train, valid
        self.conditioner, self.level_drop_prob = audio_conditioner, level_drop_prob
        self.valid_batch_size, self.num_valid_items = valid_batch_size, min(max_valid_items, len(valid))
        self.name = f"{transformer.namespace} transformer"
        parts: dict[str, nn.Module] = {"transformer": transformer}
        if audio_conditioner is not None:
            parts["condition"] = audio_conditioner.table(transformer.namespace)
        self.module = nn.ModuleDict(parts)
        self.phases = (Phase(transformer.namespace, (self.module,), self.loss),)
        self.num_items = len(train)
        self.chance = _chance(transformer)

    def batch(self, indices: list[tuple[int, int]]) -> Any:
        """Crops of (epoch, index) pairs."""
        return self.train.batch(indices)

    def loss(self, batch: Any, step: int) -> LossOutput:
        """Cross-entropy of a batch, in nats a token."""
        found = self._predict(self.train, batch)
        metrics = {"accuracy": sum_of_streams(found, self.transformer)}
        return LossOutput(found.loss, {**metrics, **_by_stream(found)})

    def validate(self) -> dict[str, float]:
        """Loss and accuracy on held-out items, each once, nothing dropped."""
        totals: dict[str, float] = {}
        for first in range(0, self.num_valid_items, self.valid_batch_size):
            indices = [(0, index) for index in range(first, min(first + self.valid_batch_size, self.num_valid_items))]
            found = self._predict(self.valid, self.valid.batch(indices))
            values = {"loss": found.loss, "accuracy": sum_of_streams(found, self.transformer), **_by_stream(found)}
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(indices) / self.num_valid_items
        return totals

    def samples(self, folder: Path, step: int) -> None:
        """Nothing: a stage alone makes no sound."""

    def before_training(self) -> None:
        """Nothing depends on data."""
