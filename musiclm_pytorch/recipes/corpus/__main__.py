"""Command that generates the toy corpus of music clips with captions, with FluidSynth and General MIDI soundfonts.

Run as `python -m musiclm_pytorch.recipes.corpus --out corpus`.
"""

import sys
from pathlib import Path

import tyro

from musiclm_pytorch.recipes.corpus.corpus import NUM_WORKERS, make_corpus
from musiclm_pytorch.recipes.corpus.planning import CLIP_SECONDS, FOLK_FRACTION

__all__ = ["main"]


def _report(finished: int, total: int) -> None:
    sys.stdout.write(f"rendered {finished} of {total} runs\n")
    sys.stdout.flush()


def main(
    out: Path,
    num_train: int = 4000,
    num_valid: int = 200,
    seed: int = 0,
    seconds: float = CLIP_SECONDS,
    soundfont: str | None = None,
    num_workers: int = NUM_WORKERS,
    folk_fraction: float = FOLK_FRACTION,
) -> None:
    """Generate music clips with captions and labels.

    Args:
        out: Folder for clips and manifests; running the command again completes an interrupted corpus.
        num_train: Number of training clips.
        num_valid: Number of held-out clips.
        seed: Seed of the random generator; equal seeds create equal corpora.
        seconds: Length of a clip.
        soundfont: "FluidR3 GM", "MuseScore General" or "Csound GM" for all clips, instead of the first two in random
            order with recorded drums in some clips. The default never uses "Csound GM", so that
            `--soundfont "Csound GM"` creates a test set with the same music in timbres that a model never met.
        num_workers: Number of synthesizer processes at a time.
        folk_fraction: Share of folk dances among all tunes; 1 = only folk dances.
    """
    make_corpus(out, num_train, num_valid, seed, seconds, soundfont, num_workers, _report, folk_fraction)
    sys.stdout.write(f"wrote {num_train} training and {num_valid} held-out clips to {out}\n")


if __name__ == "__main__":
    tyro.cli(main)
