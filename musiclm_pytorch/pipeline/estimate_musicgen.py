"""`musiclm train musicgen --dry-run`: estimates of parameters, tokens, memory, disk space and time."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.data.manifest import AudioItem, captions_of
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.lm.task import chance_losses, trained_modules
from audiolm_pytorch.nn.lora import LoRA
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.training.freezing import frozen_parameters
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.pipeline.estimate import (
    BYTES_PER_TOKEN,
    MAX_CROP_SECONDS,
    MAX_CROPS,
    VALIDATION_SHARE,
    StepEstimate,
    check_assumed,
    estimate_table,
    extrapolated,
    num_bytes,
    seconds_per_crop,
    step_function,
    training_memory,
)
from musiclm_pytorch.pipeline.musicgen_presets import MusicGenPreset
from musiclm_pytorch.pipeline.trainers import NUM_VALIDATIONS

__all__ = ["estimate_musicgen"]

_MAX_VALID_ITEMS = 128  # of a validation
_BYTES_PER_CHROMA = 4
_EMA_BYTES = 4
# Two checkpoints contain two moments of AdamW, and the EMA.
_CHECKPOINT_BYTES = 2 * (8 + _EMA_BYTES)


@typed
def estimate_musicgen(
    preset: MusicGenPreset,
    model: MusicGen,
    items: tuple[Sequence[AudioItem], Sequence[AudioItem]],
    *,
    lora_rank: int | None = None,
    freeze: Sequence[str] = (),
    assumed: str | None = None,
    depth: int | None = None,
    num_processes: int = 1,
) -> str:
    """Estimate the cost of `musicgen_trainer` with these arguments, and return a table as text; no file is written.

    Times are measured on the device of the model, whose weights change, or computed for the GPU `assumed` and a model
    of `depth` blocks (None = those of the model), of which only models with one and two blocks are built.
    """
    check_assumed(assumed)
    if assumed is not None and freeze:
        raise ValueError(f"freeze={list(freeze)} is estimated only on this machine; leave out freeze or {assumed}")
    with preserve_rng():
        options = preset, items, assumed, num_processes
        rows = [] if preset.mix_prob > 0 else [_Probe(model, *options).tokens()]
        if assumed is None:
            rows.append(_Probe(model, *options).training(lora_rank, freeze))
        else:
            one, two = (_Probe(_with_depth(model, number), *options).training(lora_rank) for number in (1, 2))
            rows.append(extrapolated(one, two, depth or model.transformer.config["depth"]))
    return estimate_table(rows, items, model.device, assumed, {})


def _with_depth(model: MusicGen, depth: int) -> MusicGen:
    """Return a model with the codec and the text encoder of `model`, and an untrained transformer of `depth` blocks."""
    transformer = MusicGenTransformer(**{**model.transformer.config, "depth": depth}).to(model.device)
    return type(model)(transformer=transformer, codec=model.codec, text_conditioner=model.text_conditioner)


class _Probe:
    """Estimates the cost of the tokens and of the training of a MusicGen."""

    def __init__(
        self,
        model: MusicGen,
        preset: MusicGenPreset,
        items: tuple[Sequence[AudioItem], Sequence[AudioItem]],
        assumed: str | None,
        num_processes: int,
    ) -> None:
        self.preset, self.model, self.items, self.assumed = preset, model, items, assumed
        self.num_processes = num_processes
        stream = model.transformer.layout.predicted[0]
        self.rate_hz, self.num_levels = float(stream.exact_hz), stream.num_levels
        self.seconds = min(preset.run.seconds, model.transformer.max_seconds or inf)
        self.crop_seconds = min(self.seconds, MAX_CROP_SECONDS)
        self.melody_frames = model.transformer.melody_frames or 0
        self.captions = [text for item in items[0][:MAX_CROPS] for text in captions_of(item)[:1]] or ["music"]

    def tokens(self) -> StepEstimate:
        """Estimate the cost of encoding every file once."""
        total_seconds = sum(item.num_samples / item.sample_hz for part in self.items for item in part)
        seconds = seconds_per_crop(self._encode, 1, self.model.device, self.assumed) * total_seconds / self.crop_seconds
        num_tokens = round(total_seconds * self.rate_hz * self.num_levels)
        num_windows = max(total_seconds / self.seconds, sum(map(len, self.items)))
        melody_bytes = num_windows * self.melody_frames * 12 * _BYTES_PER_CHROMA
        return StepEstimate("tokens", 0, num_tokens, round(BYTES_PER_TOKEN * num_tokens + melody_bytes), seconds)

    def training(self, lora_rank: int | None, freeze: Sequence[str] = ()) -> StepEstimate:
        """Estimate the cost of the training; a step takes a time in proportion to the rows of its crops."""
        model, run = self.model, self.preset.run
        if lora_rank is not None:
            LoRA(model.transformer, lora_rank)
        trained = trained_modules(model.transformer, model.text_conditioner if lora_rank is None else None)
        with frozen_parameters(trained, freeze):
            parameters = [weight for weight in trained.parameters() if weight.requires_grad]
        limit = min(run.batch_size, MAX_CROPS)
        step = step_function(parameters, self._loss, run, model.device)
        num_crops = run.num_train_steps * run.batch_size * run.grad_accum_every
        num_valid = min(len(self.items[1]), _MAX_VALID_ITEMS) * NUM_VALIDATIONS
        seconds = seconds_per_crop(step, limit, model.device, self.assumed) * (num_crops + num_valid * VALIDATION_SHARE)
        rows, crop_rows = (self.melody_frames + length * self.rate_hz for length in (self.seconds, self.crop_seconds))
        num_parameters = sum(weight.numel() for weight in parameters)
        num_tokens = round(num_crops * self.seconds * self.rate_hz * self.num_levels)
        at_once = run.batch_size * rows / crop_rows
        memory = training_memory(num_parameters, self._loss, run, model.device, at_once, self.num_processes)
        frozen_bytes = num_bytes(model) - 4 * num_parameters
        trained_bytes = num_parameters * _CHECKPOINT_BYTES + 2 * num_bytes(trained)
        return StepEstimate(
            "musicgen",
            num_parameters,
            num_tokens,
            disk_bytes=trained_bytes + num_bytes(model),
            seconds=seconds * rows / crop_rows,
            memory_bytes=memory + num_parameters * _EMA_BYTES + frozen_bytes,
            num_epochs=num_crops * self.seconds / sum(item.num_samples / item.sample_hz for item in self.items[0]),
            chance_loss=chance_losses(model.transformer)["loss"],
        )

    @torch.no_grad()
    def _encode(self, num_crops: int) -> None:
        codec, chroma, device = self.model.codec, self.model.chroma, self.model.device
        shape = num_crops, codec.channels, round(self.crop_seconds * codec.target_sample_hz)
        codec.tokenize(0.1 * torch.randn(shape, device=device))
        if chroma is not None:
            chroma(0.1 * torch.randn(num_crops, round(self.crop_seconds * chroma.sample_hz), device=device))

    def _loss(self, num_crops: int) -> Tensor:
        """Return the loss of crops with random codes and melodies."""
        model = self.model
        if self.preset.mix_prob > 0:
            self._encode(num_crops)
        shape = num_crops, max(1, int(self.crop_seconds * self.rate_hz)), self.num_levels
        codes = torch.randint(model.codec.codebook_size, shape, device=model.device)
        conditions: dict[str, ConditionTensor] = {}
        if model.text_conditioner is not None:
            conditions["text"] = model.text_conditioner([self.captions[0]] * num_crops)
        if model.chroma is not None:
            melody = torch.randn(num_crops, self.melody_frames, model.chroma.num_classes, device=model.device)
            conditions["melody"] = ConditionTensor.of(melody)
        transformer = model.transformer
        value: Tensor = transformer(transformer.packed(AudioTokens({"acoustic": codes}, {})), conditions).loss
        return value
