"""Saved modules: safetensors for the weights, JSON for everything else, and no pickle anywhere.

A module class that can be saved carries `config` (JSON-able constructor numbers; composed parts as nested specs) and a
classmethod `from_config(config)`, and is known by its class name once decorated with `register`. Two files make a saved
module: `model.safetensors` and `config.json`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from safetensors.torch import save_file
from torch import Tensor, nn

from audiolm_pytorch.saving.cached_fingerprint import once_per_state
from audiolm_pytorch.saving.files import read_json, read_weights, staged_files, write_json

__all__ = [
    "build_module",
    "digest_of",
    "fingerprint_of",
    "load_module",
    "load_weights",
    "module_spec",
    "part_fingerprint",
    "read_config",
    "read_json",
    "register",
    "save_module",
    "weights_of",
    "write_json",
]

_FORMAT_VERSION = 1
_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

_RESERVED_KEYS = ("format_version", "class", "config", "save_id")
_registry: dict[str, type[nn.Module]] = {}


def register(cls: ModuleClass) -> ModuleClass:
    """Make a module class known by its name, so that `build_module` and `load_module` find it.

    Args:
        cls: An `nn.Module` class with a classmethod `from_config`.

    Returns:
        The class itself.

    Raises:
        TypeError: The class has no `from_config`.
        ValueError: Another class of the same name is registered already.
    """
    if not callable(getattr(cls, "from_config", None)):
        raise TypeError(f"{cls.__qualname__} cannot be registered: it needs a classmethod from_config(config)")
    known = _registry.get(cls.__name__)
    # A class defined again (a reloaded module, a notebook cell) replaces itself; another one would be shadowed.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"the name {cls.__name__} is taken by {known.__module__}.{known.__qualname__}; "
            f"rename {cls.__module__}.{cls.__qualname__}"
        )
    _registry[cls.__name__] = cls
    return cls


@beartype
def module_spec(module: nn.Module) -> dict[str, Any]:
    """Describe how a module is built: its class name and its config.

    Args:
        module: A module of a registered class.

    Returns:
        `{"class": name, "config": config}`, JSON-able.

    Raises:
        TypeError: The class is not registered or the module has no `config`.
    """
    cls = type(module)
    if _registry.get(cls.__name__) is not cls:
        raise TypeError(
            f"{cls.__name__} is not a registered module class; decorate it with audiolm_pytorch.saving.modules.register"
        )
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(f"{cls.__name__} needs an attribute or property `config` (a dict), got {type(config).__name__}")
    return {"class": cls.__name__, "config": dict(config)}


@beartype
def build_module(spec: Mapping[str, Any]) -> nn.Module:
    """Build the module that a spec describes, with fresh weights.

    Args:
        spec: `{"class": name, "config": config}`, as made by `module_spec`.

    Returns:
        The module.

    Raises:
        ValueError: A key is missing, no class of that name is registered, or the config is not one of that class.
    """
    missing = [key for key in ("class", "config") if key not in spec]
    if missing:
        raise ValueError(f"a module spec needs the keys 'class' and 'config'; {missing} missing in {sorted(spec)}")
    cls = _registry.get(spec["class"])
    if cls is None:
        raise ValueError(
            f"unknown module class {spec['class']!r}; known are {sorted(_registry)}. "
            "Import the package that defines it before loading"
        )
    try:
        return cls.from_config(spec["config"])  # type: ignore[attr-defined]
    except (TypeError, KeyError, AttributeError, BeartypeCallHintViolation) as error:
        raise ValueError(
            f"the config of {spec['class']} does not fit this release ({type(error).__name__}: {error}); it was "
            "altered, or written by another release: install that one, or save the module again"
        ) from error


@beartype
def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Collect the parameters and persistent buffers of a module, each memory once.

    Tied tensors (the same memory under two names) appear under the first name only; `load_weights` fills the others.

    Args:
        module: Any module.

    Returns:
        Name to detached tensor; the tensors share memory with the module where they can.

    Raises:
        ValueError: The state holds something that is not a tensor.
    """
    weights: dict[str, Tensor] = {}
    seen_views: set[tuple[Any, ...]] = set()
    seen_storages: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} of {type(module).__name__} is a {type(value).__name__}; only tensors can be saved"
            )
        view = _view_of(value)
        if view in seen_views:
            continue
        storage = value.untyped_storage().data_ptr()
        overlaps = value.numel() > 0 and storage in seen_storages
        seen_views.update([view] if value.numel() > 0 else [])
        seen_storages.add(storage)
        weights[name] = value.detach().clone() if overlaps else value.detach().contiguous()
    return weights


@beartype
def load_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str = "the given weights") -> None:
    """Copy weights into a module; names and shapes must agree exactly, floating types are converted.

    Args:
        module: The module to fill; its own dtypes and device stay (a float16 file fills a float32 module).
        weights: Name to tensor, as made by `weights_of`.
        where: How error messages call the weights.

    Raises:
        ValueError: Names or shapes differ; the message lists them.
    """
    weights = dict(weights)
    own = module.state_dict()
    for name in [name for name in weights if name not in own]:
        if _fill_empty_buffer(module, name, weights[name]):
            del weights[name]
    given_views = {_view_of(own[name]) for name in weights if name in own}
    missing = [name for name in own if name not in weights and _view_of(own[name]) not in given_views]
    # A buffer filled just above is in `weights` no more and was not in `own` before, so it counts as neither.
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    parts = [("missing", missing), ("not known to the module", unexpected), ("of another shape", shapes)]
    faults = [f"{what}: {_shorten(names)}" for what, names in parts if names]
    if faults:
        raise ValueError(f"{where} do not fit {type(module).__name__}; " + "; ".join(faults))
    module.load_state_dict(weights, strict=False)


@beartype
def save_module(
    module: nn.Module, folder: str | Path, extra: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a module as `model.safetensors` and `config.json`.

    Args:
        module: A module of a registered class.
        folder: Where; created where missing. Other files in it are left alone.
        extra: More JSON-able entries for `config.json` (`read_config` gives them back).
        dtype: Floating type of the stored weights, e.g. `torch.float16` for half the size; None keeps each tensor's.

    Raises:
        TypeError: The module's class is not registered.
        ValueError: `extra` uses a reserved key, something is not JSON-able, or a weight does not fit into `dtype`.
    """
    folder, extra = Path(folder), dict(extra or {})
    clash = [key for key in _RESERVED_KEYS if key in extra]
    if clash:
        raise ValueError(f"extra entries may not be called {clash}; these keys belong to the format")
    weights = weights_of(module)
    if dtype is not None:
        weights = {name: _converted(name, tensor, dtype) for name, tensor in weights.items()}
    spec = module_spec(module)
    # Two files cannot be replaced in one stroke: the id in both betrays a save that was cut between the two renames.
    save_id = digest_of(spec, weights)
    with staged_files(folder) as stage:
        save_file(weights, stage / _WEIGHTS_FILE, metadata={"save_id": save_id})
        write_json(stage / _CONFIG_FILE, {"format_version": _FORMAT_VERSION, **spec, "save_id": save_id, **extra})


@beartype
def load_module(folder: str | Path, expect: type | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Build a saved module and fill it; half-precision files are loaded as the module's own type (float32).

    Args:
        folder: A folder written by `save_module`.
        expect: The class (or a base of it) that the caller needs; None takes any.
        device: Where the module shall live.

    Returns:
        The module in eval mode.

    Raises:
        ValueError: A file is missing, the format or class is another, or the weights do not fit; names the folder.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        module = build_module(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if expect is not None and not isinstance(module, expect):
        raise ValueError(f"{folder} holds a {config['class']}, but a {expect.__name__} is needed")
    weights, metadata = read_weights(folder / _WEIGHTS_FILE)
    if metadata.get("save_id") != config.get("save_id"):
        raise ValueError(
            f"{folder / _WEIGHTS_FILE} and {_CONFIG_FILE} are not of the same save (one was interrupted or a file was "
            "exchanged); save the module again"
        )
    load_weights(module, weights, where=f"the weights in {folder}")
    return module.to(device).eval()


@beartype
def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a saved module, with any extra entries.

    Args:
        folder: A folder written by `save_module`.

    Returns:
        `{"format_version", "class", "config", …}`.

    Raises:
        ValueError: The folder or file is missing, damaged, or of a format that this version does not know.
    """
    path = Path(folder) / _CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no saved module: there is no {_CONFIG_FILE} in it")
    config = read_json(path)
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this program reads {_FORMAT_VERSION}; "
            "install the release that wrote it, or save the module again"
        )
    missing = [key for key in ("class", "config") if key not in config]
    if missing:
        raise ValueError(f"{path} lacks the keys {missing}")
    return dict(config)


@beartype
def fingerprint_of(module: nn.Module) -> str:
    """Identify a module by what it computes with: class, config, parameters and persistent buffers.

    Args:
        module: Any module; without a `config` the class name stands alone.

    Returns:
        16 hexadecimal digits of a SHA-256; independent of device and of train or eval mode.
    """
    spec = {"class": type(module).__name__, "config": getattr(module, "config", {})}
    return once_per_state(module, json.dumps(spec, sort_keys=True), lambda: digest_of(spec, weights_of(module)))


@beartype
def part_fingerprint(module: nn.Module) -> str:
    """Identify a part: by its own `fingerprint`, where it knows what does not matter, else by `fingerprint_of`."""
    fingerprint: Any = getattr(module, "fingerprint", None)
    return fingerprint_of(module) if fingerprint is None else fingerprint()


def digest_of(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Hash a JSON-able spec and named tensors (name, type, shape, bytes) into 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()[:16]


def _view_of(tensor: Tensor) -> tuple[Any, ...]:
    """Tell which memory a tensor shows and how: equal for tied tensors only; an empty tensor equals itself alone."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a floating tensor to the stored type; refuse a finite value that becomes infinite."""
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(torch.isfinite(converted), torch.isfinite(tensor)):
        raise ValueError(
            f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; store it as float32"
        )
    return converted


def _fill_empty_buffer(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Give a buffer that is registered as None (made in the first forward) its saved value; True where there is one."""
    owner_name, _, buffer_name = name.rpartition(".")
    try:
        owner = module.get_submodule(owner_name)
    except AttributeError:
        return False
    if buffer_name not in owner._buffers or owner._buffers[buffer_name] is not None:
        return False
    neighbour = next(module.parameters(), None)
    owner._buffers[buffer_name] = tensor.to(neighbour.device if neighbour is not None else "cpu", copy=True)
    return True


def _shorten(names: list[str], limit: int = 8) -> str:
    """List the first names and count the rest."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
