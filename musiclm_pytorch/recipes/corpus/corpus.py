"""Generation of the toy corpus, which contains short clips of composed music with labels and captions.

A clip depends only on the seed, the split and the clip number, so that an interrupted generation can be continued.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import check_shares
from audiolm_pytorch.saving.files import read_json, staged_files, write_json
from musiclm_pytorch.recipes.corpus.effects import add_effect
from musiclm_pytorch.recipes.corpus.midi import DRUM_CHANNEL, ControlChange, Note, ProgramChange
from musiclm_pytorch.recipes.corpus.planning import (
    CLIP_SECONDS,
    FOLK_FRACTION,
    SAMPLE_HZ,
    ClipPlan,
    perform_plan,
    plan_clip,
)
from musiclm_pytorch.recipes.corpus.render import SOUNDFONTS, find_synthesizer, fit_peak, render_performances
from musiclm_pytorch.recipes.corpus.samples import drum_track, find_samples

__all__ = ["make_corpus"]

FORMAT_VERSION = 3
# One run loads every soundfont once, which takes seconds of computing time.
CLIPS_PER_RUN = 400
NUM_WORKERS = 2
# Largest absolute sample of recorded drums, relative to the other sounds.
_RECORDED_DRUM_LEVEL = 0.8

_Event = Note | ProgramChange | ControlChange


def _is_drum(event: _Event) -> bool:
    return isinstance(event, Note) and event.channel == DRUM_CHANNEL


def _finished(plan: ClipPlan, wave: np.ndarray, drums: list[Note]) -> np.ndarray:
    """Add recorded drums and effects to a rendered wave with a largest absolute sample of 1."""
    if plan.recorded is not None:
        track = drum_track(plan.recorded, drums, plan.labels.bpm, plan.seconds, SAMPLE_HZ)
        wave = wave + _RECORDED_DRUM_LEVEL * track
    wave = add_effect(wave, plan.row["effect"], SAMPLE_HZ, seed=Random(plan.touch_seed).randrange(2**32))
    return fit_peak(wave, plan.peak, SAMPLE_HZ)


def _render(plans: Sequence[ClipPlan], out: Path) -> None:
    """Render clips in one run of the synthesizer per soundfont, and write the audio files."""
    for soundfont in SOUNDFONTS:
        group = [plan for plan in plans if plan.soundfont == soundfont]
        if not group:
            continue
        scores: list[list[_Event]] = [perform_plan(plan) for plan in group]
        played = [
            [event for event in score if plan.recorded is None or not _is_drum(event)]
            for plan, score in zip(group, scores, strict=True)
        ]
        waves = render_performances(played, [1.0] * len(group), group[0].seconds, SAMPLE_HZ, soundfont)
        for plan, score, wave in zip(group, scores, waves, strict=True):
            drums = [event for event in score if isinstance(event, Note) and event.channel == DRUM_CHANNEL]
            write_audio(out / plan.row["audio"], torch.from_numpy(_finished(plan, wave, drums)), SAMPLE_HZ)


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


@typed
def make_corpus(
    out: str | Path,
    num_train: int,
    num_valid: int,
    seed: int = 0,
    seconds: float = CLIP_SECONDS,
    soundfont: str | None = None,
    num_workers: int = NUM_WORKERS,
    progress: Callable[[int, int], None] | None = None,
    folk_fraction: float = FOLK_FRACTION,
) -> Path:
    """Compose and render the clips of the corpus, and write the audio files and manifests.

    If FluidSynth, a soundfont or the recorded samples are missing, a RuntimeError is raised.

    Args:
        out: Folder for `clips/*.ogg` (Vorbis, 24 kHz, mono), `train.jsonl`, `valid.jsonl` and `recipe.json`; a call
            with equal arguments completes an interrupted corpus.
        num_train: Number of training clips.
        num_valid: Number of validation clips, which have a held-out phrase in `caption` and a training phrase in
            `caption_seen`.
        seed: Seed of the random generator.
        seconds: Length of every clip, 1 to 60 s.
        soundfont: Soundfont of all clips, a key of `render.SOUNDFONTS`; None = two soundfonts, and recorded drums in
            some clips. Tunes, labels and captions do not depend on it.
        num_workers: Number of synthesizer processes at a time.
        progress: Function that is called after every run with the number of finished runs and of all runs.
        folk_fraction: Share of folk dances among all tunes; 1 = only folk dances.

    Returns:
        The folder of the corpus.
    """
    if num_train < 1 or num_valid < 1:
        raise ValueError(f"num_train and num_valid must be at least 1, got {num_train=} and {num_valid=}")
    if not 1.0 <= seconds <= 60.0 or num_workers < 1:
        raise ValueError(f"seconds must be in 1..60 and num_workers at least 1, got {seconds=} and {num_workers=}")
    if soundfont is not None and soundfont not in SOUNDFONTS:
        raise ValueError(f"unknown soundfont {soundfont!r}; use one of {', '.join(SOUNDFONTS)}")
    check_shares(folk_fraction=folk_fraction)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"format_version": FORMAT_VERSION, "num_train": num_train, "num_valid": num_valid, "seed": seed}
    _check_folder(folder, recipe | {"seconds": seconds, "soundfont": soundfont, "folk_fraction": folk_fraction})
    (folder / "clips").mkdir(exist_ok=True)
    splits = {"train": num_train, "valid": num_valid}
    plans = {
        split: [plan_clip(split, index, seed, seconds, soundfont, folk_fraction) for index in range(count)]
        for split, count in splits.items()
    }
    every_plan = [plan for split in splits for plan in plans[split]]
    for name in sorted({plan.soundfont for plan in every_plan}):
        find_synthesizer(name)
    find_samples([sample for plan in every_plan for sample in plan.samples])
    runs = [run for split in splits for run in _missing_runs(plans[split], folder)]
    # Threads are enough: the synthesizer is a separate process, and the audio encoder releases Python's lock.
    with ThreadPoolExecutor(num_workers) as pool:
        for finished, _ in enumerate(pool.map(lambda run: _render(run, folder), runs), start=1):
            if progress is not None:
                progress(finished, len(runs))
    for split in ("valid", "train"):
        rows = "".join(json.dumps(plan.row) + "\n" for plan in plans[split])
        with staged_files(folder) as stage:
            (stage / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return folder
