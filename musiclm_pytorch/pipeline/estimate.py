"""`musiclm train --dry-run`: parameters, tokens, disk space and time of a run, from a few short timed steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.training.distributed import to_device
from audiolm_pytorch.training.rng import preserve_rng
from musiclm_pytorch.pipeline.builders import (
    STAGES,
    build_codec,
    build_mulan,
    build_quantizer,
    build_semantic_tokenizer,
    build_stage,
)
from musiclm_pytorch.pipeline.pipeline import STEPS, Pipeline, check_step
from musiclm_pytorch.pipeline.presets import RunConfig
from musiclm_pytorch.pipeline.trainers import (
    NUM_VALIDATIONS,
    codec_trainer,
    mulan_trainer,
    semantic_tokenizer_trainer,
)

__all__ = ["StepEstimate", "estimate", "estimate_steps"]

# A timed batch takes about this long, a timed crop has at most this length. The time of a step is in proportion.
_BATCH_SECONDS, _MAX_CROP_SECONDS = 0.3, 2.0
# For a trained parameter: weights and two moments of AdamW, twice the final weights, and twice as float16.
_BYTES_PER_PARAMETER = 12 + 8 + 4
_BYTES_PER_TOKEN = 2
_FORWARD_SHARE = 1 / 3  # share of the forward pass in a training step

# A module, the tokens in a second of audio, and the loss on a number of crops
_Training = tuple[nn.Module, float, Callable[[int], Tensor]]


@dataclass(frozen=True)
class StepEstimate:
    """Estimate of one step. Steps that are done and pretrained parts need no time."""

    step: str
    num_parameters: int = 0
    num_tokens: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0


@beartype
def estimate(pipeline: Pipeline, step: str = "all") -> str:
    """Return `estimate_steps` as a table."""
    rows = estimate_steps(pipeline, step)
    sums = {name: sum(getattr(row, name) for row in rows) for name in ("num_parameters", "num_tokens", "disk_bytes")}
    lines = [f"{'step':20}{'parameters':>12}{'tokens':>15}{'disk':>14}{'time':>12}"]
    for row in [*rows, StepEstimate("total", **sums, seconds=sum(row.seconds for row in rows))]:
        duration = _duration(row.seconds)
        if row.step in STEPS and pipeline.is_done(row.step):
            duration = "done"
        elif row.step in pipeline.pretrained:
            duration = "pretrained"
        disk = f"{row.disk_bytes / 1e6:,.1f} MB"
        lines.append(f"{row.step:20}{row.num_parameters:12,}{row.num_tokens:15,}{disk:>14}{duration:>12}")
    files = f"{len(pipeline.train_items):,} training and {len(pipeline.valid_items):,} held-out files"
    return "\n".join(
        [*lines, f"{files}; times on {pipeline.accelerator.device} with {torch.get_num_threads()} threads"]
    )


@beartype
def estimate_steps(pipeline: Pipeline, step: str = "all") -> list[StepEstimate]:
    """Estimate one step, or all, from a few training steps on short crops. Nothing is written.

    Raises:
        ValueError: If there is no such step, or there are no captions to train MuLaN.
    """
    check_step(step)
    with preserve_rng():
        probe = _Probe(pipeline)
        return [probe.estimate(name) for name in (STEPS if step == "all" else [step])]


class _Probe:
    """Estimates steps with the pretrained parts of a pipeline, and with untrained ones for the others."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.preset, self.device = pipeline, pipeline.preset, pipeline.accelerator.device
        self.codec: Any = pipeline.pretrained.get("codec") or build_codec(self.preset)
        self.tokenizer: Any = pipeline.pretrained.get("semantic-tokenizer") or build_semantic_tokenizer(self.preset)
        for part in (self.codec, self.tokenizer):
            part.to(self.device).eval()

    def estimate(self, step: str) -> StepEstimate:
        if step in self.pipeline.pretrained:
            return StepEstimate(step, disk_bytes=_num_bytes(self.pipeline.pretrained[step]))
        if step in ("quantizer", "tokens"):
            return self._encoding(step)
        config = getattr(self.preset, step.replace("-", "_"))
        crop_seconds = min(config.run.seconds, _MAX_CROP_SECONDS)
        if step in STAGES:
            module, token_hz, loss = self._stage(step, crop_seconds)
        else:
            shortened = replace(config, run=replace(config.run, seconds=crop_seconds))
            module, token_hz, loss = self._tokenizer_or_mulan(step, shortened)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        num_parameters = sum(parameter.numel() for parameter in parameters)
        num_crops, seconds = config.run.num_train_steps * config.run.batch_size, 0.0
        if not self.pipeline.is_done(step):
            num_forward = num_crops + _FORWARD_SHARE * NUM_VALIDATIONS * len(self.pipeline.valid_items)
            loss_seconds, update_seconds = _training_seconds(parameters, config.run, loss, self.device)
            seconds = loss_seconds * config.run.seconds / crop_seconds * num_forward
            seconds += update_seconds * config.run.num_train_steps
        num_tokens = round(num_crops * config.run.seconds * token_hz)
        return StepEstimate(step, num_parameters, num_tokens, num_parameters * _BYTES_PER_PARAMETER, seconds)

    def _tokenizer_or_mulan(self, step: str, config: Any) -> _Training:
        preset, items = replace(self.preset, **{step.replace("-", "_"): config}), self.pipeline.items
        loop: dict[str, Any] = dict(results_folder=self.pipeline.out / step, seed=self.pipeline.seed)
        trainer: Any
        if step == "codec":
            trainer = codec_trainer(preset, items, **loop)
            token_hz = config.sample_hz / config.hop_samples * config.num_quantizers
        elif step == "semantic-tokenizer":
            trainer, token_hz = semantic_tokenizer_trainer(preset, items, **loop), config.token_hz
        else:
            self.pipeline.require_captions()
            trainer = mulan_trainer(preset, items, self.pipeline.captions, **loop)
            token_hz = 100 / 16 * config.num_mels / 16  # patches of 16 frames of 10 ms by 16 mel bands
        task, phase = trainer.task, trainer.task.phases[0]
        task.module.to(self.device)

        def loss(num_crops: int) -> Tensor:
            batch = task.batch([(0, index % task.num_items) for index in range(num_crops)])
            result: Tensor = phase.loss(to_device(batch, self.device), 0).loss
            return result

        return task.module, token_hz, loss

    def _stage(self, stage: str, seconds: float) -> _Training:
        codec, tokenizer, dim = self.codec, self.tokenizer, getattr(self.preset, stage).dim
        transformer = build_stage(self.preset, stage, codec=codec, tokenizer=tokenizer).to(self.device)

        def loss(num_crops: int) -> Tensor:
            semantic = (num_crops, max(1, int(seconds * _frame_hz(tokenizer))))
            acoustic = (num_crops, max(1, int(seconds * _frame_hz(codec))), codec.num_quantizers)
            tokens = {
                "semantic": torch.randint(tokenizer.codebook_size, semantic, device=self.device),
                "acoustic": torch.randint(codec.codebook_size, acoustic, device=self.device),
            }
            embeddings = torch.randn(num_crops, self.preset.quantizer.num_quantizers, dim, device=self.device)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=self.device)
            conditions = Conditions(codes=ConditionTensor(embeddings, mask))
            return transformer(transformer.packed(AudioTokens(tokens, {})), conditions).loss

        token_hz = sum(stream.num_levels * float(stream.exact_hz) for stream in transformer.layout.predicted)
        return transformer, token_hz, loss

    @torch.no_grad()
    def _encoding(self, step: str) -> StepEstimate:
        """Estimate a step that encodes every file once."""
        pipeline, codec, tokenizer = self.pipeline, self.codec, self.tokenizer
        mulan: Any = pipeline.pretrained.get("mulan")
        if mulan is None:
            pipeline.require_captions()
            mulan = build_mulan(self.preset, pipeline.captions)
        mulan.to(self.device).eval()
        items = [*pipeline.train_items, *(pipeline.valid_items if step == "tokens" else [])]
        total_seconds = sum(item.num_samples / item.sample_hz for item in items)
        crop_seconds = min(total_seconds / len(items), _MAX_CROP_SECONDS)

        def noise(channels: int, sample_hz: int) -> Tensor:
            return torch.randn(channels, round(crop_seconds * sample_hz), device=self.device) * 0.1

        def encode() -> None:
            mulan.window_latents(noise(1, mulan.sample_hz)[0])
            if step == "tokens":
                codec.tokenize(noise(codec.channels, codec.target_sample_hz)[None])
                tokenizer(noise(1, tokenizer.target_sample_hz))

        seconds = 0.0
        if not pipeline.is_done(step):
            seconds = min(_timed(encode, self.device) for _ in range(3)) * total_seconds / crop_seconds
        if step == "quantizer":
            quantizer = build_quantizer(self.preset, mulan, len(items))
            return StepEstimate(step, 0, len(items) * quantizer.num_quantizers, _num_bytes(quantizer), seconds)
        num_tokens = round(total_seconds * (_frame_hz(codec) * codec.num_quantizers + _frame_hz(tokenizer)))
        num_windows = len(items) + total_seconds / mulan.window_stride_seconds
        disk_bytes = round(_BYTES_PER_TOKEN * (num_tokens + num_windows * mulan.dim_latent))
        return StepEstimate(step, 0, num_tokens, disk_bytes, seconds)


def _training_seconds(
    parameters: list[nn.Parameter], run: RunConfig, loss: Callable[[int], Tensor], device: torch.device
) -> tuple[float, float]:
    """Time of the gradients of one crop, the minimum of a few repetitions, and of one update of the weights."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def backward(num_crops: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            value = loss(num_crops)
        value.backward()
        value.item()  # waits for the device

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    seconds = _timed(lambda: backward(1), device)  # includes the start-up of the first call
    num_crops = min(run.batch_size, int(_BATCH_SECONDS / seconds))
    if num_crops > 1:
        seconds = min(_timed(lambda: backward(num_crops), device) for _ in range(3)) / num_crops
    return seconds, _timed(update, device)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of some work. On a CPU it is processor time, so that other programs do not change the result."""
    clock, num_clocks = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)
    started = clock()
    work()
    return (clock() - started) / num_clocks


def _frame_hz(tokenizer: Any) -> float:
    return tokenizer.target_sample_hz / tokenizer.downsample_factor


def _num_bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights_of(module).values())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
