"""Share of the words of foreign captions that the captions of a corpus contain.

Run as `python -m musiclm_pytorch.recipes.metrics.vocabulary --manifest corpus/train.jsonl --captions musiccaps.csv`.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tyro

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.mulan.text_tower import words_of

__all__ = ["known_share", "main"]

# Words without a musical meaning, which are not among the most frequent content words.
_FUNCTION_WORDS = frozenset(
    "the is and this in of with an it be there that are to on by at can as over like could may being has for no or you "
    "which one would from then but was not do up its also other some very while along have into so they their these "
    "such than if even more them he she his her we just all what where when about off out any because both each only "
    "does had how were been will who".split()
)


@typed
def known_share(known: Iterable[str], captions: Sequence[str], num_frequent: int = 300) -> dict[str, float]:
    """Compute which share of the words of captions is known.

    Returns:
        The share of all words (each word counts once per caption), and of the `num_frequent` most frequent content
        words.
    """
    vocabulary = set(known)
    counts = Counter(word for caption in captions for word in words_of([caption]))
    if not counts:
        raise ValueError("the captions contain no words; pass captions with words of at least two letters")
    frequent = [word for word, _ in counts.most_common() if word not in _FUNCTION_WORDS][:num_frequent]
    return {
        "words": sum(count for word, count in counts.items() if word in vocabulary) / counts.total(),
        "frequent content words": sum(word in vocabulary for word in frequent) / len(frequent),
    }


def main(manifest: Path, captions: Path, column: str = "caption") -> None:
    """Print the share of words of foreign captions that a corpus contains.

    Args:
        manifest: Manifest of the corpus, with the field `captions`.
        captions: CSV file with captions.
        column: Column of the CSV file.
    """
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    known = words_of(caption for row in rows for caption in row["captions"])
    with captions.open(encoding="utf-8", newline="") as file:
        foreign = [row[column] for row in csv.DictReader(file)]
    for name, share in known_share(known, foreign).items():
        sys.stdout.write(f"{name}: {share:.1%} known ({len(known)} words in the corpus)\n")


if __name__ == "__main__":
    tyro.cli(main)
