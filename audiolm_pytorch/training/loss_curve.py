"""Loss curve of a training run as an SVG file, drawn without a plotting library."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from audiolm_pytorch.saving.files import staged_files

__all__ = ["write_loss_curve"]

_WIDTH, _HEIGHT, _MARGIN = 800, 400, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b")
_MAX_POINTS = 1000

Points = list[tuple[float, float]]


def write_loss_curve(path: Path, rows: Iterable[Mapping[str, Any]], title: str) -> None:
    """Write the losses in the rows of a metrics file by phase over steps; a dashed line is the loss of guessing.

    Phases without the metric "loss" (such as the validation of a codec) have no line. Without any loss, no file is
    written.
    """
    lines: dict[str, Points] = {}
    chances: dict[str, float] = {}
    for row in rows:
        if isinstance(row.get("loss"), int | float) and math.isfinite(row["loss"]):
            lines.setdefault(str(row["phase"]), []).append((row["step"], row["loss"]))
            if isinstance(row.get("chance"), int | float):
                chances[str(row["phase"])] = row["chance"]
    if not lines:
        return
    values = [loss for points in lines.values() for _, loss in points] + list(chances.values())
    last_step = max(step for points in lines.values() for step, _ in points)
    low, high = min(values), max(values)
    high = high if high > low else low + 1

    def place(step: float, loss: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / max(last_step, 1)
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [_text(_MARGIN, 20, f"{title}: loss"), _text(_MARGIN, _HEIGHT - 15, "step 0")]
    parts += [_text(_WIDTH - 2 * _MARGIN, _HEIGHT - 15, f"{last_step:,}"), _text(2, _MARGIN, f"{high:.4g}")]
    parts += [_text(2, _HEIGHT - _MARGIN, f"{low:.4g}")]
    corners = " ".join(place(step, loss) for step, loss in ((0, high), (0, low), (last_step, low)))
    parts.append(f'<polyline points="{corners}" fill="none" stroke="black"/>')
    for number, (phase, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = " ".join(place(step, loss) for step, loss in _thinned(points))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(_WIDTH - 3 * _MARGIN, 20 + 15 * number, f"{phase} {points[-1][1]:.4g}", colour))
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


def _thinned(points: Points) -> Sequence[tuple[float, float]]:
    """Keep about 1,000 points, with the last one."""
    stride = -(-len(points) // _MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def _text(x: float, y: float, text: str, colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'
