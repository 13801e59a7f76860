"""Tags of musicnn as a second opinion: whether the tag of the requested instrument is higher than for other clips."""

import re

import torch

from musiclm_pytorch.evaluation.metric import ClipSet, Metric, UnmetNeed
from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["INSTRUMENT_TAGS", "InstrumentTags", "named_tags"]

# Tags of MagnaTagATune that name one instrument.
INSTRUMENT_TAGS = (
    "cello",
    "choir",
    "drums",
    "flute",
    "guitar",
    "harp",
    "harpsichord",
    "piano",
    "sitar",
    "synth",
    "violin",
)


def named_tags(text: str, tags: tuple[str, ...] = INSTRUMENT_TAGS) -> list[str]:
    """Return the tags that occur in a text as whole words, also in the plural."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return [tag for tag in tags if words & {tag, f"{tag}s"}]


class InstrumentTags(Metric):
    """Share of (clip, requested instrument) whose tag is above its mean over the clips that do not request it.

    The requested instrument is the label `instrument`; without this label, it is each instrument in the caption.
    """

    name = "musicnn tags"
    extractor: MusicNNExtractor

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure the clips; the mean over tags has chance level 0.5 only approximately, as tags are skewed."""
        known = self.extractor.network.tags
        tags = tuple(tag for tag in INSTRUMENT_TAGS if tag in known)
        texts = [str(item.labels.get("instrument") or item.caption or "") for item in clips.items]
        requested = [named_tags(text, tags) for text in texts]
        scores = torch.stack([self.extractor.tags(part) for part in clips.of(self.extractor)])
        is_higher: list[float] = []
        used: set[str] = set()
        for tag in tags:
            is_asked = torch.tensor([tag in of_clip for of_clip in requested])
            if not is_asked.any() or is_asked.all():
                continue
            column = scores[:, known.index(tag)]
            is_higher += (column[is_asked] > column[~is_asked].mean()).float().tolist()
            used.add(tag)
        if not is_higher:
            raise UnmetNeed(f"{clips.name}: neither labels 'instrument' nor captions name one of {', '.join(tags)}")
        note = f"{self.extractor.note()}; {', '.join(sorted(used))}"
        return [
            MetricValue.mean(
                f"{self.name} / {clips.name} / requested instrument above other clips", is_higher, None, note
            )
        ]
