"""`musiclm train --dry-run`: what a run would take, measured by a few training steps on random input."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.semantic import BestRQ, SemanticTokenizer
from audiolm_pytorch.training.rng import preserve_rng
from musiclm_pytorch.mulan import MuLaN
from musiclm_pytorch.pipeline.builders import (
    LANGUAGE_MODELS,
    build_codec,
    build_language_model,
    build_mulan,
    build_quantizer,
    build_semantic_encoder,
    build_semantic_tokenizer,
)
from musiclm_pytorch.pipeline.pipeline import STEPS, Pipeline, check_step
from musiclm_pytorch.pipeline.presets import RunConfig
from musiclm_pytorch.pipeline.pretrained_parts import exact_dtype

__all__ = ["StepEstimate", "estimate", "estimate_steps"]

# A step that would take longer than this is timed on two items, and counted for the whole batch in proportion.
_LONGEST_STEP_SECONDS = 4.0
_SMALL_BATCH = 2
# Bytes that a finished stage keeps for a parameter: checkpoint (weights and both moments of AdamW), final weights
# twice, and the result as fp16; a generation of the checkpoint more while one is written.
_BYTES_KEPT = 22
_BYTES_WHILE_WRITING = 12
_BYTES_SHIPPED = 2
_SHARD_BYTES = 2


@dataclass(frozen=True)
class StepEstimate:
    """What a stage takes.

    Attributes:
        stage: Its name.
        num_parameters: Parameters that it trains.
        num_tokens: Positions that it is trained on, or that it computes, over the whole run.
        disk_bytes: What it leaves in its folder.
        seconds: Wall time here; 0 where the stage is done, or its part is given.
        shipped_bytes: Its part of the model folder.
    """

    step: str
    num_parameters: int
    num_tokens: int
    disk_bytes: int
    seconds: float
    shipped_bytes: int


@beartype
def estimate(pipeline: Pipeline, stage: str = "all") -> str:
    """A table of what a run would take, for people. Nothing is written.

    Args:
        pipeline: The run.
        stage: One stage, or "all".

    Returns:
        Lines of text.

    Raises:
        ValueError: If there is no such stage, or MuLaN has no captions to learn from.
    """
    stages = estimate_steps(pipeline, stage)
    lines = [f"{'stage':20}{'parameters':>12}{'tokens':>15}{'disk':>12}{'time':>12}"]
    for one in stages:
        is_given = one.step in pipeline.pretrained
        duration = "done" if pipeline.is_done(one.step) else "pretrained" if is_given else _duration(one.seconds)
        lines.append(
            f"{one.step:20}{one.num_parameters:12,}{one.num_tokens:15,}{_size(one.disk_bytes):>12}{duration:>12}"
        )
    writing = max(one.num_parameters for one in stages) * _BYTES_WHILE_WRITING
    shipped = sum(one.shipped_bytes for one in stages)
    disk = sum(one.disk_bytes for one in stages) + writing + shipped
    lines.append(
        f"{'total':20}{sum(one.num_parameters for one in stages):12,}{sum(one.num_tokens for one in stages):15,}"
        f"{_size(disk):>12}{_duration(sum(one.seconds for one in stages)):>12}"
    )
    lines.append(
        f"{len(pipeline.train_items):,} training and {len(pipeline.valid_items):,} held-out files; the model itself "
        f"takes {_size(shipped)}; times were measured on {pipeline.accelerator.device} with {torch.get_num_threads()} "
        "threads, without validation"
    )
    return "\n".join(lines)


@beartype
def estimate_steps(pipeline: Pipeline, stage: str = "all") -> list[StepEstimate]:
    """Measure what each stage would take, by training it for two steps on random input. Nothing is written.

    Args:
        pipeline: The run.
        stage: One stage, or "all".

    Returns:
        An estimate of each stage, in order.

    Raises:
        ValueError: If there is no such stage, or MuLaN has no captions to learn from.
    """
    check_step(stage)
    probe = _Probe(pipeline)
    with preserve_rng():
        return [probe.estimate(name) for name in (STEPS if stage == "all" else [stage])]


class _Probe:
    """Measures the stages of a pipeline, with the parts that are given and untrained ones for the others."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.preset = pipeline, pipeline.preset
        self.device = pipeline.accelerator.device
        items = [*pipeline.train_items, *pipeline.valid_items]
        self.clip_seconds = sum(item.num_samples / item.sample_hz for item in items) / len(items)
        self.num_clips = len(items)

    @cached_property
    def codec(self) -> Any:
        """What the acoustic tokens come from."""
        return self._placed("codec", lambda: build_codec(self.preset))

    @cached_property
    def tokenizer(self) -> Any:
        """What the semantic tokens come from."""
        return self._placed("semantic-tokenizer", lambda: build_semantic_tokenizer(self.preset))

    @cached_property
    def mulan(self) -> Any:
        """The joint embedding."""
        return self._placed("mulan", self._build_mulan)

    def _placed(self, stage: str, build: Callable[[], nn.Module]) -> nn.Module:
        given = self.pipeline.pretrained.get(stage)
        return (build() if given is None else given).to(self.device).eval()

    def _build_mulan(self) -> MuLaN:
        self.pipeline.require_captions()
        return build_mulan(self.preset, self.pipeline.captions)

    def estimate(self, stage: str) -> StepEstimate:
        """Measure one stage."""
        if stage in self.pipeline.pretrained:
            part = self.pipeline.pretrained[stage]
            stored = _stored_bytes(part, exact_dtype(part, torch.float16))
            return StepEstimate(stage, 0, 0, stored, 0.0, stored)
        if stage in LANGUAGE_MODELS:
            return self._language_model(stage)
        measured: StepEstimate = getattr(self, f"_{stage.replace('-', '_')}")()
        return measured

    def _trained(
        self,
        stage: str,
        run: RunConfig,
        parameters: Iterable[Tensor],
        tokens_per_crop: float,
        loss: Callable[[int], Tensor],
        shipped: int | None = None,
    ) -> StepEstimate:
        """Estimate of a stage with a training loop; `loss` takes a number of crops."""
        parameters = list(parameters)
        count = sum(parameter.numel() for parameter in parameters)
        step_seconds = 0.0 if self.pipeline.is_done(stage) else _step_seconds(parameters, run, loss, self.device)
        return StepEstimate(
            stage,
            num_parameters=count,
            num_tokens=round(run.num_train_steps * run.batch_size * tokens_per_crop),
            disk_bytes=count * _BYTES_KEPT,
            seconds=step_seconds * run.num_train_steps,
            shipped_bytes=_BYTES_SHIPPED * (count if shipped is None else shipped),
        )

    def _wave(self, batch: int, seconds: float, sample_hz: int) -> Tensor:
        return torch.randn(batch, round(seconds * sample_hz), device=self.device) * 0.1

    def _codec(self) -> StepEstimate:
        codec, run = build_codec(self.preset).to(self.device), self.preset.codec.run
        sample_hz = codec.target_sample_hz
        mel_loss = MultiScaleMelLoss(sample_hz).to(self.device)

        def loss(batch: int) -> Tensor:
            wave = self._wave(batch, run.seconds, sample_hz)
            output = codec(wave)
            return mel_loss(output.wave, rearrange(wave, "b n -> b 1 n")) + output.commitment_loss

        tokens = run.seconds * _token_hz(codec) * codec.num_quantizers
        return self._trained("codec", run, codec.parameters(), tokens, loss)

    def _semantic_tokenizer(self) -> StepEstimate:
        encoder, run = build_semantic_encoder(self.preset), self.preset.semantic_tokenizer.run
        model = BestRQ(encoder).to(self.device)
        return self._trained(
            "semantic-tokenizer",
            run,
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            run.seconds * encoder.sample_hz / encoder.downsample_factor,
            lambda batch: model(self._wave(batch, run.seconds, encoder.sample_hz)).loss,
            shipped=_count(encoder.truncated(self.preset.semantic_tokenizer.layer)),
        )

    def _mulan(self) -> StepEstimate:
        mulan, config, run = self._build_mulan().to(self.device), self.preset.mulan, self.preset.mulan.run
        captions = self.pipeline.captions

        def loss(batch: int) -> Tensor:
            texts = [captions[index % len(captions)] for index in range(batch)]
            return mulan(self._wave(batch, run.seconds, mulan.sample_hz), texts)

        # patches of 16 bands by 16 hops of 10 ms
        tokens = run.seconds * 100 / 16 * (config.num_mels / 16)
        return self._trained("mulan", run, mulan.parameters(), tokens, loss)

    @torch.no_grad()
    def _clip_seconds_of(self, *jobs: tuple[int, Callable[[Tensor], object]]) -> float:
        """Seconds to read a clip and to do something with it at given rates, the second time."""
        path = self.pipeline.train_items[0].path
        elapsed = 0.0
        for _ in range(2):
            started = time.perf_counter()
            read_audio(path)
            for sample_hz, job in jobs:
                job(self._wave(1, self.clip_seconds, sample_hz))
            elapsed = time.perf_counter() - started
        return elapsed

    def _quantizer(self) -> StepEstimate:
        mulan, num_clips = self.mulan, len(self.pipeline.train_items)
        quantizer = build_quantizer(self.preset, mulan, num_clips)
        each = 0.0
        if not self.pipeline.is_done("quantizer"):
            each = self._clip_seconds_of((mulan.sample_hz, lambda wave: mulan.window_latents(wave[0])))
        dtype = exact_dtype(mulan, torch.float16) if "mulan" in self.pipeline.pretrained else torch.float16
        stored, levels = _stored_bytes(quantizer, dtype), self.preset.quantizer.num_quantizers
        own = stored - _stored_bytes(mulan, dtype)
        return StepEstimate("quantizer", 0, num_clips * levels, stored, each * num_clips, own)

    def _tokens(self) -> StepEstimate:
        codec, tokenizer, mulan = self.codec, self.tokenizer, self.mulan
        each = 0.0
        if not self.pipeline.is_done("tokens"):
            each = self._clip_seconds_of(
                (codec.target_sample_hz, lambda wave: codec.tokenize(wave[:, None].expand(-1, codec.channels, -1))),
                (tokenizer.target_sample_hz, tokenizer),
                (mulan.sample_hz, lambda wave: mulan.window_latents(wave[0])),
            )
        per_second = _token_hz(codec) * codec.num_quantizers + _token_hz(tokenizer)
        num_tokens = round(self.num_clips * self.clip_seconds * per_second)
        windows = 1 + max(0, int((self.clip_seconds - mulan.window_seconds) / mulan.window_stride_seconds))
        disk = _SHARD_BYTES * (num_tokens + self.num_clips * windows * mulan.dim_latent)
        return StepEstimate("tokens", 0, num_tokens, disk, each * self.num_clips, 0)

    def _language_model(self, stage: str) -> StepEstimate:
        preset, config, codec, tokenizer = self.preset, getattr(self.preset, stage), self.codec, self.tokenizer
        run = config.run
        transformer = build_language_model(preset, stage, codec=codec, tokenizer=tokenizer).to(self.device)
        levels = preset.quantizer.num_quantizers
        table = nn.Embedding(levels * preset.quantizer.codebook_size, config.dim, device=self.device)
        frames = max(1, int(run.seconds * _token_hz(codec)))
        semantic_frames = max(1, int(run.seconds * _token_hz(tokenizer)))

        def loss(batch: int) -> Tensor:
            shape = (batch, frames, codec.num_quantizers)
            tokens = {
                "semantic": torch.randint(tokenizer.codebook_size, (batch, semantic_frames), device=self.device),
                "acoustic": torch.randint(codec.codebook_size, shape, device=self.device),
            }
            codes = torch.randint(table.num_embeddings, (batch, levels), device=self.device)
            mask = torch.ones(batch, levels, dtype=torch.bool, device=self.device)
            condition = Conditions(codes=ConditionTensor(table(codes), mask))
            found: Tensor = transformer(transformer.packed(AudioTokens(tokens, {})), condition).loss
            return found

        predicted = sum(stream.num_levels * float(stream.exact_hz) for stream in transformer.layout.predicted)
        parameters = [*transformer.parameters(), *table.parameters()]
        return self._trained(stage, run, parameters, run.seconds * predicted, loss, shipped=_count(transformer))


def _step_seconds(
    parameters: list[Tensor], run: RunConfig, loss_of: Callable[[int], Tensor], device: torch.device
) -> float:
    """Time of a training step on a full batch in the precision of the run, the quicker one of two."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step(batch: int) -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        float(loss.detach())  # waits for the device
        return time.perf_counter() - started

    small = min(_SMALL_BATCH, run.batch_size)
    # the very first step also pays for what is set up once
    expected = min(step(small), step(small)) * run.batch_size / small
    if expected > _LONGEST_STEP_SECONDS:
        return expected
    return min(step(run.batch_size), step(run.batch_size))


def _token_hz(tokenizer: Codec | SemanticTokenizer) -> float:
    return tokenizer.target_sample_hz / tokenizer.downsample_factor


def _stored_bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Size of a module that is saved with its numbers in a type; None = in their own."""
    weights = weights_of(module).values()
    changed = [weight if dtype is None or not weight.is_floating_point() else weight.to(dtype) for weight in weights]
    return sum(weight.numel() * weight.element_size() for weight in changed)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
