"""De-duplication of tokens: run lengths keep time, and the inverse is exact."""

import itertools

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.semantic import Runs, deduplicate, expand


def padded(rows: list[list[int]], num_tokens: int) -> Tensor:
    """Rows of unequal length as ids `[b, num_tokens]`, -1 past their ends."""
    ids = torch.full((len(rows), num_tokens), -1)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids


def test_runs_are_those_of_groupby():
    """Guards ids and run lengths against the standard library, row by row, and that the inverse is exact."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        num_items, num_tokens, vocabulary = (int(torch.randint(low, 9, (), generator=generator)) for low in (1, 0, 1))
        counts = torch.randint(0, num_tokens + 1, (num_items,), generator=generator).tolist()
        rows = [torch.randint(0, vocabulary, (count,), generator=generator).tolist() for count in counts]
        ids = padded(rows, num_tokens)
        runs = deduplicate(ids)
        grouped = [[(key, len(list(group))) for key, group in itertools.groupby(row)] for row in rows]
        assert runs.ids.shape == runs.run_lengths.shape == (num_items, max(map(len, grouped), default=0))
        for place, row in enumerate(grouped):
            rest = runs.ids.shape[1] - len(row)
            assert runs.ids[place].tolist() == [key for key, _ in row] + [-1] * rest, trial
            assert runs.run_lengths[place].tolist() == [length for _, length in row] + [0] * rest, trial
        assert torch.equal(expand(runs), ids) and expand(runs).dtype == torch.int64


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(0, 0, dtype=torch.int64),
        torch.zeros(0, 5, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
        torch.full((2, 4), -1),
        torch.tensor([[7]]),
        torch.tensor([[7, -1], [-1, -1]]),
        torch.full((1, 1000), 3),
        torch.tensor([[0, 1] * 500]),
    ],
    ids=lambda ids: str(tuple(ids.shape)),
)
def test_edges_come_back(ids):
    """Guards nothing at all, nothing but padding, one token, one run and no repetition."""
    runs = deduplicate(ids)
    assert torch.equal(expand(runs), ids)
    assert int(runs.run_lengths.sum()) == int((ids >= 0).sum())


def test_small_types_and_inputs_stay():
    """Guards the argument against being written to, and int16 and int32 ids of shards against overflow."""
    ids = torch.tensor([[5, 5, 300], [9, -1, -1]], dtype=torch.int16)
    before = ids.clone()
    runs = deduplicate(ids)
    assert torch.equal(ids, before) and runs.ids.dtype == runs.run_lengths.dtype == torch.int64
    assert torch.equal(expand(runs), ids.long())
    long = deduplicate(torch.zeros(1, 40_000, dtype=torch.int16))
    assert long.run_lengths.tolist() == [[40_000]]


def test_runs_of_a_model_are_expanded():
    """Guards runs that no tokens preceded: equal neighbours are allowed, the width is that of the longest item."""
    runs = Runs(torch.tensor([[4, 4, 2], [1, -1, -1]]), torch.tensor([[1, 2, 1], [3, 0, 0]]))
    assert expand(runs).tolist() == [[4, 4, 4, 2], [1, 1, 1, -1]]
    assert expand(Runs(runs.ids, runs.run_lengths, 5)).tolist() == [[4, 4, 4, 2, -1], [1, 1, 1, -1, -1]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1, 1]]), "padding"),
        (torch.tensor([[-1, 1]]), "padding"),
        (torch.tensor([[1, -2]]), "below -1"),
        (torch.tensor([1, 2]), r"\[b, t\]"),
        (torch.tensor([[1.0, 2.0]]), "int"),
        (torch.tensor([[True, False]]), "int"),
    ],
)
def test_what_are_no_ids_is_refused(ids, message):
    """Guards against tokens that no inverse could give back."""
    with pytest.raises(ValueError, match=message):
        deduplicate(ids)


@pytest.mark.parametrize(
    ("ids", "run_lengths", "num_tokens", "message"),
    [
        ([[1, 2]], [[1, 0]], None, "run length of 1 or more"),
        ([[1, -1]], [[1, 2]], None, "padding"),
        ([[1, -1]], [[1, -1]], None, "padding"),
        ([[1, 2]], [[1]], None, "equal shapes"),
        ([[1, 2]], [[2, 3]], 4, "5 tokens, more than num_tokens = 4"),
    ],
)
def test_impossible_runs_are_refused(ids, run_lengths, num_tokens, message):
    """Guards `expand` against lengths that belong to other ids."""
    with pytest.raises(ValueError, match=message):
        expand(Runs(torch.tensor(ids), torch.tensor(run_lengths), num_tokens))
