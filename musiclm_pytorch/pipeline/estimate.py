"""`musiclm train --dry-run`: estimates of parameters, tokens, disk space and time of a training run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.training.distributed import to_device
from musiclm_pytorch.pipeline.builders import STAGES, build_codec, build_mulan, build_semantic_tokenizer, build_stage
from musiclm_pytorch.pipeline.pipeline import STEPS, Pipeline, check_step
from musiclm_pytorch.pipeline.trainers import NUM_VALIDATIONS, codec_trainer, mulan_trainer, semantic_tokenizer_trainer

__all__ = ["StepEstimate", "estimate", "estimate_steps"]

# Largest size of a timed batch. The time of a training step is in proportion.
_MAX_CROPS, _MAX_CROP_SECONDS = 4, 2.0
# For a trained parameter: weights and two moments of AdamW, twice the final weights, and twice as float16.
_BYTES_PER_PARAMETER = 12 + 8 + 4
_BYTES_PER_TOKEN = 2


@dataclass(frozen=True)
class StepEstimate:
    """Estimated cost of one pipeline step; a finished or pretrained step needs no time."""

    step: str
    num_parameters: int = 0
    num_tokens: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0


@beartype
def estimate(pipeline: Pipeline, step: str = "all") -> str:
    """Estimate the cost of one pipeline step, or of all steps, and return a table as text."""
    rows = estimate_steps(pipeline, step)
    totals = {name: sum(getattr(row, name) for row in rows) for name in vars(rows[0]) if name != "step"}
    lines = [f"{'step':20}{'parameters':>12}{'tokens':>15}{'disk':>14}{'time':>12}"]
    for row in [*rows, StepEstimate("total", **totals)]:
        duration = f"{row.seconds / 60:,.1f} min" if row.seconds >= 60 else f"{row.seconds:.1f} s"
        if row.step in STEPS and pipeline.is_done(row.step):
            duration = "done"
        elif row.step in pipeline.pretrained:
            duration = "pretrained"
        disk = f"{row.disk_bytes / 1e6:,.1f} MB"
        lines.append(f"{row.step:20}{row.num_parameters:12,}{row.num_tokens:15,}{disk:>14}{duration:>12}")
    files = f"{len(pipeline.train_items):,} training and {len(pipeline.valid_items):,} held-out files"
    lines.append(f"{files}; times on {pipeline.accelerator.device} with {torch.get_num_threads()} threads")
    return "\n".join(lines)


@beartype
def estimate_steps(pipeline: Pipeline, step: str = "all") -> list[StepEstimate]:
    """Estimate the cost of one pipeline step, or of all steps, from a few timed training steps; no file is written."""
    check_step(step)
    with preserve_rng():
        probe = _Probe(pipeline)
        return [probe.estimate(name) for name in (STEPS if step == "all" else [step])]


class _Probe:
    """Estimates the cost of pipeline steps, with untrained modules where no pretrained module was passed."""

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
        run, crop_seconds = config.run, min(config.run.seconds, _MAX_CROP_SECONDS)
        num_crops = min(run.batch_size, _MAX_CROPS)
        shortened = replace(config, run=replace(run, seconds=crop_seconds))
        build = self._stage if step in STAGES else self._tokenizer_or_mulan
        module, token_hz, loss = build(step, shortened, num_crops)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)

        def train_step() -> None:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            value.item()  # waits for the device

        @torch.no_grad()
        def validate() -> None:
            loss().item()

        num_parameters = sum(parameter.numel() for parameter in parameters)
        total_seconds = run.num_train_steps * run.batch_size * run.seconds
        valid_seconds = NUM_VALIDATIONS * len(self.pipeline.valid_items) * run.seconds
        timed_seconds = num_crops * crop_seconds
        seconds = self._seconds(step, train_step) * total_seconds / timed_seconds
        seconds += self._seconds(step, validate) * valid_seconds / timed_seconds
        num_tokens = round(total_seconds * token_hz)
        return StepEstimate(step, num_parameters, num_tokens, num_parameters * _BYTES_PER_PARAMETER, seconds)

    def _tokenizer_or_mulan(self, step: str, config: Any, num_crops: int) -> tuple[nn.Module, float, Any]:
        """Build the module of a step; also return the tokens per second of audio and a function to compute a loss."""
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
        task = trainer.task
        task.module.to(self.device)
        indices = [(0, index % task.num_items) for index in range(num_crops)]
        return task.module, token_hz, lambda: task.phases[0].loss(to_device(task.batch(indices), self.device), 0).loss

    def _stage(self, step: str, config: Any, num_crops: int) -> tuple[nn.Module, float, Any]:
        """Build a language model; also return the tokens per second of audio and a function to compute a loss."""
        codec, tokenizer, device, seconds = self.codec, self.tokenizer, self.device, config.run.seconds
        transformer = build_stage(self.preset, step, codec=codec, tokenizer=tokenizer).to(device)
        semantic = (num_crops, max(1, int(seconds * _frame_hz(tokenizer))))
        acoustic = (num_crops, max(1, int(seconds * _frame_hz(codec))), codec.num_quantizers)
        tokens = {
            "semantic": torch.randint(tokenizer.codebook_size, semantic, device=device),
            "acoustic": torch.randint(codec.codebook_size, acoustic, device=device),
        }
        embeddings = torch.randn(num_crops, self.preset.quantizer.num_quantizers, config.dim, device=device)
        conditions = {"codes": ConditionTensor.of(embeddings)}
        token_hz = sum(stream.num_levels * float(stream.exact_hz) for stream in transformer.layout.predicted)
        return transformer, token_hz, lambda: transformer(transformer.packed(AudioTokens(tokens, {})), conditions).loss

    @torch.no_grad()
    def _encoding(self, step: str) -> StepEstimate:
        """Estimate the cost of a step that encodes every audio file once."""
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

        seconds = self._seconds(step, encode) * total_seconds / crop_seconds
        if step == "quantizer":
            # a quantizer holds its MuLaN, which is far larger than the codebooks
            return StepEstimate(step, 0, len(items) * self.preset.quantizer.num_quantizers, _num_bytes(mulan), seconds)
        num_tokens = round(total_seconds * (_frame_hz(codec) * codec.num_quantizers + _frame_hz(tokenizer)))
        num_windows = len(items) + total_seconds / mulan.window_stride_seconds
        disk_bytes = round(_BYTES_PER_TOKEN * (num_tokens + num_windows * mulan.dim_latent))
        return StepEstimate(step, 0, num_tokens, disk_bytes, seconds)

    def _seconds(self, step: str, work: Callable[[], None]) -> float:
        """Call `work` three times and return the shortest duration in seconds; return 0 if `step` is finished."""
        if self.pipeline.is_done(step):
            return 0.0
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)


def _frame_hz(tokenizer: Any) -> float:
    return tokenizer.target_sample_hz / tokenizer.downsample_factor


def _num_bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.state_dict().values())
