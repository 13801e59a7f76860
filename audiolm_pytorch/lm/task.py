"""What the training loop needs to train a stage: one task for all of them."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.token_model import TokenLoss
from audiolm_pytorch.lm.training_data import StageSource
from audiolm_pytorch.training import LossOutput, Phase
from audiolm_pytorch.training.distributed import to_device

__all__ = ["StageTask"]

logger = logging.getLogger(__name__)

# Of a stage's config, what decides no weights: it is found out or filled in by training, or saves memory only.
_NOT_DECISIVE = ("max_seconds", "token_fingerprints", "checkpoint_blocks")


class StageTask:
    """What the loop needs to train a stage, whichever it is.

    Args:
        transformer: The stage.
        train: Data to learn from.
        valid: Held-out data.
        audio_conditioner: Makes conditions of codes; the table of the stage's namespace is trained with the stage.
        text_conditioner: Makes conditions of captions; frozen. Items without a caption are not conditioned by it.
        level_drop_prob: Probability that an item's trailing conditioning levels are dropped, from a random level on, so
            that the stage also follows codes whose last levels are wrong.
        valid_batch_size: Items of a validation batch.
        max_valid_items: At most this many items are validated on.
        token_fingerprints: What is known of the tokenizers and conditioners that make the data; a run is resumed with
            these alone.

    Attributes:
        config: Values that must not change when a run is resumed; the builder of the sources adds those of the sources.

    Raises:
        ValueError: If a conditioner is missing or not wanted, or `level_drop_prob` is no probability.
    """

    @beartype
    def __init__(
        self,
        transformer: StageTransformer,
        train: StageSource,
        valid: StageSource,
        *,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
        level_drop_prob: float | int = 0.0,
        valid_batch_size: int = 16,
        max_valid_items: int = 128,
        token_fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        if (transformer.cond_dim is None) != (audio_conditioner is None):
            raise ValueError(
                "a conditioner and a transformer with audio_text_condition=True need each other: give both or neither"
            )
        if (transformer.text_dim is None) != (text_conditioner is None):
            raise ValueError(
                "a text_conditioner and a transformer with a text_dim need each other: give both or neither"
            )
        if not 0 <= level_drop_prob <= 1:
            raise ValueError(f"level_drop_prob is a probability, between 0 and 1; got {level_drop_prob}")
        self.transformer, self.train, self.valid = transformer, train, valid
        self.conditioner, self.level_drop_prob = audio_conditioner, level_drop_prob
        self.text_conditioner = text_conditioner
        self.valid_batch_size, self.num_valid_items = valid_batch_size, min(max_valid_items, len(valid))
        self.name = f"{transformer.namespace} transformer"
        parts: dict[str, nn.Module] = {"transformer": transformer}
        if audio_conditioner is not None:
            parts["condition"] = audio_conditioner.table(transformer.namespace)
        self.module = nn.ModuleDict(parts)
        self.phases = (Phase(transformer.namespace, (self.module,), self.loss),)
        self.num_items = len(train)
        self.chance = _chance(transformer)
        self._has_warned = False
        self.token_fingerprints = dict(token_fingerprints or {})
        config = {name: value for name, value in transformer.config.items() if name not in _NOT_DECISIVE}
        self.config: dict[str, Any] = {
            "level_drop_prob": level_drop_prob,
            "transformer": json.loads(json.dumps(config)),
            **_known_makers(self.token_fingerprints),
        }

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
        """Tokens, conditions and loss of a batch."""
        given = source.read(batch)
        # Conditions are made in full precision, so that they are those of inference.
        with torch.autocast(self.transformer.device.type, enabled=False):
            codes, states = self._codes(given.condition), self._states(given.texts)
        conditions = None if codes is None and states is None else Conditions(codes=codes, text=states)
        loss: TokenLoss = self.transformer(self.transformer.packed(given.tokens, given.ends), conditions)
        return loss

    def _codes(self, heard: Mapping[str, Any]) -> ConditionTensor | None:
        """Embedded codes of waves or codes; in training some lack their last levels."""
        if self.conditioner is None:
            return None
        codes = self.conditioner.conditioning(namespace=self.transformer.namespace, **heard)
        self._check_null_tokens(codes.mask.shape[1])
        drops = self.transformer.training and self.level_drop_prob > 0
        return _drop_levels(codes, self.level_drop_prob) if drops else codes

    def _check_null_tokens(self, num_codes: int) -> None:
        """Say once where unconditional generation would show what training never does."""
        expected = self.transformer.null_tokens
        if num_codes != expected and self.transformer.cond_drop_prob > 0 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the %s learns from conditions of %d codes, but unconditionally it is generated from with %d null "
                "embeddings: build it with null_tokens=%d",
                *(self.name, num_codes, expected, num_codes),
            )

    def _states(self, texts: Sequence[str | None] | None) -> ConditionTensor | None:
        """States of texts, none where an item has no text; None if no item has one."""
        named = [(item, text) for item, text in enumerate(texts or []) if text is not None]
        if self.text_conditioner is None or texts is None or not named:
            return None
        device = self.transformer.device
        if isinstance(self.text_conditioner, nn.Module):
            self.text_conditioner.to(device)
        read = self.text_conditioner.forward([text for _, text in named])
        items = torch.tensor([item for item, _ in named], device=device)
        embeddings = read.embeddings.new_zeros(len(texts), *read.embeddings.shape[1:]).to(device)
        mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=device)
        embeddings[items], mask[items] = read.embeddings.to(device), read.mask.to(device)
        return ConditionTensor(embeddings, mask)


def _drop_levels(conditioning: ConditionTensor, probability: float) -> ConditionTensor:
    """Drop trailing levels of some items, keeping at least the first."""
    num_levels = conditioning.mask.shape[1]
    kept = torch.randint(1, num_levels, (len(conditioning),)) if num_levels > 1 else torch.ones(len(conditioning))
    chosen = torch.rand(len(conditioning)) < probability
    return conditioning.without_trailing(torch.where(chosen, kept, num_levels))


def _by_stream(found: TokenLoss) -> dict[str, Tensor | float]:
    return {f"loss_{name}": loss.detach() for name, loss in found.per_stream.items()}


def _known_makers(fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Entries of the run config for the conditioners; unknown ones are left out.

    The conditioner stands apart, since there are checkpoints that name the tokenizers alone.
    """
    tokenizers = {kind: one for kind, one in fingerprints.items() if kind != "conditioner"}
    known: dict[str, Any] = {"token_fingerprints": tokenizers, "conditioner": fingerprints.get("conditioner")}
    return {name: value for name, value in known.items() if value}


def _chance(transformer: StageTransformer) -> dict[str, float]:
    """What guessing reaches: the logarithm of each vocabulary, weighted by how often its tokens come."""
    streams = transformer.layout.predicted
    weights = [float(stream.exact_hz) * stream.num_levels for stream in streams]
    chances = [math.log(stream.vocab_size) for stream in streams]
    by_head = {
        name: math.log(head.vocab_size)
        for head in transformer.layout.heads
        for name in (f"loss_{head.stream}", f"loss_{head.stream}.{head.level}")
    }
    mean = sum(weight * chance for weight, chance in zip(weights, chances)) / sum(weights)
    return {"loss": mean, **by_head}
