import pytest
import torch
from torch import Tensor

from musiclm_pytorch.quantizer import residual_kmeans as module
from musiclm_pytorch.quantizer.residual_kmeans import residual_kmeans


def _points(size: int, clusters: int = 9) -> Tensor:
    """Points around a few centres, those around fewer: structure at two levels."""
    generator = torch.Generator().manual_seed(1)
    coarse = 3 * torch.randn(clusters, 6, generator=generator)
    fine = torch.randn(4, 6, generator=generator)
    picks = torch.randint(clusters * 4, (size,), generator=generator)
    return coarse[picks // 4] + fine[picks % 4] + 0.05 * torch.randn(size, 6, generator=generator)


def _left_over(points: Tensor, codebooks: Tensor) -> list[float]:
    """Share of the variance that is left after each level."""
    residual, shares = points, []
    for codebook in codebooks:
        residual = residual - codebook[torch.cdist(residual, codebook).argmin(dim=1)]
        shares.append(float(residual.square().sum() / (points - points.mean(dim=0)).square().sum()))
    return shares


@pytest.fixture(params=[2**40, 0], ids=["exact", "batches"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """K-means on all points at once, and in (few) mini-batches."""
    monkeypatch.setattr(module, "_MAX_LLOYD_DISTANCES", request.param)
    monkeypatch.setattr(module, "_MIN_BATCHES", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("each_way")
def test_every_level_codes_what_is_left() -> None:
    """Planted structure of two levels is found, exactly and in mini-batches, and the same again for the same seed."""
    points = _points(4000)
    codebooks = residual_kmeans(points, 3, 9, seed=2)
    shares = _left_over(points, codebooks)
    assert shares[0] < 0.25 and shares[1] < 0.1 and shares[2] < 0.8 * shares[1]
    assert codebooks.shape == (3, 9, 6) and codebooks.dtype == torch.float32
    assert torch.equal(codebooks, residual_kmeans(points, 3, 9, seed=2))
    assert not torch.equal(codebooks, residual_kmeans(points, 3, 9, seed=3))


@pytest.mark.slow
@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("distinct", [1, 5])
def test_fewer_points_than_codes_may_differ(distinct: int) -> None:
    """Copies of few points are coded exactly, and levels with nothing left to code hold no NaN."""
    points = _points(distinct).repeat(40, 1)
    codebooks = residual_kmeans(points, 3, 8)
    assert torch.isfinite(codebooks).all()
    residual = points
    for codebook in codebooks:
        residual = residual - codebook[torch.cdist(residual, codebook).argmin(dim=1)]
    assert residual.abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("each_way")
def test_points_are_not_changed() -> None:
    """No way of k-means works on the caller's memory."""
    points = _points(3000)
    before = points.clone()
    residual_kmeans(points, 2, 8)
    assert torch.equal(points, before)


@pytest.mark.slow
def test_batches_come_as_close_as_all_points_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud without clusters, where the start alone leaves a tenth more than k-means can reach."""
    points = torch.randn(6000, 6, generator=torch.Generator().manual_seed(0))
    exact = residual_kmeans(points, 1, 24)
    monkeypatch.setattr(module, "_MAX_LLOYD_DISTANCES", 0)
    monkeypatch.setattr(module, "_MIN_BATCHES", 1)
    best = _left_over(points, exact)[0]
    assert _left_over(points, residual_kmeans(points, 1, 24))[0] < 1.06 * best
    monkeypatch.setattr(module, "_MIN_EPOCHS", 0)
    monkeypatch.setattr(module, "_MIN_BATCHES", 0)
    assert _left_over(points, residual_kmeans(points, 1, 24))[0] > 1.06 * best
