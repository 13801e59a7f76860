"""Signs of damage: outputs of modules that are not finite, and files that are pointers of Git LFS."""

from torch import Tensor, nn

from audiolm_pytorch.checks.tracing import is_traced

__all__ = ["LFS_POINTER", "POINTER_REASON", "check_finite"]

# First bytes of what Git LFS leaves in place of a large file.
LFS_POINTER = b"version https://git-lfs"
POINTER_REASON = "is a pointer of Git LFS; download the file with git lfs pull"


def check_finite(values: Tensor, module: nn.Module, name: str, mask: Tensor | None = None) -> Tensor:
    """Return values that a module has computed; raise a ValueError if a value is NaN or infinity.

    A search for the nearest code vector would return code 0 for them. `mask`, of the shape of `values` without its last
    dimensions, is False at padding. Nothing is checked in traced code.
    """
    if is_traced():
        return values
    is_finite = values.isfinite()
    if mask is not None:
        is_finite = is_finite.flatten(mask.ndim).all(-1) | ~mask
    if not is_finite.all():
        precision = str(values.dtype).removeprefix("torch.")
        raise ValueError(
            f"{type(module).__name__}: the {name} are not finite (NaN or infinity) in {precision}; the weights are "
            "damaged, or overflow in this precision: look for NaN in the weights, or compute in float32"
        )
    return values
