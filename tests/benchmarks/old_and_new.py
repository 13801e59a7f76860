"""Speed of this work tree compared with an older commit, in the same run.

`git worktree add ../old 0ca9a9c && python tests/benchmarks/old_and_new.py --old ../old` needs ten minutes on two idle
cores. Each measure runs in a fresh process for each tree, and both trees alternate for five rounds. The table has the
medians and the median of the ratios. On a busy machine, one core can be measured with real-time priority:
`chrt -r 1 taskset -c 1 python tests/benchmarks/old_and_new.py --old ../old --threads 1 --rounds 3`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure both trees, or run one measure of the tree in PYTHONPATH."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="work tree of the older commit")
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES), help="measures to run")
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="threads of torch instead of those of each measure")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.measure:
        print(*(f"{name}={value}" for name, value in MEASURES[options.measure][0]().items()))
        return
    if options.old is None:
        parser.error("pass the work tree of the older commit with --old")
    print(f"load {os.getloadavg()[0]:.2f} at the start")
    for name in options.only:
        trees, threads = (options.old.resolve(), ROOT), options.threads or MEASURES[name][1]
        rounds = [[run(name, tree, threads) for tree in trees] for _ in range(options.rounds)]
        for key in rounds[0][0]:
            old, new = (statistics.median(entry[tree][key] for entry in rounds) for tree in (0, 1))
            ratio = statistics.median(entry[0][key] / entry[1][key] for entry in rounds)
            print(f"{name:12} {key:32} old {old:10.3f}   new {new:10.3f}   old / new {ratio:6.2f}", flush=True)


def run(measure: str, tree: Path, threads: int) -> dict[str, float]:
    """Run one measure with the packages of a tree in a fresh process, with cached bytecode."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": "/tmp/old_and_new_bytecode"}
    command = [sys.executable, __file__, "--measure", measure]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measure {measure} of {tree} failed:\n{done.stderr}")
    return {key: float(value) for key, value in (word.split("=") for word in done.stdout.splitlines()[-1].split())}


def decode_rows() -> dict[str, float]:
    """Milliseconds of the median row of the bundled stages, and operator calls of a row of the semantic stage."""
    import torch

    from musiclm_pytorch import MusicLM

    stages, results = MusicLM.from_pretrained("tiny").audio_lm.stages, {}
    for name, frames in (("semantic", 125), ("coarse", 250), ("fine", 100)):
        stage: Any = transformer_of(stages[name])
        for batch in (1, 4):
            best = []
            for _ in range(3):
                ends: list[float] = []
                session_of(stage, batch, frames, lambda *_, ends=ends: ends.append(time.perf_counter())).advance()
                best.append(statistics.median(later - earlier for earlier, later in zip(ends, ends[1:])))
            results[f"{name}_batch_{batch}_ms"] = 1e3 * min(best)
    stage = transformer_of(stages["semantic"])
    session = session_of(stage, 1, 125, None)
    session.advance(20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        session.advance(60)
    results["semantic_operator_calls"] = sum(event.count for event in profile.key_averages()) / 40
    return results


def transformer_of(stage: Any) -> Any:
    """The language model of a stage; the old commit wraps it."""
    return stage if hasattr(stage, "layout") else stage.transformer


def session_of(stage: Any, batch: int, frames: int, callback: Callable[..., object] | None) -> Any:
    """Create the decode session of a stage with random inputs, in both trees."""
    import torch

    try:
        from audiolm_pytorch.generation.decode_session import DecodeSession
    except ImportError:
        from audiolm_pytorch.stages.decoding import Decoding as DecodeSession
    inputs = stage.layout.inputs if hasattr(stage.layout, "inputs") else stage.layout.given
    target = stage.layout.predicted[0]
    streams = {
        stream.name: torch.randint(
            0, stream.vocab_size, (batch, int(frames * stream.rate_hz / target.rate_hz), stream.num_levels)
        )
        for stream in inputs
    }
    return DecodeSession(
        stage, streams, {target.name: frames}, batch_size=batch, seeds=list(range(batch)), callback=callback
    )


def generate() -> dict[str, float]:
    """Seconds of 5 s of music from a text, the best of four candidates, after loading and a warm-up."""
    from musiclm_pytorch import MusicLM

    musiclm, times = MusicLM.from_pretrained("tiny"), []
    for seed in range(4):
        start = time.perf_counter()
        musiclm("a calm piano waltz", num_samples=4, seconds=5, seed=seed)
        times.append(time.perf_counter() - start)
    return {"four_candidates_5_s": statistics.median(times[1:])}


def train_float32() -> dict[str, float]:
    """A float32 training step of 4 x 256 tokens, dim 512, depth 6."""
    from audiolm_pytorch import SemanticTransformer

    sizes: dict[str, Any] = {"dim": 512, "depth": 6, "heads": 8, "ff_mult": 8 / 3}
    stage = SemanticTransformer(num_semantic_tokens=1024, eos=False, **sizes)
    return training_step(stage, {"semantic": (4, 256, 1)}, bfloat16=False)


def train_bfloat16() -> dict[str, float]:
    """A training step of a stage of the sizes of the bundled coarse stage, 16 x 250 rows, in bfloat16 autocast."""
    from audiolm_pytorch import CoarseTransformer

    sizes: dict[str, Any] = {"dim": 192, "depth": 6, "heads": 3, "dropout": 0.1, "num_coarse_quantizers": 2}
    stage = CoarseTransformer(num_semantic_tokens=1024, codebook_size=1024, **sizes)
    return training_step(stage, {"semantic": (16, 125, 1), "coarse": (16, 250, 2)}, bfloat16=True)


def training_step(stage: Any, shapes: dict[str, tuple[int, ...]], bfloat16: bool) -> dict[str, float]:
    """Seconds and peak memory of a step: forward and backward pass and AdamW."""
    import torch

    torch.manual_seed(0)
    stage.train()
    packed = stage.layout.pack({name: torch.randint(0, 1024, shape) for name, shape in shapes.items()})
    optimizer, times = torch.optim.AdamW(stage.parameters()), []
    for _ in range(8):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = stage(packed).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step_seconds": statistics.median(times[1:]), "peak_mb": peak_mb}


def startup() -> dict[str, float]:
    """Seconds of `musiclm generate` from process start to the written file, for 5 s of music with four candidates."""
    command = [sys.executable, "-m", "musiclm_pytorch.cli", "generate", "a calm piano waltz"]
    start = time.perf_counter()
    subprocess.run([*command, "--out", "/tmp/startup.wav", "--seed", "0"], check=True, capture_output=True)
    return {"generate_to_file": time.perf_counter() - start}


# By name: the measure and its number of threads.
MEASURES: dict[str, tuple[Callable[[], dict[str, float]], int]] = {
    "rows": (decode_rows, 2),
    "generate": (generate, 2),
    "startup": (startup, 2),
    "float32": (train_float32, 2),
    "bfloat16": (train_bfloat16, 1),
}

if __name__ == "__main__":
    main()
