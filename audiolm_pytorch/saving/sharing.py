"""The base class of models that are saved, loaded by name, and uploaded to the Hugging Face hub; and their cards."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed, usable_device
from audiolm_pytorch.saving.sources import find_folder, is_noncommercial
from audiolm_pytorch.saving.text import one_line, printable

__all__ = ["SharedModel", "card_text", "class_advice", "write_card"]

Shared = TypeVar("Shared", bound="SharedModel")

_CARD = "README.md"
# Levels of folders in which a model is searched, to name it in an error.
_LEVELS = "", "*/", "*/*/"
# Main files of composed models, and the classes that open them. The classes may not be imported yet.
_MAIN_FILES = {"audiolm.json": "AudioLM", "musiclm.json": "MusicLM", "musicgen.json": "MusicGen"}


class SharedModel(nn.Module):
    """Base class of models with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    The mixin of huggingface_hub is not used. It would import huggingface_hub with every module, and would write a
    second `config.json`, without the hashes by which a damaged or edited file is detected.
    """

    main_file: ClassVar[str] = "config.json"
    # Folders below the folder of a model or of a training run in which the model can be.
    subfolders: ClassVar[tuple[str, ...]] = ("",)
    pipeline_tag: ClassVar[str | None] = None  # kind of model in the header of the card

    @typed
    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, licence: str | None = None
    ) -> None:
        """Write the model to a folder, which `from_pretrained` loads; a model in the folder is replaced.

        If the folder has no `README.md`, a card with the header of the hub is written.

        Args:
            dtype: Floating type of the stored weights, for example torch.float16 for half the size; None keeps it.
            licence: Licence in the header of a new card, such as mit. Without it, the header has the licence of the
                published weights in the model, if there is exactly one.
        """
        card = card_text(self, licence)
        self._write(Path(folder), dtype)
        write_card(Path(folder), card)

    @classmethod
    @typed
    def from_pretrained(
        cls: type[Shared],
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> Shared:
        """Load a model of this class, or of a subclass, in eval mode; the random generators do not change.

        A missing model, and a file that is missing, truncated or edited, raise a ValueError.

        Args:
            source: A folder, the name of a bundled model, or a hub id (owner/name).
            offline: Whether to look up a hub id in the local cache only, without the network.
            revision: Branch, tag or commit of a model on the hub.
            allow_noncommercial: Whether to load weights whose card has a non-commercial licence.
        """
        device = usable_device(device)
        hub: dict[str, Any] = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
        hub["allow_noncommercial"] = allow_noncommercial
        folder = cls.find(source, **hub)
        # A module of published weights records the hub id from which they are.
        return cls._read(folder, folder if Path(source).expanduser().is_dir() else source, hub).to(device).eval()

    @classmethod
    def find(cls, source: str | Path, **hub: Any) -> Path:
        """Return the local folder of a saved model of this class; `from_pretrained` documents the arguments."""
        files = [str(Path(subfolder, cls.main_file)) for subfolder in cls.subfolders]
        folder, _ = find_folder(source, needs=files, **hub)
        place = next((folder / file for file in files if (folder / file).is_file()), None)
        if place is None:
            within = sorted(path.parent for level in _LEVELS for path in folder.glob(f"{level}{cls.main_file}"))
            names = ", ".join(printable(str(path)) for path in within[:8])
            advice = class_advice(folder) or "pass the folder of a saved model or of a finished training run"
            advice = f"pass the right one of the folders {names}" if within else advice
            raise ValueError(f"{folder} contains no complete {cls.__name__} ({cls.main_file} is missing); {advice}")
        return place.parent

    @typed
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload model",
        dtype: torch.dtype | None = None,
        licence: str | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub, and return the address of the commit.

        A missing repository is created. A card that the repository already has is not changed. The login is that of
        huggingface_hub (`hf auth login`, or the variable HF_TOKEN). `save_pretrained` documents `dtype` and `licence`.

        Args:
            private: Whether a new repository is private; None = the default of the owner.
            revision: Branch to write to, which is created if it is missing; None = main.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype, licence=licence)
            try:
                api = import_module("huggingface_hub").HfApi()
                api.create_repo(repo_id, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                has_card = api.file_exists(repo_id, _CARD, revision=revision)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=message,
                    ignore_patterns=[_CARD] if has_card else None,
                )
            except Exception as error:  # errors of the network have no common base class
                raise ValueError(
                    f"cannot upload the model to {repo_id} ({one_line(error)}); check the name owner/name and the "
                    "connection, and log in with: hf auth login"
                ) from error
        return str(commit.commit_url)

    @abstractmethod
    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write all files of the model except the card."""

    @classmethod
    @abstractmethod
    def _read(cls, folder: Path, source: str | Path, hub: Mapping[str, Any]) -> Any:
        """Load a model from a folder that has the main file. `hub` are the further arguments of `find_folder`."""


def class_advice(folder: Path) -> str:
    """Return advice that names the class that opens the composed model in a folder; empty if there is none."""
    files = (file for level in _LEVELS for name in _MAIN_FILES for file in sorted(folder.glob(level + name)))
    if (file := next(files, None)) is None:
        return ""
    name = _MAIN_FILES[file.name]
    return f"{name}.from_pretrained opens the {name} in {printable(str(file.parent))}"


def card_text(model: SharedModel, licence: str | None = None) -> str:
    """Return the text of a model card with the YAML header of the Hugging Face hub."""
    sources = dict(sorted(_origins(model.modules())))
    restricted = [name for name, known in sources.items() if is_noncommercial(known)]
    if licence is not None and restricted and not is_noncommercial(licence):
        raise ValueError(
            f"the model contains the weights of {restricted[0]} with the licence {sources[restricted[0]]}, which "
            f"forbids commercial use; the licence {licence} of the whole model must forbid it too"
        )
    if licence is None:
        licence = next((sources[name] for name in restricted or sources if restricted or len(sources) == 1), None)
    name, package = type(model).__name__, type(model).__module__.partition("_")[0]
    header = ["---", *_licence_lines(licence), "library_name: musiclm"]
    header += [f"pipeline_tag: {model.pipeline_tag}"] if model.pipeline_tag else []
    lines = [*header, "tags:", f"  - {package}", "---", "", f"# {name}", ""]
    lines += [f"A {name} with {sum(weight.numel() for weight in model.parameters()):,} parameters.", ""]
    lines += ["```python", f"from {type(model).__module__} import {name}", ""]
    lines += [f'model = {name}.from_pretrained("owner/name")', "```", ""]
    lines += [f"- Contains the weights of {name}, licence: {known}" for name, known in sources.items()]
    return "\n".join(lines).rstrip() + "\n"


def write_card(folder: Path, text: str) -> Path:
    """Write the card of a model, unless the folder already has a card, and return its path."""
    if not (folder / _CARD).exists():
        (folder / _CARD).write_text(text, encoding="utf-8")
    return folder / _CARD


def _origins(modules: Iterable[nn.Module]) -> set[tuple[str, str]]:
    """Return sources and licences of the published models among `modules`."""
    origins: list[Any] = [getattr(module, "origin", None) for module in modules]
    return {(origin["source"], origin["licence"]) for origin in origins if isinstance(origin, dict)}


def _licence_lines(licence: str | None) -> list[str]:
    """Return the lines of a licence in the YAML header; the hub accepts other names than its own in a second line."""
    name = (licence or "unknown").partition(" (")[0]
    if name.startswith("unknown"):
        return []
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return [f"license: {name}"] if name == slug else ["license: other", f"license_name: {slug}"]
