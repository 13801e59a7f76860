"""Find models in folders, among the bundled models and on the Hugging Face hub, and check their licences."""

import logging
import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from audiolm_pytorch.saving.text import joined_lines, logger_named, printable

__all__ = ["bundled_models", "card_header", "find_folder", "is_noncommercial", "licence_of"]

logger = logger_named(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Everything that a model or a tokenizer is loaded from. Pickles are left out.
_FILES = ["*.json", "*.safetensors", "README.md", "vocab.txt", "*.model", "merges.txt"]
_NONCOMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non-?commercial|research[- ]only", re.IGNORECASE)
# Licences where the header of the model card has none. That of the 24 kHz EnCodec is an open question in
# facebookresearch/encodec, issue 69.
_LICENCES = {
    "facebook/encodec_24khz": "code MIT, the model card names none for the weights: see the model card",
    "facebook/encodec_32khz": "CC-BY-NC 4.0 (audiocraft, LICENSE_weights); see the model card",
    "facebook/encodec_48khz": "MIT (model card)",
    "descript/dac_16khz": "MIT (descript-audio-codec)",
    "descript/dac_24khz": "MIT (descript-audio-codec)",
    "descript/dac_44khz": "MIT (descript-audio-codec)",
    "kyutai/mimi": "CC-BY 4.0 (kyutai-labs/moshi)",
}
_logged: set[tuple[str, str]] = set()  # sources and licences that are already in the log


def find_folder(
    source: str | Path,
    *,
    offline: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_noncommercial: bool = False,
    needs: Sequence[str] = (),
    files: Sequence[str] | None = None,
    offered: Sequence[str] = (),
) -> tuple[Path, str | None]:
    """Return the local folder of a model, and its commit on the hub (None for a local folder).

    An existing folder is preferred to a bundled model, and a bundled model to a model on the hub. A hub id is
    downloaded if necessary; with `offline`, it is looked up in the local cache only. A ValueError is raised if the card
    of the model has a non-commercial licence, unless `allow_noncommercial` is set.

    Args:
        needs: A local folder with none of these files is skipped if it has the name of a bundled model.
        files: Names of the files to download; None = all files except pickles.
        offered: The error for a missing folder names only bundled models that have one of these files.
    """
    folder, commit = Path(source).expanduser(), None
    is_model = folder.is_dir() and (not needs or any((folder / name).is_file() for name in needs))
    if not is_model:
        folder = bundled_models().get(str(source), folder)
    if not folder.is_dir():
        if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
            names = [
                name
                for name, path in bundled_models().items()
                if not offered or any((path / file).is_file() for file in offered)
            ]
            similar = get_close_matches(str(source), names, n=1)
            raise ValueError(
                f"there is no folder {source}; pass an existing folder, a hub id like owner/name, or the name of a "
                f"bundled model: {', '.join(names)}{f' (did you mean {similar[0]}?)' if similar else ''}"
            )
        folder = _downloaded(source, offline, revision, cache_dir, _FILES if files is None else files)
        commit = folder.name
    elif revision is not None:
        raise ValueError(f"got revision={revision} of the local folder {folder}; only models on the hub have revisions")
    _check_licence(str(source), licence_of(folder, source), allow_noncommercial)
    return folder, commit


def bundled_models() -> dict[str, Path]:
    """Return the folders of all bundled models by name; the packages beside this one need not be imported."""
    paths = sorted(Path(__file__).parents[2].glob("*_pytorch/bundled/*"))
    return {path.name: path for path in paths if path.is_dir()}


def card_header(folder: Path) -> str:
    """Return the YAML header of the model card in a folder; empty if there is none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return header[1] if header else ""


def licence_of(folder: Path, source: str | Path) -> str | None:
    """Read the licence from the header of the model card; return None if no licence is known."""
    fields = dict(re.findall(r"^(license|license_name):[ \t]*([^\s#]+)", card_header(folder), re.MULTILINE))
    name = fields.get("license_name") if fields.get("license") == "other" else fields.get("license")
    return f"{printable(name)} (model card)" if name else _LICENCES.get(str(source))


def is_noncommercial(licence: str) -> bool:
    """Whether the name of a licence states that commercial use is not allowed, such as cc-by-nc-4.0."""
    return _NONCOMMERCIAL.search(licence) is not None


def _check_licence(source: str, licence: str | None, allow_noncommercial: bool) -> None:
    """Log the licence of a model once per process; raise a ValueError for a non-commercial one, unless allowed."""
    if licence is None:
        return
    restricted = is_noncommercial(licence)
    if restricted and not allow_noncommercial:
        raise ValueError(
            f"the weights of {source} have the licence {licence}, which forbids commercial use; pass "
            "allow_noncommercial=True (on the command line --allow-noncommercial) for other uses"
        )
    if (source, licence) not in _logged:
        _logged.add((source, licence))
        logger.log(logging.WARNING if restricted else logging.INFO, "%s: licence of the weights %s", source, licence)


def _downloaded(
    source: str, offline: bool, revision: str | None, cache_dir: str | Path | None, files: Sequence[str]
) -> Path:
    """Return the folder of a hub id in the local cache; files that the cache lacks are downloaded."""
    try:
        snapshot = import_module("huggingface_hub").snapshot_download(
            source, revision=revision, cache_dir=cache_dir, allow_patterns=list(files), local_files_only=offline
        )
    except (OSError, ValueError) as error:
        where = "the local cache (offline: nothing is downloaded)" if offline else "the Hugging Face hub"
        model = f"{source} at revision {revision}" if revision else source
        advice = "allow the download once" if offline else "check the connection"
        raise ValueError(
            f"there is no folder {source}, and {where} has no model {model}; check the name, {advice}, "
            f"or pass a local folder ({joined_lines(error)})"
        ) from error
    return Path(snapshot)
