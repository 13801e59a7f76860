"""Training with two processes on the CPU (gloo), judged by the files that they write."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from audiolm_pytorch.saving.files import read_weights, write_weights
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop
from audiolm_pytorch.training.samples import Sample
from tests.helpers.processes import run_two_processes

SETTINGS = LoopSettings(
    num_train_steps=8,
    batch_size=2,
    grad_accum_every=2,
    learning_rate=1e-2,
    warmup_steps=2,
    max_grad_norm=0.5,
    ema_decay=0.9,
    log_every=4,
    validate_every=4,
)


class JoinedTask:
    """Linear regression without noise; one parameter is used by the first item of the data alone."""

    name, chance, num_items = "joined", {"loss": 1.0}, 13

    def __init__(self, seed: int, rank: int) -> None:
        torch.manual_seed(seed)
        self.rank = rank
        self.module = nn.ModuleDict({"linear": nn.Linear(4, 4), "rare": nn.Linear(4, 4), "never": nn.Linear(2, 2)})
        self.module.register_buffer("calls", torch.tensor(0))
        self.phases = (Phase("main", (self.module,), self.loss),)
        self.data = torch.randn(self.num_items, 4, generator=torch.Generator().manual_seed(1))

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> LossOutput:
        self.module.calls += 1 + self.rank
        items, is_first = batch
        output = self.module["linear"](items)
        if bool(is_first.any()):
            output = output + is_first[:, None] * self.module["rare"](items)
        metrics: dict[str, Tensor | float] = {f"rank{self.rank}": float(self.rank)}
        loss = (output - 2 * items).pow(2).mean()
        # Infinite on one process only, with finite gradients: nothing but agreement on the loss tells the other.
        return LossOutput(loss + (torch.inf if step == 3 and self.rank == 1 else 0.0), metrics)

    def batch(self, indices: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([index for _, index in indices])
        return self.data[chosen], (chosen == 0).float()

    def validate(self) -> dict[str, float]:
        return {"loss": float(self.module["linear"](self.data).pow(2).mean())}

    def samples(self, step: int) -> list[Sample]:
        return [Sample(str(self.rank), torch.zeros(80), 8000)]

    def before_training(self) -> None:
        nn.init.normal_(self.module["linear"].bias)


def main(folder: Path, poisoned: bool) -> None:
    """Train twice in one group, the second time in two parts and with workers, and write what each process holds."""
    rank = int(os.environ["RANK"])
    for name, parts in [("straight", [None]), ("parts", [3, None])]:
        for part in parts:
            # Other initial weights on the second process: the loop has to make them equal.
            task = JoinedTask(seed=rank, rank=rank if poisoned else 0)
            settings = replace(SETTINGS, num_workers=0 if name == "straight" else 2)
            TrainLoop(task, settings, folder / name).train(stop_after_steps=part)
        write_weights(folder / f"{name}-{rank}.safetensors", weights_of(task.module))


def run_two(folder: Path, poisoned: bool) -> None:
    """Train in two processes, and check that both write their results."""
    done = run_two_processes(__file__, folder, str(int(poisoned)))
    wanted = [folder / f"{name}-{rank}.safetensors" for name in ("straight", "parts") for rank in (0, 1)]
    assert all(path.exists() for path in wanted), done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Gradients, clipping, unused parameters, resume: both processes equal each other and a single one."""
    run_two(tmp_path, poisoned=False)
    for name in ("straight", "parts"):
        files = [(tmp_path / f"{name}-{rank}.safetensors").read_bytes() for rank in (0, 1)]
        assert files[0] == files[1]
        assert (tmp_path / name / "finished.json").is_file()
    for kind in ("model", "ema", "optimizer"):
        paths = [tmp_path / name / "checkpoint" / f"{kind}.safetensors" for name in ("straight", "parts")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    task = JoinedTask(seed=0, rank=0)
    TrainLoop(task, replace(SETTINGS, batch_size=4), tmp_path / "one").train()
    for kind in ("model", "ema", "optimizer"):
        one, _ = read_weights(tmp_path / "one" / "checkpoint" / f"{kind}.safetensors")
        two, _ = read_weights(tmp_path / "straight" / "checkpoint" / f"{kind}.safetensors")
        assert sorted(one) == sorted(two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6, msg=f"{kind} {key}")


@pytest.mark.slow
def test_two_processes_agree_on_bad_steps_buffers_and_metrics(tmp_path: Path) -> None:
    """A bad loss on one process skips the step on both; buffers are the first one's; each metric is averaged."""
    run_two(tmp_path, poisoned=True)
    files = [(tmp_path / f"straight-{rank}.safetensors").read_bytes() for rank in (0, 1)]
    assert files[0] == files[1]
    weights, _ = read_weights(tmp_path / "straight-0.safetensors")
    # Two calls a step, 1 each on the first process, and none left of the skipped step.
    assert int(weights["calls"]) == 2 * 7
    rows = (tmp_path / "straight" / "metrics.jsonl").read_text()
    assert '"rank0": 0.0, ' in rows and '"rank1": 1.0, ' in rows and '"skipped": 1' in rows
    assert sorted(path.name for path in (tmp_path / "straight" / "samples").iterdir()) == [
        "0_step_0000004.wav",
        "0_step_0000008.wav",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), bool(int(sys.argv[2])))
