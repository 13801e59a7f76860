"""How much memory tensors take at their worst, whatever the C library makes of it."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AliveTensors(TorchDispatchMode):
    """Follows the bytes of all tensors made inside, as long as anything keeps them.

    Args:
        known: Tensors that were there before; they and their views do not count.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self._bytes: dict[StorageWeakRef, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self._known:
                    self._bytes[storage] = tensor.untyped_storage().nbytes()
        self._bytes = {storage: size for storage, size in self._bytes.items() if not storage.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self._bytes.values()))
        return result
