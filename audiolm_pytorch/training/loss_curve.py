"""Loss curves of training runs as an SVG file, drawn without a plotting library."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from audiolm_pytorch.saving.files import staged_files

__all__ = ["write_loss_curve"]

_WIDTH, _HEIGHT, _MARGIN = 800, 400, 50
_COLOURS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b"),
    *("#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#ff7f0e"),
)
_MAX_POINTS = 1000

Points = list[tuple[float, float]]


def write_loss_curve(
    path: Path, runs: Mapping[str, Iterable[Mapping[str, Any]]], title: str, metric: str = "loss"
) -> bool:
    """Write a metric of runs over steps, from the rows of their metrics files by the name of the run.

    Each phase of a run has a line, and a dashed line at the value of guessing. Phases without the metric (such as the
    loss in the validation of a codec) have no line. Without any line, no file is written. Return whether a file was
    written.
    """
    lines: dict[str, Points] = {}
    chances: dict[str, float] = {}
    for run, rows in runs.items():
        for row in rows:
            if isinstance(row.get(metric), int | float) and math.isfinite(row[metric]):
                name = f"{run} {row['phase']}".strip()
                lines.setdefault(name, []).append((row["step"], row[metric]))
                chance = row.get("chance" if metric == "loss" else f"{metric}_chance")
                if isinstance(chance, int | float):
                    chances[name] = chance
    if not lines:
        return False
    values = [loss for points in lines.values() for _, loss in points] + list(chances.values())
    last_step = max(step for points in lines.values() for step, _ in points)
    low, high = min(values), max(values)
    high = high if high > low else low + 1

    def place(step: float, loss: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / max(last_step, 1)
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [_text(_MARGIN, 20, f"{title}: {metric}"), _text(_MARGIN, _HEIGHT - 15, "step 0")]
    parts += [_text(_WIDTH - 2 * _MARGIN, _HEIGHT - 15, f"{last_step:,}"), _text(2, _MARGIN, f"{high:.4g}")]
    parts += [_text(2, _HEIGHT - _MARGIN, f"{low:.4g}")]
    corners = " ".join(place(step, loss) for step, loss in ((0, high), (0, low), (last_step, low)))
    parts.append(f'<polyline points="{corners}" fill="none" stroke="black"/>')
    for number, (phase, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = " ".join(place(step, loss) for step, loss in _thinned(points))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(_WIDTH - 10, 20 + 15 * number, f"{phase} {points[-1][1]:.4g}", colour, "end"))
        if phase in chances:
            ends = f"{place(0, chances[phase])} {place(last_step, chances[phase])}"
            parts.append(f'<polyline points="{ends}" fill="none" stroke="{colour}" stroke-dasharray="4"/>')
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    content = "\n".join(parts)
    with staged_files(path.parent) as stage:
        (stage / path.name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
            f'<rect {size} fill="white"/>\n{content}\n</svg>\n',
            encoding="utf-8",
        )
    return True


def _thinned(points: Points) -> Sequence[tuple[float, float]]:
    """Keep about 1,000 points, with the last one."""
    stride = -(-len(points) // _MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def _text(x: float, y: float, text: str, colour: str = "black", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
