import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.mulan.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning, gather_batch

LOSSES = [
    SoftmaxContrastiveLearning(),
    SoftmaxContrastiveLearning(decoupled=True),
    SigmoidContrastiveLearning(init_bias=-1.0),
]
NAMES = ["softmax", "decoupled", "sigmoid"]


def _latents(size: int, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    audio, text = F.normalize(both, dim=-1)
    return audio, text


def _naive(loss: nn.Module, audio: Tensor, text: Tensor, captions: list[int]) -> float:
    """The formulas written out, pair by pair, in float64."""
    size, temperature = len(audio), math.exp(loss.log_temperature.item())
    similarity = [[float(a @ t) / temperature for t in text] for a in audio]
    usable = [[i == j or captions[i] != captions[j] for j in range(size)] for i in range(size)]
    total = 0.0
    for i in range(size):
        if isinstance(loss, SigmoidContrastiveLearning):
            for j in range(size):
                z = (1 if i == j else -1) * (similarity[i][j] + loss.bias.item())
                total += math.log1p(math.exp(-z)) if usable[i][j] else 0.0
            continue
        contrasts = [j for j in range(size) if usable[i][j] and not (loss.decoupled and i == j)]
        if contrasts:
            total += math.log(sum(math.exp(similarity[i][j]) for j in contrasts)) / 2 - similarity[i][i] / 2
            total += math.log(sum(math.exp(similarity[j][i]) for j in contrasts)) / 2 - similarity[i][i] / 2
    return total / size


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [7, 7, 7, 7, 7]])
def test_loss_equals_a_naive_loop(loss: nn.Module, captions: list[int]) -> None:
    """Oracle in float64, with and without captions that occur more than once."""
    audio, text = _latents(5)
    value = loss(audio, text, torch.tensor(captions)).item()
    assert value == pytest.approx(_naive(loss, audio, text, captions), abs=1e-6)
    if len(set(captions)) == 5:
        assert loss(audio, text).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_loss_is_symmetric(loss: nn.Module) -> None:
    """Audio to text and text to audio count alike."""
    audio, text = _latents(5)
    torch.testing.assert_close(loss(audio, text), loss(text, audio))


@pytest.mark.parametrize("kind", [SoftmaxContrastiveLearning, SigmoidContrastiveLearning])
@pytest.mark.parametrize("size", [1, 8])
def test_loss_is_finite_at_extremes(kind: type, size: int) -> None:
    """Fault 7: exp of a similarity over a small temperature overflows without a max-subtraction."""
    for temperature in (1e-4, 1.0, 1e4):
        loss = kind(temperature, min_temperature=1e-4)
        audio = F.normalize(torch.ones(size, 6), dim=-1).requires_grad_()
        assert temperature > 1e-3 or torch.isinf((audio @ audio.T / temperature).exp()).all()
        value = loss(audio, audio)
        value.backward()
        assert value.isfinite() and audio.grad.isfinite().all() and loss.log_temperature.grad.isfinite()


def test_decoupled_loss_without_contrasts_is_zero() -> None:
    """A batch of 1, or of one caption, has nothing to learn from: 0, with gradients that are numbers."""
    loss = SoftmaxContrastiveLearning(decoupled=True)
    for size in (1, 3):
        audio, text = (latents.float().requires_grad_() for latents in _latents(size))
        value = loss(audio, text, torch.zeros(size, dtype=torch.long))
        value.backward()
        assert value == 0 and (audio.grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_same_caption_is_no_contrast(loss: nn.Module) -> None:
    """A batch of one caption is as good as its items alone; without the captions they would push each other away."""
    audio, text = _latents(3)
    alone = torch.stack([loss(audio[i : i + 1], text[i : i + 1]) for i in range(3)]).mean()
    torch.testing.assert_close(loss(audio, text, torch.zeros(3, dtype=torch.long)), alone)
    assert (loss(audio, text) - alone).abs() > 0.01


def test_temperature_starts_learns_and_stays_in_bounds() -> None:
    """It begins at 0.1, gets a gradient, and is not used below its bound, from where it can come back."""
    loss = SoftmaxContrastiveLearning(0.1, min_temperature=0.05)
    assert loss.temperature.item() == pytest.approx(0.1)
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(0.001))
    assert loss.temperature.item() == pytest.approx(0.05)
    audio, text = _latents(4)
    loss(audio, text).backward()
    assert loss.log_temperature.grad.abs() > 0


def test_chance_of_softmax_is_the_log_of_the_batch() -> None:
    """Identical latents cannot be told apart: ln(b)."""
    latents = F.normalize(torch.ones(16, 4), dim=-1)
    assert SoftmaxContrastiveLearning()(latents, latents).item() == pytest.approx(math.log(16), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_loss_is_float32_under_autocast(loss: nn.Module) -> None:
    """Bfloat16 would round similarities over a temperature to whole numbers."""
    audio, text = (latents.float() for latents in _latents(5))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(audio, text)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(audio, text))


def test_loss_rejects_shapes_that_do_not_fit() -> None:
    """Errors name the shapes."""
    loss = SoftmaxContrastiveLearning()
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        loss(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(ValueError, match="captions"):
        loss(torch.randn(2, 4), torch.randn(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="temperature"):
        SoftmaxContrastiveLearning(0.001)


def test_gather_is_the_identity_in_one_process() -> None:
    """No process group, nothing to gather."""
    rows = torch.randn(3, 2)
    assert gather_batch(rows) is rows


def _joined(loss: nn.Module, rows: slice) -> tuple[Tensor, list[Tensor]]:
    """Loss of some rows of a batch of 7, and the gradients of a small tower and of the loss's own parameters."""
    tower = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    nn.init.eye_(tower.weight)
    audio, text = _latents(7)
    captions = torch.tensor([0, 1, 2, 3, 1, 4, 5])
    loss.zero_grad()
    value = loss(F.normalize(tower(audio[rows]), dim=-1), text[rows], captions[rows])
    value.backward()
    return value.detach(), [parameter.grad.double() for parameter in (*tower.parameters(), *loss.parameters())]


def _process(rank: int, folder: str, sizes: list[int]) -> None:
    """One of two processes, each with its part of the batch; averages gradients as data parallelism does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{sizes[0]}", rank=rank, world_size=2)
    rows = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
    results = {}
    for name, loss in zip(NAMES, LOSSES):
        value, gradients = _joined(loss, rows)
        for gradient in gradients:
            dist.all_reduce(gradient)
        results[name] = [value.tolist(), [(gradient / 2).tolist() for gradient in gradients]]
    Path(folder, f"{sizes[0]}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[4, 3], [6, 1]])
def test_two_processes_equal_one_with_the_joined_batch(sizes: list[int], tmp_path: Path) -> None:
    """Faults 7 and 11: masks and labels of the whole batch, also for unequal parts; loss and gradients are the same."""
    torch.multiprocessing.spawn(_process, (str(tmp_path), sizes), nprocs=2)
    for rank in range(2):
        results = json.loads((tmp_path / f"{sizes[0]}-{rank}.json").read_text())
        for name, loss in zip(NAMES, LOSSES):
            value, gradients = _joined(loss, slice(0, 7))
            assert results[name][0] == pytest.approx(value.item(), abs=1e-9)
            for own, gradient in zip(results[name][1], gradients):
                torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), gradient, atol=1e-6, rtol=0)
