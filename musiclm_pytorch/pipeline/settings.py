"""Single settings of a preset by path, such as "semantic.run.learning_rate", from YAML files and command lines."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.text import joined_lines, one_line

__all__ = ["check_setting", "read_settings", "setting_paths", "with_settings"]

PresetClass = TypeVar("PresetClass")


def setting_paths(preset: Any) -> list[str]:
    """Return the paths of all settings of a preset, and of the dataclasses in it."""
    paths = []
    for field in fields(preset):
        value = getattr(preset, field.name)
        paths += [f"{field.name}.{path}" for path in setting_paths(value)] if is_dataclass(value) else [field.name]
    return paths


@typed
def read_settings(file: str | Path) -> dict[str, Any]:
    """Read a YAML file with nested settings, and return the value of every path."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file} ({error.strerror}); pass a YAML file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a YAML file ({one_line(error)}); correct it") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{file} must contain settings such as 'semantic: {{dim: 256}}', got {content!r:.60}")
    return dict(_flat(content or {}))


def with_settings(preset: PresetClass, settings: Mapping[str, Any]) -> PresetClass:
    """Return a copy of a preset with other values at some paths; the preset itself does not change.

    A text is read as JSON where the setting is no text: 1e-4, true, null, [0.9, 0.95].
    """
    paths = setting_paths(preset)
    for path in settings:
        check_setting(path, paths)
    return _replaced(preset, settings)


def check_setting(path: str, paths: Sequence[str], shown: Callable[[str], str] = str) -> None:
    """Check that a setting is one of `paths`; the ValueError names the nearest one, as the function `shown` writes it.

    A setting of the same section is nearer than those of other sections.
    """
    if path not in paths:
        section, dot, name = path.rpartition(".")
        names = [other.removeprefix(section + dot) for other in paths if other.rpartition(".")[0] == section]
        similar = [f"{section}{dot}{other}" for other in get_close_matches(name, names, n=1)]
        similar = similar or get_close_matches(path, paths, n=1)
        advice = shown(similar[0]) if similar else "a setting that --print-config lists"
        raise ValueError(f"there is no setting {shown(path)}; use {advice}")


def _replaced(part: Any, settings: Mapping[str, Any], place: str = "") -> Any:
    """Return a copy of a dataclass; all values of a dataclass change together, since they may depend on each other."""
    changes: dict[str, Any] = {}
    for path, value in settings.items():
        name, _, rest = path.partition(".")
        if rest:
            changes.setdefault(name, {})[rest] = value
        else:
            changes[name] = _read(value, get_type_hints(type(part))[name])
    shown = ", ".join(f"{place}{name}" for name in changes)
    for name, value in changes.items():
        if is_dataclass(getattr(part, name)):
            changes[name] = _replaced(getattr(part, name), value, f"{place}{name}.")
    try:
        return replace(part, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"wrong setting {shown}: {joined_lines(error)}") from error


def _read(value: Any, hint: Any) -> Any:
    """Read a text as JSON if the setting is no text; texts that are not JSON are checked with the type."""
    if isinstance(value, str) and str not in (hint, *get_args(hint)):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{path}", inner) for path, inner in _flat(value))
        else:
            yield str(name), value
