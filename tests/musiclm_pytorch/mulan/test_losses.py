import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.mulan import distributed, losses
from musiclm_pytorch.mulan.distributed import gather_batch
from musiclm_pytorch.mulan.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning

LOSSES = {
    "softmax": SoftmaxContrastiveLearning(),
    "decoupled": SoftmaxContrastiveLearning(decoupled=True),
    "sigmoid": SigmoidContrastiveLearning(init_bias=-1.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# clip_index and captions of the texts of five clips
TEXTS = {
    "one each": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    "equal": ([0, 1, 2, 3, 4], [0, 1, 0, 2, 1]),
    "one caption": ([0, 1, 2, 3, 4], [7, 7, 7, 7, 7]),
    "several": ([0, 0, 1, 2, 2, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]),
    "several equal": ([4, 0, 0, 2, 1, 3, 2, 2, 0, 3], [5, 1, 1, 2, 2, 3, 4, 5, 6, -9]),
}


def _latents(num_clips: int, num_texts: int, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(size, dim, generator=generator).double() for size in (num_clips, num_texts))
    return F.normalize(audio, dim=-1), F.normalize(text, dim=-1)


def _naive(loss: nn.Module, audio: Tensor, text: Tensor, captions: list[int], clip_index: list[int]) -> Tensor:
    """The formulas written out, pair by pair."""
    similarity = [[a @ t / loss.log_temperature.exp() for t in text] for a in audio]
    said = [[caption for caption, owner in zip(captions, clip_index) if owner == i] for i in range(len(audio))]
    contrast = [[caption not in said[i] for caption in captions] for i in range(len(audio))]
    total = audio.new_zeros(())
    if isinstance(loss, SigmoidContrastiveLearning):
        for i in range(len(audio)):
            for j in range(len(text)):
                if clip_index[j] == i or contrast[i][j]:
                    z = (1 if clip_index[j] == i else -1) * (similarity[i][j] + loss.bias)
                    total = total + (1 + (-z).exp()).log() / len(audio)
        return total
    for j, i in enumerate(clip_index):
        others = [[similarity[i][k] for k in range(len(text)) if contrast[i][k]]]
        others.append([similarity[k][j] for k in range(len(audio)) if contrast[k][j]])
        shares = [1 / (clip_index.count(i) * len(audio)), 1 / len(text)]
        for terms, share in zip(others, shares):
            if terms:
                sums = sum(term.exp() for term in terms)
                sums = sums if loss.decoupled else sums + similarity[i][j].exp()
                total = total + (sums.log() - similarity[i][j]) * share / 2
    return total


@every_loss
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_loss_equals_a_naive_loop(loss: nn.Module, texts: tuple[list[int], list[int]]) -> None:
    """Oracle in float64, of the loss and of all its gradients: one or several texts a clip, some of them equal."""
    clip_index, captions = texts
    loss = copy.deepcopy(loss).double()
    inputs = [latents.requires_grad_() for latents in _latents(5, len(clip_index))]
    value = loss(*inputs, torch.tensor(captions), torch.tensor(clip_index))
    expected = _naive(loss, *inputs, captions, clip_index)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    of = [*inputs, *loss.parameters()]
    if expected.requires_grad:
        for own, naive in zip(torch.autograd.grad(value, of), torch.autograd.grad(expected, of, allow_unused=True)):
            torch.testing.assert_close(own, torch.zeros_like(own) if naive is None else naive, atol=1e-11, rtol=0)
    if len(set(captions)) == len(captions):
        torch.testing.assert_close(loss(*inputs, None, torch.tensor(clip_index)), value, atol=1e-12, rtol=0)
    if clip_index == [0, 1, 2, 3, 4]:
        assert torch.equal(loss(*inputs, torch.tensor(captions)), value)


@every_loss
def test_hard_negatives_equal_a_naive_loop(loss: nn.Module) -> None:
    """Oracle in float64, with gradients: a clip is contrasted with its own hard negatives, and no other clip is."""
    loss = copy.deepcopy(loss).double()
    audio, text = _latents(5, 5)
    own = [0, 2, 2, 4]
    inputs = [latents.requires_grad_() for latents in (audio, text, _latents(1, len(own), dim=6)[1])]
    value = loss(inputs[0], inputs[1], None, None, inputs[2], torch.tensor(own))
    similarity = inputs[0] @ torch.cat(inputs[1:]).T / loss.log_temperature.exp()
    expected = audio.new_zeros(())
    for i in range(5):
        negatives = [similarity[i, 5 + j] for j, row in enumerate(own) if row == i]
        if isinstance(loss, SigmoidContrastiveLearning):
            signs = [(1 if j == i else -1) for j in range(5)] + [-1] * len(negatives)
            terms = [*similarity[i, :5].unbind(), *negatives]
            expected = expected - sum(F.logsigmoid(sign * (z + loss.bias)) for sign, z in zip(signs, terms)) / 5
            continue
        for others in ([*similarity[i, :5].unbind(), *negatives], list(similarity[:5, i].unbind())):
            others = [z for j, z in enumerate(others) if j != i or not loss.decoupled]
            expected = expected + (torch.stack(others).logsumexp(0) - similarity[i, i]) / 10
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    for gradient, naive in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(gradient, naive, atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="pass both or neither"):
        loss(audio, text, negative_latents=inputs[2])
    for wrong in ([0], [0, 1, 2, 5], [-1, 0, 0, 0], [0.0, 1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match=r"negative_index must be \[4\] integers in 0..4"):
            loss(audio, text, negative_latents=inputs[2], negative_index=torch.tensor(wrong))


@every_loss
def test_loss_is_symmetric(loss: nn.Module) -> None:
    """Audio to text and text to audio count alike."""
    audio, text = _latents(5, 5)
    torch.testing.assert_close(loss(audio, text), loss(text, audio))


@every_loss
def test_order_of_texts_does_not_matter(loss: nn.Module) -> None:
    """Texts of a clip need not be neighbours; `clip_index` assigns them."""
    clip_index, captions = (torch.tensor(numbers) for numbers in TEXTS["several equal"])
    audio, text = _latents(5, len(clip_index))
    order = torch.randperm(len(clip_index), generator=torch.Generator().manual_seed(1))
    shuffled = loss(audio, text[order], captions[order], clip_index[order])
    torch.testing.assert_close(shuffled, loss(audio, text, captions, clip_index))


@every_loss
def test_captions_of_a_clip_do_not_push_each_other_away(loss: nn.Module) -> None:
    """A single clip with three texts has only matches: the softmax loss is 0, and gradients only attract."""
    audio, text = (latents.requires_grad_() for latents in _latents(1, 3))
    value = loss(audio, text, None, torch.zeros(3, dtype=torch.long))
    value.backward()
    assert (text.grad @ audio[0] <= 0).all()
    assert isinstance(loss, SigmoidContrastiveLearning) or value == 0


KINDS: dict[str, Callable[[float], nn.Module]] = {
    "softmax": lambda temperature: SoftmaxContrastiveLearning(temperature, 1e-4),
    "decoupled": lambda temperature: SoftmaxContrastiveLearning(temperature, 1e-4, decoupled=True),
    "sigmoid": lambda temperature: SigmoidContrastiveLearning(temperature, 1e-4),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def _assert_finite_at_extremes(kind: Callable[[float], nn.Module]) -> None:
    """Loss and gradients are numbers: a batch of 1, equal and opposite latents, any temperature, half precision."""
    for size, temperature, dtype in [
        (size, temperature, dtype)
        for size in (1, 8)
        for temperature in (1e-4, 1.0, 1e4)
        for dtype in (torch.float32, torch.bfloat16)
    ]:
        loss = kind(temperature)
        same = F.normalize(torch.ones(size, 6), dim=-1).to(dtype)
        mixed = same * torch.tensor([1, -1]).repeat(size)[:size, None]
        for audio, text in ((same, same), (same, -same), (mixed, same), (mixed, mixed)):
            audio, text = audio.clone().requires_grad_(), text.clone().requires_grad_()
            value = loss(audio, text)
            value.backward()
            assert value.isfinite() and value.dtype == torch.float32
            assert audio.grad.isfinite().all() and text.grad.isfinite().all()
            assert all(parameter.grad.isfinite() for parameter in loss.parameters())


@every_kind
def test_loss_is_finite_at_extremes(kind: Callable[[float], nn.Module]) -> None:
    """Fault 7: the exponential of a similarity over a small temperature must not overflow."""
    _assert_finite_at_extremes(kind)


@every_kind
def test_check_of_extremes_sees_fault_7(kind: Callable[[float], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty form, `cosine.exp()` without the maximum taken off, does not pass the check above."""
    monkeypatch.setattr(Tensor, "logsumexp", lambda x, dim: x.exp().sum(dim).log())
    monkeypatch.setattr(losses.F, "logsigmoid", lambda x: -(1 + (-x).exp()).log())
    with pytest.raises(AssertionError):
        _assert_finite_at_extremes(kind)


def test_decoupled_loss_without_contrasts_is_zero() -> None:
    """A batch of 1, or of one caption, has nothing to learn from: 0, with gradients that are numbers."""
    loss = SoftmaxContrastiveLearning(decoupled=True)
    for size in (1, 3):
        audio, text = (latents.float().requires_grad_() for latents in _latents(size, size))
        value = loss(audio, text, torch.zeros(size, dtype=torch.long))
        value.backward()
        assert value == 0 and (audio.grad == 0).all()


@every_loss
def test_the_same_caption_is_no_contrast(loss: nn.Module) -> None:
    """A batch of one caption is as good as its items alone; without the captions they would push each other away."""
    audio, text = _latents(3, 3)
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
    audio, text = _latents(4, 4)
    loss(audio, text).backward()
    assert loss.log_temperature.grad.abs() > 0


def test_chance_of_softmax_is_the_log_of_the_batch() -> None:
    """Identical latents: ln(b), and with c texts per clip also ln(1 + c (b - 1))."""
    latents = F.normalize(torch.ones(48, 4), dim=-1)
    loss = SoftmaxContrastiveLearning()
    assert loss(latents[:16], latents[:16]).item() == pytest.approx(math.log(16), abs=1e-5)
    several = loss(latents[:16], latents, None, torch.arange(16).repeat(3)).item()
    assert several == pytest.approx((math.log(1 + 3 * 15) + math.log(16)) / 2, abs=1e-5)


@every_loss
def test_loss_is_float32_under_autocast(loss: nn.Module) -> None:
    """Bfloat16 would round similarities over a temperature to whole numbers."""
    audio, text = (latents.float() for latents in _latents(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(audio, text)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(audio, text))


@pytest.mark.parametrize(
    ("sizes", "captions", "clip_index", "words"),
    [
        ((2, 3), None, None, "2 clips and text_latents of 3 texts without clip_index; pass one text per clip"),
        ((0, 0), None, None, "no clips"),
        ((2, 2), torch.zeros(3), None, "captions"),
        ((2, 3), None, torch.tensor([0, 1]), r"clip_index must be \[3\]"),
        ((2, 3), None, torch.tensor([0.0, 1.0, 1.0]), "clip_index must be"),
        ((2, 3), None, torch.tensor([0, 1, 2]), "each of 0..1"),
        ((2, 3), None, torch.tensor([0, -1, 1]), "each of 0..1"),
        ((3, 3), None, torch.tensor([0, 0, 2]), "at least once"),
    ],
)
def test_loss_rejects_what_does_not_fit(
    sizes: tuple[int, int], captions: Tensor | None, clip_index: Tensor | None, words: str
) -> None:
    """Error messages name the input and the requirement."""
    audio, text = torch.randn(sizes[0], 4), torch.randn(sizes[1], 4)
    with pytest.raises(ValueError, match=words):
        SoftmaxContrastiveLearning()(audio, text, captions, clip_index)


def test_loss_rejects_widths_and_temperatures() -> None:
    """Both kinds of latents have one width; the first temperature is in bounds."""
    with pytest.raises(ValueError, match=r"\[2, 4\] .* \[2, 5\]"):
        SoftmaxContrastiveLearning()(torch.randn(2, 4), torch.randn(2, 5))
    with pytest.raises(ValueError, match="temperature"):
        SoftmaxContrastiveLearning(0.001)


def test_gather_is_the_identity_in_one_process() -> None:
    """No process group, nothing to gather."""
    rows = torch.randn(3, 2)
    assert gather_batch(rows, [len(rows)]) is rows


SEVEN_OWNERS = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 6])
SEVEN_CAPTIONS = torch.tensor([0, 1, 2, 3, 1, 4, 5, 6, 0, 6])


def _step(loss: nn.Module, rows: slice, several: bool) -> tuple[Tensor, list[Tensor]]:
    """Loss of some of a batch of 7 clips, and the gradients of a small tower and of the loss's own parameters."""
    loss = copy.deepcopy(loss).double()
    tower = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    nn.init.eye_(tower.weight)
    clip_index = SEVEN_OWNERS if several else torch.arange(7)
    audio, text = _latents(7, len(clip_index))
    own = (clip_index >= rows.start) & (clip_index < rows.stop)
    captions = SEVEN_CAPTIONS[: len(clip_index)][own]
    texts = (text[own], captions, clip_index[own] - rows.start if several else None)
    # In the case of several texts, each clip also has a hard negative.
    negatives = (text[:7][rows] * -0.5 + audio[rows] * 0.5, torch.arange(rows.stop - rows.start)) if several else ()
    value = loss(F.normalize(tower(audio[rows]), dim=-1), *texts, *negatives)
    value.backward()
    return value.detach(), [parameter.grad for parameter in (*tower.parameters(), *loss.parameters())]


def _gather_without_gradient(rows: Tensor, counts: list[int]) -> Tensor:
    return distributed._GatherRows.apply(rows.detach(), counts) + 0 * rows.sum()


# what went wrong in the replicas: masks and labels of the local batch, a name that is not there, a plain all_gather
FAULTS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "local numbers": lambda: setattr(losses, "own_rank", lambda: 0),
    "no gradient": lambda: setattr(losses, "gather_batch", _gather_without_gradient),
    "no name": lambda: delattr(losses, "gather_batch"),
}


def _results(rows: slice) -> dict[str, list]:
    """Loss and averaged gradients of every loss on this process, or the error that it ends in."""
    results: dict[str, list] = {}
    for name, loss in LOSSES.items():
        for several in (False, True):
            try:
                value, gradients = _step(loss, rows, several)
            except (NameError, RuntimeError) as error:
                results[f"{name} {several}"] = [type(error).__name__, []]
                continue
            for gradient in gradients:
                dist.all_reduce(gradient)
            averages = [(gradient / dist.get_world_size()).tolist() for gradient in gradients]
            results[f"{name} {several}"] = [value.item(), averages]
    return results


def _process(rank: int, folder: str, cases: dict[str, tuple[list[int], str]]) -> None:
    """One of several processes, each with its part of the batch; writes the results of each case."""
    num_processes = len(next(iter(cases.values()))[0])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_processes)
    for name, (sizes, fault) in cases.items():
        before = dict(vars(losses))
        FAULTS[fault]()
        results = _results(slice(sum(sizes[:rank]), sum(sizes[: rank + 1])))
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(results))
        vars(losses).update(before)
    dist.destroy_process_group()


def _assert_as_one_process(results: dict[str, list]) -> None:
    for name, loss in LOSSES.items():
        for several in (False, True):
            value, gradients = _step(loss, slice(0, 7), several)
            own, averages = results[f"{name} {several}"]
            assert own == pytest.approx(value.item(), abs=1e-12)
            for average, gradient in zip(averages, gradients):
                torch.testing.assert_close(torch.tensor(average).to(gradient), gradient, atol=1e-6, rtol=0)


def _of_processes(folder: Path, cases: dict[str, tuple[list[int], str]], num_processes: int) -> dict[str, list]:
    """Run the cases on several processes; the results of each case, process by process."""
    torch.multiprocessing.spawn(_process, (str(folder), cases), nprocs=num_processes)
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(num_processes)]
        for name in cases
    }


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Faults 7 and 11: loss and gradients of the whole batch, also of unequal parts; the faulty forms do not pass."""
    cases = {fault: ([4, 3], fault) for fault in FAULTS} | {"short end": ([6, 1], "none")}
    for name, results in _of_processes(tmp_path, cases, 2).items():
        for own in results:
            if cases[name][1] == "none":
                _assert_as_one_process(own)
            else:
                with pytest.raises(AssertionError):
                    _assert_as_one_process(own)


@pytest.mark.slow
def test_three_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Any number of processes, of which one may have nothing at all."""
    for own in _of_processes(tmp_path, {"three": ([2, 0, 5], "none")}, 3)["three"]:
        _assert_as_one_process(own)
