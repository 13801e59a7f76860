"""Command that generates the toy corpus of music clips with captions, with FluidSynth and a General MIDI soundfont.

Run as `python -m musiclm_pytorch.recipes.corpus --out corpus`.
"""

import sys
from pathlib import Path

import tyro

from musiclm_pytorch.recipes.corpus.corpus import make_corpus

__all__ = ["main"]


def main(out: Path, num_train: int = 4000, num_valid: int = 200, seed: int = 0) -> None:
    """Generate music clips of 5 seconds with captions and labels.

    Args:
        out: Folder for clips and manifests; running the command again completes an interrupted corpus.
        num_train: Number of training clips.
        num_valid: Number of held-out clips.
        seed: Seed of the random generator; equal seeds create equal corpora.
    """
    make_corpus(out, num_train=num_train, num_valid=num_valid, seed=seed)
    sys.stdout.write(f"wrote {num_train} training and {num_valid} held-out clips to {out}\n")


if __name__ == "__main__":
    tyro.cli(main)
