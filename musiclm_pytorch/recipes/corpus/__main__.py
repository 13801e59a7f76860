"""Command that writes the captioned toy corpus (needs fluidsynth and its General MIDI soundfont).

python -m musiclm_pytorch.recipes.corpus --out corpus
"""

import sys
from pathlib import Path

import tyro

from musiclm_pytorch.recipes.corpus.corpus import make_corpus

__all__ = ["main"]


def main(out: Path, num_train: int = 4000, num_valid: int = 200, seed: int = 0) -> None:
    """Compose and render clips of 5 seconds with captions and labels.

    Args:
        out: Folder for clips and manifests. The same command completes an interrupted corpus.
        num_train: Number of training clips.
        num_valid: Number of held-out clips.
        seed: Seed of all random choices; equal seeds create equal corpora.
    """
    make_corpus(out, num_train=num_train, num_valid=num_valid, seed=seed)
    sys.stdout.write(f"wrote {num_train} training and {num_valid} held-out clips to {out}\n")


if __name__ == "__main__":
    tyro.cli(main)
