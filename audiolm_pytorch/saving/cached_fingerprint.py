"""Remember what was computed from a module's weights for as long as nothing has written to them."""

from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

__all__ = ["once_per_state"]

# module -> (facts, its tensors with how often each had been written to and the memory it showed, the result)
_known: WeakKeyDictionary[nn.Module, tuple[str, list[tuple[ref[Tensor], tuple[int, int]]], str]] = WeakKeyDictionary()


def once_per_state(module: nn.Module, facts: str, compute: Callable[[], str]) -> str:
    """Compute something from a module's weights, or give what was computed from these very weights before.

    Hashing 95 million weights takes half a second, and up to Python 3.11 every `isinstance` check against a protocol
    with a `fingerprint` asks for it. Memory that is exchanged (`module.half()`, averaged weights in place of the raw
    ones) is noticed; numbers written through `tensor.data` are not, as they are not by autograd.

    Args:
        module: Whose parameters and persistent buffers are looked at.
        facts: Whatever else the result depends on.
        compute: Computes the result.

    Returns:
        The result.
    """
    tensors = [value for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):  # these do not count what is written to them
        return compute()
    if module in _known:
        known_facts, states, result = _known[module]
        same = len(states) == len(tensors) and all(
            known() is tensor and state == _state_of(tensor) for (known, state), tensor in zip(states, tensors)
        )
        if same and known_facts == facts:
            return result
    result = compute()
    _known[module] = facts, [(ref(tensor), _state_of(tensor)) for tensor in tensors], result
    return result


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """How often a tensor was written to, and the memory it shows (two live tensors never share an address and type)."""
    return tensor._version, hash((tensor.data_ptr(), tensor.dtype))
