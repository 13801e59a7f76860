from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from musiclm_pytorch import mulan
from tests.helpers.tiny_mulan import tiny_mulan, tones

WAVS = tones(110, 180, 300, 500, 800, 1300, 2100)
LENGTHS = torch.tensor([3200, 1500, 3000, 2000, 3100, 1800, 2500])
CLIP_INDEX = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 6])
# equal texts of clips that are not on the same process
TEXTS = "deep,dull,a tone,low,a tone,middle,in between,high,deep,very high indeed".split(",")
# clips of each process in two steps, of which the second is the short end of an epoch
SIZES = ((4, 3), (1, 2))


def _model(kind: str) -> mulan.MuLaN:
    """A mulan.MuLaN of two blocks, with the loss of that name; "layers" = softmax with layers contrasted too."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
    audio = mulan.AudioSpectrogramTransformer(**sizes, patch_size=8, sample_hz=8000, num_mels=24, spec_n_fft=256)
    loss = {
        "decoupled": mulan.SoftmaxContrastiveLearning(decoupled=True),
        "sigmoid": mulan.SigmoidContrastiveLearning(init_bias=-2.0),
    }.get(kind, mulan.SoftmaxContrastiveLearning())
    return tiny_mulan(
        audio_transformer=audio,
        text_transformer=mulan.TextTransformer(**sizes, num_tokens=256),
        loss=loss,
        layer_contrast=mulan.LayerContrast(((0, 1), (1, 2)), weight=0.5) if kind == "layers" else None,
    ).train()


def _trained(model: torch.nn.Module, rows: list[slice], chunk_size: int | None) -> dict[str, Tensor]:
    """Loss of every step, each on the clips of `rows`, and gradients and parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = {}
    for step, own in enumerate(rows):
        texts = [index for index, owner in enumerate(CLIP_INDEX.tolist()) if own.start <= owner < own.stop]
        optimizer.zero_grad()
        loss = model(
            WAVS[own],
            [TEXTS[index] for index in texts],
            LENGTHS[own],
            clip_index=CLIP_INDEX[texts] - own.start,
            chunk_size=chunk_size,
        )
        loss.backward()
        result[f"loss {step}"] = loss.detach()
        result |= {f"gradient {step} {name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return result | {f"parameter {name}": p.detach() for name, p in model.named_parameters()}


def _process(rank: int, folder: str, kinds: list[str]) -> None:
    """One of two processes under DistributedDataParallel, with unequal numbers of chunks too."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in SIZES]
    for kind in kinds:
        if kind == "fault":
            mulan.losses.own_rank = lambda: 0
        result = _trained(DistributedDataParallel(_model(kind)), rows, chunk_size=2)
        save_file({name.replace("module.", ""): tensor for name, tensor in result.items()}, f"{folder}/{kind}-{rank}")
    dist.destroy_process_group()


def _assert_as_one_process(own: dict[str, Tensor], kind: str) -> None:
    expected = _trained(_model(kind), [slice(0, sum(sizes)) for sizes in SIZES], chunk_size=None)
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Fault 11: loss, gradients and weights of a whole mulan.MuLaN after two steps in chunks, the last one short."""
    kinds = ["softmax", "decoupled", "sigmoid", "layers", "fault"]
    torch.multiprocessing.spawn(_process, (str(tmp_path), kinds), nprocs=2)
    for rank in range(2):
        for kind in kinds[:-1]:
            _assert_as_one_process(load_file(tmp_path / f"{kind}-{rank}"), kind)
    with pytest.raises(AssertionError):
        _assert_as_one_process(load_file(tmp_path / "fault-1"), "softmax")
