"""Loss scaling of float16, recomputed blocks and compiled blocks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from audiolm_pytorch.nn.transformer import Transformer
from audiolm_pytorch.training import LoopSettings, LossOutput, TrainLoop
from audiolm_pytorch.training.checkpoint import CheckpointFolder
from audiolm_pytorch.training.precision import LossScale
from tests.helpers.toy_training import Tiny, assert_same_run

SETTINGS = LoopSettings(num_train_steps=6, batch_size=2, warmup_steps=1, ema_decay=0.9, log_every=1)


def stack_task(dropout: float = 0.1) -> Tiny:
    """Regression by a transformer."""
    torch.manual_seed(0)
    stack = Transformer(dim=4, depth=2, heads=1, dim_head=4, dropout=dropout)
    return Tiny(stack, lambda batch, step: LossOutput((stack(batch[:, None]) - 1).pow(2).mean()))


def overflowing_task(first_good_step: int) -> Tiny:
    """Regression whose gradients are infinite before a step, while the loss is finite."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)

    def loss(batch: Tensor, step: int) -> LossOutput:
        value = module(batch).float().pow(2).mean()
        if step < first_good_step:
            value.register_hook(lambda gradient: gradient * torch.inf)
        return LossOutput(value)

    return Tiny(module, loss)


def test_scale_falls_after_an_overflow_and_grows_again() -> None:
    """The scale of torch.amp.GradScaler, between 1 and its upper limit."""
    scale = LossScale(scale=4.0, growth_steps=2)
    scales = []
    for is_finite in (False, False, False, True, True, True, False):
        scale.update(is_finite)
        scales.append(scale.scale)
    assert scales == [2, 1, 1, 1, 2, 2, 1]


def test_float16_trains_like_float32(tmp_path: Path) -> None:
    """The loss and the gradients that are logged are not scaled, small ones do not become zero."""
    losses = {}
    for precision in ("fp32", "fp16"):
        task = stack_task()
        result = TrainLoop(task, replace(SETTINGS, precision=precision), tmp_path / precision).train()
        losses[precision] = result.metrics["main.loss"], result.metrics["main.grad_norm"]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_scale_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    """An overflow skips the step and halves the scale; a resumed run equals the straight one, bit for bit."""
    settings = replace(SETTINGS, precision="fp16")
    straight = TrainLoop(overflowing_task(2), settings, tmp_path / "straight").train()
    for steps in (1, 2, None):
        parts = TrainLoop(overflowing_task(2), settings, tmp_path / "parts").train(stop_after_steps=steps)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    assert straight == parts
    state = CheckpointFolder(tmp_path / "parts").read().state
    assert state["loss_scales"]["main"]["scale"] == 2.0**14 and state["progress"]["skipped"] == 2


def test_a_loss_that_always_overflows_ends_the_run(tmp_path: Path) -> None:
    """While the scale is above 1, overflows are normal; then ten in a row are an error."""
    settings = replace(SETTINGS, precision="fp16", num_train_steps=100)
    with pytest.raises(RuntimeError, match="not finite at step 24,.*10 steps in a row"):
        TrainLoop(overflowing_task(100), settings, tmp_path).train()


def test_recomputed_blocks_change_nothing(tmp_path: Path) -> None:
    """The same weights, bit for bit, with dropout; the setting of the module is restored."""
    for name, value in {"plain": False, "recomputed": True}.items():
        task = stack_task()
        TrainLoop(task, replace(SETTINGS, checkpoint_blocks=value), tmp_path / name).train()
        assert not task.module.checkpoint_blocks
    assert_same_run(tmp_path / "plain", tmp_path / "recomputed")


@pytest.mark.slow
def test_compiled_blocks_share_their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled once for all, train as usual, and are plain afterwards."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_block = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_block(function, backend=backend, fullgraph=True))
    results = []
    for value in (False, True):
        task = stack_task(dropout=0.0)
        settings = replace(SETTINGS, compile=value, checkpoint_blocks=value)
        results.append(TrainLoop(task, settings, tmp_path / str(value)).train().metrics["main.loss"])
        assert "forward" not in vars(task.module.blocks[0])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert 1 <= len(graphs) <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_blocks_train_on_a_gpu(tmp_path: Path, precision: str) -> None:
    """Half precision, recomputed and compiled blocks together are near float32."""
    losses = []
    for settings in (SETTINGS, replace(SETTINGS, precision=precision, compile=True, checkpoint_blocks=True)):
        folder = tmp_path / settings.precision
        losses.append(TrainLoop(stack_task(dropout=0.0), settings, folder).train().metrics["main.loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_settings_of_blocks_need_a_transformer(tmp_path: Path) -> None:
    """Another model would ignore them."""
    task = overflowing_task(0)
    with pytest.raises(ValueError, match="compile=True is for transformers, but Linear has none"):
        TrainLoop(task, replace(SETTINGS, compile=True), tmp_path).train()
    with pytest.raises(ValueError, match="sharded_checkpoints is True; it must be False without fsdp"):
        replace(SETTINGS, sharded_checkpoints=True)
