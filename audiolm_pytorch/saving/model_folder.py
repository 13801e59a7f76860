"""Folders of composed models, with one saved module per part and a JSON file (the card) that lists the parts.

MODEL/<card>                    format version, names of the parts, and settings of the model
MODEL/<part>/config.json        constructor arguments of a part
MODEL/<part>/model.safetensors  weights of a part

The optional entry "bundled_parts" of a card, e.g. {"codec": "codec_16khz"}, lists parts that are not in the model
folder, but in the folder bundled/<name> of the package.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import read_versioned, temporary_folder, write_json
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import MODULE_MARKS, load_module, save_module
from audiolm_pytorch.saving.ownership import check_overwrite, is_own
from audiolm_pytorch.saving.sources import bundled_models
from audiolm_pytorch.saving.weights import weights_of

__all__ = ["CARD_MARKS", "PART_FILES", "exact_dtype", "read_card", "read_model_folder", "write_model_folder"]

_FORMAT_VERSION = 1
CARD_MARKS = ("format_version", "parts")
PART_FILES = _CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@typed
def write_model_folder(
    folder: str | Path,
    card: str,
    parts: Mapping[str, nn.Module],
    settings: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    exact: Mapping[str, Sequence[str]] | None = None,
    bundled: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a model folder and return its files; an existing model is replaced only after all files are written.

    Parts of the existing model that the new one does not have are removed. Other files in the folder do not change; a
    ValueError is raised if a file that would be replaced is not of a saved model or module. `settings` are further
    entries of the card. Weights are stored as `dtype` (None keeps their types), except in a part in `exact` that would
    be rounded. `exact` names submodules of a part that may be rounded. The parts in `bundled` are not written, since
    they equal the bundled modules with these names.
    """
    folder, available = Path(folder), _bundled_folders()
    for part, name in (bundled or {}).items():
        for value, choices in ((part, parts), (name, available)):
            if value not in choices:
                raise ValueError(f"got --bundled {part} {name}; choose one of {', '.join(choices)} for {value}")
    entries = {"parts": list(parts), **({"bundled_parts": dict(bundled)} if bundled else {})}
    for part, name in (bundled or {}).items():
        if part_fingerprint(load_module(available[name])) != part_fingerprint(parts[part]):
            raise ValueError(f"the {part} is not the bundled module {name}: their fingerprints differ; store the part")
    parts = {part: module for part, module in parts.items() if part not in (bundled or {})}
    check_overwrite(folder / card, CARD_MARKS)
    for other in sorted(folder.glob("*.json")):
        if other.name != card and is_own(other, CARD_MARKS):
            raise ValueError(
                f"{folder} contains another model ({other.name}), whose parts would be replaced; save to another folder"
            )
    for part in parts:
        check_overwrite(folder / part / _CONFIG, MODULE_MARKS, [folder / part / _WEIGHTS])
    stale = [part for part in _stored_parts(folder / card) if part not in parts]
    # `_swap` moves the config of a part away after its weights, so that weights without a config are not of a model.
    files = [card, *(f"{part}/{file}" for part in parts for file in (_WEIGHTS, _CONFIG))]
    stale_files = [f"{part}/{file}" for part in stale for file in (_WEIGHTS, _CONFIG)]
    with temporary_folder(folder) as stage:
        new, old = stage / "new", stage / "old"
        for part, module in parts.items():
            rounded = (exact or {}).get(part)
            stored = dtype if dtype is None or rounded is None else exact_dtype(module, dtype, but=rounded)
            save_module(module, new / part, dtype=stored)
        content = {"format_version": _FORMAT_VERSION, **entries, **settings}
        write_json(new / card, content, sealed=True)
        for place in (folder, old):
            for part in (*parts, *stale):
                (place / part).mkdir(parents=True, exist_ok=True)
        _swap(new, folder, old, files, stale_files)
    for part in stale:
        with suppress(OSError):  # the folder contains other files
            (folder / part).rmdir()
    return [folder / file for file in files]


def _swap(new: Path, folder: Path, old: Path, names: Sequence[str], stale_names: Sequence[str]) -> None:
    """Move files of `folder` to `old`, and the files `names` of `new` to `folder`; if a move fails, undo all moves.

    The card is the first of `names`. It is moved away first and moved in last, because it marks a complete model.
    """
    moves = [(folder / name, old / name) for name in (*names, *stale_names) if (folder / name).exists()]
    moves += [(new / name, folder / name) for name in reversed(names)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _stored_parts(file: Path) -> list[str]:
    """List the parts of an existing model, whose card is `file`, that are saved modules in its folder."""
    names = json.loads(file.read_bytes())["parts"] if is_own(file, CARD_MARKS) else []
    inside = [name for name in names if isinstance(name, str) and name.isidentifier()]  # a changed card may have ".."
    return [name for name in inside if is_own(file.parent / name / _CONFIG, MODULE_MARKS)]


@typed
def read_card(path: str | Path) -> dict[str, Any]:
    """Read the card of a model folder; raise a ValueError if its format version is not supported."""
    return read_versioned(path, _FORMAT_VERSION)


@typed
def read_model_folder(
    file: Path, kinds: Mapping[str, Any], *, required: Collection[str] = (), fingerprinted: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the card `file` of a model folder, and the parts of the model, with their classes in `kinds`.

    For the parts `fingerprinted`, fingerprints are computed too, while other parts are loaded.
    """
    card = read_card(file)
    names = card.get("parts")
    if not isinstance(names, list) or not {*required} <= {*map(str, names)} <= kinds.keys():
        raise ValueError(f"parts in {file} must be a list of {', '.join(kinds)}, got {names!r:.200}")
    places = _part_folders(card, file)
    missing = [
        f"{name}/{leaf}" for name, place in places.items() for leaf in PART_FILES if not (place / leaf).is_file()
    ]
    if missing:
        raise ValueError(f"the model in {file.parent} lacks {', '.join(missing)}; copy the whole folder again")

    def load(name: str) -> nn.Module:
        module = load_module(places[name], expect=kinds[name])
        if name in fingerprinted:
            part_fingerprint(module)
        return module

    with ThreadPoolExecutor(max_workers=4) as pool:
        return card, dict(zip(places, pool.map(load, places)))


def _part_folders(card: Mapping[str, Any], file: Path) -> dict[str, Path]:
    """Return the folder of every part of a card, which is the content of `file`."""
    parts, bundled = card["parts"], card.get("bundled_parts", {})
    if not isinstance(bundled, dict) or not set(bundled) <= set(parts):
        raise ValueError(
            f"bundled_parts in {file} must be a dict with keys from {', '.join(parts)}, got {bundled!r:.200}"
        )
    available = _bundled_folders()
    for name in bundled.values():
        if name not in list(available):
            raise ValueError(
                f"{file} needs the bundled module {name!r:.100}, but this installation has "
                f"{', '.join(available) or 'none'}; install the release that wrote the model, or export the model again"
            )
    return {part: available[bundled[part]] if part in bundled else file.parent / part for part in parts}


def _bundled_folders() -> dict[str, Path]:
    """Return the folders of the bundled modules by name."""
    return {name: folder for name, folder in bundled_models().items() if (folder / _CONFIG).is_file()}


@typed
def exact_dtype(module: nn.Module, dtype: torch.dtype, *, but: Sequence[str] = ()) -> torch.dtype | None:
    """Return `dtype` if it stores all weights of a module without rounding, else None; skip the submodules in `but`."""
    weights = {name: weight for name, weight in weights_of(module).items() if name.partition(".")[0] not in but}
    floats = [weight for weight in weights.values() if weight.is_floating_point()]
    return dtype if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in floats) else None
