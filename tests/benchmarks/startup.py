"""Time of `musiclm generate` from process start to the written file, compared with an older work tree.

`git worktree add /tmp/old 0ca9a9c && python tests/benchmarks/startup.py --old /tmp/old`, about two minutes. Old and new
run alternately, each in a new process; the first round writes the bytecode and is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEXT = "a slow waltz on the cello"
PHASES = ("interpreter", "command line", "torch", "package", "load", "generate", "write", "  codec", "  ranking")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, default=ROOT, help="work tree of the old commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the music")
    parser.add_argument("--phases", nargs=2, help=argparse.SUPPRESS)  # used by `compare`: start of the process, file
    args = parser.parse_args()
    if args.phases:
        return print_phases(float(args.phases[0]), args.seconds, args.phases[1])
    compare({"old": args.old.resolve(), "new": ROOT}, args.rounds, str(args.seconds))


def compare(trees: dict[str, Path], rounds: int, seconds: str) -> None:
    """Print the median times of both trees, their ratio, and the phases of the new tree."""
    print(f"{seconds} s of music, 4 candidates, load {os.getloadavg()[0]:.2f} at the start")
    times, phases = [], []  # a row for each round
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/music.wav"
        command = ["-m", "musiclm_pytorch.cli", "generate", TEXT, "--seconds", seconds, "--out", out]
        for number in range(rounds + 1):
            pair = [run(tree, folder, command)[0] for tree in trees.values()]
            _, printed = run(ROOT, folder, [__file__, "--seconds", seconds, "--phases", str(time.time()), out])
            if number:
                times, phases = [*times, pair], [*phases, [float(word) for word in printed.split()[-len(PHASES) :]]]
    for name, values in zip(trees, zip(*times)):
        print(f"{name:<16}{statistics.median(values):6.2f} s, {min(values):.2f} to {max(values):.2f}")
    print(f"{'old / new':<16}{statistics.median(old / new for old, new in times):6.2f}, median of {rounds} rounds\n")
    print("phases of the new tree, with two parts of generate")
    for name, values in zip(PHASES, zip(*phases)):
        print(f"{name:<16}{statistics.median(values):6.2f} s")


def run(tree: Path, folder: str, arguments: list[str]) -> tuple[float, str]:
    """Run Python in a new process; return the seconds and what was printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(tree)
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    printed = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return time.perf_counter() - start, printed


def timed(module: Any, name: str) -> list[float]:
    """Replace a method of a module by one that appends its seconds to the returned list."""
    seconds, method = [], getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.time()
        result = method(*args, **kwargs)
        seconds.append(time.time() - start)
        return result

    setattr(module, name, call)
    return seconds


def print_phases(start: float, seconds: float, out: str) -> None:
    """Do what `musiclm generate` does, and print the seconds of each phase."""
    laps = [start, time.time()]
    for module in ("musiclm_pytorch.cli", "torch", "musiclm_pytorch.pretrained.model_folder"):
        import_module(module)
        laps.append(time.time())
    from audiolm_pytorch.audio.files import write_audio
    from musiclm_pytorch.pretrained.model_folder import load_musiclm

    musiclm: Any = load_musiclm("tiny")
    laps.append(time.time())
    parts = timed(musiclm.audio_lm.codec, "decode_from_codebook_indices"), timed(musiclm, "scores")
    wave = musiclm(TEXT, num_samples=4, seconds=seconds, seed=0)[0]
    laps.append(time.time())
    write_audio(out, wave, musiclm.sample_hz)
    laps.append(time.time())
    print(*(after - before for before, after in zip(laps, laps[1:])), *map(sum, parts))


if __name__ == "__main__":
    main()
