"""Look-ahead of input streams in layouts, compared with a naive loop."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream

TARGET = Stream("a", 20, 3, 50)
# Input streams, with the numbers of input and predicted frames of a long and a short item.
INPUTS = {
    "slower": (Stream("s", 10, 1, 25, is_input=True, lookahead_frames=4), [[9, 12], [2, 6]]),
    "faster": (Stream("s", 10, 1, 75, is_input=True, lookahead_frames=2), [[18, 12], [7, 6]]),
    "levels": (Stream("s", 10, 2, 50, is_input=True, lookahead_frames=3), [[12, 12], [6, 6]]),
    "odd": (Stream("s", 10, 1, Fraction(50, 3), is_input=True, lookahead_frames=1), [[5, 12], [1, 6]]),
}
both_patterns = pytest.mark.parametrize("pattern", ["delayed", "parallel"])


@both_patterns
@pytest.mark.parametrize("name", INPUTS)
def test_rows_contain_the_next_input_frames(name, pattern):
    """Row f has the token at the time of frame f and the next ones in columns with ids of their own, up to the end."""
    stream, counts = INPUTS[name]
    plain, layout = (TokenLayout([one, TARGET], pattern) for one in (replace(stream, lookahead_frames=0), stream))
    lengths = {"s": torch.tensor([c[0] for c in counts]), "a": torch.tensor([c[1] for c in counts])}
    tokens = {
        "s": torch.randint(0, 10, (2, counts[0][0], stream.num_levels)),
        "a": torch.randint(0, 20, (2, counts[0][1], 3)),
    }
    packed, without = layout.pack(tokens, lengths), plain.pack(tokens, lengths)
    first, last = without.ids.shape[2] - 3, stream.lookahead_frames * stream.num_levels
    columns = [*range(first), *range(first + last, packed.ids.shape[2])]
    assert torch.equal(packed.input_mask[:, :, columns], without.input_mask)
    assert torch.equal(packed.loss_mask[:, :, columns], without.loss_mask)
    assert layout.num_ids == plain.num_ids + 10 * last
    read = layout.unpack(packed.ids, lengths)["a"]
    for item, (num_inputs, num_frames) in enumerate(counts):
        assert torch.equal(read[item, :num_frames], tokens["a"][item, :num_frames])
        for row in range(packed.ids.shape[1]):
            cells = iter(range(first, first + last))
            # A faster stream has two columns for the time of a row; the second one is later.
            now = int((row + Fraction(1, 2)) * Fraction(3, 2)) if name == "faster" else int(row * stream.exact_hz / 50)
            for ahead in range(1, stream.lookahead_frames + 1):
                for level in range(stream.num_levels):
                    cell = item, row, next(cells)
                    exists = row < num_frames and now + ahead < num_inputs
                    assert bool(packed.input_mask[cell]) == exists and not packed.loss_mask[cell]
                    if exists:
                        first_id = 1 + 10 * (level * (1 + stream.lookahead_frames) + ahead)
                        assert int(packed.ids[cell]) == first_id + int(tokens["s"][item, now + ahead, level])
    copy = TokenLayout.from_dict(layout.to_dict())
    assert copy.streams == layout.streams and copy.num_ids == layout.num_ids
    assert "lookahead_frames" not in plain.to_dict()["streams"][0]  # configs without look-ahead stay the same


def test_impossible_lookahead_raises_errors():
    """Only an input stream in time can have a look-ahead, and not in the flat pattern."""
    for wrong in ({"lookahead_frames": -1, "is_input": True}, {"lookahead_frames": 2}):
        with pytest.raises(ValueError, match="an input stream with a rate_hz can have 0 or more"):
            Stream("x", 5, **wrong)
    with pytest.raises(ValueError, match="an input stream with a rate_hz can have 0 or more"):
        Stream("x", 5, rate_hz=None, is_input=True, lookahead_frames=1)
    with pytest.raises(ValueError, match=r"lookahead_frames for \['s'\] in the flat pattern"):
        TokenLayout([INPUTS["slower"][0], TARGET], "flat")
