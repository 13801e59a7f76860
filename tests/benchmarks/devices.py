"""Tokens per second of training and decoding on a GPU, for the language models of the presets `small` and `paper`.

`python tests/benchmarks/devices.py [--presets small paper] [--stages semantic] [--batch 8] [--seconds 10]` needs some
minutes on a GPU. `--depth 1 --presets tiny --seconds 0.5 --batch 2 --steps 2` tries it on a CPU. A training
step is forward, backward and AdamW in bfloat16 autocast, plain and with compiled blocks. Decoding has a batch of
`--batch` items with float32 and with bfloat16 weights. `pytest -m gpu` runs the tests that need a GPU.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.conditioning.base import ConditionTensor  # noqa: E402
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer  # noqa: E402
from audiolm_pytorch.training import LoopSettings  # noqa: E402
from audiolm_pytorch.training.blocks import block_settings  # noqa: E402
from audiolm_pytorch.training.precision import autocast  # noqa: E402
from musiclm_pytorch.pipeline.builders import build_codec, build_semantic_tokenizer, build_stage  # noqa: E402
from musiclm_pytorch.pipeline.presets import PRESETS, Preset  # noqa: E402
from tests.helpers.decoding import decode  # noqa: E402


def main() -> None:
    """Measure and print one line for each stage and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "paper"], choices=PRESETS)
    parser.add_argument("--stages", nargs="+", default=["semantic", "coarse", "fine"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in a crop and in a decoding")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--depth", type=int, help="layers, instead of those of the preset")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    results: list[dict[str, Any]] = []
    for name in options.presets:
        for stage_name in options.stages:
            stage, tokens = stage_of(PRESETS[name], stage_name, options)
            about, num_before = {"preset": name, "stage": stage_name}, len(results)
            for compiled in (False,) if options.no_compile else (False, True):
                speed, memory = training_speed(stage, tokens, options, compiled)
                results.append({**about, "work": f"training, bf16{', compiled' * compiled}", **speed, **memory})
            for dtype in (torch.float32, torch.bfloat16):
                speed = decoding_speed(copy.deepcopy(stage).to(dtype), tokens, options)
                results.append({**about, "work": f"decoding, {str(dtype).removeprefix('torch.')}", **speed})
            for row in results[num_before:]:
                print("  ".join(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def stage_of(preset: Preset, name: str, options: Any) -> tuple[StageTransformer, AudioTokens]:
    """Build a stage with random weights, and random tokens for it."""
    depth = options.depth or getattr(preset, name).depth
    preset = replace(preset, **{name: replace(getattr(preset, name), depth=depth, dropout=0.0)})
    shallow = replace(preset, semantic_tokenizer=replace(preset.semantic_tokenizer, depth=1, layer=1))
    codec, tokenizer = build_codec(preset), build_semantic_tokenizer(shallow)
    torch.manual_seed(0)
    stage = build_stage(preset, name, codec=codec, tokenizer=tokenizer).to(options.device)
    frames = {one: max(1, int(options.seconds * part.target_sample_hz / part.downsample_factor))
              for one, part in {"semantic": tokenizer, "acoustic": codec}.items()}  # fmt: skip
    ids = {
        "semantic": torch.randint(tokenizer.codebook_size, (options.batch, frames["semantic"])),
        "acoustic": torch.randint(codec.codebook_size, (options.batch, frames["acoustic"], codec.num_quantizers)),
    }
    return stage, AudioTokens({kind: part.to(options.device) for kind, part in ids.items()}, {})


def training_speed(
    stage: StageTransformer, tokens: AudioTokens, options: Any, compiled: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Return predicted tokens per second of training, and the peak memory in GB on a GPU."""
    device = torch.device(options.device)
    settings = LoopSettings(num_train_steps=1, batch_size=1, compile=compiled)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-6, fused=True)
    codes = torch.randn(options.batch, stage.null_tokens, stage.cond_dim or stage.transformer.dim, device=device)
    packed = stage.packed(tokens)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        with autocast("bf16", device):
            loss = stage(packed, {"codes": ConditionTensor.of(codes)}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with block_settings(stage.train(), settings):
        seconds = seconds_per_call(step, options.steps, device)
    memory = {"GB": torch.cuda.max_memory_allocated() / 1e9} if is_cuda else {}
    return {"tokens/s": float(packed.loss_mask.sum()) / seconds}, memory


def decoding_speed(stage: StageTransformer, tokens: AudioTokens, options: Any) -> dict[str, float]:
    """Return decoded tokens per second of a batch; the first frame and all input streams are given."""
    streams = stage.eval().streams_of(tokens)[0]
    lengths = {stream.name: streams[stream.name].shape[1] for stream in stage.layout.streams}
    predicted = {stream.name for stream in stage.layout.predicted}
    prompt = {name: ids[:, :1] if name in predicted else ids for name, ids in streams.items()}
    seeds = list(range(options.batch))
    decode_all = lambda: decode(stage, prompt, lengths, seeds=seeds)  # noqa: E731
    seconds = seconds_per_call(decode_all, 1, torch.device(options.device))
    num_tokens = sum((lengths[one.name] - 1) * one.num_levels for one in stage.layout.predicted) * options.batch
    return {"tokens/s": num_tokens / seconds}


def seconds_per_call(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the median duration of a call, after two calls for warming up."""
    seconds = []
    for _ in range(2 + count):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
