"""Training task of a stage, with its batches, loss and validation."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditioner, ConditionTensor, TextEncoder
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.token_model import TokenLoss
from audiolm_pytorch.lm.training_data import StageInput, StageSource
from audiolm_pytorch.nn.module_state import check_shares
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.training import LossOutput, Phase
from audiolm_pytorch.training.distributed import map_over_processes, to_device
from audiolm_pytorch.training.samples import Sample

__all__ = ["StageObjective", "StageTask", "chance_losses", "trained_modules"]

logger = logger_named(__name__)

_MAX_VALID_ITEMS, _NUM_SAMPLES = 128, 2
# Samples the tokens that a stage predicts for recordings with other tokens, conditions and captions.
SampleFunction = Callable[
    [StageTransformer, AudioTokens, dict[str, ConditionTensor], Sequence[str | None]], Sequence[Sample]
]
# Entries of a stage's config that do not change its weights.
_NOT_DECISIVE = ("max_seconds", "token_fingerprints", "checkpoint_blocks")


@typed
@dataclass(frozen=True)
class StageObjective:
    """Noise in the inputs of a stage in training, and weights of the levels in its loss.

    Args:
        level_drop_prob: Probability that training drops the last levels of the conditioning codes of an item, so that
            the stage learns to work with the first levels; the number of dropped levels is random.
        history_noise: Largest share of the predicted tokens that random tokens replace in the input of the stage, so
            that the stage learns to continue its own imperfect samples. Training draws the share of each item uniformly
            from 0 to `history_noise`. Targets have no noise.
        input_noise: The same for the input tokens that an earlier stage predicts in generation.
        level_weights: Weight of every predicted level in the training loss, which is the weighted mean of the levels;
            empty = equal weights. Metrics and validation have equal weights.
    """

    level_drop_prob: float = 0.0
    history_noise: float = 0.0
    input_noise: float = 0.0
    level_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        check_shares(**{name: value for name, value in vars(self).items() if name != "level_weights"})
        if not all(weight > 0 for weight in self.level_weights):
            raise ValueError(f"level_weights must be positive numbers, got {self.level_weights}")


def trained_modules(
    transformer: StageTransformer, text_conditioner: nn.Module | None, table: nn.Module | None = None
) -> nn.ModuleDict:
    """Return the modules that the training of a stage changes, by the names that begin those of their parameters.

    The text encoder is trained if one of its parameters requires gradients.
    """
    modules = nn.ModuleDict({"transformer": transformer})
    if table is not None:
        modules["condition"] = table
    if text_conditioner is not None and any(weight.requires_grad for weight in text_conditioner.parameters()):
        modules["text"] = text_conditioner
    return modules


class StageTask:
    """Task of a `TrainLoop` that trains a stage and its table of condition embeddings.

    Items without a caption are trained without the condition `text`.

    Args:
        text_conditioner: Text encoder; needed by a stage with a `text_dim`. Parameters of the encoder that require
            gradients are trained with the stage.
        sampler: Function that returns audible samples of the stage; None = training has no samples.

    Attributes:
        config: Settings that must not change when a run is resumed; the trainer adds the settings of its data.
    """

    @typed
    def __init__(
        self,
        transformer: StageTransformer,
        train: StageSource,
        valid: StageSource,
        *,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
        sampler: SampleFunction | None = None,
        objective: StageObjective | None = None,
        batch_size: int = 16,
        token_fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        if (transformer.cond_dim is None) != (audio_conditioner is None):
            raise ValueError(
                "got only one of an audio_conditioner and a transformer with audio_text_condition=True; pass both or "
                "neither"
            )
        if (transformer.text_dim is None) != (text_conditioner is None):
            raise ValueError(
                "got only one of a text_conditioner and a transformer with a text_dim; pass both or neither"
            )
        objective = objective or StageObjective()
        if objective.level_drop_prob > 0 and audio_conditioner is None:
            raise ValueError(
                f"got level_drop_prob={objective.level_drop_prob} for a stage without conditioning codes; set "
                "level_drop_prob=0"
            )
        self.transformer, self.train, self.valid = transformer, train, valid
        self.conditioner, self.text_conditioner = audio_conditioner, text_conditioner
        self.objective, self.batch_size, self.sampler = objective, batch_size, sampler
        self.noise = _noise_of_streams(transformer, objective.history_noise, objective.input_noise)
        num_levels = transformer.layout.predicted[0].num_levels
        if len(objective.level_weights) not in (0, num_levels):
            raise ValueError(f"level_weights needs {num_levels} numbers, got {objective.level_weights}")
        self.name = f"{transformer.namespace} transformer"
        table = None if audio_conditioner is None else audio_conditioner.table(transformer.namespace)
        self.module = trained_modules(transformer, text_conditioner, table)
        self.trains_text = "text" in self.module
        # a batch without captions does not call the text encoder
        optional = () if text_conditioner is None else (text_conditioner,)
        self.phases = (Phase(transformer.namespace, (self.module,), self.loss, optional=optional),)
        self.num_items = len(train)
        self.chance = chance_losses(transformer)
        self._has_warned = False
        self.token_fingerprints = dict(token_fingerprints or {})
        config = {name: value for name, value in transformer.config.items() if name not in _NOT_DECISIVE}
        self.config: dict[str, Any] = {
            **asdict(objective),
            "level_weights": list(objective.level_weights),
            "transformer": json.loads(json.dumps(config)),
            "token_fingerprints": self.token_fingerprints,
        }

    def batch(self, indices: list[tuple[int, int]]) -> Any:
        """Return one training crop for each pair (epoch, recording index)."""
        return self.train.batch(indices)

    def loss(self, batch: Any, step: int) -> LossOutput:
        """Return the cross-entropy of a training batch in nats per token, as the mean with weights of the levels."""
        prediction = self._predict(self.train, batch)
        loss, weights = prediction.loss, self.objective.level_weights
        if len(weights) > 1:
            name = self.transformer.layout.predicted[0].name
            levels = torch.stack([prediction.per_stream[f"{name}.{level}"] for level in range(len(weights))])
            loss = (levels * levels.new_tensor(weights)).sum() / sum(weights)
        return LossOutput(loss, _metrics(prediction))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Compute loss and accuracy on the first validation items, of which every process reads a share."""
        num_items = min(_MAX_VALID_ITEMS, len(self.valid))
        totals: dict[str, float] = {}
        for sums in map_over_processes(self._validate_batch, range(0, num_items, self.batch_size)):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value / num_items
        return totals

    def _validate_batch(self, first: int) -> dict[str, float]:
        """Return loss and metrics of the batch that begins with validation item `first`, times its number of items."""
        last = min(first + self.batch_size, _MAX_VALID_ITEMS, len(self.valid))
        batch = to_device(self.valid.batch([(0, index) for index in range(first, last)]), self.transformer.device)
        prediction = self._predict(self.valid, batch)
        values = {"loss": prediction.loss, **_metrics(prediction)}
        return {name: float(value) * (last - first) for name, value in values.items()}

    @torch.no_grad()
    def samples(self, step: int) -> Sequence[Sample]:
        """Return what the sampler returns for the first held-out recordings."""
        if self.sampler is None:
            return []
        count = min(_NUM_SAMPLES, len(self.valid))
        batch = to_device(self.valid.batch([(0, index) for index in range(count)]), self.transformer.device)
        inputs = self.valid.read(batch)
        texts = [None] * count if batch.captions is None else batch.captions
        return self.sampler(self.transformer, inputs.tokens, self._conditions(inputs), texts)

    def before_training(self) -> None:
        """Do nothing, because a stage has no weights that are initialised from data."""

    def _predict(self, source: StageSource, batch: Any) -> TokenLoss:
        """Compute the loss of the stage for the tokens and conditions of a batch."""
        inputs = source.read(batch)
        conditions = self._conditions(inputs)
        packed, input_ids = self.transformer.packed(inputs.tokens, inputs.ends), None
        if self.transformer.training and self.noise:
            input_ids = self._noisy_ids(inputs.tokens, inputs.ends)
        loss: TokenLoss = self.transformer(packed, conditions, input_ids)
        return loss

    def _conditions(self, inputs: StageInput) -> dict[str, ConditionTensor]:
        """Compute all conditions without autocast, so that they are the same as in generation."""
        with torch.autocast(self.transformer.device.type, enabled=False):
            computed = {"codes": self._codes(inputs.condition), "text": self._states(inputs.texts)}
        return {name: part for name, part in computed.items() if part is not None} | inputs.conditions

    def _noisy_ids(self, tokens: AudioTokens, ends: Tensor) -> Tensor:
        """Pack tokens in which random tokens replace a random share of the tokens of each item."""
        streams, lengths = self.transformer.streams_of(tokens)
        for stream in self.transformer.layout.streams:
            if stream.name in self.noise:
                ids = streams[stream.name]
                shares = self.noise[stream.name] * torch.rand(len(ids), 1, 1)
                is_replaced = torch.rand(ids.shape) < shares
                random_ids = torch.randint(stream.vocab_size, ids.shape)
                streams[stream.name] = torch.where(is_replaced.to(ids.device), random_ids.to(ids.device), ids)
        return self.transformer.layout.pack(streams, lengths, ends).ids

    def _codes(self, conditioner_inputs: Mapping[str, Any]) -> ConditionTensor | None:
        """Compute the embeddings of the conditioning codes. Training drops the last code levels of random items."""
        if self.conditioner is None:
            return None
        codes = self.conditioner.conditioning(namespace=self.transformer.namespace, **conditioner_inputs)
        num_codes, num_nulls = codes.mask.shape[1], self.transformer.null_tokens
        if num_codes != num_nulls and self.transformer.cond_drop_prob > 0 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the %s is trained with %d codes, but unconditional generation uses %d null embeddings; build it with "
                "null_tokens=%d",
                *(self.name, num_codes, num_nulls, num_codes),
            )
        probability = self.objective.level_drop_prob
        return _drop_levels(codes, probability) if self.transformer.training and probability > 0 else codes

    def _states(self, texts: Sequence[str | None] | None) -> ConditionTensor | None:
        """Encode the captions of a batch with the text encoder; return None if no item has a caption."""
        if self.text_conditioner is None or texts is None:
            return None
        return self.text_conditioner.states_of(texts, self.transformer.device)


def _drop_levels(conditioning: ConditionTensor, probability: float) -> ConditionTensor:
    """Drop the last levels of the conditioning codes of random items. The first code level is never dropped."""
    num_levels = conditioning.mask.shape[1]
    kept = torch.randint(1, num_levels, (len(conditioning),)) if num_levels > 1 else torch.ones(len(conditioning))
    is_cut = torch.rand(len(conditioning)) < probability
    return conditioning.without_trailing(torch.where(is_cut, kept, num_levels))


def _noise_of_streams(transformer: StageTransformer, history_noise: float, input_noise: float) -> dict[str, float]:
    """Return the largest share of noise by stream name, for streams with noise."""
    generated = {name for name, source in transformer.sources.items() if source.kind in ("semantic", "acoustic")}
    inputs = [stream.name for stream in transformer.layout.inputs if stream.name in generated]
    if input_noise > 0 and not inputs:
        raise ValueError(
            f"got input_noise={input_noise}, but no earlier stage predicts the inputs of the {transformer.namespace} "
            "transformer; set input_noise=0"
        )
    noise = {stream.name: history_noise for stream in transformer.layout.predicted} | dict.fromkeys(inputs, input_noise)
    return {name: share for name, share in noise.items() if share > 0}


def _metrics(prediction: TokenLoss) -> dict[str, Tensor | float]:
    losses = {f"loss_{name}": loss.detach() for name, loss in prediction.per_stream.items()}
    return {"accuracy": prediction.accuracy, **losses}


def chance_losses(transformer: StageTransformer) -> dict[str, float]:
    """Compute the losses of uniform predictions; `loss` is the mean over streams, weighted by tokens per second."""
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
