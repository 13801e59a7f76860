"""Small runs of all trainers that are killed at random instants, or whose files are damaged.

`python -m tests.helpers.killed_runs kills 100` prints how many resumed runs equal the straight ones; `damage 60` and
`flips 200` do the same for damaged checkpoints and for changed bits in each kind of file. A second number is the seed,
a third one the worker processes of the killed runs.
"""

import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from audiolm_pytorch.audio import waves
from audiolm_pytorch.data.manifest import load_split
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.trainers import (
    TABLE_FILE,
    CoarseTransformerTrainer,
    FineTransformerTrainer,
    SemanticTransformerTrainer,
)
from audiolm_pytorch.saving.files import read_json, read_weights
from audiolm_pytorch.saving.model_folder import read_card
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTrainer
from audiolm_pytorch.training import tracking
from audiolm_pytorch.training.checkpoint import CheckpointFolder
from audiolm_pytorch.training.run_folder import read_record
from musiclm_pytorch.pipeline.builders import build_semantic_encoder
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.trainers import codec_trainer, mulan_trainer, semantic_tokenizer_trainer
from musiclm_pytorch.pretrained.parts import CARD
from tests.helpers import fakes
from tests.helpers.micro import MICRO, write_clips
from tests.helpers.toy_training import rows_of

_STAGES = {
    "semantic": SemanticTransformerTrainer,
    "coarse": CoarseTransformerTrainer,
    "fine": FineTransformerTrainer,
}


def make_trainers(data: Path, num_workers: int = 0) -> dict[str, Callable[[Path], Any]]:
    """Functions that build the trainer of each kind for a results folder, with a checkpoint at every step."""
    items = load_split(data)
    captions = [item.caption for item in items[0]]
    shared: dict[str, Any] = {"seed": 0, "num_workers": num_workers}

    def with_checkpoints(trainer: Any) -> Any:
        trainer.loop.settings.__dict__["checkpoint_every_steps"] = 1
        return trainer

    def stage(name: str, folder: Path) -> Any:
        torch.manual_seed(0)
        tokenizers = {"wav2vec": fakes.FakeSemanticTokenizer(), "codec": fakes.FakeCodec()}
        if name == "semantic":
            del tokenizers["codec"]
        if name == "fine":
            del tokenizers["wav2vec"]
        return _STAGES[name](
            transformer=fakes.tiny_stages()[name],
            items=items,
            data_max_length_seconds=0.5,
            num_train_steps=12,
            batch_size=2,
            ema_decay=0.9,
            results_folder=folder,
            checkpoint_every_steps=1,
            num_workers=num_workers,
            **tokenizers,
        )

    def preset(build: Callable[..., Any], *arguments: Any, folder: Path) -> Any:
        torch.manual_seed(0)
        return with_checkpoints(build(MICRO, items, *arguments, results_folder=folder, **shared))

    def kmeans(folder: Path) -> Any:
        torch.manual_seed(0)
        encoder: BestRQEncoder = build_semantic_encoder(MICRO)
        return KMeansTrainer(encoder=encoder, layer=1, num_clusters=8, items=items[0], results_folder=folder)

    trainers: dict[str, Callable[[Path], Any]] = {
        "codec": lambda folder: preset(codec_trainer, folder=folder),
        "best_rq": lambda folder: preset(semantic_tokenizer_trainer, folder=folder),
        "mulan": lambda folder: preset(mulan_trainer, captions, folder=folder),
        "kmeans": kmeans,
    }
    return trainers | {name: partial(stage, name) for name in _STAGES}


def prepared(num_workers: int = 0) -> dict[str, Callable[[Path], Any]]:
    """Trainers on clips in a temporary folder."""
    waves.MIN_HZ = fakes.SAMPLE_HZ  # type: ignore[misc]
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from audiolm_pytorch.semantic import kmeans_trainer

    kmeans_trainer._SECONDS_BETWEEN_STATES = 0.0  # type: ignore[misc]
    return make_trainers(write_clips(Path(tempfile.mkdtemp(prefix="clips")) / "data", 5), num_workers)


def in_child(action: Callable[[], object], kill_after_seconds: float | None = None) -> int:
    """Run in a forked process, which is killed after some time; return its exit status, 0 after success."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stderr = sys.stdout = open(os.devnull, "w")
            action()
            status = 0
        finally:
            os._exit(status)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _train(make: Callable[[Path], Any], folder: Path, log: Path | None = None, **options: Any) -> None:
    """Train in a folder, with warnings in the file `log`."""
    if log is not None:
        logging.basicConfig(filename=log, level=logging.WARNING, force=True)
    make(folder).train(**options)


def content(folder: Path) -> dict[str, Any]:
    """Bytes of all safetensors files of a finished run, and its metrics without the clock."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    rows = rows_of(folder) if (folder / "metrics.jsonl").exists() else []
    return {name: data for name, data in files.items() if "previous" not in name} | {"rows": rows}


def kill_runs(number: int, seed: int, names: list[str] | None = None, num_workers: int = 0) -> tuple[int, int]:
    """Kill runs of all trainers `number` times at random instants; return the numbers of kills and of unequal runs."""
    trainers, rng, kills, equal, runs = prepared(num_workers), random.Random(seed), 0, 0, 0
    names = names or list(trainers)
    root = Path(tempfile.mkdtemp(prefix="kills"))
    for turn, name in enumerate(names):
        straight, killed = root / name / "straight", root / name / "killed"
        started = time.monotonic()
        train = partial(_train, trainers[name])
        assert in_child(partial(train, straight)) == 0, name
        seconds = time.monotonic() - started
        share = number // len(names) + (turn < number % len(names))
        done = 0
        while done < share:
            if in_child(partial(train, killed), rng.uniform(0, 0.8) * seconds) == 0:
                shutil.rmtree(killed)  # finished before the kill: begin again, and kill earlier
                seconds *= 0.8
                continue
            done += 1
        kills += done
        runs += 1
        assert in_child(partial(train, killed)) == 0, name
        is_equal = content(straight) == content(killed)
        leftovers = [path for path in killed.rglob(".*") if path.name != ".lock"]
        equal += is_equal and not leftovers
        print(f"{name}: {done} kills, {'equal' if is_equal else 'DIFFERENT'}, {len(leftovers)} leftovers", flush=True)
    return kills, runs - equal


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint, or remove the whole folder; return what was done."""
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data, kind = file.read_bytes(), rng.choice(["cut", "zeros", "removed", "bit", "folder"])
    if kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "zeros":
        file.write_bytes(bytes(len(data)))
    elif kind == "removed":
        file.unlink()
    elif kind == "bit":
        flip(file, rng)
    else:
        shutil.rmtree(folder)
    return f"{kind} {file.name}"


def flip(file: Path, rng: random.Random) -> None:
    """Change one random bit of a file."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def damage_runs(number: int, seed: int, names: list[str] | None = None) -> int:
    """Damage the newest checkpoint of interrupted runs; return how many did not continue from the one before.

    A run continues rightly if one line is logged, and the next step has the bytes of the damaged checkpoint's step.
    """
    trainers, rng, faults = prepared(), random.Random(seed), 0
    names = names or [name for name in trainers if name != "kmeans"]
    root = Path(tempfile.mkdtemp(prefix="damage"))
    for turn, name in enumerate(names):
        base = root / name / "base"
        assert in_child(partial(_train, trainers[name], base, stop_after_steps=6)) == 0, name
        expected = {path.name: path.read_bytes() for path in (base / "checkpoint").glob("*.safetensors")}
        for _ in range(number // len(names) + (turn < number % len(names))):
            folder, log = root / name / "damaged", root / name / "log"
            shutil.copytree(base, folder)
            kind = damage(folder / "checkpoint", rng)
            status = in_child(partial(_train, trainers[name], folder, log, stop_after_steps=1))
            lines = [line for line in log.read_text().splitlines() if "checkpoint before, of step 5" in line]
            found = {path.name: path.read_bytes() for path in (folder / "checkpoint").glob("*.safetensors")}
            if status or len(lines) != 1 or found != expected:
                faults += 1
                print(f"{name}: {kind}: status {status}, lines {lines}", flush=True)
            shutil.rmtree(folder)
            log.unlink()
        print(f"{name}: done", flush=True)
    return faults


# Files of a run that nothing reads again.
_OUTPUTS = re.compile(r".*\.(wav|svg|txt|md)|\.lock")


def reader_of(file: Path) -> tuple[str, Callable[[], object]] | None:
    """Return the kind of a file of a run, and a function that reads it as a resumed run does; None for outputs."""
    folder, name = file.parent, file.name
    if _OUTPUTS.fullmatch(name) or folder.name == "checkpoint.previous":
        return None
    if folder.name == "checkpoint":
        return f"checkpoint/{name}", CheckpointFolder(folder.parent).read
    if name == "metrics.jsonl":
        return name, partial(_read_metrics, file)
    if name in ("index.json", "fields.json") or name.endswith(".npy"):
        shards = folder if name == "index.json" else folder.parent
        return f"shards/{name}", partial(_read_shards, shards)
    if name in ("config.json", "model.safetensors"):
        return f"module/{name}", partial(load_module, folder)
    if name == TABLE_FILE:
        return name, partial(read_weights, file, sealed=True)
    return name, {"plan.json": partial(read_json, file), CARD: partial(read_card, file)}.get(
        name, partial(read_record, file)
    )


def _read_shards(folder: Path) -> None:
    shards = TokenShards(folder)
    for index in range(len(shards)):
        shards[index]


def _read_metrics(file: Path) -> None:
    """Raise a ValueError if a resumed run logs the warning about changed metrics."""

    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError(record.getMessage())

    checkpoint = CheckpointFolder(file.parent).read()
    logger = logging.getLogger(tracking.__name__)
    logger.addFilter(refuse)
    try:
        tracking.MetricsFile(file).remove_after(checkpoint.step, checkpoint.state["metrics_file"])
    finally:
        logger.removeFilter(refuse)


def flip_bits(run: Path, number: int, seed: int) -> dict[str, int]:
    """Change `number` random bits, one at a time, in each kind of file; return the numbers of silent ones by kind.

    A changed bit is silent if reading raises no error, and not if it raises a ValueError. Other errors end the test.
    """
    kinds: dict[str, list[tuple[Path, Callable[[], object]]]] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        if file.name == "metrics.jsonl" and not (file.parent / "checkpoint").exists():
            continue  # the metrics of a finished step are an output
        if (found := reader_of(file)) is not None:
            found[1]()
            kinds.setdefault(found[0], []).append((file, found[1]))
    rng, silent = random.Random(seed), {}
    for kind, files in kinds.items():
        silent[kind] = 0
        for _ in range(number):
            file, read = rng.choice(files)
            data = file.read_bytes()
            flip(file, rng)
            try:
                read()
                silent[kind] += 1
                print(f"{kind}: silent in {file}", flush=True)
            except ValueError:
                pass
            file.write_bytes(data)
    return silent


def run_for_flips(folder: Path) -> Path:
    """A finished pipeline run, with an unfinished stage in `stage/` and the whole folder of k-means in `kmeans/`."""
    trainers = prepared()
    pipeline = Pipeline(MICRO, data=write_clips(folder / "clips"), out=folder / "run")
    assert in_child(lambda: list(pipeline.run())) == 0
    assert in_child(partial(_train, trainers["fine"], folder / "run" / "stage", stop_after_steps=3)) == 0
    assert in_child(partial(_train, trainers["kmeans"], folder / "run" / "kmeans")) == 0
    return folder / "run"


def _main(words: list[str]) -> None:
    kind, number = words[0], int(words[1])
    seed = int(words[2]) if len(words) > 2 else 0
    if kind == "kills":
        kills, unequal = kill_runs(number, seed, num_workers=int(words[3]) if len(words) > 3 else 0)
        print(f"{kills} kills, {unequal} runs differ from the straight run")
    elif kind == "damage":
        print(f"{number} damaged checkpoints, {damage_runs(number, seed)} runs did not continue from the one before")
    else:
        silent = flip_bits(run_for_flips(Path(tempfile.mkdtemp(prefix="flips"))), number, seed)
        print(f"{number} changed bits in each of {len(silent)} kinds of files, silent: {silent}")


if __name__ == "__main__":
    _main(sys.argv[1:])
