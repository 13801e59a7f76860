"""Load and save the parts of a MusicGen: published weights in two formats, and the model folder of this library."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.lm.compatibility import check_loadable
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.model_folder import read_model_folder, write_model_folder
from audiolm_pytorch.saving.sharing import class_advice
from audiolm_pytorch.saving.sources import find_folder, licence_of
from musiclm_pytorch.musicgen.audiocraft_format import AUDIOCRAFT_FILES, read_audiocraft
from musiclm_pytorch.musicgen.parts import MusicGenParts
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.musicgen.transformers_format import MODEL_TYPES, read_transformers

__all__ = ["CARD", "find_musicgen", "is_musicgen", "load_musicgen_parts", "read_own_parts", "write_own_parts"]

CARD = "musicgen.json"
# Of the model, below the folder of a trainer or of `musiclm train musicgen`.
_RUN_FOLDERS = ("musicgen", "musicgen/musicgen")
_MAIN_FILES = (CARD, *(f"{folder}/{CARD}" for folder in _RUN_FOLDERS), "config.json", AUDIOCRAFT_FILES[0])
_PARTS: dict[str, Any] = {"transformer": MusicGenTransformer, "codec": Codec, "text_conditioner": TextEncoder}


def load_musicgen_parts(
    source: str | Path, text_conditioner: TextEncoder | None, hub: Mapping[str, Any]
) -> MusicGenParts:
    """Load the parts of a model from a folder or the hub; `MusicGen.from_pretrained` documents the arguments."""
    folder, commit = find_musicgen(source, **hub)
    if commit is not None and not (folder / CARD).is_file() and not _is_transformers(folder):
        folder, commit = find_folder(source, files=[*AUDIOCRAFT_FILES, "README.md"], **hub)
    licence = licence_of(folder, source) or LoadedModel.licence
    origin = {"source": str(source), "revision": commit, "licence": licence}
    if (folder / CARD).is_file():
        loaded = read_own_parts(folder)
    elif _is_transformers(folder):
        loaded = read_transformers(folder, origin)
    elif (folder / AUDIOCRAFT_FILES[0]).is_file():
        return read_audiocraft(folder, origin, text_conditioner, **hub)
    else:
        advice = class_advice(folder) or (
            f"pass a folder with {CARD}, with the config.json and the safetensors of transformers, or with "
            f"audiocraft's {' and '.join(AUDIOCRAFT_FILES)}"
        )
        raise ValueError(f"{folder} has no MusicGen; {advice}")
    return loaded if text_conditioner is None else replace(loaded, text_conditioner=text_conditioner)


def find_musicgen(source: str | Path, **options: Any) -> tuple[Path, str | None]:
    """Return the local folder of a model, which can be in the folder of its training, and its commit on the hub."""
    folder, commit = find_folder(source, needs=_MAIN_FILES, **options)
    return next((folder / run for run in ("", *_RUN_FOLDERS) if (folder / run / CARD).is_file()), folder), commit


def is_musicgen(source: str | Path, **hub: Any) -> bool:
    """Whether a folder or a hub id has a MusicGen; only JSON files are downloaded."""
    folder, commit = find_musicgen(source, files=["*.json"], offered=("musiclm.json", CARD), **hub)
    if (folder / CARD).is_file() or _model_type(folder) in MODEL_TYPES:
        return True
    # Models on the hub with only the files of audiocraft have no JSON files.
    return (folder / AUDIOCRAFT_FILES[0]).is_file() or (commit is not None and not any(folder.rglob("*.json")))


def read_own_parts(folder: Path) -> MusicGenParts:
    """Read the parts of a model in the format of this library."""
    _, parts = read_model_folder(folder / CARD, _PARTS, required=("transformer", "codec"))
    return MusicGenParts(parts["transformer"], parts["codec"], parts.get("text_conditioner"))


def write_own_parts(
    folder: Path, parts: MusicGenParts, dtype: torch.dtype | None, bundled: Mapping[str, str] | None = None
) -> list[Path]:
    """Write the parts of a model in the format of this library; see `write_model_folder`."""
    check_loadable([parts.transformer], codec=parts.codec, text_conditioner=parts.text_conditioner)
    modules: Mapping[str, Any] = {name: getattr(parts, name) for name in _PARTS}
    exact = {"codec": (), "text_conditioner": ()}  # their fingerprints must not change
    stored = {name: part for name, part in modules.items() if part is not None}
    return write_model_folder(folder, CARD, stored, {}, dtype, exact, bundled)


def _is_transformers(folder: Path) -> bool:
    """Whether a folder has a MusicGen in the format of transformers, with its weights as safetensors."""
    return any(folder.glob("*.safetensors")) and _model_type(folder) in MODEL_TYPES


def _model_type(folder: Path) -> Any:
    """Return `model_type` in the `config.json` of a folder; None if there is none."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    return config.get("model_type") if isinstance(config, dict) else None
