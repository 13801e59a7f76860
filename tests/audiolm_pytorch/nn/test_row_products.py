"""Products of few rows against float64, on every path."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.nn import row_products
from audiolm_pytorch.nn.layers import RMSNorm
from audiolm_pytorch.nn.row_products import RowProduct, prepare_norm, prepare_norm_and_product
from tests.helpers.quick import only_quick

PATHS = ["tiles", "packed", "without packing"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way in which small weights are multiplied."""
    if request.param != "tiles":
        monkeypatch.setattr(row_products, "_MIN_PACKED_ROWS", 1)
        monkeypatch.setattr(row_products, "_MIN_PACKED_WEIGHTS", 0)
    if request.param == "without packing":
        monkeypatch.setattr(row_products, "_can_pack", lambda: False)
    return request.param


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x, weight = x.double(), weight.double()
    x = x if scale is None else x * scale.double()
    x = x if shift is None else x + shift.double()
    return F.linear(x, weight, None if bias is None else bias.double())


@pytest.mark.parametrize("num_rows", only_quick([1, 2, 3, 16, 17, 40], [1, 3, 17]))
@pytest.mark.parametrize("dim_out", only_quick([1, 7, 12, 40, 48], [1, 12, 40]))
def test_row_product_equals_the_linear_layer(num_rows: int, dim_out: int, path: str) -> None:
    """With and without bias, scale and shift; a second call reads new rows and overwrites the first result."""
    torch.manual_seed(num_rows)
    x, out = torch.zeros(num_rows, 24), torch.full((num_rows, dim_out), float("nan"))
    for has_bias, has_scale, has_shift in product([False, True], repeat=3):
        # A parameter with a gradient, as the weights of a model outside of inference mode.
        weight = nn.Parameter(torch.randn(dim_out, 24))
        bias = nn.Parameter(torch.randn(dim_out)) if has_bias else None
        scale, shift = torch.randn(24) if has_scale else None, torch.randn(24) if has_shift else None
        with torch.no_grad():
            multiply = RowProduct(weight, bias, x, out, scale=scale, shift=shift)
            for _ in range(2):
                x.normal_()
                address = out.data_ptr()
                multiply()
                wanted = expected(x, weight, bias, scale, shift)
                torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
                assert out.data_ptr() == address


def test_every_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are multiplied with tiles, or with packed weights if these are large; many rows with plain weights."""
    packed: list[int] = []
    original = torch.ops.mkldnn._linear_pointwise
    if not row_products._can_pack():
        pytest.skip("the installed torch cannot pack weights")
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: packed.append(len(x)) or original(x, *rest)
    )
    parts: list[tuple[int, int]] = []
    bmm = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda rows, weight, out: parts.append(tuple(rows.shape[:2])) or bmm(rows, weight, out=out)
    )
    for size in (32, 512, 37):
        weight = torch.randn(size, 512)
        for num_rows in (1, 3, 17):
            x, out = torch.randn(num_rows, 512), torch.empty(num_rows, size)
            RowProduct(weight, None, x, out)()
            wanted = F.linear(x.double(), weight.double())
            torch.testing.assert_close(out.double(), wanted, atol=1e-3, rtol=1e-4)
    assert packed == [3]
    tiles_and_rows = [(2, 1), (2, 3), (1, 17), (32, 1), (1, 17), (1, 1), (1, 3), (1, 17)]  # no tile has 37 columns
    assert parts == tiles_and_rows


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without shift", "identity", "bfloat16"])
def test_prepared_norms_and_products_equal_the_modules(kind: str, num_rows: int, path: str) -> None:
    """For norms whose scale and shift enter the weights, and for modules that are called."""
    torch.manual_seed(num_rows)
    norm: nn.Module = RMSNorm(24)
    if kind.startswith("layer"):
        norm = nn.LayerNorm(24, bias=kind == "layer")
    elif kind == "identity":
        norm = nn.Identity()
    linear = nn.Linear(24, 12, bias=kind != "rms")
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    norm, linear = norm.to(dtype), linear.to(dtype)
    x, normed, out, alone = (torch.zeros(num_rows, size, dtype=dtype) for size in (24, 24, 12, 24))
    tolerance = {"atol": 0.1, "rtol": 0.1} if kind == "bfloat16" else {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        both, normalize = prepare_norm_and_product(norm, linear, x, normed, out), prepare_norm(norm, x, alone)
        for scale in (1.0, 1e-3, 0.0):  # the last norm is that of zeros
            x.normal_().mul_(scale)
            both()
            normalize()
            torch.testing.assert_close(alone, norm(x), **tolerance)
            torch.testing.assert_close(out, linear(norm(x)), **tolerance)
