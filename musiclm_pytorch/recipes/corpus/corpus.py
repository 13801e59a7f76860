"""Generation of the toy corpus, which contains short clips of composed tunes with labels and captions.

A clip depends only on the seed, the split and the clip number, so that an interrupted generation can be continued.
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

# Pairs of label values that never occur together in training clips; each value occurs with all others. One valid clip
# in five has such a pair (field `held_out_pair`), to measure new combinations of known attributes.
HELD_OUT_PAIRS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = (
    (("instrument", "harpsichord"), ("tempo", "slow")),
    (("instrument", "accordion"), ("register", "low")),
    (("instrument", "marimba"), ("chords", "string chords")),
    (("instrument", "clarinet"), ("dance", "waltz")),
)
_HELD_OUT_VALID_FRACTION = 0.2

# Relative frequency of each value.
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
# Range of the largest absolute sample of a clip, for a variety of levels.
_PEAKS = (0.5, 0.9)


@dataclass(frozen=True)
class ClipPlan:
    """Plan of a clip that is not rendered yet, with its manifest row, its tune and its labels."""

    row: dict[str, Any]
    tune: Tune
    labels: ClipLabels
    start_bar: int
    peak: float
    touch_seed: str


def _holds(labels: dict[str, Any], pair: tuple[tuple[str, str], tuple[str, str]]) -> bool:
    return all(labels[name] == value for name, value in pair)


def _draw_labels(rng: Random, dance: str, split: str) -> dict[str, Any]:
    """Draw the labels of a clip. Only validation clips can have a pair of labels in `HELD_OUT_PAIRS`."""
    pairs = [pair for pair in HELD_OUT_PAIRS if ("dance", dance) in pair or all(name != "dance" for name, _ in pair)]
    pair = rng.choice(pairs) if split == "valid" and rng.random() < _HELD_OUT_VALID_FRACTION else None
    while True:
        labels = {
            name: rng.choices(list(values), weights=list(values.values()))[0] for name, values in _LABEL_WEIGHTS.items()
        }
        labels |= dict(pair or ()) | {"dance": dance}
        if pair is not None or not any(_holds(labels, other) for other in HELD_OUT_PAIRS):
            return labels | {"held_out_pair": pair is not None}


def _captions(labels: dict[str, Any], split: str, rng: Random) -> dict[str, Any]:
    """Generate the caption fields of a manifest row; validation clips have phrases that training captions lack."""
    seen = caption_variants(labels, rng, CAPTIONS_PER_CLIP)
    if split == "train":
        return {"caption": seen[0], "captions": seen}
    unseen = caption_variants(labels, rng, CAPTIONS_PER_CLIP // 2, held_out=True)
    return {"caption": unseen[0], "caption_seen": seen[0], "captions": unseen}


@beartype
def plan_clip(split: str, index: int, seed: int) -> ClipPlan:
    """Draw the labels, captions and music of clip number `index` of a split, "train" or "valid"."""
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', got {split!r}")
    name = f"recipe-{split}-{index // CLIPS_PER_TUNE:05d}"
    tune_rng = Random(f"tune {seed} {name}")
    dance = tune_rng.choices(list(_DANCE_WEIGHTS), weights=list(_DANCE_WEIGHTS.values()))[0]
    tune = compose_tune(dance, "minor" if tune_rng.random() < _MINOR_FRACTION else "major", tune_rng)

    rng = Random(f"clip {seed} {split} {index}")
    drawn = _draw_labels(rng, dance, split)
    bpm = round(TEMPI_BPM[drawn["tempo"]] * rng.uniform(1 - TEMPO_JITTER, 1 + TEMPO_JITTER), 1)
    order = ("instrument", "tempo", "dance", "mode", "chords", "drums", "register")
    labels_of_row = drawn | {"mode": tune.mode}
    labels_of_row = {label: labels_of_row[label] for label in order}
    row = {"audio": f"clips/{split}-{index:05d}.ogg"} | _captions(labels_of_row, split, rng) | labels_of_row
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
    """Return a list `[start_seconds, end_seconds, pitch class]` for each melody note of a clip."""
    events = []
    for note in _perform(plan):
        if isinstance(note, Note) and note.channel == MELODY_CHANNEL:
            end_seconds = note.start_seconds + note.duration_seconds
            events.append([round(note.start_seconds, 4), round(end_seconds, 4), _PITCH_CLASSES[note.pitch % 12]])
    return events


def _render(plans: Sequence[ClipPlan], out: Path) -> None:
    """Render clips in one run of the synthesizer, and write the audio files."""
    waves = render_performances(
        [_perform(plan) for plan in plans], [plan.peak for plan in plans], CLIP_SECONDS, SAMPLE_HZ
    )
    for plan, wave in zip(plans, waves, strict=True):
        write_audio(out / plan.row["audio"], torch.from_numpy(wave), SAMPLE_HZ)


def _missing_runs(plans: Sequence[ClipPlan], out: Path) -> Iterator[Sequence[ClipPlan]]:
    """Find the groups of `CLIPS_PER_RUN` clips in which an audio file is missing.

    All clips of a group with a missing file are rendered again, so that interruptions do not change the audio.
    """
    for first in range(0, len(plans), CLIPS_PER_RUN):
        run = plans[first : first + CLIPS_PER_RUN]
        if not all((out / plan.row["audio"]).is_file() for plan in run):
            yield run


def _check_folder(out: Path, recipe: dict[str, Any]) -> None:
    """Write the settings of the corpus into an empty folder, or check that an existing corpus has equal settings."""
    note = out / "recipe.json"
    if note.is_file():
        present = read_json(note)
        if present != recipe:
            raise ValueError(
                f"{out} contains a corpus with the settings {present}, got the settings {recipe}; use another folder, "
                "or remove the old corpus"
            )
    elif any(out.iterdir()):
        raise ValueError(f"{out} contains files, but no corpus; use an empty folder")
    else:
        write_json(note, recipe)


@beartype
def make_corpus(out: str | Path, num_train: int, num_valid: int, seed: int = 0) -> Path:
    """Compose and render the clips of the corpus, and write the audio files and manifests.

    Args:
        out: Folder for `clips/*.ogg` (Vorbis, 24 kHz, mono, 5 s), `train.jsonl`, `valid.jsonl` and `recipe.json`; a
            call with equal arguments completes an interrupted corpus.
        num_train: Number of training clips.
        num_valid: Number of validation clips, which have a held-out phrase in `caption` and a training phrase in
            `caption_seen`.
        seed: Seed of the random generator.

    Returns:
        The folder of the corpus.

    Raises:
        RuntimeError: If FluidSynth or its soundfont is missing.
    """
    if num_train < 1 or num_valid < 1:
        raise ValueError(f"num_train and num_valid must be at least 1, got {num_train=} and {num_valid=}")
    find_synthesizer()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(
        folder, {"format_version": FORMAT_VERSION, "num_train": num_train, "num_valid": num_valid, "seed": seed}
    )
    (folder / "clips").mkdir(exist_ok=True)
    splits = {"train": num_train, "valid": num_valid}
    plans = {split: [plan_clip(split, index, seed) for index in range(count)] for split, count in splits.items()}
    runs = [run for split in splits for run in _missing_runs(plans[split], folder)]
    # Threads are enough: the synthesizer is a separate process, and the audio encoder releases Python's lock.
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for _ in pool.map(lambda run: _render(run, folder), runs):
            pass
    for split in ("valid", "train"):
        rows = "".join(json.dumps(plan.row) + "\n" for plan in plans[split])
        with staged_files(folder) as stage:
            (stage / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return folder
