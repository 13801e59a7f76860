"""Load models (only from safetensors) and tokenizers of transformers, from a folder or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from audiolm_pytorch.saving.construction import build_within
from audiolm_pytorch.saving.files import open_weights, read_json
from audiolm_pytorch.saving.sources import find_folder, licence_of
from audiolm_pytorch.saving.text import logger_named, one_line
from audiolm_pytorch.saving.tokenizer_json import rust_errors, tokenizer_of_json

__all__ = [
    "LoadedModel",
    "load_model",
    "load_tokenizer",
    "model_of",
    "model_settings",
    "model_type_of",
    "portable_origin",
    "require_transformers",
]

logger = logger_named(__name__)

_PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"
# Files that may hold the vocabulary of a tokenizer.
_VOCABULARIES = ["tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model"]
# Settings of transformers that do not describe the model, and change from release to release.
_VOLATILE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "format_version")


@dataclass(frozen=True)
class LoadedModel:
    """A model loaded with transformers, its origin, and the settings of its feature extractor (`preprocessor`).

    `source` is a local folder or a hub id; `revision` is the commit on the hub, and None for a local folder.
    """

    model: nn.Module
    source: str = "a model in memory"
    revision: str | None = None
    licence: str = "unknown: see the model card"
    preprocessor: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any]:
        """Source, revision and licence of the model as a JSON-able dict."""
        return {"source": self.source, "revision": self.revision, "licence": self.licence}


def require_transformers() -> Any:
    """Import the package transformers; if it is not installed, raise an ImportError with the `pip install` command."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError('published models need transformers: pip install "musiclm[pretrained]"') from error


def model_type_of(folder: Path) -> str:
    """Read `model_type` from the `config.json` of a folder in transformers' format."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; pass a model folder written by save_pretrained")
    config = read_json(path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise ValueError(f"{path} has no entry model_type; pass a model folder written by save_pretrained")
    return model_type


def load_model(
    source: str | Path | LoadedModel, model_classes: Mapping[str, str], *, unneeded: Sequence[str] = (), **hub: Any
) -> LoadedModel:
    """Load a model of transformers in float32; every weight must be in the safetensors files.

    Args:
        source: Local folder or hub id, as in `find_folder`; a loaded model is returned unchanged.
        model_classes: Name of the transformers class for each accepted `model_type`.
        unneeded: Prefixes of names of weights that may be missing, because the caller does not use these weights.
        **hub: Further arguments of `find_folder`.
    """
    if isinstance(source, LoadedModel):
        settings: Any = source.model.config
        if settings.model_type not in model_classes:
            raise ValueError(
                f"models of type {settings.model_type!r} are not supported; pass a model of a type in "
                f"{sorted(model_classes)}"
            )
        return source
    transformers = require_transformers()
    folder, commit = find_folder(source, **hub)
    model_type = model_type_of(folder)
    if model_type not in model_classes:
        raise ValueError(
            f"{source} has the model type {model_type!r}; pass a model of type {' or '.join(map(repr, model_classes))}"
        )
    model_class = model_classes[model_type]
    if not any(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        found = f", only {pickles}, which can run code" if pickles else ""
        raise ValueError(
            f"{folder} has no file *.safetensors{found}; if you trust the model, write it again with "
            f"transformers.{model_class}.from_pretrained(…).save_pretrained(…)"
        )
    try:
        _check_sizes(folder, getattr(transformers, model_class))
        model, report = getattr(transformers, model_class).from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they raise an error below, with their names
        )
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded as {model_class}: {one_line(error, 2000)}") from error
    missing = (name for name in report["missing_keys"] if not name.startswith(tuple(unneeded)))
    absent = [*sorted(missing), *sorted(map(str, report["mismatched_keys"]))]
    if absent:
        # transformers only warns and leaves them random.
        raise ValueError(
            f"the weights in {folder} do not fit {model_class}; some are missing or of another shape: {absent[:8]}"
        )
    if report["unexpected_keys"]:
        logger.warning("%s: %d weights of the file are not used by the model", folder, len(report["unexpected_keys"]))
    licence = licence_of(folder, source) or LoadedModel.licence
    return LoadedModel(model.to(torch.float32), str(source), commit, licence, _preprocessor_in(folder))


def _check_sizes(folder: Path, model_class: Any) -> None:
    """Build a model from its config without memory for weights; raise a ValueError if its files have far fewer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with open_weights(path) as file:
            shapes |= {f"{path.name} {name}": shape for name, (_, shape) in file.facts.items()}
    config = model_class.config_class.from_pretrained(str(folder), local_files_only=True)
    with build_within(shapes):
        model_class(config)


def load_tokenizer(source: str | Path, **hub: Any) -> Tokenizer:
    """Load a text tokenizer of transformers as a `tokenizers.Tokenizer`, which can be saved as one JSON string.

    The tokenizer adds the special tokens of the model, and does not truncate or pad. `find_folder` documents the
    arguments. A ValueError is raised for a tokenizer that is not a fast tokenizer of transformers.
    """
    transformers = require_transformers()
    folder, _ = find_folder(source, **hub)
    # Without a vocabulary, transformers makes an empty tokenizer and does not warn.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"{folder} has no tokenizer; the folder needs one of the files {_VOCABULARIES}")
    # The file is checked before transformers reads it. Alone, without other files, it is a whole tokenizer.
    own_file = folder / "tokenizer.json"
    own = None
    try:
        if own_file.is_file():
            own = tokenizer_of_json(own_file.read_text(encoding="utf-8"))
            if not (folder / "tokenizer_config.json").is_file():
                return own  # transformers would add the tokens that are usual for the model type
        with rust_errors(f"transformers cannot read the tokenizer in {folder}"):
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            loaded = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
            return tokenizer_of_json(loaded.backend_tokenizer.to_str())
    except ValueError as error:
        if own is not None:
            return own
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({one_line(error, 2000)}); save it as tokenizer.json with "
            "save_pretrained of a fast tokenizer"
        ) from error


def model_of(settings: Mapping[str, Any], model_classes: Mapping[str, str]) -> nn.Module:
    """Build a model of transformers with random weights from the settings that `model_settings` returned."""
    model_class = getattr(require_transformers(), model_classes[settings["model_type"]])
    return model_class(model_class.config_class.from_dict(dict(settings)))


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the JSON-able config of a model, without entries that differ between releases of transformers."""
    config: Any = model.config
    return {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}


def portable_origin(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a model for a saved file; the path of a local folder is replaced by the folder's name."""
    return {**origin, "source": origin["source"] if origin["revision"] else Path(origin["source"]).name}


def _preprocessor_in(folder: Path) -> dict[str, Any]:
    if (folder / _PREPROCESSOR).is_file():
        return dict(read_json(folder / _PREPROCESSOR))
    if (folder / _PROCESSOR).is_file():
        return dict(read_json(folder / _PROCESSOR).get("feature_extractor", {}))
    return {}
