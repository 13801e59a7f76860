"""The decoding step without state computes the rows of the whole sequence."""

import pytest
import torch

from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.decode_step import DecodeStep
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream

STACKS = {
    "rotary": {"positions": "rotary", "kv_heads": 1, "cond_dim": 8},
    "relative": {"positions": "relative", "cond_dim": 8},
    "sinusoidal with cross-attention": {
        "positions": "sinusoidal",
        "text_dim": 8,
        "norm": "layer",
        "feed_forward": "gelu",
    },
}


@pytest.mark.parametrize("stack", STACKS)
def test_steps_compute_the_rows_of_a_sequence(stack: str) -> None:
    """From an empty cache, prefix first: the logits of every row and head, for two streams in the delayed pattern."""
    layout = TokenLayout((Stream("a", 12, 1, 25, is_input=True), Stream("b", 16, 3, 50)), pattern="delayed")
    model = TokenTransformer(layout=layout, dim=16, depth=2, heads=2, dim_head=8, **STACKS[stack]).eval()
    packed = layout.pack({"a": torch.randint(12, (2, 4, 1)), "b": torch.randint(16, (2, 8, 3))})
    name = "codes" if "cond_dim" in STACKS[stack] else "text"
    fused = model.fuse({name: ConditionTensor.of(torch.randn(2, 3, 8))}, 2)
    expected = model.hidden(packed.ids, packed.input_mask, fused)
    step = DecodeStep(model)
    keys, values = step.empty_cache(2), step.empty_cache(2)
    ids, nothing = packed.ids.masked_fill(~packed.input_mask, layout.num_ids), torch.zeros(2, 16)
    empty = torch.full_like(ids[:, 0], layout.num_ids)
    rows = [(empty, fused.prefix[:, row]) for row in range(fused.num_rows)]
    rows += [(ids[:, row], nothing) for row in range(ids.shape[1])]
    for number, (row, extra) in enumerate(rows):
        keys, values, *logits = step(row, extra, keys, values, fused.states)
        for head, found in enumerate(logits):
            if number >= fused.num_rows:
                wanted = model.logits(expected[:, number - fused.num_rows], head)
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert keys.shape[3] == len(rows) and len(logits) == 3


def test_encoders_have_no_decoding_step() -> None:
    """A model without causal attention cannot be decoded."""
    layout = TokenLayout((Stream("b", 16, 1, 50),))
    model = TokenTransformer(layout=layout, dim=16, depth=1, heads=2, dim_head=8, causal=False)
    with pytest.raises(ValueError, match="causal=True"):
        DecodeStep(model)
