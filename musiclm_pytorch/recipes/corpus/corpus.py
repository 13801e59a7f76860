"""The corpus: thousands of short clips of our own tunes, with labels and captions.

    python -m musiclm_pytorch.recipes.corpus --out corpus --num-train 4000 --num-valid 200 --seed 0

Everything is decided by (seed, split, number of the clip) before anything is rendered, so an interrupted run goes on
where it stopped, and the labels of a seed are always the same.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from beartype import beartype

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.saving.files import read_json, staged_files, write_json
from musiclm_pytorch.recipes.corpus.captions import caption_variants
from musiclm_pytorch.recipes.corpus.composition import Tune, compose_tune
from musiclm_pytorch.recipes.corpus.midi import ControlChange, Note, ProgramChange
from musiclm_pytorch.recipes.corpus.performance import (
    INSTRUMENTS,
    MELODY_CHANNEL,
    TEMPI_BPM,
    TEMPO_JITTER,
    ClipLabels,
    perform,
)
from musiclm_pytorch.recipes.corpus.render import find_synthesizer, render_performances

__all__ = ["HELD_OUT_PAIRS", "ClipPlan", "make_corpus", "plan_clip"]

FORMAT_VERSION = 1
CLIP_SECONDS = 5.0
SAMPLE_HZ = 24_000
CLIPS_PER_TUNE = 2
CLIPS_PER_RUN = 100
CAPTIONS_PER_CLIP = 6
NUM_WORKERS = 2

# Pairs of label values that no training clip has together; each value occurs with all others. One valid clip in five
# has one of these pairs (field `held_out_pair`): they measure whether a model puts known attributes together anew.
HELD_OUT_PAIRS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = (
    (("instrument", "harpsichord"), ("tempo", "slow")),
    (("instrument", "accordion"), ("register", "low")),
    (("instrument", "marimba"), ("chords", "string chords")),
    (("instrument", "clarinet"), ("dance", "waltz")),
)
_HELD_OUT_VALID_FRACTION = 0.2

# How often each value is drawn; instruments are drawn evenly.
_LABEL_WEIGHTS: dict[str, dict[Any, float]] = {
    "instrument": dict.fromkeys(INSTRUMENTS, 1.0),
    "tempo": dict.fromkeys(TEMPI_BPM, 1.0),
    "chords": {None: 0.4, "piano chords": 0.2, "guitar chords": 0.2, "string chords": 0.2},
    "drums": {False: 0.72, True: 0.28},
    "register": {"low": 0.25, "mid": 0.5, "high": 0.25},
}
_DANCE_WEIGHTS = {
    "reel": 0.28,
    "jig": 0.24,
    "hornpipe": 0.10,
    "waltz": 0.11,
    "folk tune": 0.09,
    "morris dance": 0.06,
    "country dance": 0.05,
    "slip jig": 0.035,
    "christmas carol": 0.035,
}
_MINOR_FRACTION = 0.2
_PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
# Greatest absolute sample of a clip: recordings differ in level, and so do these.
_PEAKS = (0.5, 0.9)


@dataclass(frozen=True)
class ClipPlan:
    """A clip before it is rendered: its row of the manifest, and what is played."""

    row: dict[str, Any]
    tune: Tune
    labels: ClipLabels
    start_bar: int
    peak: float
    touch_seed: str


def _holds(labels: dict[str, Any], pair: tuple[tuple[str, str], tuple[str, str]]) -> bool:
    return all(labels[name] == value for name, value in pair)


def _draw_labels(rng: Random, dance: str, split: str) -> dict[str, Any]:
    """Labels of a clip of a given dance; only valid clips have a held-out pair, and they have it on purpose."""
    wanted = [pair for pair in HELD_OUT_PAIRS if ("dance", dance) in pair or all(name != "dance" for name, _ in pair)]
    pair = rng.choice(wanted) if split == "valid" and rng.random() < _HELD_OUT_VALID_FRACTION else None
    while True:
        labels = {
            name: rng.choices(list(values), weights=list(values.values()))[0] for name, values in _LABEL_WEIGHTS.items()
        }
        labels |= dict(pair or ()) | {"dance": dance}
        if pair is not None or not any(_holds(labels, other) for other in HELD_OUT_PAIRS):
            return labels | {"held_out_pair": pair is not None}


def _captions(labels: dict[str, Any], split: str, rng: Random) -> dict[str, Any]:
    """The caption fields of a row: training wordings, and for valid clips held-out ones beside them."""
    seen = caption_variants(labels, rng, CAPTIONS_PER_CLIP)
    if split == "train":
        return {"caption": seen[0], "captions": seen}
    unseen = caption_variants(labels, rng, CAPTIONS_PER_CLIP // 2, held_out=True)
    return {"caption": unseen[0], "caption_seen": seen[0], "captions": unseen}


@beartype
def plan_clip(split: str, index: int, seed: int) -> ClipPlan:
    """Decide everything about one clip.

    Args:
        split: "train" or "valid"; the splits share no tune.
        index: Number of the clip in its split.
        seed: Seed of the corpus.

    Returns:
        The plan; equal arguments give equal plans.

    Raises:
        ValueError: If the split is not known.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', got {split!r}.")
    name = f"recipe-{split}-{index // CLIPS_PER_TUNE:05d}"
    tune_rng = Random(f"tune {seed} {name}")
    dance = tune_rng.choices(list(_DANCE_WEIGHTS), weights=list(_DANCE_WEIGHTS.values()))[0]
    tune = compose_tune(dance, "minor" if tune_rng.random() < _MINOR_FRACTION else "major", tune_rng)

    rng = Random(f"clip {seed} {split} {index}")
    drawn = _draw_labels(rng, dance, split)
    bpm = round(TEMPI_BPM[drawn["tempo"]] * rng.uniform(1 - TEMPO_JITTER, 1 + TEMPO_JITTER), 1)
    order = ("instrument", "tempo", "dance", "mode", "chords", "drums", "register")
    described = drawn | {"mode": tune.mode}
    described = {label: described[label] for label in order}
    row = {"audio": f"clips/{split}-{index:05d}.ogg"} | _captions(described, split, rng) | described
    row |= {
        "bpm": bpm,
        "tune": name,
        "held_out_pair": drawn["held_out_pair"],
        "duration": CLIP_SECONDS,
        "sample_rate": SAMPLE_HZ,
    }
    labels = ClipLabels(drawn["instrument"], drawn["tempo"], drawn["chords"], drawn["drums"], drawn["register"], bpm)
    plan = ClipPlan(
        row, tune, labels, rng.randrange(tune.num_bars), rng.uniform(*_PEAKS), f"touch {seed} {split} {index}"
    )
    row["pitch_class"] = _melody_events(plan)
    return plan


def _perform(plan: ClipPlan) -> list[Note | ProgramChange | ControlChange]:
    return perform(plan.tune, plan.labels, plan.start_bar, CLIP_SECONDS, Random(plan.touch_seed))


def _melody_events(plan: ClipPlan) -> list[list[Any]]:
    """`[start_seconds, end_seconds, pitch class]` of each note of the melody."""
    events = []
    for note in _perform(plan):
        if isinstance(note, Note) and note.channel == MELODY_CHANNEL:
            end_seconds = note.start_seconds + note.duration_seconds
            events.append([round(note.start_seconds, 4), round(end_seconds, 4), _PITCH_CLASSES[note.pitch % 12]])
    return events


def _render(plans: Sequence[ClipPlan], out: Path) -> None:
    """Render clips in one run and write them, each file complete or not there."""
    waves = render_performances(
        [_perform(plan) for plan in plans], [plan.peak for plan in plans], CLIP_SECONDS, SAMPLE_HZ
    )
    for plan, wave in zip(plans, waves, strict=True):
        write_audio(out / plan.row["audio"], torch.from_numpy(wave), SAMPLE_HZ)


def _missing_runs(plans: Sequence[ClipPlan], out: Path) -> Iterator[Sequence[ClipPlan]]:
    """The runs of `CLIPS_PER_RUN` clips that are not complete.

    A run is rendered as a whole, so that its sound does not depend on where an earlier attempt stopped.
    """
    for first in range(0, len(plans), CLIPS_PER_RUN):
        run = plans[first : first + CLIPS_PER_RUN]
        if not all((out / plan.row["audio"]).is_file() for plan in run):
            yield run


def _claim(out: Path, recipe: dict[str, Any]) -> None:
    """Note in the folder which corpus it holds, or refuse a folder that holds another."""
    note = out / "recipe.json"
    if note.is_file():
        found = read_json(note)
        if found != recipe:
            raise ValueError(
                f"{out} holds a corpus made with {found}, not with {recipe}; give another folder, or remove this one."
            )
    elif any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no corpus of this recipe; give a new folder.")
    else:
        write_json(note, recipe)


@beartype
def make_corpus(out: str | Path, num_train: int, num_valid: int, seed: int = 0) -> Path:
    """Compose, render and write the corpus.

    Args:
        out: Folder to write: `clips/*.ogg` (Vorbis, 24 kHz, mono, 5 s), `train.jsonl`, `valid.jsonl`, `recipe.json`. A
            folder in which an equal call was interrupted is completed.
        num_train: Number of training clips, >= 1.
        num_valid: Number of valid clips, >= 1. Their `caption` is in held-out wording, their `caption_seen` in training
            wording.
        seed: Seed of every choice.

    Returns:
        The folder.

    Raises:
        ValueError: If a number is below 1, or the folder holds something else.
        RuntimeError: If FluidSynth or its soundfont is missing.
    """
    if num_train < 1 or num_valid < 1:
        raise ValueError(f"num_train and num_valid must be at least 1, got {num_train} and {num_valid}.")
    find_synthesizer()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"format_version": FORMAT_VERSION, "num_train": num_train, "num_valid": num_valid, "seed": seed})
    (folder / "clips").mkdir(exist_ok=True)
    splits = {"train": num_train, "valid": num_valid}
    plans = {split: [plan_clip(split, index, seed) for index in range(count)] for split, count in splits.items()}
    runs = [run for split in splits for run in _missing_runs(plans[split], folder)]
    # Threads suffice: the synthesizer is a process of its own, and the encoder works without Python's lock.
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for _ in pool.map(lambda run: _render(run, folder), runs):
            pass
    for split in ("valid", "train"):
        rows = "".join(json.dumps(plan.row) + "\n" for plan in plans[split])
        with staged_files(folder) as stage:
            (stage / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return folder
