"""The training loop: exact resume, accumulation, schedule, averaging, isolation of phases, and what it refuses."""

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from audiolm_pytorch.saving import files
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.files import read_json, read_weights, write_json
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, Task, TrainLoop
from audiolm_pytorch.training.ema import WeightEMA
from audiolm_pytorch.training.loss_curve import write_loss_curve
from audiolm_pytorch.training.optimizer import learning_rate_at
from audiolm_pytorch.training.rng import seed_rng
from tests.helpers.toy_training import SETTINGS, Tiny, ToyTask, assert_same_run, linear_task, rows_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness is promised on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_toy_is_a_task() -> None:
    """The protocol is satisfied by plain attributes."""
    assert isinstance(ToyTask(), Task)


def test_accumulating_two_batches_equals_one_of_twice_the_size(tmp_path: Path) -> None:
    """Gradients of a mean loss are averaged, not summed, and the data are the same."""
    weights, rows = [], []
    for name, batch_size, accumulate in [("one", 4, 1), ("two", 2, 2)]:
        task = linear_task()
        settings = LoopSettings(
            num_train_steps=9, batch_size=batch_size, grad_accum_every=accumulate, max_grad_norm=6.0, log_every=1
        )
        TrainLoop(task, settings, tmp_path / name).train()
        weights.append(task.module.weight.detach())
        rows.append(torch.tensor([[row["loss"], row["grad_norm"]] for row in rows_of(tmp_path / name)]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    # AdamW hardly sees the scale of gradients; their norm before clipping does.
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-6)


def test_loop_equals_a_plain_adamw_loop(tmp_path: Path) -> None:
    """Oracle: clipping, schedule and decay (none on vectors), written with torch alone."""
    task = linear_task()
    settings = LoopSettings(num_train_steps=7, batch_size=8, weight_decay=0.3, warmup_steps=2, max_grad_norm=0.1)
    TrainLoop(task, settings, tmp_path).train()
    oracle = linear_task()
    groups = [
        {"params": [oracle.module.weight], "weight_decay": 0.3},
        {"params": [oracle.module.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    for step in range(7):
        loss = (oracle.module(oracle.data) - 2 * oracle.data).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(oracle.module.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, peak=3e-4, warmup_steps=2, num_train_steps=7, final_fraction=0.05)
        optimizer.step()
    torch.testing.assert_close(task.module.weight, oracle.module.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(task.module.bias, oracle.module.bias, rtol=0, atol=1e-6)


def test_transposed_parameters_are_stepped_like_any_other(tmp_path: Path) -> None:
    """The fused step and a resumed optimizer respect a parameter whose memory is not in row order."""
    results = []
    for name, transposed in [("plain", False), ("transposed", True)]:
        torch.manual_seed(0)
        value = torch.randn(4, 3)
        module = nn.Module()
        module.weight = nn.Parameter(value.t().contiguous().t() if transposed else value)
        assert module.weight.is_contiguous() != transposed

        def loss(batch: Tensor, step: int, module: nn.Module = module) -> LossOutput:
            return LossOutput((batch @ module.weight - batch[:, :3]).pow(2).mean())

        TrainLoop(Tiny(module, loss), SETTINGS, tmp_path / name).train(stop_after_steps=6)
        TrainLoop(Tiny(module, loss), SETTINGS, tmp_path / name).train()
        results.append(module.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_learning_rate_is_a_pure_function_with_the_right_ends() -> None:
    """Ramp from a positive start to the peak, then down to the final fraction, monotonically."""
    rates = [
        learning_rate_at(step, peak=2.0, warmup_steps=4, num_train_steps=20, final_fraction=0.1) for step in range(25)
    ]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(later < earlier for earlier, later in zip(rates[4:19], rates[5:20], strict=True))
    assert rates[19:] == [pytest.approx(0.2)] * 6
    middle = learning_rate_at(10, peak=1.0, warmup_steps=0, num_train_steps=21)
    assert middle == pytest.approx(0.5)
    for steps in (1, 2, 3):
        assert all(
            0 < learning_rate_at(step, peak=1.0, warmup_steps=2, num_train_steps=steps, final_fraction=0.1) <= 1
            for step in range(steps)
        )


def test_average_follows_its_definition_and_steps_aside() -> None:
    """Oracle: the recursion by hand; the module has the average inside the block, and its raw weights afterwards."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    average, expected = WeightEMA({"w": parameter}, decay=0.5), torch.tensor([1.0, 2.0])
    for step in range(1, 20):
        with torch.no_grad():
            parameter += torch.randn(2)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    own = parameter.detach().clone()
    torch.testing.assert_close(average.weights()["w"], expected)
    with average.in_place():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.detach(), own)
    with pytest.raises(ValueError, match="differ in"):
        average.load({"v": own})


def test_final_module_holds_the_average(tmp_path: Path) -> None:
    """The finished weights are the averaged ones; buffers are the last; the raw ones stay in the checkpoint."""
    loop = TrainLoop(ToyTask(), SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="not finished"):
        loop.final_module()
    loop.train()
    raw, _ = read_weights(tmp_path / "checkpoint" / "model.safetensors")
    averaged, _ = read_weights(tmp_path / "checkpoint" / "ema.safetensors")
    module = TrainLoop(ToyTask(seed=5), SETTINGS, tmp_path).final_module()
    assert not module.training
    assert torch.equal(module["model"].inner.weight, averaged["model.inner.weight"])
    assert not torch.equal(module["model"].inner.weight, raw["model.inner.weight"])
    assert torch.equal(module["model"].mean, raw["model.mean"])


def test_phases_do_not_touch_each_other(tmp_path: Path) -> None:
    """A phase without gradient keeps its weights, although the other phase's loss flows through it."""
    task = ToyTask(critic=True)
    still = nn.Linear(2, 2)
    task.module["still"] = still
    main, critic = task.phases
    seen: list[Tensor | None] = []

    def critic_loss(batch: Tensor, step: int) -> LossOutput:
        seen.extend(parameter.grad for parameter in task.module.parameters())
        return LossOutput(task.critic_loss(batch, step).loss * 0 + still.weight.sum() * 0)

    task.phases = (main, Phase("critic", (task.module["critic"], still), critic_loss))
    before = {name: value.detach().clone() for name, value in task.module.named_parameters()}
    TrainLoop(task, replace(SETTINGS, weight_decay=0.0), tmp_path).train(stop_after_steps=3)
    changed = {name for name, value in task.module.named_parameters() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("critic", "still")) for name in changed)
    assert "model.inner.weight" in changed and "model.unused" not in changed
    assert all(gradient is None for gradient in seen)
    assert all(parameter.grad is None for parameter in task.module.parameters())


def test_a_phase_does_nothing_before_its_first_step(tmp_path: Path) -> None:
    """Before its first step a phase changes no weights and has no optimizer state and no rows of metrics."""
    task = ToyTask(critic=True, critic_from=4)
    asked: list[int] = []
    inner = task.critic_loss

    def critic_loss(batch: Tensor, step: int) -> LossOutput:
        asked.append(step)
        return inner(batch, step)

    task.phases = (task.phases[0], replace(task.phases[1], loss=critic_loss))
    before = task.module["critic"].weight.detach().clone()
    settings = replace(SETTINGS, log_every=1)
    TrainLoop(task, settings, tmp_path).train(stop_after_steps=4)
    assert asked == [] and torch.equal(task.module["critic"].weight, before)
    optimizer, _ = read_weights(tmp_path / "checkpoint" / "optimizer.safetensors")
    assert optimizer and not any(name.startswith("critic") for name in optimizer)
    TrainLoop(task, settings, tmp_path).train(stop_after_steps=1)
    assert asked == [4] and not torch.equal(task.module["critic"].weight, before)
    assert [row["step"] for row in rows_of(tmp_path) if row["phase"] == "critic"] == [5]
    with pytest.raises(ValueError, match="phases: found .*'critic from step 4'"):
        TrainLoop(ToyTask(critic=True, critic_from=5), settings, tmp_path).train()
    with pytest.raises(ValueError, match="first_step of phase 'late' is -1"):
        Phase("late", (nn.Linear(1, 1),), inner, first_step=-1)


def test_on_row_receives_every_row_and_after_a_resume_the_earlier_ones(tmp_path: Path) -> None:
    """A warning about a run depends on all its rows, in a new process too."""
    seen: list[Any] = []
    TrainLoop(ToyTask(), SETTINGS, tmp_path, on_row=seen.append).train(stop_after_steps=6)
    assert [(row["step"], row["phase"]) for row in seen] == [(1, "main"), (4, "main"), (5, "valid")]
    resumed: list[Any] = []
    TrainLoop(ToyTask(), SETTINGS, tmp_path, on_row=resumed.append).train()
    assert [row["step"] for row in resumed] == [row["step"] for row in rows_of(tmp_path)]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows_of(tmp_path)]


def test_bad_steps_are_skipped_and_leave_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A NaN loss moves neither weights nor the buffers it poisoned, and is counted."""
    task = ToyTask()
    loop = TrainLoop(task, replace(SETTINGS, log_every=1), tmp_path)
    loop.train(stop_after_steps=4)
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    task.bad = lambda step: step in (4, 5)
    with caplog.at_level(logging.WARNING):
        loop.train(stop_after_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in task.module.state_dict().items())
    assert sum("step is skipped" in record.message for record in caplog.records) == 2
    loop.train()
    assert all(torch.isfinite(value).all() for value in task.module.state_dict().values())
    assert rows_of(tmp_path)[-2]["skipped"] == 2


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    """The error names step and items; the count survives a resume; the checkpoint before it is untouched."""
    settings = replace(SETTINGS, num_train_steps=40)
    task = ToyTask()
    task.bad = lambda step: step >= 2
    TrainLoop(task, settings, tmp_path).train(stop_after_steps=6)
    with pytest.raises(RuntimeError, match=r"phase 'main' are not finite at step 11, .*\(\d+, \d+\)"):
        TrainLoop(task, settings, tmp_path).train()
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 6


def test_exploding_gradients_are_caught_with_a_finite_loss(tmp_path: Path) -> None:
    """The guard checks the gradients too: that of sqrt is not finite at 0."""
    module = nn.Linear(4, 4)
    task = Tiny(module, lambda batch, step: LossOutput((module(batch) * 0).pow(2).sum().sqrt()))
    before = module.weight.detach().clone()
    TrainLoop(task, SETTINGS, tmp_path).train(stop_after_steps=2)
    assert torch.equal(module.weight, before)


def test_metrics_hold_the_chance_level_and_means(tmp_path: Path) -> None:
    """A row holds the mean since the last row, and the chance level beside the loss."""
    result = TrainLoop(ToyTask(), SETTINGS, tmp_path).train()
    rows = rows_of(tmp_path)
    assert [(row["step"], row["phase"]) for row in rows] == [
        (1, "main"), (4, "main"), (5, "valid"), (8, "main"), (10, "valid"), (12, "main"), (12, "valid")
    ]  # fmt: skip
    assert all(row["chance"] == 1.5 for row in rows)
    assert all(row["constant"] == 2.0 and row["grad_norm"] > 0 for row in rows if row["phase"] == "main")
    assert result.metrics["valid.loss"] == rows[-1]["loss"]
    every_step = TrainLoop(ToyTask(), replace(SETTINGS, log_every=1), tmp_path / "fine")
    every_step.train()
    fine = [row["loss"] for row in rows_of(tmp_path / "fine") if row["phase"] == "main"]
    assert rows[1]["loss"] == pytest.approx(sum(fine[1:4]) / 3)
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        f"1_step_00000{step:02d}.wav" for step in (5, 10, 12)
    ]


def test_infinite_metrics_do_not_break_files(tmp_path: Path) -> None:
    """JSON has no NaN: such a metric is null in the row, and the checkpoint is written and read."""
    module = nn.Linear(4, 4)
    task = Tiny(module, lambda batch, step: LossOutput(module(batch).pow(2).mean(), {"odd": torch.tensor(torch.nan)}))
    task.validate = lambda: {"loss": math.inf}  # type: ignore[method-assign]
    TrainLoop(task, SETTINGS, tmp_path).train(stop_after_steps=6)
    result = TrainLoop(task, SETTINGS, tmp_path).train()
    assert result.metrics["valid.loss"] is None and result.metrics["main.odd"] is None
    assert rows_of(tmp_path)[0]["odd"] is None


def test_constructor_touches_nothing(tmp_path: Path) -> None:
    """No folder, no random numbers, no process group and no prompt before train."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    task = Tiny(nn.Linear(4, 4), lambda batch, step: LossOutput(batch.sum()))
    torch.set_rng_state(torch_state)
    TrainLoop(task, SETTINGS, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state) and random.getstate() == python_state


def test_training_restores_the_generators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The random numbers of the program are the same as without a training, and nothing is printed."""
    task = ToyTask()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    expected = np.random.RandomState()
    expected.set_state(np.random.get_state())
    TrainLoop(task, SETTINGS, tmp_path).train()
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert np.random.rand() == expected.rand()
    assert capsys.readouterr() == ("", "")


def test_every_step_has_other_noise(tmp_path: Path) -> None:
    """Seeding before each step must not give each the same noise."""
    draws: list[float] = []
    TrainLoop(ToyTask(on_batch=lambda count: draws.append(float(torch.rand(())))), SETTINGS, tmp_path).train()
    assert len(set(draws)) == len(draws) == 12


def test_seeds_are_a_function_of_the_position() -> None:
    """Equal positions have equal noise; another step, rank or seed has other noise."""

    def draw(*position: int | str) -> tuple[float, float, float]:
        seed_rng(*position, device=CPU)  # type: ignore[arg-type]
        return float(torch.rand(())), float(np.random.rand()), random.random()

    with preserve_rng():
        assert draw(0, 1, 2) == draw(0, 1, 2)
        draws = [draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2), draw(0, 12), draw(0, "validate")]
    for kind in zip(*draws, strict=True):
        assert len(set(kind)) == len(draws)


def test_two_loops_share_one_process_and_one_accelerator(tmp_path: Path) -> None:
    """Interleaved trainings do not influence each other."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "alone").train()
    accelerator = Accelerator(cpu=True)
    loops = [TrainLoop(ToyTask(), SETTINGS, tmp_path / name, accelerator) for name in ("one", "two")]
    for _ in range(4):
        for loop in loops:
            loop.train(stop_after_steps=3)
    assert_same_run(tmp_path / "alone", tmp_path / "one")
    assert_same_run(tmp_path / "alone", tmp_path / "two")


def test_bf16_runs_the_loss_under_autocast(tmp_path: Path) -> None:
    """Matrix products are in bfloat16; weights and optimizer are in float32."""
    module = nn.Linear(4, 4)
    types: list[torch.dtype] = []

    def loss(batch: Tensor, step: int) -> LossOutput:
        output = module(batch)
        types.append(output.dtype)
        return LossOutput((output.float() - batch).pow(2).mean())

    task = Tiny(module, loss)
    task.validate = lambda: {"loss": float(loss(task.data, 0).loss)}  # type: ignore[method-assign]
    TrainLoop(task, replace(SETTINGS, precision="bf16"), tmp_path).train()
    assert set(types) == {torch.bfloat16}
    optimizer, _ = read_weights(tmp_path / "checkpoint" / "optimizer.safetensors")
    assert {value.dtype for value in (module.weight, *optimizer.values())} == {torch.float32}


def test_impossible_phases_and_accelerators_are_refused(tmp_path: Path) -> None:
    """Shared parameters, parameters outside the module, doubled names and doubled accumulation."""
    task = ToyTask(critic=True)
    main, critic = task.phases
    task.phases = (main, Phase("other", (task.module["model"],), task.main_loss))
    with pytest.raises(ValueError, match="share a parameter"):
        TrainLoop(task, SETTINGS, tmp_path)
    task.phases = (main, Phase("main", (task.module["critic"],), task.critic_loss))
    with pytest.raises(ValueError, match="distinct names"):
        TrainLoop(task, SETTINGS, tmp_path)
    task.phases = (Phase("main", (nn.Linear(2, 2),), task.main_loss),)
    with pytest.raises(ValueError, match="2 of them outside"):
        TrainLoop(task, SETTINGS, tmp_path).train()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="grad_accum_every"):
        TrainLoop(ToyTask(), SETTINGS, tmp_path, accelerator)


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_steps": 0},
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"betas": (0.9, 1.0)},
        {"final_lr_fraction": 2.0},
        {"checkpoint_every_steps": 0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    """The constructor checks each number and names it."""
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SETTINGS, **change)


def test_metric_must_be_one_number(tmp_path: Path) -> None:
    """A vector among the metrics raises an error that names it, before the first row."""
    module = nn.Linear(4, 4)
    task = Tiny(module, lambda batch, step: LossOutput(module(batch).mean(), {"wide": torch.zeros(3)}))
    with pytest.raises(ValueError, match="'wide' has shape"):
        TrainLoop(task, SETTINGS, tmp_path).train()


@pytest.mark.parametrize("is_main", [True, False])
def test_results_are_saved_by_the_first_process_while_the_others_wait(tmp_path: Path, is_main: bool) -> None:
    """If several processes wrote one file, it would be damaged."""
    done: list[str] = []
    loop = TrainLoop(ToyTask(), SETTINGS, tmp_path)
    loop._accelerator = SimpleNamespace(is_main_process=is_main, wait_for_everyone=lambda: done.append("waited"))
    loop.on_main_process(lambda: done.append("saved"))
    assert done == (["saved", "waited"] if is_main else ["waited"])


def test_the_loss_curve_has_every_phase(tmp_path: Path) -> None:
    """An SVG file with a line per phase, a dashed line of the chance loss, and escaped names; NaN is left out."""
    TrainLoop(ToyTask(critic=True), SETTINGS, tmp_path).train()
    curve = (tmp_path / "loss.svg").read_text()
    root = ElementTree.fromstring(curve)
    assert root.tag.endswith("svg") and len(root.findall("{*}polyline")) == 1 + 2 * 3
    assert all(f">{phase} " in curve for phase in ("main", "critic", "valid"))
    rows = [{"phase": "a<b", "step": step, "loss": math.nan if step == 2 else 1.0} for step in range(3000)]
    write_loss_curve(tmp_path / "other.svg", {"": rows}, "x")
    assert len((tmp_path / "other.svg").read_bytes()) < 30_000
    assert "a&lt;b" in ElementTree.tostring(ElementTree.parse(tmp_path / "other.svg").getroot(), encoding="unicode")
    others = {"first": [{"phase": "valid", "step": 1, "mel": 1.0}], "second": [{"phase": "valid", "step": 1, "mel": 2}]}
    assert not write_loss_curve(tmp_path / "none.svg", others, "x")
    assert not (tmp_path / "none.svg").exists()
    assert write_loss_curve(tmp_path / "mel.svg", others, "x", metric="mel")
    assert all(f">{name}<" in (tmp_path / "mel.svg").read_text() for name in ("first valid 1", "second valid 2"))


def test_a_full_disk_is_an_error_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OSError names the file; the checkpoint before remains, and training continues when there is space again."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=5)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="cannot write .*ema.safetensors: No space left"),
    ):
        patch.setattr(files, "save_file", full)
        TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=2)
    assert TrainLoop(ToyTask(), SETTINGS, tmp_path).train().step == 12
    assert not list(tmp_path.rglob(".writing-*"))


@pytest.mark.parametrize(
    "change",
    [
        *({"optimizers": {}}, {"progress": {"stage": 1}}, {"progress": {"step": 9}}, {"progress": None}, {"run": 3}),
        *(
            {"progress": {"step": 1, "metrics": 3}},
            {"progress": {"step": "1"}},
            {"progress": {"step": 1, "seconds": []}},
        ),
        *({"window": []}, {"window": {"a": 1}}, {"metrics_file": {}}, {"metrics_file": 3}),
    ],
)
def test_an_altered_state_is_a_named_error(tmp_path: Path, change: dict[str, Any]) -> None:
    """A state with other entries raises a ValueError with the name of the file or folder."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=1)
    for name in ("checkpoint", "checkpoint.previous"):
        state = read_json(tmp_path / name / "state.json")
        write_json(tmp_path / name / "state.json", {**state, "state": {**state["state"], **change}})
    with pytest.raises(ValueError, match="state.json does not describe this run|contains a run without settings"):
        TrainLoop(ToyTask(), SETTINGS, tmp_path).train()
