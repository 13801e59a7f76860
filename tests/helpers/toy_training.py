"""Small tasks for the tests of the training loop: noise of every kind, a buffer that training moves, two phases."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audiolm_pytorch.training import LoopSettings, LossOutput, Phase
from audiolm_pytorch.training.samples import Sample

WIDTH = 6
SETTINGS = LoopSettings(
    num_train_steps=12, batch_size=3, learning_rate=1e-2, warmup_steps=3, ema_decay=0.9, validate_every=5, log_every=4
)


class ToyModel(nn.Module):
    """Linear, running mean as a buffer, dropout, and a parameter whose memory is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.transposed = nn.Parameter(torch.randn(WIDTH + 1, WIDTH).t())
        self.outer = nn.Linear(WIDTH + 1, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(hidden.mean(dim=0), 0.1)
                self.count += 1
                self.scratch += torch.randn(2)
        hidden = nn.functional.dropout(hidden - self.mean, 0.2, self.training)
        return self.outer(hidden @ self.transposed)


class ToyTask:
    """Reconstruction by one phase; with `critic`, a second phase trains a critic on the first one's output."""

    name = "toy"
    num_items = 11
    chance = {"loss": 1.5}

    def __init__(
        self,
        seed: int = 0,
        critic: bool = False,
        critic_from: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.module = nn.ModuleDict({"model": ToyModel()})
        self.phases: tuple[Phase, ...] = (Phase("main", (self.module["model"],), self.main_loss),)
        if critic:
            self.module["critic"] = nn.Linear(WIDTH, 1)
            self.phases += (Phase("critic", (self.module["critic"],), self.critic_loss, critic_from),)
        self.data = torch.randn(self.num_items, WIDTH, generator=torch.Generator().manual_seed(1))
        self.batches_made = 0
        self.on_batch = on_batch
        self.sampled: list[int] = []
        self.bad: Callable[[int], bool] = lambda step: False

    def main_loss(self, batch: Tensor, step: int) -> LossOutput:
        output = self.module["model"](batch)
        loss = (output - batch).pow(2).mean()
        if "critic" in self.module:
            loss = loss - 0.1 * self.module["critic"](output).mean()
        if self.bad(step):
            self.module["model"].mean.fill_(torch.nan)
            loss = loss * torch.nan
        return LossOutput(loss, {"error": (output - batch).abs().mean(), "constant": 2.0})

    def critic_loss(self, batch: Tensor, step: int) -> LossOutput:
        critic = self.module["critic"]
        return LossOutput((critic(self.module["model"](batch)) - critic(batch)).mean() + critic.weight.pow(2).sum())

    def batch(self, indices: list[tuple[int, int]]) -> Tensor:
        self.batches_made += 1
        if self.on_batch is not None:
            self.on_batch(self.batches_made)
        items = self.data[[index for _, index in indices]]
        return items + 0.1 * torch.randn_like(items) + 0.1 * float(np.random.rand()) + 0.1 * random.random()

    def validate(self) -> dict[str, float]:
        assert not self.module.training and not torch.is_grad_enabled()
        return {"loss": float((self.module["model"](self.data) - self.data).pow(2).mean())}

    def samples(self, step: int) -> list[Sample]:
        self.sampled.append(step)
        return [Sample("1", torch.zeros(80), 8000)]

    def before_training(self) -> None:
        self.module["model"].mean.copy_(torch.randn(WIDTH))


def tensors_in(folder: Path) -> dict[str, Any]:
    """Read every tensor file of a run's folder as bytes, and its progress without the clock."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    return files


class Tiny:
    """A task around any module and loss, for single questions."""

    name, chance, num_items = "tiny", {"loss": 1.0}, 8

    def __init__(self, module: nn.Module, loss: Callable[[Any, int], LossOutput]) -> None:
        self.module, self.phases = module, (Phase("main", (module,), loss),)
        self.data = torch.randn(self.num_items, 4, generator=torch.Generator().manual_seed(3))

    def batch(self, indices: list[tuple[int, int]]) -> Tensor:
        return self.data[[index for _, index in indices]]

    def validate(self) -> dict[str, float]:
        return {}

    def samples(self, step: int) -> list[Sample]:
        return []

    def before_training(self) -> None:
        pass


def linear_task() -> Tiny:
    """Least squares by one linear layer."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    return Tiny(module, lambda batch, step: LossOutput((module(batch) - 2 * batch).pow(2).mean()))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics, without the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, average and metrics are the same, bit for bit."""
    assert sorted(tensors_in(one)) == [f"checkpoint/{name}.safetensors" for name in ("ema", "model", "optimizer")]
    assert tensors_in(one) == tensors_in(other)
    assert rows_of(one) == rows_of(other)
