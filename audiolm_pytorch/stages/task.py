"""What the training loop needs to train a stage: one task for all of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning import Conditioner, Conditioning, Conditions
from audiolm_pytorch.stages.sources import StageSource
from audiolm_pytorch.stages.stage_transformer import StageTransformer
from audiolm_pytorch.stages.token_model import TokenLoss
from audiolm_pytorch.training import LossOutput, Phase
from audiolm_pytorch.training.ranks import to_device

__all__ = ["StageTask"]


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
        token_fingerprints: What is known of the tokenizers that make the data; a run is resumed with these alone.

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
        token_fingerprints: Mapping[str, str] | None = None,
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
        self.token_fingerprints = dict(token_fingerprints or {})
        # Part of the run's identity in the loop's checkpoints. Nothing known, nothing said: as in older checkpoints.
        self.identity: dict[str, Any] = (
            {"token_fingerprints": self.token_fingerprints} if self.token_fingerprints else {}
        )

    def batch(self, indices: list[tuple[int, int]]) -> Any:
        """Crops of (epoch, index) pairs."""
        return self.train.batch(indices)

    def loss(self, batch: Any, step: int) -> LossOutput:
        """Cross-entropy of a batch, in nats a token."""
        found = self._predict(self.train, batch)
        return LossOutput(found.loss, {"accuracy": found.accuracy, **_by_stream(found)})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy on held-out items, each once, nothing dropped."""
        totals: dict[str, float] = {}
        for first in range(0, self.num_valid_items, self.valid_batch_size):
            indices = [(0, index) for index in range(first, min(first + self.valid_batch_size, self.num_valid_items))]
            batch = to_device(self.valid.batch(indices), self.transformer.device)
            found = self._predict(self.valid, batch)
            for name, value in {"loss": found.loss, "accuracy": found.accuracy, **_by_stream(found)}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(indices) / self.num_valid_items
        return totals

    def samples(self, folder: Path, step: int) -> None:
        """Nothing: a stage alone makes no sound."""

    def before_training(self) -> None:
        """Nothing depends on data."""

    def _predict(self, source: StageSource, batch: Any) -> TokenLoss:
        """Tokens, condition and loss of a batch."""
        given = source.read(batch)
        conditions = None
        if self.conditioner is not None:
            # The conditioner hears audio in full precision, so that its codes are those of inference.
            with torch.autocast(self.transformer.device.type, enabled=False):
                conditioning = self.conditioner.conditioning(namespace=self.transformer.namespace, **given.condition)
            if self.transformer.training and self.level_drop_prob > 0:
                conditioning = _drop_levels(conditioning, self.level_drop_prob)
            conditions = Conditions(codes=conditioning)
        loss: TokenLoss = self.transformer(self.transformer.packed(given.tokens, given.ends), conditions)
        return loss


def _drop_levels(conditioning: Conditioning, probability: float) -> Conditioning:
    """Drop trailing levels of some items, keeping at least the first."""
    num_levels = conditioning.mask.shape[1]
    kept = torch.randint(1, num_levels, (len(conditioning),)) if num_levels > 1 else torch.ones(len(conditioning))
    chosen = torch.rand(len(conditioning)) < probability
    return conditioning.without_trailing(torch.where(chosen, kept, num_levels))


def _by_stream(found: TokenLoss) -> dict[str, Tensor | float]:
    return {f"loss_{name}": loss.detach() for name, loss in found.per_stream.items()}


def _chance(transformer: StageTransformer) -> dict[str, float]:
    """What guessing reaches: the logarithm of each vocabulary, weighted by how often its tokens come."""
    streams = transformer.layout.predicted
    weights = [float(stream.rate_hz) * stream.num_levels for stream in streams]
    chances = [math.log(stream.vocab_size) for stream in streams]
    by_head = {
        name: math.log(head.vocab_size)
        for head in transformer.layout.heads
        for name in (f"loss_{head.stream}", f"loss_{head.stream}.{head.level}")
    }
    mean = sum(weight * chance for weight, chance in zip(weights, chances)) / sum(weights)
    return {"loss": mean, **by_head}
