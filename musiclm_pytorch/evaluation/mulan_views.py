"""Pictures of a joint embedding: the similarities of texts and clips, and a map of the latents (extra [plot])."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from musiclm_pytorch.evaluation.mulan_check import MuLaNCheck, modality_gap, values_of_texts
from musiclm_pytorch.evaluation.plots import new_figure, one_line, write_figure
from musiclm_pytorch.evaluation.tagging import TagTest

__all__ = ["draw_latents", "draw_similarities", "gap_plane", "label_named", "principal_plane", "sorted_clips"]

_DPI = 110
_MOST_IN_LEGEND = 30
_MOST_LETTERS = 28
# A group of clips lower than this share of the picture has no room for its name.
_LEAST_SHARE = 0.014
# More lines from texts to clips than this are a tangle.
_MOST_LINES = 500
_PLAIN_COLOURS = ((0.1, 0.4, 0.8, 1.0), (0.9, 0.4, 0.1, 1.0))
_NOT_SAID = "(not said)"
_UNKNOWN_COLOUR = (0.6, 0.6, 0.6, 1.0)


@dataclass(frozen=True)
class _Grouping:
    """Classes that things are sorted and coloured by.

    Attributes:
        names: Of the classes that occur.
        of_clips: `[c]` class of each clip, -1 = unknown.
        of_texts: `[t]` class of each text, -1 = it does not say.
    """

    names: tuple[str, ...]
    of_clips: Tensor
    of_texts: Tensor


@beartype
def label_named(tests: Sequence[TagTest], label: str | None) -> TagTest | None:
    """Choose the label that pictures are ordered and coloured by.

    Args:
        tests: Labels there are.
        label: The one wanted. None = the first.

    Returns:
        It; None where there is no label at all and none was asked for.

    Raises:
        ValueError: If there is no label of that name, naming those that there are.
    """
    if label is None:
        return tests[0] if tests else None
    for test in tests:
        if test.label == label:
            return test
    there = ", ".join(test.label for test in tests) or "none"
    raise ValueError(f"there is no label {label!r} of a few values; there are: {there}")


@beartype
def sorted_clips(tests: Sequence[TagTest], first: TagTest | None, count: int) -> list[int]:
    """Order clips by one label, then by the others in turn, then as they came; unknown classes last.

    Args:
        tests: Labels.
        first: The one that matters most.
        count: Clips there are.

    Returns:
        Indices of the clips.
    """
    keys = [test.truth.tolist() for test in ([] if first is None else [first]) + [t for t in tests if t is not first]]
    return sorted(range(count), key=lambda clip: [(key[clip] < 0, key[clip]) for key in keys])


@beartype
def principal_plane(latents: Tensor) -> tuple[Tensor, list[float]]:
    """Project vectors on their two principal components; the sign is such that the largest weight is positive.

    Args:
        latents: `[n, d]`, n and d at least 2.

    Returns:
        `[n, 2]` coordinates, and the shares of the variance that the two components hold.
    """
    centred = latents.double() - latents.double().mean(dim=0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    shares = sizes.square() / sizes.square().sum().clamp(min=1e-12)
    return centred @ axes.T, shares[:2].tolist()


@beartype
def draw_similarities(check: MuLaNCheck, path: str | Path, title: str, label: str | None = None) -> None:
    """Draw the cosine of every text with every clip, both ordered by a label.

    Args:
        check: As `check_mulan` gives it.
        path: Picture to write; the suffix chooses the format.
        title: Line above the picture.
        label: What to order by. None = the first label, or the order of the manifest where there is none.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no such label.
    """
    figure = new_figure((10.5, 9))
    axes = figure.subplots()
    first = label_named(check.tests, label)
    clips = sorted_clips(check.tests, first, len(check.audio))
    places = torch.empty(len(clips), dtype=torch.long)
    places[clips] = torch.arange(len(clips))
    # A text stands where the first of its clips stands, so that right pairs lie on the diagonal.
    earliest = places.expand_as(check.relevant).masked_fill(~check.relevant, len(clips)).amin(dim=1)
    texts = earliest.argsort(stable=True)
    cosines = check.similarities[texts][:, clips]
    low, high = torch.quantile(cosines.flatten()[:: max(1, cosines.numel() // 10**6)], torch.tensor([0.01, 0.999]))
    image = axes.imshow(cosines, cmap="magma", vmin=float(low), vmax=float(high), aspect="auto")
    figure.colorbar(image, ax=axes, label="cosine", fraction=0.04, pad=0.02)
    what = "captions" if check.are_captions else "prompts"
    axes.set_xlabel(f"{len(clips)} clips" + (f", by {_plain(first.label)}" if first else ""), parse_math=False)
    axes.set_ylabel(f"{len(texts)} {what}, each where its first clip stands")
    if first is not None:
        groups = _grouping(check, first)
        _mark_groups(axes, groups, groups.of_clips[clips], "x")
        _mark_groups(axes, groups, groups.of_texts[texts], "y")
    axes.set_title(_plain(title, 110), parse_math=False)
    write_figure(figure, path, _DPI)


def _mark_groups(axes: Any, groups: _Grouping, classes: Tensor, axis: str) -> None:
    """Name the runs of a class along an axis, with lines between them."""
    values, counts = torch.unique_consecutive(classes, return_counts=True)
    ends = counts.cumsum(0)
    draw = axes.axvline if axis == "x" else axes.axhline
    for end in ends[:-1].tolist():
        draw(end - 0.5, color="white", linewidth=0.4, alpha=0.6)
    named = [
        (float(end - count / 2 - 0.5), _NOT_SAID if value < 0 else groups.names[value])
        for value, count, end in zip(values.tolist(), counts.tolist(), ends.tolist())
        if count >= _LEAST_SHARE * len(classes)
    ]
    places, names = [place for place, _ in named], [_plain(name) for _, name in named]
    if axis == "x":
        axes.set_xticks(places, names, rotation=45, ha="right", fontsize=8, parse_math=False)
    else:
        axes.set_yticks(places, names, fontsize=8, parse_math=False)


@beartype
def draw_latents(check: MuLaNCheck, path: str | Path, title: str, label: str | None = None) -> None:
    """Draw clips and texts in the plane of their common principal components, and along the modality gap.

    Args:
        check: As `check_mulan` gives it.
        path: Picture to write; the suffix chooses the format.
        title: Line above the picture.
        label: What to colour by. None = the first label, or the modality where there is none.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no such label.
    """
    figure = new_figure((15, 6.8))
    plane, line = figure.subplots(1, 2)
    first = label_named(check.tests, label)
    groups = None if first is None else _grouping(check, first)
    audio, text = check.audio.double(), check.text.double()
    points, shares = principal_plane(torch.cat([audio, text]))
    _scatter(plane, points[: len(audio)], points[len(audio) :], groups, check.relevant)
    plane.set(xlabel=f"component 1 ({shares[0]:.0%} of the variance)", ylabel=f"component 2 ({shares[1]:.0%})")
    plane.set_title("principal components of clips and texts together", fontsize=10)
    points = gap_plane(audio, text)
    _scatter(line, points[: len(audio)], points[len(audio) :], groups, None)
    line.set(xlabel="along the line from the mean of the clips to that of the texts", ylabel="component 1 across it")
    gap = modality_gap(check.audio, check.text)
    line.set_title(f"modality gap: {gap:.2f} from mean to mean (+), all vectors being of length 1", fontsize=10)
    for place in (plane, line):
        place.set_aspect("equal", adjustable="datalim")
    _legend(figure, groups, first, "captions" if check.are_captions else "prompts")
    figure.suptitle(_plain(title, 130), parse_math=False)
    write_figure(figure, path, _DPI)


@beartype
def gap_plane(audio: Tensor, text: Tensor) -> Tensor:
    """Project latents on the line between the means of the modalities, and on what varies most across it.

    Args:
        audio: `[c, d]`.
        text: `[t, d]`.

    Returns:
        `[c + t, 2]`: distances from the middle of the two means along the line, texts towards the positive side; and
        the first principal component of what is left.
    """
    means = audio.double().mean(dim=0), text.double().mean(dim=0)
    direction = torch.nn.functional.normalize(means[1] - means[0], dim=0)
    centred = torch.cat([audio, text]).double() - (means[0] + means[1]) / 2
    along = centred @ direction
    across = centred - along[:, None] * direction
    return torch.stack([along, principal_plane(across)[0][:, 0]], dim=1)


def _scatter(axes: Any, clips: Tensor, texts: Tensor, groups: _Grouping | None, pairs: Tensor | None) -> None:
    """Clips as dots, texts as triangles, the mean of each as a cross; thin lines from texts to their first clips."""
    colours = _colours(0 if groups is None else len(groups.names))
    size = float(min(max(14_000 / (len(clips) + len(texts)), 3), 40))
    if pairs is not None and len(texts) <= _MOST_LINES:
        own = clips[pairs.long().argmax(dim=1)]
        ends = torch.stack([own, texts], dim=1)[pairs.any(dim=1)]
        axes.plot(*ends.permute(2, 1, 0), color="grey", linewidth=0.5, alpha=0.5, zorder=1)
    kinds = (
        (clips, None if groups is None else groups.of_clips, "o", _PLAIN_COLOURS[0]),
        (texts, None if groups is None else groups.of_texts, "^", _PLAIN_COLOURS[1]),
    )
    for points, classes, marker, plain in kinds:
        chosen = [plain] * len(points) if classes is None else [colours[number] for number in classes.tolist()]
        edge = "black" if marker == "^" else "none"
        axes.scatter(*points.T, c=chosen, marker=marker, s=size, alpha=0.8, edgecolors=edge, linewidths=0.5, zorder=2)
        axes.scatter(*points.mean(dim=0), c="black", marker="+", s=220, linewidths=1.6, zorder=3)


def _legend(figure: Any, groups: _Grouping | None, first: TagTest | None, what: str) -> None:
    """Say what marks and colours mean, right of the pictures."""
    from matplotlib.lines import Line2D

    colours = _PLAIN_COLOURS if groups is None else ("black", "black")
    lines = [
        Line2D([], [], linestyle="", marker=mark, color=colour, label=name)
        for mark, name, colour in (("o", "clips", colours[0]), ("^", what, colours[1]))
    ]
    if groups is not None and first is not None:
        lines.append(Line2D([], [], linestyle="", label=f"{_plain(first.label)}:"))
        palette = _colours(len(groups.names))
        shown = groups.names[:_MOST_IN_LEGEND]
        lines += [
            Line2D([], [], linestyle="", marker="s", color=palette[number], label=_plain(name))
            for number, name in enumerate(shown)
        ]
        if len(groups.names) > len(shown):
            lines.append(Line2D([], [], linestyle="", label=f"and {len(groups.names) - len(shown)} more"))
        if torch.cat([groups.of_clips, groups.of_texts]).min() < 0:
            lines.append(Line2D([], [], linestyle="", marker="s", color=_UNKNOWN_COLOUR, label=_NOT_SAID))
    legend = figure.legend(handles=lines, loc="outside right upper", fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _grouping(check: MuLaNCheck, test: TagTest) -> _Grouping:
    return _Grouping(test.values, test.truth, values_of_texts(test.truth, check.relevant))


def _colours(count: int) -> list[Any]:
    """A colour for each class, and at the end (number -1) that of an unknown class."""
    import matplotlib

    if count <= 10:
        named = [matplotlib.colormaps["tab10"](number) for number in range(count)]
    elif count <= 20:
        named = [matplotlib.colormaps["tab20"](number) for number in range(count)]
    else:
        named = [matplotlib.colormaps["turbo"](number / (count - 1)) for number in range(count)]
    return [*named, _UNKNOWN_COLOUR]


def _plain(text: str, most: int = _MOST_LETTERS) -> str:
    """One line that is not too long."""
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"
