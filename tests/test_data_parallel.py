"""Two processes (gloo): gradients averaged in the backward pass equal those averaged after it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from audiolm_pytorch.audio import waves
from audiolm_pytorch.codecs.discriminators import soundstream_discriminators
from audiolm_pytorch.codecs.training import SoundStreamTrainer
from audiolm_pytorch.data.manifest import load_split
from audiolm_pytorch.saving.files import read_weights
from audiolm_pytorch.training import LoopSettings, LossOutput, TrainLoop, optimizer
from audiolm_pytorch.training.distributed import create_accelerator
from tests.helpers.killed_runs import make_trainers
from tests.helpers.micro import write_clips
from tests.helpers.processes import run_two_processes
from tests.helpers.small_models import small_soundstream
from tests.helpers.toy_training import Tiny

NAMES = ("adversarial", "mulan", "fine")


def adversarial_trainer(data: Path, folder: Path) -> Any:
    """A codec with discriminators, whose losses it uses from step 4."""
    torch.manual_seed(0)
    return SoundStreamTrainer(
        small_soundstream(target_sample_hz=8000),
        discriminators=soundstream_discriminators(channels=1, width=8),
        items=load_split(data),
        batch_size=2,
        num_train_steps=6,
        data_max_length_seconds=0.25,
        adversarial_start_step=2,
        discriminator_lead_steps=2,
        unquantized_steps=2,
        results_folder=folder,
    )


def train_all(data: Path, out: Path) -> None:
    """Train with every trainer in a subfolder of `out`."""
    trainers = make_trainers(data) | {"adversarial": lambda folder: adversarial_trainer(data, folder)}
    for name in NAMES:
        trainers[name](out / name).train()


def average_afterwards() -> None:
    """Replace the averaging in the backward pass by one after it, a parameter at a time."""
    computed: list[nn.Module] = []

    def plain(module: nn.Module, accelerator: Any) -> nn.Module:
        module.register_forward_hook(lambda module, *_: computed.append(module))
        return module

    def mean(accelerator: Any, value: Tensor) -> Tensor:
        for parameter in [one for one in computed.pop().parameters() if one.requires_grad]:
            used = torch.tensor(float(parameter.grad is not None))
            dist.all_reduce(used)
            if used:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient)
                parameter.grad = gradient / 2
        computed.clear()
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / 2

    optimizer.data_parallel, optimizer.mean_over_processes = plain, mean


def reduction_starts_early(folder: Path) -> bool:
    """Whether the gradients of the last layers are sent before those of the first layers are computed."""
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(9)))  # 36 MiB: more than one bucket of 25

    def loss(batch: Tensor, step: int) -> LossOutput:
        return LossOutput(layers(batch.repeat(1, 256)).pow(2).mean())

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        TrainLoop(Tiny(layers, loss), LoopSettings(num_train_steps=1, batch_size=2), folder).train()
    events = [(event.time_range.start, event.name) for event in profile.events()]
    reductions = [start for start, name in events if "all_reduce" in name or "allreduce" in name]
    backward = [start for start, name in events if name == "AddmmBackward0"]
    return any(start < max(backward) for start in reductions if start > min(backward))


@pytest.mark.slow
def test_gradients_are_averaged_in_the_backward_pass(tmp_path: Path) -> None:
    """Guards discriminators, codebooks, unused parameters and gathered contrasts under DistributedDataParallel."""
    write_clips(tmp_path / "data")
    done = run_two_processes(__file__, tmp_path)
    assert (tmp_path / "done").exists(), done.stderr[-3000:]
    assert (tmp_path / "done").read_text() == "True"
    for name in NAMES:
        files = [tmp_path / way / name / "checkpoint" / "model.safetensors" for way in ("overlapped", "afterwards")]
        overlapped, afterwards = (read_weights(file)[0] for file in files)
        assert overlapped.keys() == afterwards.keys()
        for key, value in afterwards.items():
            torch.testing.assert_close(overlapped[key], value, rtol=0, atol=1e-6, msg=f"{name} {key}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    waves.MIN_HZ = 1  # the stages of the tests are at 800 Hz
    folder = Path(sys.argv[1])
    create_accelerator()
    is_early = reduction_starts_early(folder / "early")
    train_all(folder / "data", folder / "overlapped")
    average_afterwards()
    train_all(folder / "data", folder / "afterwards")
    if os.environ["RANK"] == "0":
        (folder / "done").write_text(str(is_early))
