"""`musiclm train --dry-run`: parameters, tokens, disk space and time of a run, from a few short timed steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.training.rng import preserve_rng
from musiclm_pytorch.pipeline.builders import (
    build_codec,
    build_mulan,
    build_quantizer,
    build_semantic_encoder,
    build_semantic_objective,
    build_semantic_tokenizer,
    build_stage,
)
from musiclm_pytorch.pipeline.pipeline import NUM_VALIDATIONS, STEPS, Pipeline, check_step
from musiclm_pytorch.pipeline.presets import RunConfig

__all__ = ["StepEstimate", "estimate", "estimate_steps"]

# A timed batch takes about this long, a timed crop has at most this length. The time of a step is in proportion.
_BATCH_SECONDS, _MAX_CROP_SECONDS = 0.3, 2.0
# For a trained parameter: weights and two moments of AdamW, twice the final weights, and twice as float16.
_BYTES_PER_PARAMETER = 12 + 8 + 4
_BYTES_PER_TOKEN = 2
_FORWARD_SHARE = 1 / 3  # share of the forward pass in a training step

# A module, the tokens in a second of audio, and the loss on random crops: loss(number of crops, seconds)
_Training = tuple[nn.Module, float, Callable[[int, float], Tensor]]


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
    """Estimate one step, or all, from a few short steps on random input. Nothing is written.

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

    @cached_property
    def mulan(self) -> Any:
        mulan: Any = self.pipeline.pretrained.get("mulan")
        if mulan is None:
            self.pipeline.require_captions()
            mulan = build_mulan(self.preset, self.pipeline.captions)
        return mulan.to(self.device).eval()

    def estimate(self, step: str) -> StepEstimate:
        if step in self.pipeline.pretrained:
            return StepEstimate(step, disk_bytes=_num_bytes(self.pipeline.pretrained[step]))
        if step in ("quantizer", "tokens"):
            return self._encoding(step)
        run = getattr(self.preset, step.replace("-", "_")).run
        module, token_hz, loss = self._training(step)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        num_parameters = sum(parameter.numel() for parameter in parameters)
        num_crops = run.num_train_steps * run.batch_size
        seconds = 0.0
        if not self.pipeline.is_done(step):
            num_validated = NUM_VALIDATIONS * len(self.pipeline.valid_items)
            crop_seconds = _seconds_per_crop(parameters, run, loss, self.device)
            seconds = crop_seconds * (num_crops + _FORWARD_SHARE * num_validated)
        num_tokens = round(num_crops * run.seconds * token_hz)
        return StepEstimate(step, num_parameters, num_tokens, num_parameters * _BYTES_PER_PARAMETER, seconds)

    def _training(self, step: str) -> _Training:
        match step:
            case "codec":
                return self._codec_training()
            case "semantic-tokenizer":
                return self._semantic_training()
            case "mulan":
                return self._mulan_training()
            case _:
                return self._stage_training(step)

    def _codec_training(self) -> _Training:
        codec = self.codec.train()
        mel_loss = MultiScaleMelLoss(codec.target_sample_hz).to(self.device)

        def loss(batch: int, seconds: float) -> Tensor:
            wave = self._wave(batch, seconds, codec.target_sample_hz)
            output = codec(wave)
            return mel_loss(output.wave, wave[:, None]) + output.commitment_loss

        return codec, _frame_hz(codec) * codec.num_quantizers, loss

    def _semantic_training(self) -> _Training:
        encoder = build_semantic_encoder(self.preset)
        objective = build_semantic_objective(self.preset, encoder).to(self.device)

        def loss(batch: int, seconds: float) -> Tensor:
            return objective(self._wave(batch, seconds, encoder.sample_hz)).loss

        return objective, self.preset.semantic_tokenizer.token_hz, loss

    def _mulan_training(self) -> _Training:
        mulan, captions = self.mulan.train(), self.pipeline.captions

        def loss(batch: int, seconds: float) -> Tensor:
            texts = [captions[number % len(captions)] for number in range(batch)]
            result: Tensor = mulan(self._wave(batch, seconds, mulan.sample_hz), texts)
            return result

        # patches of 16 hops of 10 ms by 16 mel bands
        return mulan, 100 / 16 * self.preset.mulan.num_mels / 16, loss

    def _stage_training(self, stage: str) -> _Training:
        codec, tokenizer, dim = self.codec, self.tokenizer, getattr(self.preset, stage).dim
        transformer = build_stage(self.preset, stage, codec=codec, tokenizer=tokenizer).to(self.device)

        def loss(batch: int, seconds: float) -> Tensor:
            semantic = (batch, max(1, int(seconds * _frame_hz(tokenizer))))
            acoustic = (batch, max(1, int(seconds * _frame_hz(codec))), codec.num_quantizers)
            tokens = {
                "semantic": torch.randint(tokenizer.codebook_size, semantic, device=self.device),
                "acoustic": torch.randint(codec.codebook_size, acoustic, device=self.device),
            }
            embeddings = torch.randn(batch, self.preset.quantizer.num_quantizers, dim, device=self.device)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=self.device)
            conditions = Conditions(codes=ConditionTensor(embeddings, mask))
            return transformer(transformer.packed(AudioTokens(tokens, {})), conditions).loss

        token_hz = sum(stream.num_levels * float(stream.exact_hz) for stream in transformer.layout.predicted)
        return transformer, token_hz, loss

    @torch.no_grad()
    def _encoding(self, step: str) -> StepEstimate:
        """Estimate a step that encodes every file once."""
        items = [*self.pipeline.train_items, *(self.pipeline.valid_items if step == "tokens" else [])]
        total_seconds = sum(item.num_samples / item.sample_hz for item in items)
        crop_seconds = min(total_seconds / len(items), _MAX_CROP_SECONDS)
        codec, tokenizer, mulan = self.codec.eval(), self.tokenizer, self.mulan.eval()

        def encode() -> None:
            mulan.window_latents(self._wave(1, crop_seconds, mulan.sample_hz)[0])
            if step == "tokens":
                codec.tokenize(self._wave(codec.channels, crop_seconds, codec.target_sample_hz)[None])
                tokenizer(self._wave(1, crop_seconds, tokenizer.target_sample_hz))

        is_done = self.pipeline.is_done(step)
        seconds = 0.0 if is_done else min(_timed(encode, self.device) for _ in range(3)) * total_seconds / crop_seconds
        if step == "quantizer":
            quantizer = build_quantizer(self.preset, mulan, len(items))
            return StepEstimate(step, 0, len(items) * quantizer.num_quantizers, _num_bytes(quantizer), seconds)
        num_tokens = round(total_seconds * (_frame_hz(codec) * codec.num_quantizers + _frame_hz(tokenizer)))
        num_windows = len(items) + total_seconds / mulan.window_stride_seconds
        disk_bytes = round(_BYTES_PER_TOKEN * (num_tokens + num_windows * mulan.dim_latent))
        return StepEstimate(step, 0, num_tokens, disk_bytes, seconds)

    def _wave(self, batch: int, seconds: float, sample_hz: int) -> Tensor:
        return torch.randn(batch, round(seconds * sample_hz), device=self.device) * 0.1


def _seconds_per_crop(
    parameters: list[nn.Parameter], run: RunConfig, loss: Callable[[int, float], Tensor], device: torch.device
) -> float:
    """Time of a training step, divided by the batch size: the minimum of a few steps on fewer and shorter crops."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    crop_seconds = min(run.seconds, _MAX_CROP_SECONDS)

    def backward(batch: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            value = loss(batch, crop_seconds)
        value.backward()
        value.item()  # waits for the device

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    seconds = _timed(lambda: backward(1), device)  # includes the start-up of the first call
    batch = min(run.batch_size, int(_BATCH_SECONDS / seconds))
    if batch > 1:
        seconds = min(_timed(lambda: backward(batch), device) for _ in range(3)) / batch
    return seconds * run.seconds / crop_seconds + min(_timed(update, device) for _ in range(2)) / run.batch_size


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
