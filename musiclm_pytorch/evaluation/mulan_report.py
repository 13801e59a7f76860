"""The metrics of a joint embedding as tables for a reader."""

from collections.abc import Sequence
from typing import Any

from beartype import beartype

from musiclm_pytorch.evaluation.report import Metric, aligned_table

__all__ = ["mulan_head", "mulan_tables"]

_SHARES = "Shares in %, with 95% intervals over {over}.\n\n"


@beartype
def mulan_head(settings: dict[str, Any]) -> str:
    """Say what was measured on what.

    Args:
        settings: As they stand in metrics.json.

    Returns:
        Markdown.
    """
    name = f"{settings['model_class']} {settings['model_fingerprint']}"
    lines = [
        f"# Check of {settings['model']}, a joint embedding of audio and text",
        "",
        f"    {settings['command']}",
        "",
        f"- {name}: {settings['sample_hz']} Hz, {settings['dim_latent']} numbers a latent",
        f"- {settings['num_clips']} clips and {settings['num_texts']} different texts ({settings['texts']})",
    ]
    lines += [f"- prompts of {label}: {_some(list(said.values()))}" for label, said in settings["prompts"].items()]
    return "\n".join([*lines, "", ""])


def _some(words: list[str]) -> str:
    """The first few of some prompts."""
    more = f", and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(repr(word) for word in words[:3]) + more


@beartype
def mulan_tables(metrics: Sequence[Metric]) -> str:
    """Set metrics as tables: retrieval, tags, top clips, latents.

    Args:
        metrics: As `check_metrics` gives them.

    Returns:
        Markdown.
    """
    groups: dict[str, dict[str, dict[str, Metric]]] = {}
    for metric in metrics:
        group, _, rest = metric.name.partition(" / ")
        row, _, measure = rest.rpartition(" / ")
        groups.setdefault(group, {}).setdefault(row, {})[measure] = metric
    text = "## Retrieval\n\n" + _SHARES.format(over="what is asked") + _table("", groups["retrieval"])
    if "tagging" in groups:
        head = "\n## Zero-shot tags\n\nAUC: clips ranked by one prompt alone, its class against the rest. "
        head += "Balanced accuracy: the nearest of a label's prompts. Classes weighted alike. "
        text += head + _SHARES.format(over="clips") + _table("label", groups["tagging"])
    if "top clip" in groups:
        head = "\n## Top clip of a caption\n\nHas it what the caption says? Balanced: classes weighted alike. "
        text += head + _SHARES.format(over="captions") + _table("label", groups["top clip"])
    latents = groups["latents"][""]
    lines = [[measure, _shown(measure, metric)] for measure, metric in latents.items()]
    return text + "\n## Latents\n\n" + aligned_table([["of unit vectors", "value"], *lines])


def _table(what: str, rows: dict[str, dict[str, Metric]]) -> str:
    """One line a row of metrics, and after each a line of what guessing gives."""
    measures = list(next(iter(rows.values())))
    notes = any(metric.note for row in rows.values() for metric in row.values())
    lines = [[what, *(["n", "of"] if notes else ["n"]), *measures]]
    for name, row in rows.items():
        first = row[measures[0]]
        lines.append([name, str(first.count), *([first.note] if notes else [])])
        lines[-1] += [_shown(measure, row[measure]) for measure in measures]
        lines.append(["guessing", "", *([""] if notes else [])])
        lines[-1] += [_number(measure, row[measure].chance or 0.0) for measure in measures]
    return aligned_table(lines)


def _shown(measure: str, metric: Metric) -> str:
    """A metric with its interval."""
    value, low, high = (_number(measure, number) for number in (metric.value, metric.low, metric.high))
    return f"{value} [{low}, {high}]"


def _number(measure: str, value: float) -> str:
    """Shares in percent, ranks as they are, cosines and distances with three decimals."""
    if measure == "median rank":
        return f"{round(value, 1):g}"
    return f"{value:.3f}" if measure.startswith(("cosine", "modality")) else f"{100 * value:.1f}"
