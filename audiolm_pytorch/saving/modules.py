"""Save and load modules: weights as safetensors, everything else as JSON, without pickle.

A saved module is a folder with `model.safetensors` and `config.json`. Only modules of classes that are registered with
`register` can be saved. The attribute `config` of a module contains its JSON-able constructor arguments; a submodule is
written as the spec that `module_spec` returns. If `config` differs from the constructor arguments, the class needs a
classmethod `from_config(config)`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed, usable_device
from audiolm_pytorch.saving.construction import build_within
from audiolm_pytorch.saving.files import (
    check_digest,
    digest_of_file,
    open_weights,
    read_json,
    read_versioned,
    save_tensors,
    staged_files,
    write_json,
)
from audiolm_pytorch.saving.lazy_exports import import_exports
from audiolm_pytorch.saving.ownership import check_overwrite, check_same_class
from audiolm_pytorch.saving.sharing import SharedModel
from audiolm_pytorch.saving.text import joined_lines, one_line
from audiolm_pytorch.saving.weights import check_weights, load_weights, weights_of

__all__ = [
    "SavedModule",
    "build_module",
    "constructor_arguments",
    "converted",
    "load_module",
    "module_spec",
    "read_config",
    "register",
    "registered_class",
    "save_module",
]

_FORMAT_VERSION = 1
MODULE_MARKS = ("format_version", "class", "config")
_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_RESERVED_KEYS = ("format_version", "class", "config", "weights_sha256", "sha256")

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])
_registry: dict[str, type[nn.Module]] = {}


def register(cls: ModuleClass) -> ModuleClass:
    """Class decorator that registers an `nn.Module` class by its unique name for `build_module` and `load_module`."""
    known = _registry.get(cls.__name__)
    # The same class may be defined again, by a reloaded module or a notebook cell.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"the name {cls.__name__} is taken by the class {known.__module__}.{known.__qualname__}; "
            f"rename the class {cls.__module__}.{cls.__qualname__}"
        )
    _registry[cls.__name__] = cls
    return cls


def registered_class(name: str) -> type[nn.Module] | None:
    """Return the registered class with this name, or None; lazy exports of the imported packages are searched too."""
    if name not in _registry:
        import_exports(name)
    if name not in _registry:  # perhaps a class that no package exports, beside one that is exported
        import_exports()
    return _registry.get(name)


def constructor_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor as a dict; `values` must be `locals()` in the constructor's first line."""
    return {name: value for name, value in values.items() if name not in ("self", "__class__")}


@typed
def module_spec(module: nn.Module) -> dict[str, Any]:
    """Return the JSON-able spec of a module of a registered class: `{"class": name, "config": config}`."""
    cls = type(module)
    if _registry.get(cls.__name__) is not cls:
        raise TypeError(
            f"{cls.__name__} is not a registered module class; decorate it with audiolm_pytorch.saving.modules.register"
        )
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(f"{cls.__name__} needs an attribute or property `config` (a dict), got {type(config).__name__}")
    return {"class": cls.__name__, "config": dict(config)}


@typed
def build_module(spec: Mapping[str, Any]) -> nn.Module:
    """Build a module with random weights from a spec of `module_spec`; raise a ValueError if the config is wrong."""
    if not {"class", "config"} <= spec.keys():
        raise ValueError(f"a module spec needs the keys 'class' and 'config'; got the keys {sorted(spec)}")
    cls = _class_of(spec)
    try:
        if hasattr(cls, "from_config"):
            return cls.from_config(spec["config"])
        return cls(**{name: _built_parts(value) for name, value in spec["config"].items()})
    except (ImportError, ValueError):  # a missing package, or a message of the constructor
        raise
    except Exception as error:
        raise ValueError(
            f"the config of {cls.__name__} does not fit this release of the library ({one_line(error)}); install the "
            "release that wrote the config, or save the module again"
        ) from error


def _class_of(spec: Mapping[str, Any]) -> Any:
    name = spec["class"]
    cls = registered_class(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"unknown module class {name!r:.100}; import the package that defines this class before loading, or load "
            "another module"
        )
    return cls


def _built_parts(value: Any) -> Any:
    """Build the module of a module spec, or the modules of a list of specs; return other values unchanged."""
    if isinstance(value, list):
        return [_built_parts(item) for item in value]
    return build_module(value) if isinstance(value, dict) and value.keys() == {"class", "config"} else value


@typed
def save_module(
    module: nn.Module, folder: str | Path, extra: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a module of a registered class as two files; other files in the folder are not changed.

    A saved module in the folder is replaced; a ValueError is raised if it is of another class, or if the two files are
    not of a saved module.

    Args:
        extra: Additional JSON-able entries for `config.json`; `read_config` returns them.
        dtype: Floating type of the stored weights, such as `torch.float16` for half the size; None keeps the dtypes.
            A weight with a value too large for `dtype` raises a ValueError.
    """
    folder, extra = Path(folder), dict(extra or {})
    reserved = [key for key in _RESERVED_KEYS if key in extra]
    if reserved:
        raise ValueError(f"entries of `extra` may not be called {reserved}, which are reserved names; rename them")
    check_overwrite(folder / _CONFIG_FILE, MODULE_MARKS, [folder / _WEIGHTS_FILE])
    check_same_class(folder / _CONFIG_FILE, type(module).__name__)
    weights = weights_of(module)
    if dtype is not None:
        weights = {name: converted(name, tensor, dtype) for name, tensor in weights.items()}
    spec = module_spec(module)
    with staged_files(folder) as stage:
        save_tensors(stage / _WEIGHTS_FILE, weights, {})
        # Two files cannot be replaced in one step: the digest shows a save that was interrupted between two renames.
        digest = digest_of_file(stage / _WEIGHTS_FILE)
        content = {"format_version": _FORMAT_VERSION, **spec, "weights_sha256": digest, **extra}
        write_json(stage / _CONFIG_FILE, content, sealed=True)


@typed
def load_module(folder: str | Path, expect: type | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load a saved module in eval mode; its weights have the dtypes of its constructor (float32), not of the file.

    A ValueError is raised if the files are damaged, or if the module is not of the class `expect` or a subclass. The
    random generators do not change.
    """
    folder, device = Path(folder), usable_device(device)
    config = read_config(folder)
    cls = _class_of(config)
    if expect is not None and not issubclass(cls, expect):
        raise ValueError(f"{folder} holds a {config['class']}, but a {expect.__name__} is needed")
    where = f"the weights in {folder / _WEIGHTS_FILE}"
    check_digest(folder / _WEIGHTS_FILE, str(config["weights_sha256"]))
    with open_weights(folder / _WEIGHTS_FILE) as file:
        try:
            with build_within({name: shape for name, (_, shape) in file.facts.items()}):
                module = build_module(config)
        except ValueError as error:
            raise ValueError(f"{folder}: {joined_lines(error)}") from error
        check_weights(module, file.facts, where)
        weights = file.tensors()
    load_weights(module, weights, where)
    return module.to(device).eval()


@typed
def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json`: `format_version`, `class`, `config`, `weights_sha256`, and extra entries of `save_module`."""
    path = Path(folder) / _CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a saved module: {_CONFIG_FILE} is missing; pass a folder of save_module")
    config = read_versioned(path, _FORMAT_VERSION)
    missing = [key for key in ("class", "config", "weights_sha256") if key not in config]
    if missing:
        raise ValueError(f"{path} lacks the keys {missing}; save the module again")
    return config


class SavedModule(SharedModel):
    """Base class of modules that are saved as two files; subclasses are registered with `register`.

    The classes below are loaded by `from_pretrained` of their common base class, by name.
    """

    published: ClassVar[Mapping[str, str]] = {}  # class for each `model_type` of transformers' format
    held_as: ClassVar[str | None] = None  # attribute of other modules that holds a module of this class

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        save_module(self, folder, dtype=dtype)

    @classmethod
    def _read(cls, folder: Path, source: str | Path, hub: Mapping[str, Any]) -> Any:
        config = read_json(folder / _CONFIG_FILE)
        if isinstance(config, dict) and "model_type" in config and "class" not in config:
            return cls._of_published(folder, config["model_type"], source, hub)
        if cls.held_as is None or issubclass(_class_of(read_config(folder)), cls):
            return load_module(folder, expect=cls)
        module = load_module(folder)
        part = getattr(module, cls.held_as, None)
        if not isinstance(part, cls):
            raise ValueError(f"{folder} holds a {type(module).__name__}, but a {cls.__name__} is needed")
        return part

    @classmethod
    def _of_published(cls, folder: Path, model_type: Any, source: str | Path, hub: Mapping[str, Any]) -> Any:
        """Build a module of a model in transformers' format."""
        if model_type not in [*cls.published]:
            raise ValueError(
                f"{folder} contains a model of type {model_type!r:.60}, but a {cls.__name__} is needed (published "
                f"types that can be loaded: {', '.join(sorted(cls.published)) or 'none'})"
            )
        published: Any = registered_class(cls.published[model_type])
        if not issubclass(published, cls):
            raise ValueError(f"{folder} holds the model of a {published.__name__}, but a {cls.__name__} is needed")
        return published(source, **hub)


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a floating tensor to a dtype (None keeps it); raise a ValueError if a finite value becomes infinite."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not torch.equal(torch.isfinite(result), torch.isfinite(tensor)):
        raise ValueError(
            f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; save the module as float32"
        )
    return result
