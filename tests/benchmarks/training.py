"""Speed of loading in training: worker processes, token shards beside waves, and the time around the model.

`python tests/benchmarks/training.py [--threads 2] [--steps 10] [--cpu] [--json FILE]`, some minutes. All models are
untrained ones of the preset `tiny`, and a HuBERT of the published base size; the data are noisy tones in MP3 files at
44.1 kHz. Every figure is a ratio of times of the same run:

- items/s of two workers over none, for crops of compressed files that are decoded again for every crop;
- batches/s of the loader alone over the steps/s of training, for the codec (from waves, whose decoded files are kept in
  memory) and two stages (from token shards);
- steps/s of the stages from token shards over those from waves, for the semantic stage also with tokens of HuBERT;
- share of a step of the stages, from shards, that is not forward pass, backward pass or optimizer.

A second table has the times of the parts of a step. The gain of token shards is 1 + (tokenize + conditioning) / (the
rest of a step), so it depends on the encoders and not on the loader: it is small for the three layers of `tiny`.
"""

import argparse
import json
import multiprocessing
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
from transformers import HubertConfig, HubertModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.data.batches import BatchPlan, collate_crops  # noqa: E402
from audiolm_pytorch.data.crops import CropDataset  # noqa: E402
from audiolm_pytorch.data.items import AudioItem  # noqa: E402
from audiolm_pytorch.data.manifest import load_items  # noqa: E402
from audiolm_pytorch.semantic import KMeansTokenizer, TransformersEncoder  # noqa: E402
from audiolm_pytorch.training.distributed import create_accelerator  # noqa: E402
from audiolm_pytorch.training.loading import loaded_batches  # noqa: E402
from musiclm_pytorch.pipeline import builders  # noqa: E402
from musiclm_pytorch.pipeline.presets import PRESETS  # noqa: E402
from musiclm_pytorch.pipeline.token_shards import compute_tokens  # noqa: E402
from musiclm_pytorch.pipeline.trainers import codec_trainer, stage_trainer  # noqa: E402

TINY = PRESETS["tiny"]
NUM_CLIPS, CLIP_SECONDS, CLIP_HZ = 16, 12, 44_100
LOOP = {"checkpoint_every_seconds": 1e9}
clock: Callable[[], float] = time.perf_counter


def write_clips(folder: Path) -> list[AudioItem]:
    """Write noisy tones as MP3 files."""
    folder.mkdir()
    seconds = np.arange(CLIP_SECONDS * CLIP_HZ) / CLIP_HZ
    for number in range(NUM_CLIPS):
        noise = np.random.default_rng(number).standard_normal(len(seconds))
        wave = 0.3 * np.sin(2 * np.pi * 110 * (number + 1) * seconds) + 0.05 * noise
        soundfile.write(folder / f"{number:02d}.mp3", wave, CLIP_HZ)
    return load_items(folder).items


def batch_seconds(load: Callable[[Any], Any], num_items: int, batch_size: int, count: int, workers: int) -> float:
    """Return the time of a batch after the first ones, which include the start of the workers.

    On the clock of the CPU, it is the time that the busiest of the processes needs for a batch.
    """
    plan, ahead = BatchPlan(num_items, batch_size, seed=0), 2 * workers  # batches that workers load ahead
    with loaded_batches(load, plan, range(count + 2 * ahead + 1), workers) as batches:
        for _ in range(1 + ahead):
            next(batches)
        start, start_of_workers = clock(), _workers_seconds()
        for _ in range(count):
            next(batches)
        seconds, of_workers = clock() - start, _workers_seconds() - start_of_workers
    return max(seconds, of_workers / max(workers, 1)) / count if clock is time.process_time else seconds / count


def _workers_seconds() -> float:
    """CPU time of the running worker processes (Linux)."""
    files = [Path(f"/proc/{worker.pid}/schedstat") for worker in multiprocessing.active_children()]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def worker_gain(items: list[AudioItem], count: int) -> float:
    """Return items/s with two workers, divided by those without."""
    crops = CropDataset(items, TINY.semantic.run.seconds, [TINY.codec.sample_hz], cache_bytes=0)

    def load(pairs: list[tuple[int, int]]) -> Any:
        return collate_crops([crops.get(*pair) for pair in pairs])

    pairs = [[batch_seconds(load, len(items), 4, 6 * count, workers) for workers in (0, 2)] for _ in range(3)]
    return statistics.median(none / two for none, two in pairs)


class StepTimes:
    """Times of the parts of every step of a trainer: `load`, `tokenize`, `forward`, `backward`, `optimizer`, `other`.

    `tokenize` is what a stage computes from a batch before its own forward pass: tokens and conditions.
    """

    def __init__(self, trainer: Any, accelerator: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = {}
        self._start = 0.0
        task = trainer.task
        task.phases = tuple(replace(phase, loss=self._timed("loss", phase.loss)) for phase in task.phases)
        self._wrap(task, "batch", "load")
        if hasattr(task, "train"):
            self._wrap(task.train, "read", "tokenize")
        self._wrap(accelerator, "backward", "backward")
        self.hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._begin()),
            register_optimizer_step_post_hook(lambda *_: self._end()),
        ]

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        if hasattr(owner, name):
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = clock()
            output = function(*arguments, **keywords)
            self._parts[part] = self._parts.get(part, 0.0) + clock() - start
            return output

        return timed

    def _begin(self) -> None:
        self._start = clock()

    def _end(self) -> None:
        now, parts = clock(), self._parts
        parts["optimizer"] = now - self._start
        parts["forward"] = parts.pop("loss", 0.0) - parts.get("tokenize", 0.0)
        self.steps.append({**parts, "end": now})
        self._parts = {}

    def medians(self) -> dict[str, float]:
        """Return the median time of every part of a step, and of the whole `step`, without the first two steps."""
        for hook in self.hooks:
            hook.remove()
        rows = []
        for before, row in pairwise(self.steps[1:]):
            step = row["end"] - before["end"]
            parts = {name: seconds for name, seconds in row.items() if name != "end"}
            rows.append({"step": step, **parts, "other": step - sum(parts.values())})
        return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}


def hubert_base(folder: Path) -> KMeansTokenizer:
    """Build an untrained semantic tokenizer of the size of the published HuBERT base, layer 9, 500 clusters."""
    HubertModel(HubertConfig()).save_pretrained(folder)
    encoder = TransformersEncoder(folder, layer_count=9)
    return KMeansTokenizer(encoder=encoder, layer=9, centroids=torch.randn(500, encoder.dim))


def step_times(trainer: Any, accelerator: Any, steps: int) -> dict[str, float]:
    """Train, and return the times of a step."""
    times = StepTimes(trainer, accelerator)
    trainer.train(stop_after_steps=steps + 3)
    return times.medians()


def loader_gain(trainer: Any, seconds: float) -> float:
    """Return batches/s of the loader without workers, divided by the steps/s of the training."""
    task, settings = trainer.task, trainer.loop.settings
    return seconds / batch_seconds(task.batch, task.num_items, settings.batch_size, 20, 0)


def measure(folder: Path, steps: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Measure all ratios, with files in an empty folder; return them and the times of the steps."""
    items = write_clips(folder / "clips")
    accelerator = create_accelerator()
    found = {"items/s, 2 workers over none": worker_gain(items, steps)}
    times: dict[str, dict[str, float]] = {}
    loop = {"accelerator": accelerator, **LOOP}
    codec_run = codec_trainer(TINY, (items, items), results_folder=folder / "codec", **loop)
    times["codec"] = step_times(codec_run, accelerator, steps)
    found["codec: batches/s of the loader over steps/s"] = loader_gain(codec_run, times["codec"]["step"])

    codec, tokenizer = builders.build_codec(TINY).eval(), builders.build_semantic_tokenizer(TINY)
    mulan = builders.build_mulan(TINY, ["a low tone", "a high tone"]).eval()
    quantizer = builders.build_quantizer(TINY, mulan, NUM_CLIPS)
    quantizer.fit(torch.nn.functional.normalize(torch.randn(64, mulan.dim_latent), dim=-1))
    parts: dict[str, Any] = {"codec": codec, "semantic_tokenizer": tokenizer, "mulan": mulan}
    for case in ("semantic", "coarse", "semantic, HuBERT base"):
        stage = case.partition(",")[0]
        if case != stage:
            parts["semantic_tokenizer"] = hubert_base(folder / "hubert")
        shards = compute_tokens(folder / "tokens" / case, items, **parts, origin={}, accelerator=accelerator)
        tokenizer = parts["semantic_tokenizer"]
        tokenizers = {"wav2vec": tokenizer, **({"codec": codec} if stage == "coarse" else {})}
        for name, data in {"waves": {"items": (items, items)}, "shards": {"shards": shards}}.items():
            model = builders.build_stage(TINY, stage, codec=codec, tokenizer=tokenizer)
            run = stage_trainer(
                *(TINY, model, stage),
                **{**tokenizers, "audio_conditioner": quantizer, **data, **loop},
                results_folder=folder / case / name,
            )
            times[f"{case} from {name}"] = step_times(run, accelerator, steps)
        before, after = times[f"{case} from waves"], times[f"{case} from shards"]
        found[f"{case}: steps/s from shards over from waves"] = before["step"] / after["step"]
        found[f"{case}: batches/s of the loader over steps/s, shards"] = loader_gain(run, after["step"])
        inside = sum(after[part] for part in ("forward", "backward", "optimizer"))
        found[f"{case}: share of a step outside of the model, shards"] = 1 - inside / after["step"]
    return found, times


def main() -> None:
    """Measure everything and print the tables."""
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--steps", type=int, default=10, help="steps, or batches, per figure")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, for a machine that is busy")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    cores = len(os.sched_getaffinity(0))
    machine = {"threads": options.threads, "cores": cores, "torch": torch.__version__, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        found, times = measure(Path(folder), options.steps)
    print(f"{machine}\n\n| ratio | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")
    columns = ("step", "load", "tokenize", "forward", "backward", "optimizer", "other")
    print(f"\n| milliseconds of | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in times.items():
        print(f"| {name} | {' | '.join(f'{1000 * row.get(column, 0.0):.0f}' for column in columns)} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "ratios": found, "seconds": times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
