"""The order of training data is a pure function of the step (fault 8 of DESIGN.md: no data position in checkpoints)."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.data.batches import BatchPlan, collate_crops
from audiolm_pytorch.data.crops import Crop, CropDataset
from audiolm_pytorch.data.manifest import load_items


def crop_of(num_samples: int, rates_hz: tuple[int, ...] = (16000,), ends_file: bool = False) -> Crop:
    """A crop without a file."""
    waves = {hz: torch.randn(num_samples * hz // 16000) for hz in rates_hz}
    return Crop(waves, 0.0, ends_file)


def test_the_data_position_is_a_pure_function_of_the_step() -> None:
    """Guards fault 8: a new object, at any step and in any order, returns the indices of the straight run."""
    straight = [BatchPlan(37, 8, seed=5).indices(step) for step in range(30)]
    resumed = BatchPlan(37, 8, seed=5)
    assert [resumed.indices(step) for step in reversed(range(30))] == straight[::-1]
    assert [BatchPlan(37, 8, seed=5).indices(step) for step in range(17, 30)] == straight[17:]
    assert BatchPlan(37, 8, seed=6).indices(0) != straight[0]


def test_the_waves_of_a_resumed_run_are_those_of_the_straight_run(write_folder: Callable[..., Path]) -> None:
    """Guards fault 8 down to the samples: plan and crops depend on nothing but the step."""
    items = load_items(write_folder(num_files=5, seconds=0.6)).items

    def waves(first: int, last: int) -> list[torch.Tensor]:
        plan, data = BatchPlan(5, 2, seed=1), CropDataset(items, 0.2, [24000, 16000], seed=1)
        batches = [collate_crops([data.get(*place) for place in plan.indices(step)]) for step in range(first, last)]
        return [batch.waves[16000] for batch in batches]

    straight = waves(0, 8)
    assert all(torch.equal(left, right) for left, right in zip(waves(5, 8), straight[5:], strict=True))


@pytest.mark.parametrize(("num_items", "batch_size"), [(12, 4), (13, 4), (7, 7), (10, 3)])
def test_every_epoch_sees_every_item_once(num_items: int, batch_size: int) -> None:
    """Guards against items that are dropped at the end of an epoch or seen twice."""
    plan = BatchPlan(num_items, batch_size, seed=0)
    places = [place for step in range(3 * num_items) for place in plan.indices(step)]
    seen = Counter(places)
    complete = places[-1][0]
    assert complete >= 2
    for epoch in range(complete):
        assert [seen[epoch, index] for index in range(num_items)] == [1] * num_items
    assert [index for epoch, index in places if epoch == 0] != [index for epoch, index in places if epoch == 1]


def test_fewer_items_than_a_batch_wrap_into_later_epochs() -> None:
    """Guards tiny data sets: a file that fills a batch gives a different crop each time."""
    places = BatchPlan(3, 8, seed=0).indices(0)
    assert [epoch for epoch, _ in places] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert len(set(places)) == 8


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_batch(world_size: int) -> None:
    """Guards data parallel runs: the ranks together receive the batch of a single process."""
    for step in range(9):
        parts = [BatchPlan(29, 8 // world_size, 0, rank, world_size).indices(step) for rank in range(world_size)]
        assert sum(parts, []) == BatchPlan(29, 8, 0).indices(step)


def test_impossible_plans_are_refused() -> None:
    """Guards empty data sets, wrong ranks and negative steps."""
    with pytest.raises(ValueError, match="num_items, batch_size and world_size must be at least 1"):
        BatchPlan(0, 8, 0)
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        BatchPlan(4, 2, 0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        BatchPlan(4, 2, 0).indices(-1)


def test_crops_are_padded_with_zeros_and_keep_their_lengths() -> None:
    """Guards order, lengths at every rate, zeros behind the end, and the marks of ends."""
    crops = [crop_of(1600, (16000, 24000)), crop_of(3200, (16000, 24000), ends_file=True)]
    batch = collate_crops(crops)
    for hz in (16000, 24000):
        assert batch.waves[hz].shape == (2, hz // 5)
        assert batch.lengths[hz].tolist() == [hz // 10, hz // 5]
        assert torch.equal(batch.waves[hz][0, : hz // 10], crops[0].waves[hz])
        assert batch.waves[hz][0, hz // 10 :].abs().max() == 0
    assert batch.ends_file.dtype == torch.bool and batch.ends_file.tolist() == [False, True]


def test_crops_that_do_not_go_together_are_refused() -> None:
    """Guards the empty batch and mixed rates."""
    with pytest.raises(ValueError, match="empty list"):
        collate_crops([])
    with pytest.raises(ValueError, match="all crops need the same sample rates"):
        collate_crops([crop_of(160), crop_of(160, rates_hz=(24000,))])
