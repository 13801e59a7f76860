"""Functions that find, load and export model folders, which contain a whole MusicLM (see `parts`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from beartype import beartype

from audiolm_pytorch.saving.model_folder import read_card
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.bundled import bundled_folder
from musiclm_pytorch.pretrained.parts import CARD, read_parts, save_parts

__all__ = ["export_musiclm", "load_musiclm", "model_folder"]


@beartype
def load_musiclm(name_or_folder: str | Path = "tiny", device: str | torch.device = "cpu") -> MusicLM:
    """Load a MusicLM in eval mode, without network access, with the default sampling settings in `musiclm.json`.

    The model is a bundled model, or a folder that `MusicLM.save`, `musiclm train all` or `musiclm export` wrote.
    """
    return MusicLM.from_folder(model_folder(name_or_folder), device)


@beartype
def export_musiclm(run: str | Path, out: str | Path, settings: Mapping[str, Any] | None = None) -> int:
    """Copy the model of the training run or model folder `run` to `out` with fp16 weights; return its size in bytes.

    The folder `out` must be new or empty, or contain a model, which is then replaced. `settings` are fields of
    `musiclm.json`, for example `{"num_levels": 2}` or `{"sampling": {"coarse": {"temperature": 0.8}}}`.
    """
    folder, out = model_folder(run), Path(out)
    if out.exists() and not _may_be_replaced(out):
        raise ValueError(f"{out} contains files that do not belong to a model; pass a new or empty folder")
    card, parts = read_parts(folder)
    card.update({**(settings or {}), "weights": "float16"})
    MusicLM.of_parts(parts, card, folder)
    about = {key: value for key, value in card.items() if key not in ("format_version", "parts", "bundled_parts")}
    return sum(file.stat().st_size for file in save_parts(out, parts, about, torch.float16))


@beartype
def model_folder(name_or_folder: str | Path) -> Path:
    """Find a model folder by its path, by the folder of a finished training run, or by the name of a bundled model."""
    path = Path(name_or_folder)
    for folder in (path, path / "model"):
        if (folder / CARD).is_file():
            return folder
    names = sorted(file.parent.name for file in bundled_folder("").glob(f"*/{CARD}"))
    if str(name_or_folder) in names:
        return bundled_folder(str(name_or_folder))
    if path.is_dir():
        raise ValueError(f"{path} contains no complete model ({CARD} is missing); finish it with musiclm train all")
    raise ValueError(
        f"there is no model {str(name_or_folder)!r}; pass the folder of a trained model or a bundled name: "
        f"{', '.join(names)}"
    )


def _may_be_replaced(folder: Path) -> bool:
    """Whether a folder contains a model, or nothing except files of an interrupted export."""
    if not folder.is_dir():
        return False
    if (folder / CARD).is_file():
        try:
            read_card(folder / CARD)
        except ValueError:
            return False
        return True
    return all(entry.name.startswith(".writing-") for entry in folder.iterdir())
