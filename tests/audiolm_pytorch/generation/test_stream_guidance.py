"""Guidance along an input stream with a frame rate: training drops its tokens, and decoding guides along it."""

import pytest
import torch

from audiolm_pytorch.conditioning.base import guide
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stages import CoarseTransformer
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode
from tests.helpers.fakes import SIZES, random_conditions, tiny_stages
from tests.helpers.toy_audiolm import audiolm_of

TARGET = Stream("a", 20, 2, 50)
TEXT = Stream("t", 7, 1, None, is_input=True)
PATTERNS = ["flat", "delayed", "parallel"]


def layout_of(pattern: str, *further: Stream, guided: bool = True) -> TokenLayout:
    """A layout whose input stream has a look-ahead outside of the flat pattern."""
    lookahead = 0 if pattern == "flat" else 2
    stream = Stream("s", 10, 1, 25, is_input=True, lookahead_frames=lookahead, guided=guided)
    return TokenLayout([stream, *further, TARGET], pattern)


def tokens_of(batch: int) -> dict[str, torch.Tensor]:
    return {"s": torch.randint(0, 10, (batch, 4, 1)), "a": torch.randint(0, 20, (batch, 8, 2))}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropped_tokens_become_empty_cells(pattern):
    """Only cells of the guided stream become empty; words become null tokens; other items stay as they are."""
    layout, tokens = layout_of(pattern, TEXT), {**tokens_of(2), "t": torch.randint(0, 7, (2, 3, 1))}
    packed = layout.pack(tokens)
    dropped = layout.without_conditions(packed, torch.tensor([False, True]))
    is_input = (packed.ids >= 1) & (packed.ids < layout.heads[0].first_id - 7) & packed.input_mask
    assert torch.equal(dropped.input_mask[0], packed.input_mask[0]) and torch.equal(dropped.ids[0], packed.ids[0])
    assert is_input[1].sum() >= 4 and torch.equal(dropped.input_mask[1], packed.input_mask[1] & ~is_input[1])
    assert (dropped.ids[1, :3, 0] == layout.null_id).all() and torch.equal(dropped.ids[1, 3:], packed.ids[1, 3:])
    assert torch.equal(dropped.loss_mask, packed.loss_mask)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_drops_a_guided_stream_with_the_conditions(pattern, guided):
    """With all conditions dropped, the loss depends on the input tokens only if their stream is not guided."""
    model = TokenTransformer(layout=layout_of(pattern, guided=guided), **SIZES, cond_drop_prob=1.0).train()
    tokens = tokens_of(2)
    losses = [model(model.layout.pack({**tokens, "s": semantic})).loss for semantic in (tokens["s"], 9 - tokens["s"])]
    assert torch.equal(*losses) == guided


@pytest.mark.parametrize("pattern", PATTERNS)
def test_guided_decoding_equals_a_loop_without_cache(pattern):
    """The unconditional half has no input tokens in any row, and no conditions."""
    torch.manual_seed(0)
    model = TokenTransformer(layout=layout_of(pattern), **SIZES, cond_dim=8, null_tokens=3).eval()
    for weight in model.heads.parameters():
        weight.data.mul_(40)
    inputs, conditions = {"s": torch.randint(0, 10, (2, 4, 1))}, random_conditions(2)
    lengths = {"s": torch.tensor([4, 3])}
    settings = SamplingSettings(temperature=0, guidance_scale=2.0)
    result = decode(model, inputs, {"a": 6}, lengths=lengths, conditioning=conditions, settings=settings).streams["a"]
    grid = model.layout.grid(inputs, {"a": 6}, 2, lengths)
    ids, mask = grid.packed.ids, grid.packed.input_mask
    without = mask & ~((ids >= 1) & (ids < model.layout.heads[0].first_id))
    halves = [(model.fuse(conditions, 2), mask), (model.fuse({}, 2), without)]
    for row in range(1, ids.shape[1]):
        states = [model.hidden(ids[:, :row], cells[:, :row], fused)[:, -1] for fused, cells in halves]
        for item, column in grid.packed.loss_mask[:, row].nonzero().tolist():
            head = int(grid.head[item, row, column])
            logits = [model.logits(state[item], head) for state in states]
            ids[item, row, column] = model.layout.heads[head].first_id + guide(*logits, 2.0).argmax()
    expected = model.layout.unpack(ids, {"s": lengths["s"], "a": 6})["a"]
    assert torch.equal(result, expected)


@pytest.mark.slow
def test_guidance_makes_a_trained_stage_follow_its_input():
    """A stage that learned tokens of which 62% follow the input: guidance raises this share."""
    torch.manual_seed(0)
    layout = TokenLayout([Stream("s", 4, 1, 50, True, guided=True), Stream("a", 4, 1, 50)], "delayed")
    model = TokenTransformer(layout=layout, **SIZES, cond_drop_prob=0.3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        semantic = torch.randint(0, 4, (16, 20, 1))
        coarse = torch.where(torch.rand(semantic.shape) < 0.5, semantic, torch.randint(0, 4, semantic.shape))
        optimizer.zero_grad()
        model(layout.pack({"s": semantic, "a": coarse})).loss.backward()
        optimizer.step()
    asked = torch.randint(0, 4, (20, 30, 1))
    shares = []
    for scale in (0.0, 1.0, 2.5):
        settings = SamplingSettings(guidance_scale=scale)
        found = decode(model, {"s": asked}, {"a": 30}, settings=settings, seeds=list(range(20))).streams["a"]
        shares.append(float((found == asked).float().mean()))
    assert shares[0] == pytest.approx(0.25, abs=0.08)  # without the input, tokens are right by chance
    assert shares[1] == pytest.approx(0.62, abs=0.15) and shares[2] > shares[1] + 0.15


def test_a_guided_coarse_stage_needs_no_condition(tmp_path):
    """Guidance of the model is on for a guided coarse stage without conditions, and off for other stages."""
    stage = tiny_stages()["coarse"]
    guided = CoarseTransformer(**{**stage.config, "guide_semantic": True})
    save_module(guided, tmp_path / "coarse")
    assert load_module(tmp_path / "coarse").layout.streams[0].guided and "guide_semantic" not in stage.config
    waves = []
    for semantic_is_guided in (False, True):
        for scale in (1.0, 2.0):
            torch.manual_seed(0)
            audio_lm = audiolm_of()
            if semantic_is_guided:
                audio_lm.coarse_transformer = CoarseTransformer(**{**stage.config, "guide_semantic": True})
                audio_lm.coarse_transformer.load_state_dict(stage.state_dict())
            audio_lm.sampling = {name: SamplingSettings(guidance_scale=scale) for name in audio_lm.stages}
            waves.append(audio_lm.generate(GenerationRequest(seconds=0.6, seeds=1)).acoustic)
    assert torch.equal(waves[0], waves[1]) and not torch.equal(waves[2], waves[3])
    with pytest.raises(ValueError, match="'a' is predicted, so it cannot be guided"):
        Stream("a", 5, guided=True)
