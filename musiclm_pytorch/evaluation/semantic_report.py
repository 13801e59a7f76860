"""The semantic check as tables, and the verdict: which layer, and at which k its tokens beat those of log-mel."""

from collections.abc import Sequence
from dataclasses import dataclass

from beartype import beartype

from musiclm_pytorch.evaluation.report import Metric, aligned_table
from musiclm_pytorch.evaluation.semantic_scores import FRONT_END, LOG_MEL, OWN_TOKENS, Reading, Score

__all__ = ["SemanticVerdict", "TokenVerdict", "judge", "score_tables", "verdict_tables"]

# What language models need of semantic tokens: melody and words. Speaker and instrument are sound, not content.
CONTENT = ("pitch class", "digit")
_CONTENT_OF_TOKENS = ((Reading.TOKEN, "pitch class"), (Reading.TOKEN, "digit"), (Reading.HISTOGRAM, "digit"))
# A loss of less than that many points is borne for a win elsewhere.
_BEARABLE_LOSS = 0.02


@dataclass(frozen=True)
class TokenVerdict:
    """Tokens of a layer against tokens of a baseline at equal k.

    Attributes:
        clusters: k.
        layer: The layer's view.
        baseline: The view it is compared with.
        gains: Differences in content, in 0..1.
        wins: Content measures whose interval lies above zero.
        losses: Content measures whose interval lies below zero.
        holds: Whether it is ahead in some content measure, and behind in none by more than two points.
    """

    clusters: int
    layer: str
    baseline: str
    gains: tuple[Metric, ...]
    wins: tuple[str, ...]
    losses: tuple[str, ...]
    holds: bool


@dataclass(frozen=True)
class SemanticVerdict:
    """What follows from the scores.

    Attributes:
        best_layer: The layer whose linear probes have the best mean of pitch class and digit.
        content: That mean, in 0..1.
        gains: What its linear probes have over those on each baseline.
        best_token_layers: For each k the layer whose tokens have the best mean of the content measures.
        tokens: Every layer against every baseline, for each k.
    """

    best_layer: str
    content: float
    gains: tuple[Metric, ...]
    best_token_layers: dict[int, str]
    tokens: tuple[TokenVerdict, ...]


@beartype
def judge(scores: Sequence[Score]) -> SemanticVerdict:
    """Compare layers with each other and with the baselines.

    Args:
        scores: As `check_semantic` gives them.

    Returns:
        The verdict.
    """
    table = {(score.view, score.key): score for score in scores}
    views = list(dict.fromkeys(score.view for score in scores))
    baselines = [view for view in views if view in (LOG_MEL, FRONT_END)]
    layers = [view for view in views if view not in baselines]

    def content(view: str) -> float:
        return sum(table[view, (Reading.LINEAR, probe, None)].value for probe in CONTENT) / len(CONTENT)

    best = max(layers, key=content)
    gains = [
        score.gain_over(table[baseline, score.key])
        for baseline in baselines
        for score in scores
        if score.view == best and score.reading is Reading.LINEAR
    ]
    tokens, best_token_layers = [], {}
    for k in dict.fromkeys(score.clusters for score in scores if score.clusters is not None):
        ranked = {
            layer: sum(table[layer, (reading, probe, k)].value for reading, probe in _CONTENT_OF_TOKENS)
            for layer in layers
        }
        best_token_layers[k] = max(ranked, key=lambda layer: ranked[layer])
        for layer in layers:
            own = [table[layer, (reading, probe, k)] for reading, probe in _CONTENT_OF_TOKENS]
            for baseline in baselines:
                others = [table[baseline, score.key] for score in own]
                tokens.append(_token_verdict(k, layer, baseline, own, others))
    return SemanticVerdict(best, content(best), tuple(gains), best_token_layers, tuple(tokens))


def _token_verdict(
    clusters: int, layer: str, baseline: str, own: Sequence[Score], others: Sequence[Score]
) -> TokenVerdict:
    """Compare tokens with tokens in every content measure."""
    gains = tuple(one.gain_over(other) for one, other in zip(own, others))
    names = [_measure(score) for score in own]
    wins = tuple(name for name, gain in zip(names, gains) if gain.low > 0)
    losses = tuple(name for name, gain in zip(names, gains) if gain.high < 0)
    values = [gain.value for gain in gains]
    return TokenVerdict(
        clusters, layer, baseline, gains, wins, losses, max(values) > 0 and min(values) >= -_BEARABLE_LOSS
    )


def _measure(score: Score) -> str:
    """A measure of tokens as the tables call it."""
    return f"{score.probe} of a clip" if score.reading is Reading.HISTOGRAM else score.probe


@beartype
def score_tables(metrics: Sequence[tuple[Score, Metric]]) -> str:
    """Set scores as tables: one of the linear probes, one of k-means tokens for every k, one of a tokenizer's own.

    Args:
        metrics: Scores with their metrics.

    Returns:
        Markdown.
    """
    # k-means of the layers may have as many clusters as the tokenizer: each has a table of its own
    parts: dict[tuple[bool, int | None], list[tuple[Score, Metric]]] = {}
    for score, metric in metrics:
        parts.setdefault((score.view == OWN_TOKENS, score.clusters), []).append((score, metric))
    return "Share of right answers on held-out clips in %, with 95% intervals over clips.\n\n" + "\n".join(
        _heading(own, k) + _table(part) for (own, k), part in parts.items()
    )


def _heading(own: bool, clusters: int | None) -> str:
    """What stands above a table."""
    if clusters is None:
        return "## Linear probes on frames\n\n"
    text = (
        f"## Own tokens, k = {clusters}\n\nThose that the tokenizer gives.\n"
        if own
        else f"## Tokens, k = {clusters}\n\n"
    )
    return (
        f"{text}From one token: pitch class, digit, speaker of the frame. From the tokens' histogram: of the clip.\n\n"
    )


def _table(metrics: Sequence[tuple[Score, Metric]]) -> str:
    """One line a view, one column a measure, and a line for guessing."""
    views = list(dict.fromkeys(score.view for score, _ in metrics))
    columns = [score for score, _ in metrics if score.view == views[0]]
    cells = {(score.view, score.key): _percent(metric) for score, metric in metrics}
    head = ["features", *(f"{_measure(score)}{' (balanced)' if score.balanced else ''}" for score in columns)]
    lines = [[view, *(cells[view, column.key] for column in columns)] for view in views]
    return aligned_table([head, *lines, ["guessing", *(f"{100 * column.chance:.1f}" for column in columns)]])


def _percent(metric: Metric, signed: bool = False) -> str:
    """A share in percent, or a difference in points, with its interval."""
    form = "+.1f" if signed else ".1f"
    value, low, high = (format(100 * number, form) for number in (metric.value, metric.low, metric.high))
    return f"{value} [{low}, {high}]"


@beartype
def verdict_tables(verdict: SemanticVerdict) -> str:
    """Set the verdict in words and tables.

    Args:
        verdict: As `judge` gives it.

    Returns:
        Markdown.
    """
    text = f"## Verdict\n\nBest layer for content: {verdict.best_layer} "
    text += f"(mean of pitch class and digit in the linear probes {100 * verdict.content:.1f}%).\n\n"
    names = list(dict.fromkeys(metric.name.split(" / ")[2] for metric in verdict.gains))
    rows = dict.fromkeys(metric.name.split(" / ")[0] for metric in verdict.gains)
    cells = {tuple(metric.name.split(" / ")[::2]): _percent(metric, signed=True) for metric in verdict.gains}
    text += aligned_table([["points", *names], *([row, *(cells[row, name] for name in names)] for row in rows)])
    if not verdict.tokens:
        return text
    text += (
        "\nTokens against k-means of the baselines at equal k, in points; * marks the best layer of each k. The last "
    )
    text += "column says whether tokens are ahead somewhere in content and nowhere behind by more than 2 points.\n\n"
    measures = [
        f"{probe} of a clip" if reading is Reading.HISTOGRAM else probe for reading, probe in _CONTENT_OF_TOKENS
    ]
    lines = [["k", "tokens of", "against", *measures, "wins", "loses", "holds"]]
    for one in verdict.tokens:
        mark = "*" if verdict.best_token_layers[one.clusters] == one.layer else ""
        gains = [_percent(gain, signed=True) for gain in one.gains]
        words = [", ".join(one.wins) or "-", ", ".join(one.losses) or "-", "yes" if one.holds else "no"]
        lines.append([str(one.clusters), one.layer + mark, one.baseline, *gains, *words])
    return text + aligned_table(lines)
