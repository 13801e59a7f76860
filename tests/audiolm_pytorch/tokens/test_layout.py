"""Layouts: packing, unpacking and decoding grids, compared with slow, independent implementations."""

from fractions import Fraction

import pytest
import torch

from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream

PATTERNS = ["flat", "delayed", "parallel"]
INPUT = Stream("s", 10, 1, 25, is_input=True)
TARGET = Stream("a", 20, 3, 50)
TEXT = Stream("t", 30, 1, None, is_input=True)
CODES = Stream("m", 8, 2, None, is_input=True)
# Combinations of streams, and the frames of each stream for a long and a short item.
MIXES = {
    "plain": ([INPUT, TARGET], [[3, 6], [2, 4]]),
    "ends": ([INPUT, Stream("a", 20, 3, 50, eos=True)], [[3, 6], [1, 1]]),
    "alone": ([Stream("a", 7, 1, 25, eos=True)], [[5], [0]]),
    "groups": (
        [Stream("g", 9, 4, 50, is_input=True, num_groups=2), Stream("a", 5, 6, 50, num_groups=2)],
        [[4, 4], [3, 2]],
    ),
    "faster input": ([Stream("s", 90, 1, 75, is_input=True), Stream("a", 20, 2, 50)], [[7, 5], [3, 2]]),
    "odd rates": ([Stream("s", 9, 2, Fraction(25, 2), is_input=True), TARGET], [[3, 11], [1, 3]]),
    "melody": ([INPUT, Stream("p", 12, 1, Fraction(50, 3), is_input=True), TARGET], [[3, 2, 6], [1, 1, 2]]),
    "no time": ([TEXT, INPUT, TARGET], [[4, 3, 6], [0, 2, 4]]),
    "no time twice": ([TARGET, CODES, TEXT], [[4, 1, 0], [3, 0, 5]]),
    "two predicted": ([TEXT, Stream("b", 5, 1, 50), TARGET], [[2, 4, 4], [0, 3, 3]]),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_mix = pytest.mark.parametrize("mix", MIXES)


def tokens(batch=2, inputs=3, frames=6, levels=3):
    return {"s": torch.randint(0, 10, (batch, inputs, 1)), "a": torch.randint(0, 20, (batch, frames, levels))}


def random_batch(mix):
    """Streams of a layout, their tokens for two items, and the lengths of the items."""
    torch.manual_seed(0)
    streams, counts = MIXES[mix]
    handed, lengths = {}, {}
    for index, stream in enumerate(streams):
        lengths[stream.name] = torch.tensor([count[index] for count in counts])
        shape = (2, int(lengths[stream.name].max()), stream.num_levels)
        handed[stream.name] = torch.randint(0, stream.vocab_size, shape)
    return streams, handed, lengths


def packed_batch(mix, pattern):
    """The layout of a random batch, its tokens and lengths, and its packed form."""
    streams, handed, lengths = random_batch(mix)
    layout = TokenLayout(streams, pattern)
    return layout, handed, lengths, layout.pack(handed, lengths)


def naive_ids(streams):
    """First id of every (stream, level), of ends `(stream, "end")` and of `null`, by counting."""
    found, next_id = {"start": 0}, 1
    for stream in streams:
        for level in range(stream.num_levels):
            found[stream.name, level] = next_id
            next_id += stream.vocab_size
            if stream.eos and level == 0:
                found[stream.name, "end"] = next_id
                next_id += 1
    if any(stream.rate_hz is None for stream in streams):
        found["null"] = next_id
        next_id += 1
    return found, next_id


def naive_grid(streams, pattern, item, end):
    """Arrange one item token by token as `{(row, column): (id, is predicted)}`."""
    ids, _ = naive_ids(streams)
    cells, row = {}, 0
    for stream in streams:
        if stream.rate_hz is None:
            flat = [ids[stream.name, q] + t for frame in item[stream.name] for q, t in enumerate(frame)]
            for token in flat or [ids["null"]]:
                cells[row, 0] = (token, False)
                row += 1
    timed = [stream for stream in streams if stream.rate_hz is not None]
    inputs, predicted = [s for s in timed if s.is_input], [s for s in timed if not s.is_input]
    if pattern == "flat":
        cells[row, 0] = (ids["start"], False)
        for stream in inputs + predicted:
            for frame in item[stream.name]:
                for level, token in enumerate(frame):
                    row += 1
                    cells[row, 0] = (ids[stream.name, level] + token, not stream.is_input)
            if stream.eos and end:
                row += 1
                cells[row, 0] = (ids[stream.name, "end"], True)
        return cells
    column, num_frames = 0, len(item[predicted[0].name])
    for stream in inputs:
        ratio = Fraction(stream.rate_hz) / Fraction(predicted[0].rate_hz)
        per_row = -(-ratio.numerator // ratio.denominator)  # columns
        for part in range(per_row):
            for level in range(stream.num_levels):
                for frame in range(num_frames):
                    covering = int((frame + Fraction(part, per_row)) * ratio)
                    token = item[stream.name][min(covering, len(item[stream.name]) - 1)][level]
                    cells[row + frame, column] = (ids[stream.name, level] + token, False)
                column += 1
    cells[row, column] = (ids["start"], False)
    for stream in predicted:
        for level in range(stream.num_levels):
            later = level // stream.num_groups if pattern == "delayed" else 0
            for frame, levels in enumerate(item[stream.name]):
                cells[row + 1 + frame + later, column] = (ids[stream.name, level] + levels[level], True)
            if stream.eos and end and level == 0:
                cells[row + 1 + num_frames, column] = (ids[stream.name, "end"], True)
            column += 1
    return cells


def naive_item(handed, lengths, item):
    return {name: found[item, : lengths[name][item]].tolist() for name, found in handed.items()}


@every_mix
@every_pattern
@pytest.mark.parametrize("end", [False, True])
def test_packing_matches_a_naive_loop(mix, pattern, end):
    """Ids and masks of every pattern are right for groups, rates, ends and streams that are not in time."""
    streams, handed, lengths = random_batch(mix)
    layout = TokenLayout(streams, pattern)
    packed = layout.pack(handed, lengths, torch.tensor([end, False]))
    assert layout.num_ids == naive_ids(streams)[1]
    for item in range(2):
        has_end = end and item == 0
        cells = naive_grid(streams, pattern, naive_item(handed, lengths, item), has_end)
        found = {
            (r, c): (int(packed.ids[item, r, c]), bool(packed.loss_mask[item, r, c]))
            for r, c in packed.input_mask[item].nonzero().tolist()
        }
        assert found == cells
        assert not (packed.loss_mask[item] & ~packed.input_mask[item]).any()
        assert packed.ids.shape[2] == 1 + max(column for _, column in cells)
        counts = {name: int(count[item]) for name, count in lengths.items()}
        assert len(layout.table(counts, has_end).block) == 1 + max(row for row, _ in cells)


@every_mix
@every_pattern
def test_unpack_undoes_pack_for_items_of_any_length(mix, pattern):
    """Padding and lengths per item lose no token; the result is -1 past an item's end."""
    streams, handed, lengths = random_batch(mix)
    layout = TokenLayout(streams, pattern)
    found = layout.unpack(layout.pack(handed, lengths).ids, lengths)
    for stream in streams:
        # With one row per frame, input streams in time are packed only as far as rows need them.
        is_partial = pattern != "flat" and stream.is_input and stream.rate_hz is not None
        for item, count in enumerate(lengths[stream.name].tolist()):
            stands = (found[stream.name][item] >= 0).all(-1)
            assert not stands[count:].any() and (stands[:1] if is_partial else stands)[:count].all()
            assert torch.equal(found[stream.name][item][stands], handed[stream.name][item, : len(stands)][stands])


@every_mix
@every_pattern
def test_packing_does_not_depend_on_other_items(mix, pattern):
    """A short item in a batch is packed as if it were alone, and padded on the right."""
    layout, handed, lengths, packed = packed_batch(mix, pattern)
    for item in range(2):
        alone = layout.pack({name: found[item : item + 1, : lengths[name][item]] for name, found in handed.items()})
        rows = alone.ids.shape[1]
        assert torch.equal(packed.input_mask[item, :rows], alone.input_mask[0])
        assert not packed.input_mask[item, rows:].any() and not packed.loss_mask[item, rows:].any()
        assert torch.equal(packed.loss_mask[item, :rows], alone.loss_mask[0])
        assert torch.equal(packed.ids[item, :rows][alone.input_mask[0]], alone.ids[0][alone.input_mask[0]])


@every_mix
@every_pattern
def test_every_predicted_token_is_in_the_range_of_its_head(mix, pattern):
    """The head of a cell covers exactly the ids of one level, and the end id if the stream has one."""
    layout, handed, lengths, packed = packed_batch(mix, pattern)
    wanted = {stream.name: lengths[stream.name] for stream in layout.predicted}
    grid = layout.grid(handed, wanted, 2, {**lengths, **dict.fromkeys(wanted, 0)})
    assert torch.equal(grid.packed.loss_mask, packed.loss_mask) and torch.equal(grid.head >= 0, packed.loss_mask)
    first_id, sizes = naive_ids(layout.streams)[0], {stream.name: stream.vocab_size for stream in layout.streams}
    for head in layout.heads:
        first = first_id[head.stream, head.level]
        assert head.ids(allow_eos=False) == range(first, first + sizes[head.stream])
        has_end = (head.stream, "end") in first_id and head.level == 0
        assert head.has_eos == has_end and head.ids(allow_eos=True) == range(first, first + head.num_logits)
        assert head.num_logits == sizes[head.stream] + has_end
        assert not has_end or first_id[head.stream, "end"] == first + sizes[head.stream]
    for item, row, column in packed.loss_mask.nonzero().tolist():
        head = layout.heads[int(grid.head[item, row, column])]
        assert int(packed.ids[item, row, column]) in head.ids(allow_eos=False)


@pytest.mark.parametrize("levels", range(1, 9))
def test_ids_are_disjoint(levels):
    """Start, levels, ends and the null token have ids of their own."""
    streams = [TEXT, INPUT, Stream("a", 20, levels, 25, eos=True), Stream("b", 5, 1, 25, eos=True)]
    layout = TokenLayout(streams, "flat")
    first, num_ids = naive_ids(streams)
    ranges = [set(head.ids(allow_eos=True)) for head in layout.heads] + [{first["start"]}, {layout.null_id}]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == 1 + 21 + 20 * (levels - 1) + 6 + 1
    assert layout.num_ids == num_ids == 1 + 30 + 10 + 21 + 20 * (levels - 1) + 6 + 1
    assert layout.null_id == first["null"] and TokenLayout([INPUT, TARGET]).null_id is None


@every_pattern
def test_dropped_conditions_become_null_tokens_in_place(pattern):
    """Rows, streams in time and other items stay as they are."""
    streams, handed, lengths = random_batch("no time")
    handed = {**handed, "t": torch.randint(0, 30, (2, 4, 1))}
    lengths = {**lengths, "t": torch.tensor([4, 2])}
    layout = TokenLayout(streams, pattern)
    packed = layout.pack(handed, lengths)
    dropped = layout.without_conditions(packed, torch.tensor([False, True]))
    assert torch.equal(dropped.ids[0], packed.ids[0]) and torch.equal(dropped.input_mask, packed.input_mask)
    assert torch.equal(dropped.loss_mask, packed.loss_mask)
    assert (dropped.ids[1, :2, 0] == layout.null_id).all() and torch.equal(dropped.ids[1, 2:], packed.ids[1, 2:])
    read = layout.unpack(dropped.ids, lengths)
    assert (read["t"][1] == -1).all() and torch.equal(read["t"][0], handed["t"][0])
    assert torch.equal(read["a"][1, :4], handed["a"][1, :4])
    empty = layout.pack({**handed, "t": handed["t"][:, :0]}, {name: n for name, n in lengths.items() if name != "t"})
    assert (empty.ids[:, 0, 0] == layout.null_id).all() and empty.input_mask[:, 0, 0].all()
    assert torch.equal(layout.without_conditions(empty, torch.tensor([True, True])).ids, empty.ids)
    plain = TokenLayout([INPUT, TARGET], pattern)
    packed = plain.pack(tokens())
    assert plain.without_conditions(packed, torch.tensor([True, True])) is packed
    with pytest.raises(ValueError, match="drop must be bool"):
        layout.without_conditions(dropped, torch.tensor([1]))


def test_input_streams_of_other_rates_are_aligned_and_clamped():
    """A higher rate uses several columns; a missing frame repeats the last one (HuBERT has 49 frames per second)."""
    layout = TokenLayout([Stream("s", 90, 1, 50, is_input=True), Stream("a", 20, 1, 25)], "delayed")
    packed = layout.pack({"s": torch.arange(7)[None], "a": torch.zeros(1, 4, 1, dtype=torch.long)})
    assert packed.ids.shape[2] == 3
    assert (packed.ids[0, :4, :2] - 1).tolist() == [[0, 1], [2, 3], [4, 5], [6, 6]]


def test_groups_of_a_level_have_the_same_delay():
    """The delayed pattern delays levels, not groups."""
    layout = TokenLayout([Stream("a", 5, 6, 50, num_groups=2)], "delayed")
    packed = layout.pack({"a": torch.zeros(1, 1, 6, dtype=torch.long)})
    assert packed.loss_mask[0].nonzero().tolist() == [[1, 0], [1, 1], [2, 2], [2, 3], [3, 4], [3, 5]]


@every_mix
@every_pattern
def test_grid_marks_the_missing_cells_of_each_item(mix, pattern):
    """With prompts of unequal length, exactly the cells after each prompt are missing."""
    streams, handed, lengths = random_batch(mix)
    layout = TokenLayout(streams, pattern)
    names = [stream.name for stream in layout.predicted]
    known = {name: torch.stack((lengths[name][0] // 2, lengths[name][1])) for name in names}
    wanted = {name: torch.stack((lengths[name][0], lengths[name][1] + 2)) for name in names}
    grid = layout.grid(handed, wanted, 2, {**lengths, **known})
    levels = {stream.name: stream.num_levels for stream in streams}
    missing = sum((wanted[name] - known[name]) * levels[name] for name in names)
    assert grid.packed.loss_mask.sum(dim=(1, 2)).tolist() == missing.tolist()
    assert torch.equal(grid.head[grid.packed.loss_mask] >= 0, torch.ones(int(missing.sum()), dtype=torch.bool))
    found = layout.unpack(grid.packed.ids, grid.num_frames)
    for name in names:
        for item in range(2):
            count = int(known[name][item])
            assert torch.equal(found[name][item, :count], handed[name][item, :count])
            where = [layout.heads[h].stream == name for h in grid.head[item][grid.packed.loss_mask[item]].tolist()]
            frames = grid.frame[item][grid.packed.loss_mask[item]][torch.tensor(where, dtype=torch.bool)]
            assert (frames >= count).all() and (frames < wanted[name][item]).all()


@every_pattern
def test_grid_accepts_missing_streams_that_are_not_in_time(pattern):
    """A missing stream gives the same grid as an empty one."""
    layout = TokenLayout([TEXT, INPUT, TARGET], pattern)
    streams = {"s": tokens()["s"]}
    without = layout.grid(streams, {"a": 4}, 2)
    empty = layout.grid({**streams, "t": torch.zeros(2, 0, 1, dtype=torch.long)}, {"a": 4}, 2)
    assert torch.equal(without.packed.ids, empty.packed.ids) and int(without.packed.ids[0, 0, 0]) == layout.null_id
    with pytest.raises(ValueError, match="missing"):
        layout.pack({**streams, "a": tokens()["a"]})


def test_frame_alignment_ignores_streams_that_are_not_in_time():
    """Windows start where a frame of every input stream in time starts."""
    assert TokenLayout([INPUT, TARGET, TEXT]).frame_alignment == 2
    assert TokenLayout([Stream("p", 9, 1, Fraction(50, 3), is_input=True), INPUT, TARGET]).frame_alignment == 6


@every_mix
@every_pattern
def test_layout_survives_a_round_trip_through_json_data(mix, pattern):
    """Saved models rebuild the layout they were trained with."""
    layout = TokenLayout(MIXES[mix][0], pattern)
    copy = TokenLayout.from_dict(layout.to_dict())
    assert copy.streams == layout.streams and copy.pattern == layout.pattern and copy.num_ids == layout.num_ids


def test_saved_layouts_without_groups_load():
    """Files of older models have no num_groups."""
    old = {"name": "a", "vocab_size": 5, "num_levels": 2, "rate_hz": "50", "given": False, "eos": False}
    assert TokenLayout.from_dict({"streams": [old], "pattern": "delayed"}).streams == (Stream("a", 5, 2, 50),)


def test_wrong_tokens_raise_errors():
    """Errors name the stream and the position of wrong shapes, lengths, names and tokens."""
    layout = TokenLayout([INPUT, TARGET], "delayed")
    streams = tokens()
    wrong = streams["s"].clone()
    wrong[1, 2] = 17
    for changed, match in {
        r"'s' has token 17 at item 1, frame 2, level 0, outside \[0, 10\)": {"s": wrong},
        r"has token -1 .* pass lengths": {"s": torch.where(wrong == 17, -1, wrong)},
        r"\[b, f, 3\], got torch.int64 \(2, 6, 2\)": {"a": streams["a"][..., :2]},
        r"integers \[b, f, 1\], got torch.float32": {"s": streams["s"].float()},
        r"same number of items .*'s': 1, 'a': 2": {"s": streams["s"][:1]},
        r"unknown streams \['b'\]; the streams are \['s', 'a'\]": {"b": streams["a"]},
        r"every input stream with a rate_hz needs one or more frames; \['s'\] have none": {"s": streams["s"][:, :0]},
    }.items():
        with pytest.raises(ValueError, match=changed):
            layout.pack({**streams, **match})
    with pytest.raises(ValueError, match=r"tokens of streams \['s'\] are missing"):
        layout.pack({"a": streams["a"]})
    for lengths, match in [
        ({"a": 9}, r"'a' must be at most 6, the number of its frames; got 9"),
        ({"a": torch.tensor([1, 2, 3])}, r"one integer or 2 integers, 0 or more; got \[1, 2, 3\]"),
        ({"a": -1}, "got -1"),
        ({"a": torch.tensor([2.5, 3.0])}, "one integer"),
        ({"A": 3}, r"unknown streams \['A'\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            layout.pack(streams, lengths)
    with pytest.raises(ValueError, match="ends must be"):
        layout.pack(streams, ends=torch.tensor([True]))
    with pytest.raises(ValueError, match=r"prompt of 'a' has \[6, 6\] frames, longer than the requested \[4, 4\]"):
        layout.grid(streams, {"a": 4}, 2)
    with pytest.raises(ValueError, match="need 3 items"):
        layout.grid(streams, {"a": 9}, 3)
    packed = layout.pack(streams)
    with pytest.raises(ValueError, match=r"ids must be \[b, 12, 4\] .*, got \(2, 9, 4\)"):
        layout.unpack(packed.ids, {"s": 3, "a": 9})
    with pytest.raises(ValueError, match="predicted streams need equal numbers of frames"):
        TokenLayout([Stream("b", 5), Stream("c", 5)], "parallel").table({"b": 2, "c": 3})


def test_rows_of_another_layout_are_refused():
    """The loss of foreign rows would be 0, or that of wrong tokens."""
    names = stages(pattern="delayed")
    others = [names["semantic"].layout, TokenLayout(names["coarse"].layout.streams, "parallel")]
    for layout in others:
        streams = {one.name: torch.zeros(2, 6, one.num_levels, dtype=torch.long) for one in layout.streams}
        with pytest.raises(ValueError, match="rows that a .* layout of the streams .* has packed"):
            names["coarse"](layout.pack(streams))
    with pytest.raises(ValueError, match=r"ids must be in 0..\d+ in this layout, got 999..999"):
        TokenLayout([TARGET]).unpack(torch.full((1, 13, 1), 999), {"a": 4})
    foreign = TokenLayout([INPUT, TARGET]).unpack(torch.zeros(1, 20, 1, dtype=torch.long), {"s": 3, "a": 4})
    assert all((ids == -1).all() for ids in foreign.values())


def test_impossible_layouts_raise_errors():
    """Errors name the stream, the value and what is needed."""
    with pytest.raises(ValueError, match="unknown pattern 'spiral'; use one of"):
        TokenLayout([TARGET], "spiral")
    with pytest.raises(ValueError, match="predicted"):
        TokenLayout([INPUT])
    with pytest.raises(ValueError, match="must differ"):
        TokenLayout([TARGET, TARGET])
    for pattern in ("delayed", "parallel"):
        with pytest.raises(ValueError, match=f"{pattern} pattern.* the same rate_hz, got .*'b': '25'"):
            TokenLayout([TARGET, Stream("b", 5, 1, 25)], pattern)
    for wrong, match in [
        ({"vocab_size": 0}, "'x' needs positive numbers, got {'vocab_size'"),
        ({"num_levels": 0}, "'x' needs positive numbers, got {'num_levels'"),
        ({"rate_hz": -25}, "'x' needs positive numbers, got {'rate_hz'"),
        ({"num_levels": 5, "num_groups": 2}, "num_levels=5, which is not a multiple of num_groups=2"),
        ({"is_input": True, "eos": True}, "cannot predict its end"),
        ({"rate_hz": None}, "needs a rate_hz"),
        ({"is_input": True, "lookahead_frames": 10**6}, "lookahead_frames=1000000 .* at most 2048 levels"),
    ]:
        with pytest.raises(ValueError, match=match):
            Stream(**{"name": "x", "vocab_size": 5, **wrong})


# layouts of the stages

SIZES = {"dim": 16, "depth": 1, "heads": 1, "dim_head": 16, "ff_mult": 1.0}
MELODY = Stream("melody", 12, 1, 25, is_input=True)
WORDS = Stream("words", 30, 1, None, is_input=True)


def stages(**options):
    """The three stages for a codec with two groups."""
    groups = {"num_groups": 2, **options}
    return {
        "semantic": SemanticTransformer(num_semantic_tokens=12, **options, **SIZES),
        "coarse": CoarseTransformer(
            num_semantic_tokens=12, codebook_size=16, num_coarse_quantizers=4, **groups, **SIZES
        ),
        "fine": FineTransformer(num_coarse_quantizers=4, num_fine_quantizers=2, codebook_size=16, **groups, **SIZES),
    }


@every_pattern
@pytest.mark.parametrize("name", ["semantic", "coarse", "fine"])
def test_stages_pack_any_pattern_groups_and_extra_streams(name, pattern, tmp_path):
    """A stage selects tokens by kind and level, extra streams by name, and is the same after saving and loading."""
    torch.manual_seed(0)
    model = stages(pattern=pattern, extra_streams=[WORDS, MELODY])[name]
    found = {
        "semantic": torch.randint(0, 12, (2, 3)),
        "acoustic": torch.randint(0, 16, (2, 6, 6)),
        "words": torch.randint(0, 30, (2, 5)),
        "melody": torch.randint(0, 12, (2, 3)),
    }
    frames = {"semantic": [3, 2], "acoustic": [6, 4], "words": [5, 0], "melody": [3, 2]}
    used = {kind: found[kind] for kind in model.kinds}
    lengths = {kind: torch.tensor(frames[kind]) for kind in model.kinds}
    packed = model.packed(AudioTokens(used, lengths))
    names = [stream.name for stream in model.layout.streams]
    own_lengths = {name: lengths[model.sources[name].kind] for name in names}
    read = model.layout.unpack(packed.ids, own_lengths)
    levels = {"coarse": slice(0, 4), "fine": slice(4, 6)}
    for stream in names:
        right = found["acoustic"][..., levels[stream]] if stream in levels else found[stream].unsqueeze(-1)
        for item in range(2):
            stands = read[stream][item] >= 0
            assert torch.equal(read[stream][item][stands], right[item, : len(stands)][stands])
            assert stream in levels or stream == "words" or stands.any()
    assert read["words"][0].flatten().tolist() == found["words"][0].tolist() and (read["words"][1] == -1).all()
    assert model(packed).loss.isfinite()
    save_module(model, tmp_path / "stage")
    again = load_module(tmp_path / "stage")
    assert again.config == model.config and again.layout.to_dict() == model.layout.to_dict()
    assert {s.num_groups for s in again.layout.streams if s.name in levels} in (set(), {2})


def test_wrong_extra_streams_raise_errors():
    """An extra stream must be an input and must not have the name of the stage's own tokens."""
    for wrong, match in [
        (Stream("melody", 12, 1, 25), "set is_input=True"),
        (Stream("acoustic", 12, 1, 25, is_input=True), "cannot be named 'acoustic'"),
        (Stream("coarse", 12, 1, 25, is_input=True), "must differ"),
    ]:
        with pytest.raises(ValueError, match=match):
            stages(extra_streams=[wrong])["coarse"]
    with pytest.raises(ValueError, match="not a multiple of num_groups=3"):
        FineTransformer(num_coarse_quantizers=4, num_fine_quantizers=2, codebook_size=16, num_groups=3, **SIZES)
    with pytest.raises(ValueError, match="got lengths without tokens"):
        AudioTokens({"semantic": torch.zeros(1, 2)}, {"acoustic": torch.tensor([1])})
    model = stages(extra_streams=[WORDS])["semantic"]
    with pytest.raises(ValueError, match="needs words tokens"):
        model.packed(AudioTokens({"semantic": torch.zeros(1, 2, dtype=torch.long)}, {}))
