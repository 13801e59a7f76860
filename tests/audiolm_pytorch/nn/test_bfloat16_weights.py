"""Decoding with bfloat16 weights: close to float32 weights, with every part of a transformer."""

import copy
from typing import Any

import pytest
import torch

from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.nn import row_products
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.transformer import FusedConditions, Transformer
from tests.helpers.decoding import decode
from tests.helpers.fakes import CONDITION, tiny_stages

OPTIONS: list[dict[str, Any]] = [
    {},
    {"positions": "relative", "kv_heads": 1},
    {"norm": "layer", "feed_forward": "gelu", "positions": "sinusoidal", "bias": True},
    {"feed_forward": lambda dim: torch.nn.Linear(dim, dim), "cross": True},
]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_rows_are_close_to_those_of_float32_weights(
    options: dict[str, Any], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows differ by the precision of bfloat16 only, with and without packed weights."""
    torch.manual_seed(0)
    if not packs:
        monkeypatch.setattr(row_products, "_can_pack", lambda: False)
    stack = Transformer(dim=32, depth=2, heads=2, dim_head=16, init_std=None, **options).eval()
    half = copy.deepcopy(stack).bfloat16()
    x, states = torch.randn(3, 9, 32), torch.randn(3, 4, 32) if "cross" in options else None
    rows = []
    with torch.inference_mode():
        for model in (stack, half):
            cached, weight = CachedTransformer(model, 3), model.blocks[0].attention.to_qkv.weight
            fused = FusedConditions(states=None if states is None else states.to(weight.dtype))
            cached.prefill(x[:, :4].to(weight.dtype), fused, [4, 2, 3], 12)
            starts = [4, 2, 3]
            steps = [cached.step(x[range(3), [s + n for s in starts]], [s + n for s in starts]) for n in range(5)]
            rows.append(torch.stack([step.clone() for step in steps]))
            assert cached.hidden.dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[0], atol=0.15, rtol=0.15)
    assert not torch.equal(rows[1], rows[0])


def test_tokens_are_nearly_those_of_float32_weights() -> None:
    """Greedy decoding of a model with distinct logits, with guidance and in batches."""
    torch.manual_seed(0)
    stage = tiny_stages(**CONDITION)["semantic"].eval()
    for weight in stage.heads.parameters():
        weight.data.mul_(40)
    conditions = {"codes": ConditionTensor.of(torch.randn(4, 3, 8))}
    settings = SamplingSettings(temperature=0, guidance_scale=1.5)
    result = [
        decode(model, {}, {"semantic": 8}, batch_size=4, conditioning=conditions, settings=settings).streams["semantic"]
        for model in (stage, copy.deepcopy(stage).bfloat16())
    ]
    assert (result[0] == result[1]).float().mean() > 0.7
