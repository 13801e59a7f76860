"""The table of a layout against slow, independent ways of saying the same."""

import pytest
import torch

from audiolm_pytorch.stages import Stream, TokenLayout

GIVEN = Stream("s", 10, 1, 25, given=True)
TARGET = Stream("a", 20, 3, 50)


def tokens(batch=2, given=3, frames=6, levels=3):
    return {"s": torch.randint(0, 10, (batch, given, 1)), "a": torch.randint(0, 20, (batch, frames, levels))}


def first_ids(layout):
    """First id of every (stream, level), counted by hand: the start, then each level's tokens, ends behind level 0."""
    found, next_id = {}, 1
    for stream in layout.streams:
        for level in range(stream.num_levels):
            found[stream.name, level] = next_id
            next_id += stream.vocab_size + (stream.eos and level == 0)
    return found, next_id


def test_flat_is_the_papers_order():
    """One column: start, all given tokens, then level by level inside each frame, each in its own id range."""
    layout = TokenLayout([GIVEN, TARGET], "flat")
    streams = tokens()
    base, num_ids = first_ids(layout)
    wanted = [[0] + [base["s", 0] + int(t) for t in streams["s"][i].flatten()] for i in range(2)]
    for i in range(2):
        wanted[i] += [base["a", q] + int(streams["a"][i, f, q]) for f in range(6) for q in range(3)]
    packed = layout.pack(streams)
    assert layout.num_ids == num_ids and layout.num_columns == 1
    assert packed.ids[..., 0].tolist() == wanted
    assert packed.loss_mask[0, :, 0].tolist() == [False] * 4 + [True] * 18


def test_delayed_cells_match_a_naive_loop():
    """Level k of frame f stands in row 1 + f + k; the given token that covers frame f stands in row f."""
    layout = TokenLayout([GIVEN, TARGET], "delayed")
    streams = tokens()
    base, _ = first_ids(layout)
    packed = layout.pack(streams)
    assert packed.ids.shape == (2, 1 + 6 + 2, 4) == (2, layout.rows({"s": 3, "a": 6}), layout.num_columns)
    wanted = {(0, 1): layout.start_id}
    for frame in range(6):
        wanted[frame, 0] = base["s", 0] + int(streams["s"][1, frame // 2, 0])
        for level in range(3):
            wanted[1 + frame + level, 1 + level] = base["a", level] + int(streams["a"][1, frame, level])
    stands = {(int(r), int(c)): int(packed.ids[1, r, c]) for r, c in packed.input_mask[1].nonzero()}
    assert stands == wanted


@pytest.mark.parametrize("pattern", ["flat", "delayed"])
@pytest.mark.parametrize("eos", [False, True])
def test_unpack_undoes_pack_for_items_of_any_length(pattern, eos):
    """Right padding and per-item lengths lose nothing; past an item's end stands -1."""
    layout = TokenLayout([GIVEN, Stream("a", 20, 3, 50, eos=eos)], pattern)
    streams = tokens(batch=3)
    lengths = {"s": torch.tensor([3, 2, 1]), "a": torch.tensor([6, 4, 1])}
    ends = torch.tensor([True, False, True]) if eos else None
    found = layout.unpack(layout.pack(streams, lengths, ends).ids, lengths, ["s", "a"])
    for name, counts in lengths.items():
        for item, count in enumerate(counts.tolist()):
            assert torch.equal(found[name][item, :count], streams[name][item, :count])
            assert (found[name][item, count:] == -1).all()


@pytest.mark.parametrize("pattern", ["flat", "delayed"])
def test_packing_a_batch_is_packing_each_item_alone(pattern):
    """A short item has no hole between its streams: it looks as if it were alone, padded on the right."""
    layout = TokenLayout([GIVEN, TARGET], pattern)
    streams = tokens()
    lengths = {"s": torch.tensor([3, 2]), "a": torch.tensor([6, 4])}
    packed = layout.pack(streams, lengths)
    alone = layout.pack({"s": streams["s"][1:, :2], "a": streams["a"][1:, :4]})
    rows = alone.ids.shape[1]
    assert torch.equal(packed.input_mask[1, :rows], alone.input_mask[0]) and not packed.input_mask[1, rows:].any()
    assert torch.equal(packed.loss_mask[1, :rows], alone.loss_mask[0])
    assert torch.equal(packed.ids[1, :rows][alone.input_mask[0]], alone.ids[0][alone.input_mask[0]])


@pytest.mark.parametrize("pattern", ["flat", "delayed"])
def test_every_predicted_token_has_one_cell_and_a_head_that_may_produce_it(pattern):
    """Loss mask, heads and legal ids are one table: each cell's id is legal for its head, each token counted once."""
    layout = TokenLayout([GIVEN, TARGET], pattern)
    packed = layout.pack(tokens())
    counts = {"s": 3, "a": 6}
    heads = layout.head(counts)
    assert torch.equal(heads >= 0, packed.loss_mask[0])
    assert packed.loss_mask[0].sum() == 18
    for row in range(layout.rows(counts)):
        for column, legal in enumerate(layout.legal(counts, row)):
            assert (legal is None) == (not packed.loss_mask[0, row, column])
            if legal is not None:
                assert packed.ids[0, row, column] in legal and len(legal) == 20


def test_ids_are_disjoint_and_ends_are_their_own():
    """No two meanings share an id: start, levels, streams, ends (the mistake of offset end ids)."""
    layout = TokenLayout([GIVEN, Stream("a", 20, 2, 25, eos=True), Stream("b", 5, 1, 25, eos=True)], "flat")
    ranges = [set(head.ids(allow_eos=True)) for head in layout.heads] + [{layout.start_id}]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == 1 + 21 + 20 + 6
    assert layout.num_ids == 1 + 10 + 21 + 20 + 6


@pytest.mark.parametrize("pattern", ["flat", "delayed"])
def test_end_stands_only_where_a_file_ends(pattern):
    """The end id follows the last frame of items that really end, and carries loss; a crop has none."""
    layout = TokenLayout([Stream("a", 20, 1, 50, eos=True)], pattern)
    packed = layout.pack({"a": tokens()["a"][..., :1]}, ends=torch.tensor([True, False]))
    assert packed.ids[0, 7, 0] == layout.heads[0].first_id + 20
    assert packed.loss_mask[:, 7, 0].tolist() == [True, False] == packed.input_mask[:, 7, 0].tolist()


def test_given_streams_of_other_rates_are_aligned_and_clamped():
    """Higher rates take several columns; one frame too few repeats the last (HuBERT: 49 frames a second)."""
    layout = TokenLayout([Stream("s", 90, 1, 50, given=True), Stream("a", 20, 1, 25)], "delayed")
    packed = layout.pack({"s": torch.arange(7)[None], "a": torch.zeros(1, 4, 1, dtype=torch.long)})
    assert layout.num_columns == 3
    assert (packed.ids[0, :4, :2] - 1).tolist() == [[0, 1], [2, 3], [4, 5], [6, 6]]


def test_canvas_marks_what_is_missing_for_each_item():
    """Prompts of unequal length: known tokens stand, the rest is to be decoded."""
    layout = TokenLayout([GIVEN, TARGET], "delayed")
    streams = tokens()
    canvas = layout.canvas(streams, {"a": 8}, 2, {"a": torch.tensor([0, 5])})
    assert canvas.packed.loss_mask.sum(dim=(1, 2)).tolist() == [24, 9]
    found = layout.unpack(canvas.packed.ids, {"s": 3, "a": 8})["a"]
    assert torch.equal(found[1, :5], streams["a"][1, :5])


def test_layout_survives_a_round_trip_through_json_data():
    """Saved models rebuild the very layout they were trained with."""
    layout = TokenLayout([GIVEN, TARGET], "delayed")
    copy = TokenLayout.from_dict(layout.to_dict())
    assert copy.streams == layout.streams and copy.pattern == layout.pattern and copy.num_ids == layout.num_ids


def test_layout_refuses_what_it_cannot_mean():
    """Wrong shapes, tokens outside the vocabulary and impossible layouts are errors, not silence."""
    layout = TokenLayout([GIVEN, TARGET], "delayed")
    streams = tokens()
    with pytest.raises(ValueError, match="outside"):
        layout.pack({**streams, "s": streams["s"] + 10})
    with pytest.raises(ValueError, match="missing"):
        layout.pack({"a": streams["a"]})
    with pytest.raises(ValueError, match=r"\[b, f, 3\]"):
        layout.pack({**streams, "a": streams["a"][..., :2]})
    with pytest.raises(ValueError, match="longer than what is wanted"):
        layout.canvas(streams, {"a": 4}, 2)
    with pytest.raises(ValueError, match="unknown pattern"):
        TokenLayout([TARGET], "spiral")
    with pytest.raises(ValueError, match="predicted"):
        TokenLayout([GIVEN])
    with pytest.raises(ValueError, match="one rate_hz"):
        TokenLayout([TARGET, Stream("b", 5, 1, 25)], "delayed")
