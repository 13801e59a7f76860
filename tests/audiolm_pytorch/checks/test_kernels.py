"""The check of kernels finds kernels that are wrong, and names them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audiolm_pytorch.checks.kernels import TOLERANCE, check_kernels, relative_error


def test_kernels_of_this_machine_are_right() -> None:
    """Torch and numpy agree to the precision of float32, far below the tolerance."""
    checks = check_kernels("cpu")
    assert len({check.name for check in checks}) == len(checks) > 15
    assert all(check.is_right and check.error < TOLERANCE / 100 for check in checks)


def _without_last_mask(queries, keys, values, attn_mask=None, **options):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.roll(1, dims=-1) | torch.eye(len(attn_mask[0, 0]), dtype=torch.bool)
    return _attention(queries, keys, values, attn_mask=attn_mask, **options)


_attention, _conv, _rfft, _scatter = F.scaled_dot_product_attention, F.conv1d, torch.fft.rfft, torch.Tensor.scatter_
# Broken kernels: owner, name, the broken version, and the only check that must fail.
BROKEN = {
    "mask": (F, "scaled_dot_product_attention", _without_last_mask, "attention with a mask"),
    "dilation": (F, "conv1d", lambda x, w, dilation=1, stride=1: _conv(x, w, stride=stride)[..., :185], "convolution"),
    "NaN": (torch.fft, "rfft", lambda x, n: _rfft(x, n=n) * torch.nan, "Fourier transform"),
    "not written": (torch.Tensor, "scatter_", lambda out, *_: out, "writes into a cache"),
    "missing": (F, "embedding", lambda *_: _not_implemented(), "embedding"),
}


def _not_implemented():
    raise NotImplementedError("no kernel of\nthis device")


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_broken_kernel_is_named(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong values, wrong lengths, NaN, results that are not written, and missing operators are found."""
    owner, name, broken, check_name = BROKEN[kernel]
    monkeypatch.setattr(owner, name, broken)
    (wrong,) = (check for check in check_kernels("cpu") if not check.is_right)
    assert wrong.name == check_name and wrong.error > 0.05
    assert wrong.detail == ("no kernel of this device" if kernel == "missing" else "")


def test_relative_error() -> None:
    """The error is relative to the largest expected value; NaN and other shapes are infinitely wrong."""
    assert relative_error(torch.tensor([1.0, 4.5]), np.array([1.0, 5.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan")]), np.array([1.0])) == float("inf")
    assert relative_error(torch.zeros(2), np.zeros(3)) == float("inf")
