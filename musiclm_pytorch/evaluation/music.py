"""The metrics of generated music, and a table that compares several sets of clips."""

from collections.abc import Sequence

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import Metric
from musiclm_pytorch.evaluation.metrics.adherence import AttributeFeatures, LabelAdherence
from musiclm_pytorch.evaluation.metrics.beat import Beat
from musiclm_pytorch.evaluation.metrics.chroma import ChromaSimilarity
from musiclm_pytorch.evaluation.metrics.diversity import Diversity
from musiclm_pytorch.evaluation.metrics.frechet import FrechetDistance
from musiclm_pytorch.evaluation.metrics.inception import InceptionScore
from musiclm_pytorch.evaluation.metrics.instrument_tags import InstrumentTags
from musiclm_pytorch.evaluation.metrics.kernel import KernelDistance
from musiclm_pytorch.evaluation.metrics.kl_divergence import KLDivergence
from musiclm_pytorch.evaluation.metrics.memorisation import Memorisation, SemanticTokens
from musiclm_pytorch.evaluation.metrics.novelty import MelodySpectrogram, Novelty
from musiclm_pytorch.evaluation.metrics.text_retrieval import TextRetrieval
from musiclm_pytorch.evaluation.metrics.text_similarity import TextSimilarity
from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor
from musiclm_pytorch.evaluation.report import MetricValue, aligned_table

__all__ = ["comparison_table", "music_metrics", "name_parts"]


@typed
def music_metrics(
    *,
    joint: Sequence[JointEmbedder] = (),
    musicnn: MusicNNExtractor | None = None,
    classifier: AttributeClassifier | None = None,
    tokens: SemanticTokens | None = None,
) -> list[Metric]:
    """List the metrics that can be computed with the given models; several need no model."""
    metrics: list[Metric] = []
    embedders = [*([] if musicnn is None else [musicnn]), *joint]
    for embedder in embedders:
        metrics += [FrechetDistance(embedder), KernelDistance(embedder), Diversity(embedder)]
    if musicnn is not None:
        metrics += [KLDivergence(musicnn), InceptionScore(musicnn), InstrumentTags(musicnn)]
    for model in joint:
        metrics += [TextSimilarity(model), TextRetrieval(model), Novelty(model)]
    if classifier is not None:
        features = AttributeFeatures(classifier)
        metrics += [LabelAdherence(features), Novelty(features)]
    metrics += [Beat(), ChromaSimilarity(), Novelty(MelodySpectrogram())]
    return metrics if tokens is None else [*metrics, Memorisation(tokens)]


@typed
def name_parts(value: MetricValue) -> tuple[str, str]:
    """Divide the name `metric / set / measure` of a value into `metric / measure` and the set."""
    metric, clips, *measure = value.name.split(" / ")
    return " / ".join([metric, *measure]), clips


@typed
def comparison_table(values: Sequence[MetricValue]) -> str:
    """Format values as a Markdown table with a row per measure and a column per set of clips.

    A cell has the value and its 95% interval. The last columns are the chance level and the number of clips of the
    first set, and the embedder with its windows and the hash of its weights.
    """
    sets = list(dict.fromkeys(name_parts(value)[1] for value in values))
    rows: dict[str, dict[str, MetricValue]] = {}
    for value in values:
        measure, clips = name_parts(value)
        rows.setdefault(measure, {})[clips] = value
    cells = [["", *sets, "chance", "n", "computed from"]]
    for measure, of_sets in rows.items():
        first = next(iter(of_sets.values()))
        texts = [of_sets[name].text(_digits(of_sets[name].value)) if name in of_sets else "" for name in sets]
        chance = "" if first.chance is None else f"{first.chance:.{_digits(first.chance)}f}"
        cells.append([measure, *texts, chance, str(first.count), first.note])
    return aligned_table([[cell.replace("|", "/") for cell in line] for line in cells])


def _digits(value: float) -> int:
    """Return the number of decimals, for about three significant digits."""
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
