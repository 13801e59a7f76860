"""Folders of short sounds with broken files of ten kinds, and the memory of a training on them.

`python -m tests.helpers.broken_files 10000 2000` writes 10,000 files, 1% of them broken, trains the micro codec for
2,000 steps, and prints how often each broken file is listed and the memory of the process along the way.
"""

import io
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from audiolm_pytorch.data.manifest import load_split
from musiclm_pytorch.pipeline.trainers import codec_trainer
from tests.helpers.micro import MICRO

HZ = 16000
_SUFFIXES = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}


def _sound(seed: int, name: str = "WAV", num_samples: int = HZ // 2, **options: Any) -> bytes:
    data = io.BytesIO()
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, num_samples)
    soundfile.write(data, wave, HZ, format=name, **options)
    return data.getvalue()


def _one_hertz() -> bytes:
    data = bytearray(_sound(0))
    data[24:28] = (1).to_bytes(4, "little")
    return bytes(data)


def _not_a_number() -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.full(HZ // 2, np.nan), HZ, format="WAV", subtype="FLOAT")
    return data.getvalue()


def broken() -> dict[str, bytes]:
    """Ten kinds of broken files by name."""
    return {
        "empty.wav": b"",
        "text.wav": b"a text " * 100,
        "page.mp3": b"<!doctype html><html>404 not found</html>",
        "cut.flac": _sound(1, "FLAC")[:3000],
        "header.wav": _sound(2)[:44],
        "zeros.ogg": bytes(5000),
        "tag.mp3": b"ID3\x04\0\0\0\0\x02\0" + bytes(256),
        "nan.wav": _not_a_number(),
        "one_hertz.wav": _one_hertz(),
        "video.wav": b"\0\0\0\x20ftypM4A " + bytes(2000),
    }


def write_files(folder: Path, num_files: int, num_broken: int) -> set[str]:
    """Write files of four formats, and return the names of the broken ones."""
    folder.mkdir(parents=True)
    kinds = list(broken().items())
    step = num_files // num_broken
    names = set()
    for number in range(num_files):
        if number % step == 0 and len(names) < num_broken:
            name, data = kinds[len(names) % len(kinds)]
            path = folder / f"{number:05d}_{name}"
            names.add(path.name)
        else:
            suffix = list(_SUFFIXES)[number % len(_SUFFIXES)]
            path, data = folder / f"{number:05d}.{suffix}", _sound(number, _SUFFIXES[suffix])
        path.write_bytes(data)
    return names


def private_megabytes() -> float:
    """Memory of this process that is not shared; the cache of decoded files is shared with workers."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def train(folder: Path, results: Path, steps: int, every: int) -> list[float]:
    """Train the micro codec on a folder; return the memory in MB every so many steps."""
    run = replace(MICRO.codec.run, num_train_steps=steps, checkpoint_every_steps=steps // 2)
    preset = replace(MICRO, codec=replace(MICRO.codec, run=run))
    trainer = codec_trainer(preset, load_split(folder), results_folder=results)
    memory: list[float] = []
    num_steps = 0

    def count(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps % every == 0:
            memory.append(private_megabytes())

    hook = register_optimizer_step_post_hook(count)
    try:
        trainer.train()
    finally:
        hook.remove()
    return memory


def _main(num_files: int, steps: int) -> None:
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="broken"))
    logging.basicConfig(filename=root / "log", level=logging.WARNING)
    names = write_files(root / "data", num_files, num_files // 100)
    started = time.monotonic()
    load_split(root / "data")
    print(f"{num_files} files listed in {time.monotonic() - started:.1f} s", flush=True)
    text = (root / "log").read_text()
    counts = [text.count(f"/{name} (") for name in names]
    print(
        f"{len(names)} broken files of {len(broken())} kinds, listed {min(counts)} to {max(counts)} times", flush=True
    )
    memory = train(root / "data", root / "run", steps, steps // 20)
    print("MB every", steps // 20, "steps:", " ".join(f"{value:.0f}" for value in memory))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
