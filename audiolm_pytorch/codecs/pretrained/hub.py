"""Models of others: a local folder or a hub id to a loaded transformers model, safetensors only, with its licence."""

import logging
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.files import read_json

__all__ = ["LoadedModel", "find_folder", "load_model", "model_type_of", "require_transformers"]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "README.md"]
# What their publishers say where the model card's header says nothing (it did not for the 24 kHz EnCodec when this was
# written; the licence of its weights is an open question in facebookresearch/encodec, issue 69).
_LICENCES = {
    "facebook/encodec_24khz": "code MIT, the model card names none for the weights: see the model card",
    "facebook/encodec_32khz": "CC-BY-NC 4.0 (audiocraft, LICENSE_weights); see the model card",
    "facebook/encodec_48khz": "MIT (model card)",
    "descript/dac_16khz": "MIT (descript-audio-codec)",
    "descript/dac_24khz": "MIT (descript-audio-codec)",
    "descript/dac_44khz": "MIT (descript-audio-codec)",
    "kyutai/mimi": "CC-BY 4.0 (kyutai-labs/moshi)",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model of transformers and where it came from.

    Args:
        model: The model.
        source: Folder or hub id.
        revision: Commit of the hub, where it came from there.
        licence: Licence of the weights, as far as it is known.
    """

    model: nn.Module
    source: str = "a model in memory"
    revision: str | None = None
    licence: str = "unknown: see the model card"


def require_transformers() -> Any:
    """Import transformers, or say how to install it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError('pretrained codecs need transformers: pip install "musiclm-pytorch[pretrained]"') from error


def find_folder(
    source: str | Path, *, offline: bool = False, revision: str | None = None, cache_dir: str | Path | None = None
) -> tuple[Path, str | None]:
    """Find the files of a model; a local folder always wins.

    Args:
        source: A folder, or a hub id (`owner/name`).
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub; says nothing of a folder.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Returns:
        The folder, and the commit where it came from the hub.

    Raises:
        ImportError: If transformers (which brings the hub's client) is not installed.
        ValueError: If there is no such folder and the hub does not give it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"there is no folder {source}; give a folder of a codec, or a hub id like owner/name")
    require_transformers()
    try:
        snapshot = import_module("huggingface_hub").snapshot_download(
            source, revision=revision, cache_dir=cache_dir, allow_patterns=_FILES, local_files_only=offline
        )
    except (OSError, ValueError) as error:
        where = "the local cache (offline: nothing is downloaded)" if offline else "the Hugging Face hub"
        raise ValueError(
            f"{source} is no folder here, and {where} has no {source}"
            f"{f' at revision {revision}' if revision else ''}; check the name, "
            f"{'allow the download once' if offline else 'the connection'}, or give a local folder ({error})"
        ) from error
    return Path(snapshot), Path(snapshot).name


def model_type_of(folder: Path) -> str:
    """Read which architecture a folder in transformers' format holds.

    Raises:
        ValueError: If its `config.json` is missing, damaged or names none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no codec: there is no config.json in it")
    config = read_json(path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise ValueError(f"{path} has no model_type: it is not in the format of transformers' save_pretrained")
    return model_type


def load_model(
    source: str | Path,
    model_class: str,
    model_type: str,
    *,
    offline: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a model of transformers in float32: every weight from the file, and from safetensors alone.

    Args:
        source: A folder, or a hub id.
        model_class: Name of the class in transformers.
        model_type: What `config.json` must say.
        offline: Whether to keep off the network.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept.

    Returns:
        The model and its origin.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the folder is of another architecture, has no safetensors, or its weights do not fit.
    """
    transformers = require_transformers()
    folder, commit = find_folder(source, offline=offline, revision=revision, cache_dir=cache_dir)
    found = model_type_of(folder)
    if found != model_type:
        raise ValueError(f"{source} holds a model of type {found!r}, this codec reads {model_type!r}; see open_codec")
    if not any(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        raise ValueError(
            f"{folder} has no *.safetensors{f', only {pickles}, which unpickles code' if pickles else ''}; where you "
            f"trust it, write it again: transformers.{model_class}.from_pretrained(…).save_pretrained(…)"
        )
    try:
        model, report = getattr(transformers, model_class).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded as {model_class}: {type(error).__name__}: {error}") from error
    absent = [*sorted(report["missing_keys"]), *map(str, report["mismatched_keys"])]
    if absent:
        # transformers only warns, and leaves them random: a codec that sounds broken
        raise ValueError(f"the weights in {folder} do not fit {model_class}: missing or of another shape: {absent[:8]}")
    if report["unexpected_keys"]:
        logger.warning("%s: %d weights are not used", folder, len(report["unexpected_keys"]))
    licence = _licence_in(folder) or _LICENCES.get(str(source), LoadedModel.licence)
    return LoadedModel(model.to(torch.float32), str(source), commit, licence)


def _licence_in(folder: Path) -> str | None:
    """Read the licence from the header of a model card, if the folder has one that names it."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    header = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    named = dict(
        re.findall(r"^(license|license_name):[ \t]*([^\s#]+)", header.group(1), re.MULTILINE) if header else []
    )
    name = named.get("license_name") if named.get("license") == "other" else named.get("license")
    return f"{name} (model card)" if name else None
