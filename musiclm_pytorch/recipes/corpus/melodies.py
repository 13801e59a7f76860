"""Command that renders melodies of the corpus alone, each by several instruments, with the notes as labels.

Run as `python -m musiclm_pytorch.recipes.corpus.melodies --out melodies --soundfont "Csound GM"`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import tyro

from audiolm_pytorch.audio.files import write_audio
from musiclm_pytorch.recipes.corpus.instruments import INSTRUMENTS
from musiclm_pytorch.recipes.corpus.performance import MELODY_CHANNEL
from musiclm_pytorch.recipes.corpus.planning import (
    CLIP_SECONDS,
    CLIPS_PER_TUNE,
    SAMPLE_HZ,
    ClipPlan,
    perform_plan,
    plan_clip,
)
from musiclm_pytorch.recipes.corpus.render import render_performances

__all__ = ["main", "render_melodies"]

_LABELS = ("tune", "bpm", "mode", "pitch_class", "soundfont", "duration", "sample_rate")


def render_melodies(
    count: int,
    *,
    renderings: int = 1,
    split: str = "valid",
    seed: int = 0,
    seconds: float = CLIP_SECONDS,
    soundfont: str = "Csound GM",
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Render `count` melodies of different tunes without accompaniment, each by `renderings` random instruments.

    Returns:
        Waves `[n]` at 24 kHz with rows of a manifest; all renderings of a melody have equal labels `tune` and
        `pitch_class`.
    """
    plans: list[ClipPlan] = []
    for index in range(count):
        plan = plan_clip(split, CLIPS_PER_TUNE * index, seed, seconds, soundfont)
        rng = Random(f"melody {seed} {split} {index}")
        for _ in range(renderings):
            instrument = rng.choice(list(INSTRUMENTS))
            register = rng.choice(INSTRUMENTS[instrument].registers)
            plans.append(replace(plan, labels=replace(plan.labels, instrument=instrument, register=register)))
    events = [[event for event in perform_plan(plan) if event.channel == MELODY_CHANNEL] for plan in plans]
    waves = render_performances(events, [plan.peak for plan in plans], seconds, SAMPLE_HZ, soundfont)
    rows = []
    for number, plan in enumerate(plans):
        labels = {name: plan.row[name] for name in _LABELS}
        sound = {"instrument": plan.labels.instrument, "register": plan.labels.register}
        rows.append({"audio": f"melodies/{split}-{number:05d}.ogg", **sound, **labels})
    return list(zip(waves, rows))


def main(
    out: Path,
    count: int = 60,
    renderings: int = 1,
    split: str = "valid",
    seed: int = 1000,
    seconds: float = CLIP_SECONDS,
    soundfont: str = "Csound GM",
) -> None:
    """Render melodies alone, as audio files with a manifest that can also train a melody embedder.

    Args:
        out: Folder for the audio files and `train.jsonl`.
        count: Number of melodies.
        renderings: Number of instruments that play each melody.
        split: train or valid.
        seed: Seed of the tunes; the corpus has the seed 0 by default.
        seconds: Length of a melody.
        soundfont: "FluidR3 GM", "MuseScore General" or "Csound GM".
    """
    if (out / "train.jsonl").exists():
        raise ValueError(f"{out} contains a manifest already; use another folder")
    options: dict[str, Any] = {"split": split, "seed": seed, "seconds": seconds, "soundfont": soundfont}
    clips = render_melodies(count, renderings=renderings, **options)
    for wave, row in clips:
        write_audio(out / row["audio"], torch.from_numpy(wave), SAMPLE_HZ)
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in clips), encoding="utf-8")
    sys.stdout.write(f"wrote {len(clips)} renderings of {count} melodies to {out}\n")


if __name__ == "__main__":
    tyro.cli(main)
