"""Speed of loading in training: worker processes, token shards beside waves, and the time around the model.

`python tests/benchmarks/training.py [--threads 2] [--steps 10] [--json FILE]`, some minutes. All models are untrained
ones of the preset `tiny`; the data are noisy tones in MP3 files at 44.1 kHz. Every figure is a ratio of times of the
same run:

- items/s of two workers over none, for crops of compressed files that are decoded again for every crop;
- batches/s of the loader alone over the steps/s of training, for the codec (from waves, whose decoded files are kept in
  memory) and the semantic stage (from token shards);
- steps/s of the semantic stage from token shards over those from waves;
- share of a step of the semantic stage, from shards, that is not forward pass, backward pass or optimizer.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.data.batches import BatchPlan, collate_crops  # noqa: E402
from audiolm_pytorch.data.crops import CropDataset  # noqa: E402
from audiolm_pytorch.data.items import AudioItem  # noqa: E402
from audiolm_pytorch.data.manifest import load_items  # noqa: E402
from audiolm_pytorch.training.distributed import create_accelerator  # noqa: E402
from audiolm_pytorch.training.loading import loaded_batches  # noqa: E402
from musiclm_pytorch.pipeline import builders  # noqa: E402
from musiclm_pytorch.pipeline.presets import PRESETS  # noqa: E402
from musiclm_pytorch.pipeline.token_shards import compute_tokens  # noqa: E402
from musiclm_pytorch.pipeline.trainers import codec_trainer, stage_trainer  # noqa: E402

TINY = PRESETS["tiny"]
NUM_CLIPS, CLIP_SECONDS, CLIP_HZ = 16, 12, 44_100
LOOP = {"log_every": 1, "checkpoint_every_seconds": 1e9}


def write_clips(folder: Path) -> list[AudioItem]:
    """Write noisy tones as MP3 files."""
    folder.mkdir()
    seconds = np.arange(CLIP_SECONDS * CLIP_HZ) / CLIP_HZ
    for number in range(NUM_CLIPS):
        noise = np.random.default_rng(number).standard_normal(len(seconds))
        wave = 0.3 * np.sin(2 * np.pi * 110 * (number + 1) * seconds) + 0.05 * noise
        soundfile.write(folder / f"{number:02d}.mp3", wave, CLIP_HZ)
    return load_items(folder).items


def batches_per_second(load: Callable[[Any], Any], num_items: int, batch_size: int, count: int, workers: int) -> float:
    """Load batches after a first one, which includes the start of the workers."""
    plan = BatchPlan(num_items, batch_size, seed=0)
    with loaded_batches(load, plan, range(count + 1 + 2 * workers), workers) as batches:
        for _ in range(1 + 2 * workers):  # with those that the workers load ahead
            next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        return count / (time.perf_counter() - start)


def worker_gain(items: list[AudioItem], count: int) -> float:
    """Return items/s with two workers, divided by those without."""
    crops = CropDataset(items, TINY.semantic.run.seconds, [TINY.codec.sample_hz], cache_bytes=0)

    def load(pairs: list[tuple[int, int]]) -> Any:
        return collate_crops([crops.get(*pair) for pair in pairs])

    pairs = [[batches_per_second(load, len(items), 4, count, workers) for workers in (0, 2)] for _ in range(3)]
    return statistics.median(two / none for none, two in pairs)


def step_seconds(trainer: Any, folder: Path, steps: int) -> float:
    """Train, and return the median time of a step after the first two."""
    trainer.train(stop_after_steps=steps + 3)
    times = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(after - before for before, after in pairwise(times[2:]))


def loader_gain(trainer: Any, seconds: float) -> float:
    """Return batches/s of the loader without workers, divided by the steps/s of the training."""
    task, settings = trainer.task, trainer.loop.settings
    return batches_per_second(task.batch, task.num_items, settings.batch_size, 20, 0) * seconds


class ModelTime:
    """Total time in the loss of the phases, in the backward pass and in optimizers of a trainer."""

    def __init__(self, trainer: Any, accelerator: Any) -> None:
        self.seconds, self._start = 0.0, 0.0
        task = trainer.task
        task.phases = tuple(replace(phase, loss=self._timed(phase.loss)) for phase in task.phases)
        accelerator.backward = self._timed(accelerator.backward)
        register_optimizer_step_pre_hook(lambda *_: self._begin())
        register_optimizer_step_post_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._start

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._begin()
            output = function(*arguments, **keywords)
            self._end()
            return output

        return timed


def measure(folder: Path, steps: int) -> dict[str, float]:
    """Measure all ratios, with files in an empty folder."""
    items = write_clips(folder / "clips")
    found = {"items/s, 2 workers over none": worker_gain(items, steps)}
    codec_run = codec_trainer(TINY, (items, items), results_folder=folder / "codec", **LOOP)
    seconds = step_seconds(codec_run, folder / "codec", steps)
    found["codec: batches/s of the loader over steps/s"] = loader_gain(codec_run, seconds)

    accelerator = create_accelerator()
    codec, tokenizer = builders.build_codec(TINY).eval(), builders.build_semantic_tokenizer(TINY)
    mulan = builders.build_mulan(TINY, ["a low tone", "a high tone"]).eval()
    quantizer = builders.build_quantizer(TINY, mulan, NUM_CLIPS)
    quantizer.fit(torch.nn.functional.normalize(torch.randn(64, mulan.dim_latent), dim=-1))
    parts: dict[str, Any] = {"codec": codec, "semantic_tokenizer": tokenizer, "mulan": mulan}
    shards = compute_tokens(folder / "tokens", items, **parts, origin={}, accelerator=accelerator)
    times, runs = {}, {}
    for name, data in {"waves": {"items": (items, items)}, "shards": {"shards": shards}}.items():
        stage = builders.build_stage(TINY, "semantic", codec=codec, tokenizer=tokenizer)
        loop = {"results_folder": folder / name, "accelerator": accelerator, **LOOP}
        parts = {"wav2vec": tokenizer, "audio_conditioner": quantizer}
        runs[name] = stage_trainer(TINY, stage, "semantic", **parts, **data, **loop)
        times[name] = step_seconds(runs[name], folder / name, steps)
    found["semantic stage: steps/s from shards over from waves"] = times["waves"] / times["shards"]
    found["semantic stage: batches/s of the loader over steps/s"] = loader_gain(runs["shards"], times["shards"])

    inside = ModelTime(runs["shards"], accelerator)
    runs["shards"].results_folder = runs["shards"].loop.folder = folder / "again"
    runs["shards"].loop._run = None
    runs["shards"].train(stop_after_steps=steps)
    last = json.loads((folder / "again" / "metrics.jsonl").read_text().splitlines()[-1])
    found["semantic stage: share of a step outside of the model"] = 1 - inside.seconds / last["seconds"]
    return found


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--steps", type=int, default=10, help="steps, or batches, per figure")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cores = len(os.sched_getaffinity(0))
    machine = {"threads": options.threads, "cores": cores, "torch": torch.__version__, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.steps)
    print(f"{machine}\n\n| ratio | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "ratios": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
