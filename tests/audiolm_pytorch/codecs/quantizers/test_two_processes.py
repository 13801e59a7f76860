"""Quantizers on two processes (gloo) against one process that holds the joined batch."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from audiolm_pytorch.codecs.quantizers import make_quantizer
from audiolm_pytorch.saving.files import read_weights, write_weights
from tests.helpers.processes import run_two_processes

KINDS = {"residual": {}, "groups": {"groups": 2}, "lookup_free": {"lookup_free": True}}
DIM, LEVELS, STEPS = 8, 3, 9
# Frames that each process holds: unequal where the codes move, equal where gradients are averaged.
NUM_FRAMES = (90, 40)


def batch(step: int, process: int, count: int) -> Tensor:
    """The frames of one process at one step."""
    generator = torch.Generator().manual_seed(1000 * step + process)
    return torch.randn(1, count, DIM, generator=generator) * (1 + 4 * (step % 5 == 0))


def trained(kind: dict, processes: list[int], seed: int) -> dict[str, Tensor]:
    """Initialise and train a quantizer on the frames of some processes; everything that it then holds."""
    torch.manual_seed(7)
    # made before there is a group, as a codec is that a trainer is given
    quantizer = make_quantizer(dim=DIM, codebook_size=32, num_quantizers=LEVELS, **kind)
    if len(processes) == 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    starts = [batch(900, process, 5 * NUM_FRAMES[process])[0] for process in processes]
    quantizer.initialise(torch.cat(starts))
    state = {f"start.{name}": value.clone() for name, value in quantizer.state_dict().items()}
    used, revived = [], 0
    for step in range(STEPS):
        if step % 6 == 2:
            _let_codes_die(quantizer)
        before = _codes(quantizer)
        frames = torch.cat([batch(step, process, NUM_FRAMES[process]) for process in processes], dim=1)
        codes = quantizer.train()(frames).codes
        used.append((codes[0, 0] >= 0).sum())
        revived += int(((_codes(quantizer) - before).norm(dim=-1) > 1).sum())
    state |= {f"end.{name}": value.clone() for name, value in quantizer.state_dict().items()}
    state |= {f"gradient.{name}": value for name, value in _gradients(quantizer, processes).items()}
    return {**state, "levels": torch.stack(used), "revived": torch.tensor(revived)}


def _codes(quantizer: nn.Module) -> Tensor:
    parts = getattr(quantizer, "quantizers", [quantizer])
    return torch.cat([part.codebook(level).clone() for part in parts for level in range(LEVELS)])


def _let_codes_die(quantizer: nn.Module) -> None:
    """Make every third code one that has not been used for long."""
    for name, buffer in quantizer.named_buffers():
        if name.endswith(("cluster_size", "embed_avg")):
            buffer[:, ::3] *= 1e-2


def _gradients(quantizer: nn.Module, processes: list[int]) -> dict[str, Tensor]:
    """Gradients of the quantizer's own loss, averaged over the processes as training does."""
    frames = torch.cat([batch(700, process, 50) for process in processes], dim=1)
    quantizer.level_dropout = 0.0
    quantizer(frames.requires_grad_()).loss.backward()
    found = {name: value.grad for name, value in quantizer.named_parameters() if value.grad is not None}
    if dist.is_initialized():
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return found


def main(folder: Path) -> None:
    """Train every kind on this process's part and write what it then holds."""
    rank = int(os.environ["RANK"])
    for name, kind in KINDS.items():
        # other draws on the second process: what is random has to come from the first
        write_weights(folder / f"{name}-{rank}.safetensors", trained(kind, [rank], seed=rank))


@pytest.mark.slow
def test_two_processes_equal_one_with_both_batches(tmp_path: Path) -> None:
    """Start, averages, revival, dropped levels and entropy loss are equal to those of one process."""
    done = run_two_processes(__file__, tmp_path)
    for name, kind in KINDS.items():
        paths = [tmp_path / f"{name}-{rank}.safetensors" for rank in (0, 1)]
        assert all(path.exists() for path in paths), done.stderr[-3000:]
        first, second = (read_weights(path)[0] for path in paths)
        one = trained(kind, [0, 1], seed=0)
        assert sorted(one) == sorted(first) == sorted(second)
        for key, value in one.items():
            # bit for bit; what each process counts of its own batch is the same as well
            assert torch.equal(first[key], second[key]), f"{name} {key}"
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
        assert len(set(one["levels"].tolist())) > 1
        if "lookup_free" not in kind:
            assert one["revived"] > 30


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
