"""How near decoding and training of the stages come to what the machine allows.

`python tests/benchmarks/decode.py [--threads 2] [--limit ../shared/tools/limit.py] [--json FILE]`, three minutes
on two idle cores. The three stages at dim 512, depth 6, 8 heads, float32, feed-forward 8/3 wide, random weights (which
no figure here depends on), every stage flat, a token a row, as in the paper, and in its default pattern.

- Limit at a position: bytes that a row has to read there (weights of the stack and of the head, keys and values so far)
  at the rate of `limit.py`'s matrix-vector products, which is measured before, between and after, the best counting.
  It can be passed: that script's product reads a single row's weights on one core, ours (`layers.Projection`) on all.
- Rows are timed one by one, sampling and all. One item, four, and both with half weights take turns, five rounds; a
  speed is that of the median row of the median round, a ratio the median of the rounds' own.
- Growth: median row around position 200 and around 2,000, beside the bytes read there.
- Training: 4 x 256 tokens, forward, backward and AdamW, in floating point operations as torch's own counter finds them
  (matrix products alone: 2 a multiply-add, backward twice forward), over the rate of `limit.py`'s product of matrices.
- The bundled model: when the first sound of a stream comes, and how much faster than real time all of it.
"""

import argparse
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

from audiolm_pytorch.lm.stage_transformer import StageTransformer  # noqa: E402
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer  # noqa: E402
from audiolm_pytorch.nn.half_weights import with_half_weights  # noqa: E402
from musiclm_pytorch import load_musiclm  # noqa: E402
from tests.helpers.decoding import decode  # noqa: E402

SIZES: dict[str, Any] = {"dim": 512, "depth": 6, "heads": 8, "ff_mult": 8 / 3}
VOCABULARY = 1024
COARSE, FINE = 4, 8
ROWS = 400  # of a decoding whose speed is told
ROUNDS = 5
EARLY, LATE, AROUND = 200, 2000, 50


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--limit", type=Path, default=ROOT.parent / "shared/tools/limit.py", help="path of limit.py")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    limits = [measured_limit(options.limit, options.threads)]
    stages = {name: stage.eval() for name, stage in build_stages().items()}
    speeds = {name: stage_figures(stage) for name, stage in stages.items()}
    limits.append(measured_limit(options.limit, options.threads))
    growth = growth_figures(stages["semantic"])
    training = training_figures()
    limits.append(measured_limit(options.limit, options.threads))
    limit = {name: max(one[name] for one in limits) for name in limits[0]}
    figures = {
        "machine": {"threads": options.threads, "torch": torch.__version__, "load_average": load},
        "limit": limit,
        "stages": speeds,
        "growth": growth,
        "training": training,
        "bundled": stream_figures(),
    }
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def build_stages() -> dict[str, StageTransformer]:
    """The stages of the paper, flat, and coarse and fine as they are by default."""
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
    """What `limit.py` says: GB/s of streaming weights, GFLOP/s of float32 products."""
    done = subprocess.run([sys.executable, str(script), str(threads)], capture_output=True, text=True, check=True)
    words = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    return {"stream_gb_s": words["stream"], "gemm_gflop_s": words["gemm_float32"]}


def stage_figures(stage: StageTransformer) -> dict[str, Any]:
    """Rows a second alone, four candidates at a time, and with half weights; and the bytes that a row reads."""
    half = with_half_weights(stage)
    sides = {"one": (stage, 1), "four": (stage, 4), "half_one": (half, 1), "half_four": (half, 4)}
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):  # the sides take turns, so that a machine that is slower for a while slows all of them
        times = {name: row_times(model, batch, ROWS) for name, (model, batch) in sides.items()}
        rounds.append({name: 1e3 * statistics.median(rows) for name, rows in times.items()})
    num_rows = len(times["one"])
    return {
        "row_ms": statistics.median(one["one"] for one in rounds),
        "four": statistics.median(4 * one["one"] / one["four"] for one in rounds),
        "half": statistics.median(one["one"] / one["half_one"] for one in rounds),
        "half_four": statistics.median(4 * one["one"] / one["half_four"] for one in rounds),
        "rounds_ms": rounds,
        "bytes": statistics.mean(bytes_read(stage, position) for position in range(ROWS - num_rows, ROWS)),
        "tokens_a_row": 1 if is_flat(stage) else sum(stream.num_levels for stream in stage.layout.predicted),
    }


def growth_figures(stage: StageTransformer) -> dict[str, float]:
    """The median row around position 200 and around 2,000."""
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
    """Whether a row is a single token; the semantic stage has one level, so its pattern does not matter."""
    return stage.layout.pattern == "flat"


def row_times(stage: StageTransformer, batch: int, num_rows: int) -> list[float]:
    """Seconds of each row after the first of a decoding that ends at row `num_rows`."""
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
    """Frames of every stream, as its rates ask for, of a sequence of about so many rows."""
    target = stage.layout.predicted[0]
    ratios = [stream.exact_hz / target.exact_hz for stream in stage.layout.streams]
    rows_a_frame = sum(r * s.num_levels for r, s in zip(ratios, stage.layout.streams)) if is_flat(stage) else 1
    frames = int(num_rows / rows_a_frame) // 2 * 2
    return [int(frames * ratio) for ratio in ratios]


def bytes_read(stage: StageTransformer, position: int) -> float:
    """Bytes of weights and cache that one row at a position reads, in float32."""
    stack = sum(parameter.numel() for parameter in stage.transformer.parameters())
    heads = [weight.numel() for weight in stage.heads.parameters()]
    head = heads[0] if is_flat(stage) else sum(heads)
    stack_of_cache = 2 * stage.transformer.depth * stage.transformer.kv_heads * stage.transformer.dim_head
    return 4.0 * (stack + head + stack_of_cache * position)


def training_figures() -> dict[str, float]:
    """Seconds of a training step of 4 x 256 tokens, and its floating point operations."""
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


def stream_figures() -> dict[str, dict[str, float]]:
    """Seconds to the first sound of a stream of the bundled model, to its end, and of generating at one go."""
    audio_lm = load_musiclm("tiny").audio_lm
    audio_lm.generate(seconds=1, seeds=0)  # what is done once is not counted
    figures = {}
    for seconds in (10, 60):
        start = time.perf_counter()
        ends = [time.perf_counter() - start for _ in audio_lm.stream(seconds=seconds, seeds=0)]
        start = time.perf_counter()
        audio_lm.generate(seconds=seconds, seeds=0)
        figures[f"{seconds} s"] = {"first": ends[0], "stream": ends[-1], "generate": time.perf_counter() - start}
    return figures


def table(figures: dict[str, Any]) -> str:
    """All figures in words."""
    limit, machine = figures["limit"], figures["machine"]
    lines = [
        f"{machine['threads']} threads, torch {machine['torch']}, load {machine['load_average']:.2f} at the start",
        f"limit.py: {limit['stream_gb_s']:.1f} GB/s of weights, {limit['gemm_gflop_s']:.0f} GFLOP/s in float32",
        "",
        row("stage", ("tokens/s", "limit", "of limit", "four, x", "bf16, x", "four bf16, x")),
    ]
    for name, one in figures["stages"].items():
        possible = limit["stream_gb_s"] * 1e9 / one["bytes"]
        rows_a_second = 1e3 / one["row_ms"]
        cells = (
            f"{rows_a_second * one['tokens_a_row']:.0f}",
            f"{possible * one['tokens_a_row']:.0f}",
            f"{rows_a_second / possible:.0%}",
            f"{one['four']:.2f}",
            f"{one['half']:.2f}",
            f"{one['half_four']:.2f}",
        )
        lines.append(row(name, cells))
    growth, training = figures["growth"], figures["training"]
    grown = growth["late_ms"] / growth["early_ms"]
    rate = training["gflop"] / training["seconds"]
    return "\n".join(
        [
            *lines,
            "",
            f"semantic, a row at {EARLY}: {growth['early_ms']:.2f} ms, at {LATE}: {growth['late_ms']:.2f} ms: "
            f"x {grown:.2f}, the bytes it reads x {growth['bytes_ratio']:.2f}",
            f"training step, 4 x 256: {training['seconds']:.3f} s, {training['gflop']:.1f} GFLOP, {rate:.0f} GFLOP/s, "
            f"{rate / limit['gemm_gflop_s']:.0%} of the product of matrices",
            *(
                f"bundled model, {length}: first sound of a stream after {one['first']:.2f} s, all after "
                f"{one['stream']:.1f} s; generate {one['generate']:.1f} s"
                for length, one in figures["bundled"].items()
            ),
        ]
    )


def row(name: str, cells: Sequence[str]) -> str:
    """A line of the table."""
    return f"{name:16}" + "".join(f"{cell:>14}" for cell in cells)


if __name__ == "__main__":
    main()
