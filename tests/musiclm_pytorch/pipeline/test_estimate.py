"""Estimates of a dry run: short measurements, of which the shortest counts, or an assumed device."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from musiclm_pytorch.pipeline import estimate as module
from musiclm_pytorch.pipeline.estimate import DEVICES, _Probe, estimate, estimate_steps, training_memory
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.trainers import NUM_VALIDATIONS
from tests.helpers.micro import MICRO


def probe(assumed: str | None = None, is_done: bool = False) -> _Probe:
    """A probe without modules, to time any function."""
    made: _Probe = object.__new__(_Probe)
    made.assumed, made.device = assumed, torch.device("cpu")
    made.pipeline = SimpleNamespace(is_done=lambda step: is_done)  # type: ignore[assignment]
    return made


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, list[int]]]:
    """A function that measures calls of the passed durations; it returns seconds per crop, and the crops of each."""

    def measure(*durations: float, max_crops: int = 4) -> tuple[float, list[int]]:
        clock, calls, left = [0.0], [], iter(durations)
        monkeypatch.setattr(module.time, "thread_time", lambda: clock[0])

        def work(num_crops: int) -> None:
            calls.append(num_crops)
            clock[0] += next(left)

        return probe()._seconds("codec", work, max_crops), calls

    return measure


def test_the_shortest_measurement_counts(timed: Callable[..., tuple[float, list[int]]]) -> None:
    """A call that another program disturbs has no influence."""
    assert timed(0.125, 0.75, 0.5) == (0.125, [1, 4, 4])
    assert timed(0.125, 0.0625, 0.25, 0.125, 0.5, 0.75) == (0.015625, [1, 4, 4, 4, 4, 4])


def test_a_slow_step_is_measured_once(timed: Callable[..., tuple[float, list[int]]]) -> None:
    """A large model on a small machine does not keep the user waiting."""
    assert timed(60.0) == (60.0, [1])
    assert timed(0.75, 0.5, max_crops=4) == (0.5, [1, 1])


def test_a_finished_step_needs_no_measurement() -> None:
    """Nothing is computed."""
    assert probe(is_done=True)._seconds("codec", lambda num_crops: pytest.fail("was measured"), 4) == 0.0


def test_an_assumed_device_counts_operations() -> None:
    """The work runs once, and the clock has no influence."""
    left, right = torch.ones(30, 40), torch.ones(40, 50)
    seconds = probe("a100")._seconds("codec", lambda num_crops: left @ right, 4)
    assert seconds == pytest.approx(2 * 30 * 40 * 50 / (0.3 * DEVICES["a100"] * 1e12))


def test_an_unknown_device_is_refused(micro_data: Path, tmp_path: Path) -> None:
    """The message lists the devices."""
    with pytest.raises(ValueError, match="no estimate for the device 'a1000'; choose one of: .*a100, h100"):
        estimate(Pipeline(MICRO, data=micro_data, out=tmp_path / "run"), "fine", "a1000")


def test_validation_is_part_of_the_time(micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second per crop, the time is the number of crops in training and in all validations."""
    monkeypatch.setattr(_Probe, "_seconds", lambda self, step, work, max_crops: 1.0)
    run = MICRO.fine.run
    for num_steps in (run.num_train_steps, 3 * run.num_train_steps):
        preset = replace(MICRO, fine=replace(MICRO.fine, run=replace(run, num_train_steps=num_steps)))
        pipeline = Pipeline(preset, data=micro_data, out=tmp_path / "run")
        [row] = estimate_steps(pipeline, "fine")
        crops = num_steps * run.batch_size + len(pipeline.valid_items) * NUM_VALIDATIONS / 3
        assert row.seconds == pytest.approx(crops)


def test_sharded_parameters_need_less_memory() -> None:
    """Every process holds its share of 16 bytes per parameter, or all of them and the buckets of gradients."""
    options = {"num_parameters": 1000, "loss": None, "device": torch.device("cpu"), "num_crops": 0, "num_processes": 4}
    run = MICRO.semantic.run
    assert training_memory(run=run, **options) == 20_000
    assert training_memory(run=replace(run, fsdp=True), **options) == 4000


@pytest.mark.slow
def test_memory_epochs_and_chance(micro_data: Path, tmp_path: Path) -> None:
    """Larger batches need more memory, accumulated ones only more time; curves begin at the chance loss."""
    stage = replace(MICRO.semantic, run=replace(MICRO.semantic.run, precision="fp32"))
    rows = {}
    for name, change in {"one": {}, "large": {"batch_size": 40}, "often": {"grad_accum_every": 10}}.items():
        preset = replace(MICRO, semantic=replace(stage, run=replace(stage.run, **change)))
        [rows[name]] = estimate_steps(Pipeline(preset, data=micro_data, out=tmp_path / "run"), "semantic", "h100")
    one, large, often = rows["one"], rows["large"], rows["often"]
    assert large.num_tokens == often.num_tokens == 10 * one.num_tokens
    assert large.num_epochs == pytest.approx(often.num_epochs) == pytest.approx(10 * one.num_epochs)
    # 12 steps of 4 crops of 1 s, over the files that are not held out
    assert one.num_epochs == pytest.approx(48 / 9) and one.chance_loss == pytest.approx(math.log(12))
    weights = 16 * one.num_parameters
    assert often.memory_bytes == one.memory_bytes > weights
    assert large.memory_bytes - weights == pytest.approx(10 * (one.memory_bytes - weights), rel=0.01)


@pytest.mark.slow
def test_estimates_of_a_device_grow_with_the_depth(micro_data: Path, tmp_path: Path) -> None:
    """Estimates from models of one and two layers are those from the whole model."""
    preset = replace(
        MICRO,
        semantic_tokenizer=replace(MICRO.semantic_tokenizer, depth=5, layer=3),
        mulan=replace(MICRO.mulan, depth=5),
        coarse=replace(MICRO.coarse, depth=5),
    )
    for step in ("semantic-tokenizer", "mulan", "coarse"):
        pipeline = Pipeline(preset, data=micro_data, out=tmp_path / "run")
        [row] = estimate_steps(pipeline, step, "h100")
        whole = vars(_Probe(pipeline, "h100")._training(step, getattr(preset, step.replace("-", "_"))))
        for name, value in vars(row).items():
            assert value == (pytest.approx(whole[name], rel=0.01) if name != "step" else step), name


@pytest.mark.slow
def test_discriminators_are_part_of_the_time_and_the_memory(micro_data: Path, tmp_path: Path) -> None:
    """An adversarial codec trains more parameters with more operations; its codebooks are not initialised."""
    adversarial = replace(MICRO, codec=replace(MICRO.codec, adversarial=True))
    presets = MICRO, adversarial
    plain, row = (
        estimate_steps(Pipeline(preset, data=micro_data, out=tmp_path / "run"), "codec", "h100")[0]
        for preset in presets
    )
    assert row.num_parameters > plain.num_parameters + 1e6
    assert row.seconds > 2 * plain.seconds and row.memory_bytes > 2 * plain.memory_bytes


def test_the_generators_of_the_caller_do_not_move(micro_data: Path, tmp_path: Path) -> None:
    """A dry run is no reason for other random numbers."""
    before = torch.get_rng_state()
    estimate_steps(Pipeline(MICRO, data=micro_data, out=tmp_path / "run"), "fine", "h100")
    assert torch.equal(torch.get_rng_state(), before) and not (tmp_path / "run").exists()
