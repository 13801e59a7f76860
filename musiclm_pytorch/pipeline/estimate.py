"""`musiclm train --dry-run`: estimates of parameters, tokens, memory, disk space and time of a training run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.lm.task import chance_losses
from audiolm_pytorch.nn.lora import LoRA
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.training.distributed import to_device
from audiolm_pytorch.training.freezing import frozen_parameters
from audiolm_pytorch.training.precision import autocast
from musiclm_pytorch.pipeline.builders import STAGES, build_codec, build_mulan, build_semantic_tokenizer, build_stage
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.presets import RunConfig, TransformerConfig
from musiclm_pytorch.pipeline.steps import MELODY_STEPS, STEPS, check_step
from musiclm_pytorch.pipeline.trainers import NUM_VALIDATIONS, codec_trainer, mulan_trainer, semantic_tokenizer_trainer

__all__ = [
    "BYTES_PER_PARAMETER",
    "BYTES_PER_TOKEN",
    "MAX_CROPS",
    "MAX_CROP_SECONDS",
    "VALIDATION_SHARE",
    "StepEstimate",
    "check_assumed",
    "estimate",
    "estimate_steps",
    "estimate_table",
    "extrapolated",
    "num_bytes",
    "seconds_per_crop",
    "step_function",
    "training_memory",
]

# Sizes of a timed batch: first one crop, then several if one crop is fast. The time of a step is in proportion.
MAX_CROPS, MAX_CROP_SECONDS = 4, 1.0
_FAST_SECONDS, _MAX_TIMED_SECONDS, _MAX_CALLS = 0.25, 1.0, 5
# Peak TFLOP/s of dense bf16 products (fp16 for t4 and v100), from the data sheets, and the share that training reaches.
DEVICES = {
    **{"t4": 65, "v100": 125, "l4": 121, "a10g": 70, "a100": 312, "h100": 989, "h200": 989},
    **{"rtx3090": 71, "rtx4090": 165},
}
_UTILISATION = 0.3
# Held-out crops of a validation and their least length in seconds, and decodings per crop. Other steps use all crops.
_VALIDATION = {"codec": (64, 3.0, 2), "semantic": (128, 0.0, 1), "coarse": (128, 0.0, 1), "fine": (128, 0.0, 1)}
_MAX_CAPTIONS = 1000
# Time of a validation as a share of a training step on equal crops: a forward pass without a backward pass.
VALIDATION_SHARE = 1 / 3
# Weights, gradients and two moments of AdamW in float32; and the buckets in which processes exchange gradients.
_MEMORY_PER_PARAMETER, _BUCKET_BYTES = 16, 4
# For a trained parameter: two checkpoints (weights and two moments of AdamW), the final weights, and twice as float16.
# At the end of a step, the float16 files remain.
BYTES_PER_PARAMETER = 2 * 12 + 4 + 4
BYTES_PER_TOKEN = 2


@dataclass(frozen=True)
class StepEstimate:
    """Estimated cost of one pipeline step; a finished or pretrained step needs no time.

    Attributes:
        memory_bytes: Memory of weights, gradients, moments of AdamW, EMA, and activations of one batch of one process.
        num_epochs: Seconds of all training crops, divided by the seconds of the training files.
        chance_loss: Loss of uniform guesses, with which the training of most models begins; None = no such loss.
    """

    step: str
    num_parameters: int = 0
    num_tokens: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    num_epochs: float = 0.0
    chance_loss: float | None = None


@typed
def estimate(pipeline: Pipeline, step: str = "all", device: str | None = None) -> str:
    """Estimate the cost of one pipeline step, or of all steps, and return a table as text.

    Times are measured on this machine, or computed for a GPU in `DEVICES` from the number of operations.
    """
    rows = estimate_steps(pipeline, step, device)
    states = dict.fromkeys(pipeline.pretrained, "pretrained")
    states |= {row.step: "done" for row in rows if row.step in STEPS and pipeline.is_done(row.step)}
    return estimate_table(rows, pipeline.items, pipeline.accelerator.device, device, states)


def estimate_table(
    rows: Sequence[StepEstimate],
    items: tuple[Sequence[AudioItem], Sequence[AudioItem]],
    device: torch.device,
    assumed: str | None,
    states: Mapping[str, str],
) -> str:
    """Format estimates and their sum; `states` has the steps that need no time, with a word instead of the time."""
    sums = ("num_parameters", "num_tokens", "disk_bytes", "seconds")
    totals: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in sums}
    totals["memory_bytes"] = max(row.memory_bytes for row in rows)
    heads = f"{'tokens':>20}{'epochs':>11}{'chance loss':>13}{'memory':>12}{'disk':>14}{'time':>14}"
    lines = [f"{'step':20}{'parameters':>14}{heads}"]
    for row in [*rows, StepEstimate("total", **totals)]:
        epochs = f"{row.num_epochs:,.3g}" if row.num_epochs else ""
        chance = "" if row.chance_loss is None else f"{row.chance_loss:.2f}"
        memory = f"{row.memory_bytes / 1e9:,.1f} GB" if row.memory_bytes else ""
        disk, duration = f"{row.disk_bytes / 1e6:,.1f} MB", states.get(row.step, _duration(row.seconds))
        cells = f"{row.num_tokens:20,}{epochs:>11}{chance:>13}{memory:>12}{disk:>14}{duration:>14}"
        lines.append(f"{row.step:20}{row.num_parameters:14,}{cells}")
    files = f"{len(items[0]):,} training and {len(items[1]):,} held-out files"
    times = f"times on {device} with {torch.get_num_threads()} threads"
    if assumed is not None:
        times = f"times of a {assumed} at {_UTILISATION:.0%} of {DEVICES[assumed]} TFLOP/s, without reading of files"
    lines.append(f"{files}; {times}; memory of weights, gradients, AdamW, EMA and the activations of one batch")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """Return a duration in days, minutes or seconds."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def check_assumed(device: str | None) -> None:
    """Raise a ValueError for a GPU that is not in `DEVICES`."""
    if device is not None and device not in DEVICES:
        raise ValueError(f"there is no estimate for the device {device!r}; choose one of: {', '.join(DEVICES)}")


@typed
def estimate_steps(pipeline: Pipeline, step: str = "all", device: str | None = None) -> list[StepEstimate]:
    """Estimate the cost of one pipeline step, or of all steps, from a few timed training steps; no file is written."""
    check_step(step)
    if step in MELODY_STEPS:
        raise ValueError(f"there is no estimate for the step {step}; run it without --dry-run")
    check_assumed(device)
    with preserve_rng():
        probe = _Probe(pipeline, device)
        return [probe.estimate(name) for name in (STEPS if step == "all" else [step])]


class _Probe:
    """Estimates the cost of pipeline steps, with untrained modules where no pretrained module was passed."""

    def __init__(self, pipeline: Pipeline, assumed: str | None) -> None:
        self.assumed = assumed
        self.pipeline, self.preset, self.device = pipeline, pipeline.preset, pipeline.accelerator.device
        self.start, given = pipeline.start, {**pipeline.start.trained, **pipeline.pretrained}
        self.codec: Any = given.get("codec") or build_codec(self.preset)
        self.tokenizer: Any = given.get("semantic-tokenizer") or build_semantic_tokenizer(self.preset)
        for part in (self.codec, self.tokenizer):
            part.to(self.device).eval()

    def estimate(self, step: str) -> StepEstimate:
        if step in self.pipeline.pretrained:
            return StepEstimate(step, disk_bytes=num_bytes(self.pipeline.pretrained[step]))
        if step in ("quantizer", "tokens"):
            return self._encoding(step)
        config = getattr(self.preset, step.replace("-", "_"))
        if self.assumed is None or step in self.start.trained or not isinstance(config, TransformerConfig):
            return self._training(step, config)
        # parameters, operations and memory grow linearly with the depth, so that no large model is built
        layer: dict[str, Any] = {"layer": 1} if hasattr(config, "layer") else {}  # that is clustered: within the depth
        one, two = (self._training(step, replace(config, depth=depth, **layer)) for depth in (1, 2))
        return extrapolated(one, two, config.depth)

    def _training(self, step: str, config: Any) -> StepEstimate:
        """Estimate the cost of a step that trains a model."""
        run, crop_seconds = config.run, min(config.run.seconds, MAX_CROP_SECONDS)
        if self.assumed is not None and step in STAGES:  # the condition codes are in front of whole crops
            crop_seconds = run.seconds
        shortened = replace(config, run=replace(run, seconds=crop_seconds))
        build = self._stage if step in STAGES else self._tokenizer_or_mulan
        module, token_hz, chance, loss = build(step, shortened)
        if step in self.start.trained and self.start.lora_rank is not None:
            LoRA(module, self.start.lora_rank)
        with frozen_parameters(module, self.start.freeze):
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        train_step = step_function(parameters, loss, run, self.device)
        num_parameters = sum(parameter.numel() for parameter in parameters)
        total_seconds = run.num_train_steps * run.batch_size * run.grad_accum_every * run.seconds
        num_held_out = len(self.pipeline.valid_items)
        max_crops, least_seconds, num_decodings = _VALIDATION.get(step, (num_held_out, 0.0, 1))
        valid_seconds = min(num_held_out, max_crops) * max(run.seconds, least_seconds) * num_decodings * NUM_VALIDATIONS
        limit = min(run.batch_size, MAX_CROPS)
        all_seconds = total_seconds + valid_seconds * VALIDATION_SHARE
        seconds = self._seconds(step, train_step, limit) * all_seconds / crop_seconds
        at_once = min(run.batch_size, getattr(config, "chunk_size", None) or run.batch_size)
        num_crops = 0.0 if self.pipeline.is_done(step) else at_once * run.seconds / crop_seconds
        return StepEstimate(
            step,
            num_parameters,
            num_tokens=round(total_seconds * token_hz),
            disk_bytes=num_parameters * BYTES_PER_PARAMETER,
            seconds=seconds,
            memory_bytes=training_memory(
                num_parameters, loss, run, self.device, num_crops, self.pipeline.accelerator.num_processes
            ),
            num_epochs=total_seconds / sum(item.num_samples / item.sample_hz for item in self.pipeline.train_items),
            chance_loss=chance,
        )

    def _tokenizer_or_mulan(self, step: str, config: Any) -> tuple[nn.Module, float, float | None, Any]:
        """Build the module of a step; also return tokens per second, chance loss, and the loss of a number of crops."""
        preset, items = replace(self.preset, **{step.replace("-", "_"): config}), self.pipeline.items
        loop: dict[str, Any] = dict(results_folder=self.pipeline.out / step, seed=self.pipeline.seed)
        trainer: Any
        start = self.start.copy_of(step)
        if step == "codec":
            trainer = codec_trainer(preset, items, codec=start, **loop)
            trainer.task.unquantized_steps = config.run.num_train_steps  # the codebooks are not initialised here
            token_hz = _frame_hz(trainer.task.codec) * trainer.task.codec.num_quantizers
        elif step == "semantic-tokenizer":
            trainer = semantic_tokenizer_trainer(
                preset, items, encoder=start and start.encoder.requires_grad_(True), **loop
            )
            token_hz = _frame_hz(self.tokenizer)
        else:
            self.pipeline.require_captions()
            captions = self.pipeline.captions[:_MAX_CAPTIONS]
            trainer = mulan_trainer(preset, items, captions, mulan=start, **loop)
            token_hz = 100 / 16 * config.num_mels / 16  # patches of 16 frames of 10 ms by 16 mel bands
        task = trainer.task
        task.module.to(self.device)
        last_step = config.run.num_train_steps - 1

        def loss(num_crops: int) -> Tensor:
            batch = to_device(task.batch([(0, index % task.num_items) for index in range(num_crops)]), self.device)
            losses = [phase.loss(batch, last_step).loss for phase in task.phases]
            return torch.stack(losses).sum()

        return task.module, token_hz, task.chance.get("loss"), loss

    def _stage(self, step: str, config: Any) -> tuple[nn.Module, float, float | None, Any]:
        """Build a language model; also return tokens per second, chance loss, and the loss of a number of crops."""
        codec, tokenizer, device, seconds = self.codec, self.tokenizer, self.device, config.run.seconds
        preset = replace(self.preset, **{step: config})
        start = self.start.copy_of(step)
        transformer: Any = start or build_stage(preset, step, codec=codec, tokenizer=tokenizer)
        transformer.to(device)
        num_semantic = max(1, int(seconds * _frame_hz(tokenizer)))
        num_acoustic = max(1, int(seconds * _frame_hz(codec)))

        def loss(num_crops: int) -> Tensor:
            acoustic = (num_crops, num_acoustic, codec.num_quantizers)
            tokens = {
                "semantic": torch.randint(tokenizer.codebook_size, (num_crops, num_semantic), device=device),
                "acoustic": torch.randint(codec.codebook_size, acoustic, device=device),
            }
            num_codes = self.preset.quantizer.num_quantizers
            embeddings = torch.randn(num_crops, num_codes, transformer.cond_dim, device=device)
            conditions = {"codes": ConditionTensor.of(embeddings)}
            value: Tensor = transformer(transformer.packed(AudioTokens(tokens, {})), conditions).loss
            return value

        token_hz = sum(stream.num_levels * float(stream.exact_hz) for stream in transformer.layout.predicted)
        return transformer, token_hz, chance_losses(transformer)["loss"], loss

    @torch.no_grad()
    def _encoding(self, step: str) -> StepEstimate:
        """Estimate the cost of a step that encodes every audio file once."""
        pipeline, codec, tokenizer = self.pipeline, self.codec, self.tokenizer
        mulan: Any = pipeline.pretrained.get("mulan")
        if mulan is None:
            pipeline.require_captions()
            mulan = build_mulan(self.preset, pipeline.captions[:_MAX_CAPTIONS])
        mulan.to(self.device).eval()
        items = [*pipeline.train_items, *(pipeline.valid_items if step == "tokens" else [])]
        total_seconds = sum(item.num_samples / item.sample_hz for item in items)
        crop_seconds = min(total_seconds / len(items), MAX_CROP_SECONDS)

        def noise(channels: int, sample_hz: int) -> Tensor:
            return torch.randn(channels, round(crop_seconds * sample_hz), device=self.device) * 0.1

        def encode(num_crops: int) -> None:
            mulan.window_latents(noise(1, mulan.sample_hz)[0])
            if step == "tokens":
                codec.tokenize(noise(codec.channels, codec.target_sample_hz)[None])
                tokenizer(noise(1, tokenizer.target_sample_hz))

        seconds = self._seconds(step, encode, 1) * total_seconds / crop_seconds
        if step == "quantizer":
            # a quantizer holds its MuLaN, which is far larger than the codebooks
            return StepEstimate(step, 0, len(items) * self.preset.quantizer.num_quantizers, num_bytes(mulan), seconds)
        num_tokens = round(total_seconds * (_frame_hz(codec) * codec.num_quantizers + _frame_hz(tokenizer)))
        num_windows = len(items) + total_seconds / mulan.window_stride_seconds
        disk_bytes = round(BYTES_PER_TOKEN * (num_tokens + num_windows * mulan.dim_latent))
        return StepEstimate(step, 0, num_tokens, disk_bytes, seconds)

    def _seconds(self, step: str, work: Callable[[int], None], max_crops: int) -> float:
        """Return the duration in seconds of `work` per crop; return 0 if `step` is finished."""
        return 0.0 if self.pipeline.is_done(step) else seconds_per_crop(work, max_crops, self.device, self.assumed)


def step_function(
    parameters: Sequence[nn.Parameter], loss: Callable[[int], Tensor], run: RunConfig, device: torch.device
) -> Callable[[int], None]:
    """Return the function of a number of crops that trains for one step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def train_step(num_crops: int) -> None:
        value = _forward(loss, num_crops, run, device)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        value.item()  # waits for the device

    return train_step


def extrapolated(one: StepEstimate, two: StepEstimate, depth: int) -> StepEstimate:
    """Return the estimate for a model of `depth` layers from those for one and two layers."""
    values, steps = vars(one), vars(two)
    grown = {name: values[name] + (depth - 1) * (steps[name] - values[name]) for name in values if name != "step"}
    return StepEstimate(one.step, **grown)


def training_memory(
    num_parameters: int,
    loss: Callable[[int], Tensor],
    run: RunConfig,
    device: torch.device,
    num_crops: float,
    num_processes: int,
) -> int:
    """Estimate the bytes for trained parameters, and for what `loss` keeps of `num_crops` crops for gradients."""
    one, two = (_saved_bytes(partial(_forward, loss, number, run, device)) if num_crops else 0 for number in (1, 2))
    bytes_per_parameter: float = _MEMORY_PER_PARAMETER + (_BUCKET_BYTES if num_processes > 1 else 0)
    if run.fsdp:
        bytes_per_parameter = _MEMORY_PER_PARAMETER / num_processes
    return round(num_parameters * bytes_per_parameter + (two - one) * num_crops)


def _saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Count the bytes that a forward pass keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = forward()
    del value  # until here, the tensors exist, so that no two of them have one address
    return sum(sizes.values())


def _forward(loss: Callable[[int], Tensor], num_crops: int, run: RunConfig, device: torch.device) -> Tensor:
    with autocast(run.precision, device):
        return loss(num_crops)


def seconds_per_crop(
    work: Callable[[int], None], max_crops: int, device: torch.device, assumed: str | None = None
) -> float:
    """Return the duration of `work(num_crops)` per crop, on this machine or on the GPU `assumed` of `DEVICES`.

    The result is the minimum of a few calls. On a CPU, the processor time of this thread is measured, so that other
    programs have little influence.
    """
    if assumed is not None:
        with FlopCounterMode(display=False) as counter:
            work(1)
        return counter.get_total_flops() / (_UTILISATION * DEVICES[assumed] * 1e12)
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds: list[float] = []
    num_crops = 1
    while len(seconds) < 2 or (sum(seconds) < _MAX_TIMED_SECONDS and len(seconds) < _MAX_CALLS):
        started = clock()
        work(num_crops)
        seconds.append(clock() - started)
        if seconds[0] > _MAX_TIMED_SECONDS:
            break
        if num_crops < max_crops and seconds[-1] < _FAST_SECONDS:
            num_crops, seconds = max_crops, []
    return min(seconds) / num_crops


def _frame_hz(tokenizer: Any) -> float:
    return tokenizer.target_sample_hz / tokenizer.downsample_factor


def num_bytes(module: nn.Module) -> int:
    """Return the size of the saved weights of a module."""
    return sum(weight.numel() * weight.element_size() for weight in module.state_dict().values())
