"""Speed of decoding and training of the stages, compared with the limits of the machine.

`python tests/benchmarks/decode.py [--threads 2] [--limit ../shared/tools/limit.py] [--json FILE]` needs three minutes
on two idle cores. It measures the three stages in float32 with dim 512, depth 6, 8 heads, feed-forward width 8/3 and
random weights, each with the flat pattern of the paper (one token per row) and with its default pattern.

- The limit of a row is the number of bytes that it reads (weights of the transformer and of the head, and earlier keys
  and values), divided by the best rate at which `limit.py` reads as many bytes, which is measured three times.
- Each row is timed, sampling included, for one item and for four items, with float32 and with bfloat16 weights. These
  alternate over five rounds. A speed is the median row of the median round, a ratio is the median of the ratios of the
  rounds: four candidates compared with one, and bfloat16 compared with float32.
- Growth compares the median row around position 200 with the one around position 2,000, and the bytes that they read.
- A training step has 4 x 256 tokens, forward, backward and AdamW. Its floating point operations are those of torch's
  counter (matrix products only, 2 per multiply-add), and are divided by the rate of the matrix product of `limit.py`.
- The bundled model is timed until the first chunk of a stream, until its end, and for `generate`.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.generation.request import GenerationRequest  # noqa: E402
from audiolm_pytorch.lm.stage_transformer import StageTransformer  # noqa: E402
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer  # noqa: E402
from musiclm_pytorch import MusicLM  # noqa: E402
from tests.helpers.decoding import decode  # noqa: E402

SIZES: dict[str, Any] = {"dim": 512, "depth": 6, "heads": 8, "ff_mult": 8 / 3}
VOCABULARY = 1024
COARSE, FINE = 4, 8
ROWS = 400  # of a timed sequence
ROUNDS = 5
EARLY, LATE, AROUND = 200, 2000, 50


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--limit", type=Path, default=ROOT.parent / "shared/tools/limit.py", help="path of limit.py")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    limits = [measured_limit(options.limit, options.threads)]
    stages = {name: stage.eval() for name, stage in build_stages().items()}
    speeds = {name: stage_results(stage) for name, stage in stages.items()}
    limits.append(measured_limit(options.limit, options.threads))
    growth = growth_results(stages["semantic"])
    training = training_results()
    limits.append(measured_limit(options.limit, options.threads))
    limit = {name: max(entry[name] for entry in limits) for name in limits[0]}
    results = {
        "machine": {"threads": options.threads, "torch": torch.__version__, "load_average": load},
        "limit": limit,
        "stages": speeds,
        "growth": growth,
        "training": training,
        "bundled": stream_results(),
    }
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def build_stages() -> dict[str, StageTransformer]:
    """The stages with the flat pattern, and the coarse and fine stage with their default pattern."""
    coarse: dict[str, Any] = {
        "num_semantic_tokens": VOCABULARY,
        "codebook_size": VOCABULARY,
        "num_coarse_quantizers": COARSE,
    }
    fine = {"codebook_size": VOCABULARY, "num_coarse_quantizers": COARSE, "num_fine_quantizers": FINE}
    return {
        "semantic": SemanticTransformer(num_semantic_tokens=VOCABULARY, **SIZES),
        "coarse, flat": CoarseTransformer(pattern="flat", **coarse, **SIZES),
        "fine, flat": FineTransformer(pattern="flat", **fine, **SIZES),
        "coarse, delayed": CoarseTransformer(pattern="delayed", **coarse, **SIZES),
        "fine, delayed": FineTransformer(pattern="delayed", **fine, **SIZES),
    }


def measured_limit(script: Path, threads: int) -> dict[str, float]:
    """Results of `limit.py`, GB/s of streamed weights and GFLOP/s of float32 products."""
    done = subprocess.run([sys.executable, str(script), str(threads)], capture_output=True, text=True, check=True)
    words = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    return {"stream_gb_s": words["stream"], "gemm_gflop_s": words["gemm_float32"]}


def stage_results(stage: StageTransformer) -> dict[str, Any]:
    """Time of a row for one item, speedups of four items and of bfloat16, and the bytes that a row reads."""
    half = copy.deepcopy(stage).bfloat16()
    variants = {"one": (stage, 1), "four": (stage, 4), "half_one": (half, 1), "half_four": (half, 4)}
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):  # alternate, so that a temporarily slow machine affects all of them
        times = {name: row_times(model, batch, ROWS) for name, (model, batch) in variants.items()}
        rounds.append({name: 1e3 * statistics.median(rows) for name, rows in times.items()})
    num_rows = len(times["one"])
    return {
        "row_ms": statistics.median(entry["one"] for entry in rounds),
        "four": statistics.median(4 * entry["one"] / entry["four"] for entry in rounds),
        "half": statistics.median(entry["one"] / entry["half_one"] for entry in rounds),
        "half_four": statistics.median(entry["four"] / entry["half_four"] for entry in rounds),
        "rounds_ms": rounds,
        "bytes": statistics.mean(bytes_read(stage, position) for position in range(ROWS - num_rows, ROWS)),
        "tokens_a_row": 1 if is_flat(stage) else sum(stream.num_levels for stream in stage.layout.predicted),
    }


def growth_results(stage: StageTransformer) -> dict[str, float]:
    """Median time of the rows around position 200 and around position 2,000."""
    times = row_times(stage, 1, LATE + AROUND)
    first = LATE + AROUND - len(times)
    early, late = (
        statistics.median(times[position - first - AROUND : position - first + AROUND]) for position in (EARLY, LATE)
    )
    return {
        "early_ms": 1e3 * early,
        "late_ms": 1e3 * late,
        "bytes_ratio": bytes_read(stage, LATE) / bytes_read(stage, EARLY),
    }


def is_flat(stage: StageTransformer) -> bool:
    """Whether a row is a single token. The semantic stage has one level, so that its pattern has no effect."""
    return stage.layout.pattern == "flat"


def row_times(stage: StageTransformer, batch: int, num_rows: int) -> list[float]:
    """Seconds of each row after the first, up to row `num_rows`."""
    frames = num_frames(stage, num_rows)
    streams = {
        stream.name: torch.randint(0, stream.vocab_size, (batch, count, stream.num_levels))
        for stream, count in zip(stage.layout.streams, frames)
        if stream.is_input
    }
    target = stage.layout.predicted[0].name
    ends: list[float] = []
    decode(
        stage,
        streams,
        {target: frames[-1]},
        batch_size=batch,
        seeds=list(range(batch)),
        callback=lambda done, wanted: ends.append(time.perf_counter()),
    )
    return [later - earlier for earlier, later in zip(ends, ends[1:])]


def num_frames(stage: StageTransformer, num_rows: int) -> list[int]:
    """Frames of every stream, in the ratio of the rates, of a sequence of about `num_rows` rows."""
    target = stage.layout.predicted[0]
    ratios = [stream.exact_hz / target.exact_hz for stream in stage.layout.streams]
    rows_a_frame = sum(r * s.num_levels for r, s in zip(ratios, stage.layout.streams)) if is_flat(stage) else 1
    frames = int(num_rows / rows_a_frame) // 2 * 2
    return [int(frames * ratio) for ratio in ratios]


def bytes_read(stage: StageTransformer, position: int) -> float:
    """Bytes of float32 weights and cache that one row at `position` reads."""
    stack = sum(parameter.numel() for parameter in stage.transformer.parameters())
    heads = [weight.numel() for weight in stage.heads.parameters()]
    head = heads[0] if is_flat(stage) else sum(heads)
    stack_of_cache = 2 * stage.transformer.depth * stage.transformer.kv_heads * stage.transformer.dim_head
    return 4.0 * (stack + head + stack_of_cache * position)


def training_results() -> dict[str, float]:
    """Seconds and GFLOP of a training step of 4 x 256 tokens."""
    stage = SemanticTransformer(num_semantic_tokens=VOCABULARY, eos=False, **SIZES).train()
    packed = stage.layout.pack({"semantic": torch.randint(0, VOCABULARY, (4, 256, 1))})
    optimizer = torch.optim.AdamW(stage.parameters())

    def step() -> Tensor:
        loss: Tensor = stage(packed).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    with FlopCounterMode(display=False) as counter:
        step()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "gflop": counter.get_total_flops() / 1e9}


def stream_results() -> dict[str, dict[str, float]]:
    """Seconds of the bundled model to the first chunk of a stream, to its end, and of `generate`."""
    audio_lm = MusicLM.from_pretrained("tiny").audio_lm
    audio_lm.generate(GenerationRequest(seconds=1, seeds=0))  # warm-up
    results = {}
    for seconds in (10, 60):
        request = GenerationRequest(seconds=seconds, seeds=0)
        start = time.perf_counter()
        ends = [time.perf_counter() - start for _ in audio_lm.stream(request)]
        start = time.perf_counter()
        audio_lm.generate(request)
        results[f"{seconds} s"] = {"first": ends[0], "stream": ends[-1], "generate": time.perf_counter() - start}
    return results


def table(results: dict[str, Any]) -> str:
    """All results as text."""
    limit, machine = results["limit"], results["machine"]
    lines = [
        f"{machine['threads']} threads, torch {machine['torch']}, load {machine['load_average']:.2f} at the start",
        f"limit.py: {limit['stream_gb_s']:.1f} GB/s of weights, {limit['gemm_gflop_s']:.0f} GFLOP/s in float32",
        "",
        row("stage", ("tokens/s", "limit", "of limit", "four, x", "bf16, x", "four bf16, x")),
    ]
    for name, entry in results["stages"].items():
        possible = limit["stream_gb_s"] * 1e9 / entry["bytes"]
        rows_a_second = 1e3 / entry["row_ms"]
        cells = (
            f"{rows_a_second * entry['tokens_a_row']:.0f}",
            f"{possible * entry['tokens_a_row']:.0f}",
            f"{rows_a_second / possible:.0%}",
            f"{entry['four']:.2f}",
            f"{entry['half']:.2f}",
            f"{entry['half_four']:.2f}",
        )
        lines.append(row(name, cells))
    growth, training = results["growth"], results["training"]
    grown = growth["late_ms"] / growth["early_ms"]
    rate = training["gflop"] / training["seconds"]
    return "\n".join(
        [
            *lines,
            "",
            f"semantic, a row at {EARLY}: {growth['early_ms']:.2f} ms, at {LATE}: {growth['late_ms']:.2f} ms: "
            f"x {grown:.2f}, bytes x {growth['bytes_ratio']:.2f}",
            f"training step, 4 x 256: {training['seconds']:.3f} s, {training['gflop']:.1f} GFLOP, {rate:.0f} GFLOP/s, "
            f"{rate / limit['gemm_gflop_s']:.0%} of the matrix product",
            *(
                f"bundled model, {length}: first chunk of a stream after {entry['first']:.2f} s, all after "
                f"{entry['stream']:.1f} s; generate {entry['generate']:.1f} s"
                for length, entry in results["bundled"].items()
            ),
        ]
    )


def row(name: str, cells: Sequence[str]) -> str:
    """One line of the table."""
    return f"{name:16}" + "".join(f"{cell:>14}" for cell in cells)


if __name__ == "__main__":
    main()
