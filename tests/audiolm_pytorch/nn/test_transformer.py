"""The transformer and the token model: causality, cache, conditions, loss, precision, saving."""

import math
import socket
from dataclasses import replace

import pytest
import torch

from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.transformer import Transformer
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.fakes import CONDITION, SIZES, random_conditions, tiny_stages

INPUT, TARGET = Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50, eos=True)


def model_of(pattern="delayed", **changes):
    return TokenTransformer(layout=TokenLayout([INPUT, TARGET], pattern), **{**SIZES, "cond_dim": 8, **changes}).eval()


def batch_of(model, batch=2, frames=6):
    streams = {"s": torch.randint(0, 10, (batch, frames // 2, 1)), "a": torch.randint(0, 20, (batch, frames, 2))}
    return model.layout.pack(streams)


def test_transformer_is_causal():
    """A change of one row changes no row before it."""
    stack = Transformer(dim=32, depth=2, heads=2, dim_head=16)
    x = torch.randn(1, 8, 32)
    y = x.clone()
    y[:, 5:] = torch.randn(1, 3, 32)
    torch.testing.assert_close(stack(x)[:, :5], stack(y)[:, :5])
    assert not torch.allclose(stack(x)[:, 5], stack(y)[:, 5])


@pytest.mark.parametrize("pattern", ["flat", "delayed"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_cached_logits_equal_uncached_ones(pattern, conditioned):
    """Rows through the cache, at unequal positions, give the logits of one pass over all rows."""
    model = model_of(pattern)
    packed = batch_of(model)
    fused = model.fuse(random_conditions(2) if conditioned else None, 2)
    x, rows, items = model.embed(packed.ids, packed.input_mask), packed.ids.shape[1], torch.arange(2)
    whole = model.hidden(packed.ids, packed.input_mask, fused)
    cached = CachedTransformer(model.transformer, 2)
    # Item 1 starts two rows after item 0. Rows that the first call wrote too many are overwritten before they are read.
    starts = [2, 4]
    with torch.no_grad():
        first = cached.prefill(x[:, :4], fused, starts, fused.num_rows + rows)
        torch.testing.assert_close(first, whole[items, torch.tensor([1, 3])], atol=1e-5, rtol=1e-5)
        while min(starts) < rows:
            at = torch.tensor(starts).clamp(max=rows - 1)
            step = cached.step(x[items, at], at.tolist())
            for head in range(len(model.layout.heads)):
                torch.testing.assert_close(
                    model.logits(step, head), model.logits(whole[items, at], head), atol=1e-5, rtol=1e-5
                )
            starts = [start + 1 for start in starts]


def test_untrained_loss_is_at_chance_level():
    """The loss starts at ln(V) and equals the cross-entropy of each cell; padding adds nothing."""
    model = model_of()
    lengths = {"s": torch.tensor([3, 1]), "a": torch.tensor([6, 2])}
    streams = {"s": torch.randint(0, 10, (2, 3, 1)), "a": torch.randint(0, 20, (2, 6, 2))}
    packed = model.layout.pack(streams, lengths, torch.tensor([True, False]))
    result = model(packed)
    assert abs(result.loss.item() - math.log(20)) < 0.2
    hidden = model.hidden(packed.ids, packed.input_mask, model.fuse(None, 2))
    nats = []
    for item, row, column in packed.loss_mask.nonzero().tolist():
        cell = int(packed.ids[item, row, column])
        head = next(i for i, head in enumerate(model.layout.heads) if cell in head.ids(allow_eos=True))
        log_probs = model.logits(hidden[item, row - 1], head).log_softmax(-1)
        nats.append(-log_probs[cell - model.layout.heads[head].first_id].item())
    assert len(nats) == 12 + 4 + 1
    assert result.loss.item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    assert set(result.per_stream) == {"a", "a.0", "a.1"} and 0 <= result.accuracy <= 1


def test_every_parameter_gets_a_gradient():
    """No parameter is unused."""
    model = model_of(cond_drop_prob=0.5).train()
    conditioning = random_conditions(8)
    streams = {"s": torch.arange(10).view(2, 5).repeat(4, 1), "a": torch.randint(0, 20, (8, 10, 2))}
    model(model.layout.pack(streams, ends=torch.ones(8, dtype=torch.bool)), conditioning).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert not model.embedding.weight.grad[-1].any()


def test_dropped_conditions_do_not_change_the_loss(monkeypatch):
    """Fault 2: with drop probability 1 the condition has no effect in training, in every stage."""

    def check():
        for stage in tiny_stages(**CONDITION, cond_drop_prob=1.0).values():
            stage.train()
            streams = {s.name: torch.randint(0, 12, (2, 4, s.num_levels)) for s in stage.layout.streams}
            packed = stage.layout.pack(streams)
            losses = [stage(packed, random_conditions(2)).loss.item() for _ in range(2)]
            assert losses[0] == losses[1]

    check()
    monkeypatch.setattr(ConditionTensor, "without_items", lambda self, drop: self)
    with pytest.raises(AssertionError):
        check()


def test_conditions_are_dropped_per_item_in_training_only():
    """The dropped share is close to the probability; dropped items equal masked items."""
    model = model_of(cond_drop_prob=0.5)
    conditioning = random_conditions(1)
    packed = batch_of(model, batch=1)
    rows = {name: part.expand(64, -1, -1) for name, part in vars(packed).items() if isinstance(part, torch.Tensor)}
    packed = replace(packed, **rows)
    seen = []
    model.fuse, original = lambda c, b: seen.append(c["codes"].mask.any(1)) or original(c, b), model.fuse
    model.eval()(packed, conditioning)
    model.train()(packed, conditioning)
    assert seen[0].all()
    assert 12 <= int(seen[1].sum()) <= 52  # 64 fair coins; fails by chance once in 10^6


def test_masked_conditions_become_the_null_embedding():
    """Masked embeddings have no influence; an item without embeddings is unconditional."""
    model = model_of()
    codes = random_conditions(2)["codes"]
    hidden = codes.without_trailing(torch.tensor([1, 0]))
    other = ConditionTensor(torch.where(hidden.mask[..., None], hidden.embeddings, torch.randn(2, 3, 8)), hidden.mask)
    torch.testing.assert_close(model.fuse({"codes": hidden}, 2).prefix, model.fuse({"codes": other}, 2).prefix)
    assert torch.equal(model.fuse({"codes": hidden}, 2).prefix[1], model.fuser.entries["codes"].null.expand(3, -1))
    assert model.fuse(None, 2).prefix.shape == (2, model.null_tokens, 32)


def test_right_padding_changes_nothing():
    """The loss of an item is the same alone and next to a longer item."""
    model = model_of()
    streams = {"s": torch.randint(0, 10, (2, 5, 1)), "a": torch.randint(0, 20, (2, 10, 2))}
    both = model.layout.pack(streams, {"s": torch.tensor([2, 5]), "a": torch.tensor([4, 10])})
    alone = model.layout.pack({"s": streams["s"][:1, :2], "a": streams["a"][:1, :4]})
    padded = model.hidden(both.ids, both.input_mask, model.fuse(None, 2))[0, : alone.ids.shape[1]]
    torch.testing.assert_close(
        padded, model.hidden(alone.ids, alone.input_mask, model.fuse(None, 1))[0], atol=1e-5, rtol=1e-5
    )


def test_bfloat16_autocast_is_close_and_its_loss_is_float32():
    """Products are bfloat16, the loss is float32."""
    model = model_of().train()
    packed = batch_of(model, batch=4, frames=20)
    exact = model(packed).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(packed).loss
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["semantic", "coarse", "fine"])
def test_saved_stage_is_the_same_model(name, tmp_path):
    """Config and weights restore class, layout and logits."""
    stage = tiny_stages(**CONDITION, max_seconds=2.5)[name].eval()
    save_module(stage, tmp_path / name)
    loaded = load_module(tmp_path / name, expect=type(stage))
    assert loaded.config == stage.config and loaded.max_seconds == 2.5
    packed = stage.layout.pack({s.name: torch.randint(0, 12, (1, 4, s.num_levels)) for s in stage.layout.streams})
    condition = random_conditions(1)
    assert loaded(packed, condition).loss.item() == stage(packed, condition).loss.item()


def test_generic_model_is_saved_with_its_layout(tmp_path):
    """A model of any layout needs no subclass."""
    model = model_of()
    save_module(model, tmp_path)
    assert load_module(tmp_path).layout.to_dict() == model.layout.to_dict()


def test_construction_uses_no_network(monkeypatch):
    """Fault 9: the width of a condition is not downloaded from a hub."""

    def refuse(*args, **kwargs):
        raise OSError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert SemanticTransformer(num_semantic_tokens=5, audio_text_condition=True, **SIZES).cond_dim == SIZES["dim"]


def test_conditions_of_wrong_kind_or_size_raise_errors():
    """A condition for an unconditional model, of another width, or of another batch."""
    model = model_of()
    packed = batch_of(model)
    with pytest.raises(ValueError, match="width"):
        model(packed, random_conditions(2, dim=9))
    with pytest.raises(ValueError, match="for 3 items, need conditions for 1 or 2 items"):
        model(packed, random_conditions(3))
    with pytest.raises(ValueError, match="does not accept codes conditions"):
        model_of(cond_dim=None)(packed, random_conditions(2))
