"""How much of the music survives a codec: attribute accuracy of real clips and of their reconstructions.

Run as `python -m musiclm_pytorch.evaluation.codec_check --codec DIR --data ../shared/data/tunes`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.audio import resample
from audiolm_pytorch.codecs.protocol import Codec
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.io import load_module
from musiclm_pytorch.evaluation.attributes import AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.measures import reconstruct
from musiclm_pytorch.evaluation.report import balanced_accuracy

__all__ = ["check_codec", "main"]


@beartype
def check_codec(
    codec: Codec,
    classifier: AttributeClassifier,
    waves: Tensor,
    sample_hz: int,
    truth: dict[str, list[str]],
    num_levels: int | None = None,
) -> dict[str, dict[str, float]]:
    """Compare the classifier on real clips and on their reconstructions.

    Args:
        codec: The codec.
        classifier: Fitted on real clips.
        waves: Real clips `[b, n]`.
        sample_hz: Their rate (Hz).
        truth: For each attribute, the true names.
        num_levels: Code levels to keep; None keeps all.

    Returns:
        For each attribute the balanced accuracies `real` and `codec`, and `same`: how often the two answers agree.
    """
    at_codec = resample(waves, sample_hz, codec.target_sample_hz)
    rebuilt = reconstruct(codec, at_codec, num_levels=num_levels)
    on_real = classifier.predict(waves, sample_hz)
    on_codec = classifier.predict(rebuilt, codec.target_sample_hz)
    return {
        name: {
            "real": balanced_accuracy(names, on_real[name]),
            "codec": balanced_accuracy(names, on_codec[name]),
            "same": sum(a == b for a, b in zip(on_real[name], on_codec[name])) / len(names),
        }
        for name, names in truth.items()
    }


def main(
    codec: Path,
    data: Path = Path("../shared/data/tunes"),
    classifier: Path | None = None,
    levels: Sequence[int] = (),
    limit: int | None = None,
    device: str = "cpu",
) -> None:
    """Print what is left of the attributes of held-out clips after a codec.

    Args:
        codec: Folder of a saved codec.
        data: Folder with train.jsonl and valid.jsonl.
        classifier: Folder of a fitted classifier; made there if it is missing.
        levels: Also try only so many code levels.
        limit: Use only the first clips.
        device: Where the codec runs.
    """
    import audiolm_pytorch.codecs.soundstream  # noqa: F401  (registers the class that load_module looks for)

    judge = fitted_classifier(data, classifier)
    module = load_module(codec, device=device)
    if not isinstance(module, Codec):
        raise ValueError(f"{codec} holds a {type(module).__name__}, which is no codec")
    items = load_items(data / "valid.jsonl").items[:limit]
    waves = load_clips(items, module.target_sample_hz)
    truth = {name: labels_of(items, name) for name in judge.classes}
    for num_levels in (None, *levels):
        scores = check_codec(module, judge, waves, module.target_sample_hz, truth, num_levels)
        for name, row in scores.items():
            kept = "all levels" if num_levels is None else f"{num_levels} levels"
            figures = "  ".join(f"{key} {100 * value:5.1f}%" for key, value in row.items())
            chance = 100 / len(judge.classes[name])
            sys.stdout.write(f"{name:12s} {kept:10s} {figures}  chance {chance:4.1f}%  n {len(items)}\n")


if __name__ == "__main__":
    tyro.cli(main)
