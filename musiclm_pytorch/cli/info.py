"""`musiclm info`: versions, devices and bundled models, or what is known of a model or an audio file."""

import json
import os
import platform
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from audiolm_pytorch import __version__
from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import ModelOptions, option_name
from musiclm_pytorch.cli.generate import REPEATED_OPTIONS

__all__ = ["Info"]

_CARDS = ("musiclm.json", "audiolm.json", "musicgen.json", "config.json")
_SHORT, _KNOWN = ("class", "licence", "weights"), ("instruments", "words")
_WIDTH = 100


@dataclass(frozen=True)
class Info(ModelOptions):
    """Print versions, devices and bundled models; or what is known of a model or an audio file.

    Of a file that `musiclm generate` wrote, the command that makes it again is printed.
    """

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE or MODEL]")] = None
    """Audio file, or model: the name of a bundled one, a folder, or a hub id."""
    json: bool = False
    """Print JSON."""

    def execute(self) -> int:
        """Print the facts."""
        from audiolm_pytorch.audio.formats import AUDIO_SUFFIXES
        from audiolm_pytorch.saving.sources import bundled_models, find_folder

        path = Path(self.source or ".")
        if self.source is None:
            facts = _installation()
        elif path.is_file() or path.suffix.lower() in AUDIO_SUFFIXES:
            facts = _sound(path)
        elif path.suffix and path.parent.is_dir() and not path.exists():
            raise ValueError(
                f"there is no file or folder {path}; pass an audio file, the folder of a model, a hub id like "
                f"owner/name, or the name of a bundled model: {', '.join(bundled_models())}"
            )
        else:
            folder, _ = find_folder(**self.source_of(self.source))
            facts = _model(folder, self.source)
        print(json.dumps(facts, indent=2) if self.json else "\n".join(_lines(facts)))
        return 0


def _installation() -> dict[str, Any]:
    from audiolm_pytorch.saving.sources import bundled_models

    models = {name: _model(folder, name) for name, folder in bundled_models().items()}
    known = {f"{key} of {name}": facts[key] for name, facts in models.items() for key in _KNOWN if key in facts}
    dependencies = _dependencies()
    missing = [name for name, version in dependencies.items() if version is None]
    return {
        "bundled models": {name: {key: facts[key] for key in _SHORT} for name, facts in models.items()},
        **known,
        "devices": _devices(),
        "versions": {
            "musiclm": __version__,
            "python": platform.python_version(),
            **{name: version for name, version in dependencies.items() if version is not None},
        },
        **({"optional packages that can be added": missing} if missing else {}),
    }


def _dependencies() -> dict[str, str | None]:
    """Return the versions of all packages that musiclm can use; None = not installed, as many optional ones."""
    try:
        requirements = metadata.requires("musiclm") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        requirements = ["torch", "numpy", "soundfile", "transformers"]
    found: dict[str, str | None] = {}
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found.pop("musiclm", None)
    return found


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            found[f"cuda:{number}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    elif torch.accelerator.is_available() and (device := torch.accelerator.current_accelerator()) is not None:
        found[device.type] = f"{torch.accelerator.device_count()} devices; `musiclm doctor --device {device.type}`"
    return found


def _model(folder: Path, source: str) -> dict[str, Any]:
    """Return what the files of a model state, without loading it."""
    from audiolm_pytorch.saving.sources import licence_of

    card = next((path for name in _CARDS if (path := folder / name).is_file()), None)
    if card is None:
        card = next((path for name in _CARDS if (path := folder / "model" / name).is_file()), None)  # of a run
    if card is None:
        raise ValueError(f"{source} is no audio file and contains no model; pass a model or an audio file")
    folder = card.parent
    content = json.loads(card.read_text(encoding="utf-8"))
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    facts = {
        "class": content.get("class") or {"musiclm": "MusicLM", "audiolm": "AudioLM"}.get(card.stem, "MusicGen"),
        "licence": licence_of(folder, source) or "unknown",
        "weights": f"{num_bytes / 1e6:.1f} MB",
        **{name: content[name] for name in ("parts", "bundled_parts", "sampling") if name in content},
    }
    header = _card_header(folder)
    if isinstance(header.get("instruments"), list):
        facts["instruments"] = list(map(str, header["instruments"]))
    for path in (folder / "config.json", folder / "quantizer" / "config.json"):
        if path.is_file() and (words := _known_words(json.loads(path.read_text(encoding="utf-8")))):
            facts["words"] = words
    return facts


def _card_header(folder: Path) -> dict[str, Any]:
    """Return the fields in the header of a model card."""
    from audiolm_pytorch.saving.sources import card_header

    try:
        fields = yaml.safe_load(card_header(folder))
    except yaml.YAMLError:
        fields = None
    return fields if isinstance(fields, dict) else {}


def _known_words(config: Any) -> list[str] | None:
    """Find the words of training captions in the configuration of a module or of its parts."""
    if not isinstance(config, dict):
        return None
    if config.get("known_words"):
        return list(config["known_words"])
    return next(filter(None, map(_known_words, config.values())), None)


def _sound(path: Path) -> dict[str, Any]:
    """Return format, length and comment of an audio file."""
    from audiolm_pytorch.audio.stream import open_sound

    with open_sound(path) as file:
        facts: dict[str, Any] = {
            "file": str(path),
            "format": f"{file.format} {file.subtype}",
            "sample_hz": file.samplerate,
            "channels": file.channels,
            "seconds": round(file.frames / file.samplerate, 3),
        }
        comment = file.comment
    try:
        request = json.loads(comment)
    except ValueError:
        request = comment
    if isinstance(request, dict):
        facts["generated"] = request
        if (command := _command(request)) is not None:
            facts["command"] = command
    elif comment:
        facts["comment"] = comment
    return facts


def _command(request: Mapping[str, Any]) -> str | None:
    """Return the command that makes a file again, from its comment; None = the comment lacks options or is shortened.

    Anyone can write a comment, so only the options of `REPEATED_OPTIONS` are used.
    """
    from musiclm_pytorch.generation.prompts import MAX_COMMENT_LETTERS

    text, options = request.get("text"), request.get("options")
    if not isinstance(options, dict) or not isinstance(text, str) or len(text) >= MAX_COMMENT_LETTERS:
        return None
    words = ["musiclm", "generate", *([] if "story" in options else [text])]
    for name in REPEATED_OPTIONS:
        if (value := {**request, **options}.get(name)) is not None:
            words += [option_name(name), *_words(value)]
    return shlex.join(words)


def _words(value: Any) -> list[str]:
    """Return the words of the value of an option, from JSON."""
    if isinstance(value, list):
        return [word for entry in value for word in _words(entry)]
    return [f"{value:.12g}" if isinstance(value, float) else str(value)]


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield the lines of a table of names and values."""
    width = max((len(name) for name, value in facts.items() if not isinstance(value, Mapping)), default=0)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}{printable(name)}"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list):
            lines = textwrap.wrap(printable(", ".join(map(str, value))), _WIDTH)
            yield f"{indent}{printable(name)}"
            yield from (f"{indent}  {line}" for line in lines)
        else:
            yield f"{indent}{printable(name):{width}}  {printable(value)}"
