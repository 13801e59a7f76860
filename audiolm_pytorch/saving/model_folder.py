"""Folders of composed models, with one saved module per part and a JSON file (the card) that lists the parts.

MODEL/<card>                    format version, names of the parts, and settings of the model
MODEL/<part>/config.json        constructor arguments of a part
MODEL/<part>/model.safetensors  weights of a part
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import read_versioned, temporary_folder, write_json
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import MODULE_MARKS, load_module, save_module
from audiolm_pytorch.saving.ownership import check_overwrite
from audiolm_pytorch.saving.weights import weights_of

__all__ = ["CARD_MARKS", "PART_FILES", "exact_dtype", "load_parts", "read_card", "write_model_folder"]

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
) -> list[Path]:
    """Write a model folder and return its files; an existing model is replaced only after all files are written.

    Other files in the folder do not change; a ValueError is raised if a file that would be replaced is not of a saved
    model or module. `settings` are further entries of the card. Weights are stored as `dtype`
    (None keeps their types), except in a part in `exact` that would be rounded. `exact` names submodules of a part that
    may be rounded.
    """
    folder = Path(folder)
    check_overwrite(folder / card, CARD_MARKS)
    for part in parts:
        check_overwrite(folder / part / _CONFIG, MODULE_MARKS, [folder / part / _WEIGHTS])
    # `_swap` moves the config of a part away after its weights, so that weights without a config are not of a model.
    files = [card, *(f"{part}/{file}" for part in parts for file in (_WEIGHTS, _CONFIG))]
    with temporary_folder(folder) as stage:
        new, old = stage / "new", stage / "old"
        for part, module in parts.items():
            rounded = (exact or {}).get(part)
            stored = dtype if dtype is None or rounded is None else exact_dtype(module, dtype, but=rounded)
            save_module(module, new / part, dtype=stored)
        content = {"format_version": _FORMAT_VERSION, "parts": list(parts), **settings}
        write_json(new / card, content, sealed=True)
        for place in (folder, old):
            for part in parts:
                (place / part).mkdir(parents=True, exist_ok=True)
        _swap(new, folder, old, files)
    return [folder / file for file in files]


def _swap(new: Path, folder: Path, old: Path, names: Sequence[str]) -> None:
    """Move files of `folder` to `old`, and files of `new` to `folder`; if a move fails, undo all moves.

    The card is the first of `names`. It is moved away first and moved in last, because it marks a complete model.
    """
    moves = [(folder / name, old / name) for name in names if (folder / name).exists()]
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


@typed
def read_card(path: str | Path) -> dict[str, Any]:
    """Read the card of a model folder; raise a ValueError if its format version is not supported."""
    return read_versioned(path, _FORMAT_VERSION)


@typed
def load_parts(
    folder: Path, folders: Mapping[str, Path], kinds: Mapping[str, Any], fingerprinted: Sequence[str] = ()
) -> dict[str, Any]:
    """Load the parts of a model from the folders `folders` by name; check that each part has its class in `kinds`.

    `folder` is the model folder for error messages. For the parts `fingerprinted`, fingerprints are computed too, while
    other parts are loaded.
    """
    missing = [
        f"{name}/{file}" for name, place in folders.items() for file in PART_FILES if not (place / file).is_file()
    ]
    if missing:
        raise ValueError(f"the model in {folder} lacks {', '.join(missing)}; copy the whole folder again")

    def load(name: str) -> nn.Module:
        module = load_module(folders[name], expect=kinds[name])
        if name in fingerprinted:
            part_fingerprint(module)
        return module

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(folders, pool.map(load, folders)))


@typed
def exact_dtype(module: nn.Module, dtype: torch.dtype, *, but: Sequence[str] = ()) -> torch.dtype | None:
    """Return `dtype` if it stores all weights of a module without rounding, else None; skip the submodules in `but`."""
    weights = {name: weight for name, weight in weights_of(module).items() if name.partition(".")[0] not in but}
    floats = [weight for weight in weights.values() if weight.is_floating_point()]
    return dtype if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in floats) else None
