"""Fingerprints: short hashes of the class, config and weights of a module."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.weights import weights_of

__all__ = ["cached_fingerprint", "digest_of", "fingerprint_of", "nameless_fingerprint", "part_fingerprint", "state_of"]

_NUM_STATE_VALUES = 32
# The last fingerprint of each module, with the facts and the tensor states that it was computed from.
_cache: WeakKeyDictionary[nn.Module, tuple[str, list[tuple[ref[Tensor], tuple[int, int]]], str]] = WeakKeyDictionary()


@typed
def fingerprint_of(module: nn.Module) -> str:
    """Hash the class, config, parameters and persistent buffers of a module into 16 hexadecimal digits.

    The hash does not depend on the device or on train or eval mode.
    """
    spec = {"class": type(module).__name__, "config": getattr(module, "config", {})}
    return cached_fingerprint(module, json.dumps(spec, sort_keys=True), lambda: digest_of(spec, weights_of(module)))


@typed
def part_fingerprint(module: nn.Module) -> str:
    """Return `module.fingerprint()` if the module has this method, else `fingerprint_of(module)`."""
    fingerprint: Any = getattr(module, "fingerprint", None)
    return fingerprint_of(module) if fingerprint is None else fingerprint()


def nameless_fingerprint(model: nn.Module, facts: list[Any]) -> str:
    """Hash the weights of a model and the JSON-able description `facts` into 16 hexadecimal digits.

    The names of the weights are not hashed, because releases of transformers differ in these names.
    """

    def digest() -> str:
        parts = []
        for tensor in weights_of(model).values():
            parts.append(f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes_of(tensor)).hexdigest()}")
        return hashlib.sha256(json.dumps([facts, sorted(parts)], sort_keys=True).encode()).hexdigest()[:16]

    return cached_fingerprint(model, json.dumps(facts, sort_keys=True), digest)


def digest_of(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Hash the JSON-able `spec` and named tensors (name, dtype, shape, bytes) into 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:16]


def cached_fingerprint(module: nn.Module, facts: str, compute: Callable[[], str]) -> str:
    """Return the fingerprint of a module; call `compute` only if weights or `facts` changed since the last call.

    Without the cache, hashing 95 million weights takes half a second per call. The cache detects in-place writes to
    weights and replaced weights (`module.half()`, EMA), and writes to `tensor.data` that change most of a tensor.
    """
    tensors = [value for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):  # inference tensors do not count writes
        return compute()
    if module in _cache:
        known_facts, states, fingerprint = _cache[module]
        is_same = len(states) == len(tensors) and all(
            known() is tensor and state == state_of(tensor) for (known, state), tensor in zip(states, tensors)
        )
        if is_same and known_facts == facts:
            return fingerprint
    fingerprint = compute()
    _cache[module] = facts, [(ref(tensor), state_of(tensor)) for tensor in tensors], fingerprint
    return fingerprint


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Return the number of writes to a tensor (0 for an inference tensor), and a hash of address, type and some values.

    The values are hashed because torch does not count writes to `tensor.data`.
    """
    values = b""
    if not tensor.is_meta and tensor.numel():
        values = bytes(_bytes_of(tensor.detach().reshape(-1)[:: -(-tensor.numel() // _NUM_STATE_VALUES)]))
    return 0 if tensor.is_inference() else tensor._version, hash((tensor.data_ptr(), tensor.dtype, values))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
