"""Positions, shared heads, text conditions, forgetful masking, checkpointing and compilation against references."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.generation import decode_session
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.attention import AttentionContext, SelfAttention, attend
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.positions import RelativePositions, WavePositionBias
from audiolm_pytorch.nn.transformer import FusedConditions, Transformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode
from tests.helpers.fakes import SIZES, select, tiny_stages
from tests.helpers.quick import only_quick

GREEDY = SamplingSettings(temperature=0)
CHECKPOINTED = {"checkpoint_blocks": True, "forget_prob": 0.5}
OPTIONS = [
    {},
    {"positions": "relative"},
    {"kv_heads": 1},
    {"text_dim": 6},
    {"text_dim": 6, "text_as": "prefix"},
    {"cond_dim": 8},
    {"positions": "relative", "kv_heads": 1, "text_dim": 6, "cond_dim": 8},
    {"positions": "relative", "text_dim": 6, "text_as": "prefix", "cond_dim": 8},
]


def model_of(pattern: str = "delayed", eos: bool = True, **options: object) -> TokenTransformer:
    torch.manual_seed(0)
    layout = TokenLayout([Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50, eos=eos)], pattern)
    model = TokenTransformer(layout=layout, **{**SIZES, "heads": 4, **options}).eval()
    for weight in model.heads.parameters():
        weight.data.mul_(40)  # distinct logits, although the model is untrained
    if model.transformer.relative is not None:
        model.transformer.relative.bias.weight.data.mul_(30)
    return model


def conditions_of(model: TokenTransformer, lengths: tuple[int, ...] = (4, 2, 0)) -> Conditions | None:
    """Codes and texts that the model accepts; texts differ in length, and the last item has no text."""
    parts = {}
    if model.cond_dim is not None:
        parts["codes"] = ConditionTensor(
            torch.randn(len(lengths), 3, model.cond_dim), torch.ones(len(lengths), 3).bool()
        )
    if model.text_dim is not None:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        parts["text"] = ConditionTensor(torch.randn(len(lengths), max(lengths), model.text_dim), mask)
    return parts or None


def inputs(batch: int) -> dict[str, Tensor]:
    return {"s": torch.randint(0, 10, (batch, 3, 1), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("pattern", only_quick(["flat", "delayed", "parallel"], ["delayed"]))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_logits_equal_those_of_one_pass(options: dict, pattern: str) -> None:
    """Row by row through the cache, with items at unequal positions, to 1e-5."""
    model = model_of(pattern, **options)
    packed = model.layout.pack({**inputs(3), "a": torch.randint(0, 20, (3, 6, 2))})
    fused = model.fuse(conditions_of(model), 3)
    x, rows, items = model.embed(packed.ids, packed.input_mask), packed.ids.shape[1], torch.arange(3)
    whole = model.hidden(packed.ids, packed.input_mask, fused)
    cached = CachedTransformer(model.transformer, 3)
    with torch.no_grad():
        cached.prefill(x[:, :4], fused, [2, 3, 4], fused.num_rows + rows)
        for step in range(rows - 2):
            at = torch.tensor([2, 3, 4]).add(step).clamp(max=rows - 1)
            here = cached.step(x[items, at], at.tolist())
            for head in range(len(model.layout.heads)):
                expected = model.logits(whole[items, at], head)
                torch.testing.assert_close(model.logits(here, head), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_of_an_item_do_not_depend_on_its_batch(options: dict) -> None:
    """An item is the same next to items with longer texts, to 1e-5; padding has no influence."""
    model = model_of(**options)
    packed = model.layout.pack({**inputs(3), "a": torch.randint(0, 20, (3, 6, 2))})
    conditions = conditions_of(model)
    both = model.hidden(packed.ids, packed.input_mask, model.fuse(conditions, 3))
    for item, length in enumerate((4, 2, 0)):
        one = select(conditions, torch.tensor([item]))
        if one is not None and "text" in one:
            text = one["text"]
            one["text"] = ConditionTensor(text.embeddings[:, : max(length, 1)], text.mask[:, : max(length, 1)])
        alone = model.hidden(packed.ids[item : item + 1], packed.input_mask[item : item + 1], model.fuse(one, 1))
        torch.testing.assert_close(both[item], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", only_quick(OPTIONS[1:], OPTIONS[-2:]), ids=str)
def test_decoding_equals_a_loop_without_cache(options: dict) -> None:
    """Greedy, with guidance if the model has conditions: a loop that computes all rows again gives the same tokens."""
    model = model_of(**options)
    conditions = conditions_of(model, (4, 2))
    scale = 1.0 if conditions is None else 2.0
    settings = SamplingSettings(temperature=0, guidance_scale=scale)
    result = decode(model, inputs(2), {"a": 5}, conditioning=conditions, settings=settings).streams["a"]
    grid = model.layout.grid(inputs(2), {"a": 5}, 2)
    ids, mask = grid.packed.ids, grid.packed.input_mask
    everybody = torch.ones(2, dtype=torch.bool)
    nothing = {name: part.without_items(everybody) for name, part in (conditions or {}).items()}
    for row in range(1, ids.shape[1]):
        for item, column in grid.packed.loss_mask[:, row].nonzero().tolist():
            head = int(grid.head[item, row, column])
            states = [model.hidden(ids[:, :row], mask[:, :row], model.fuse(c, 2)) for c in (conditions, nothing)]
            with_it, without = (model.logits(state[item, -1], head) for state in states)
            token = (without + scale * (with_it - without))[:20].argmax()
            ids[item, row, column] = model.layout.heads[head].first_id + token
    assert torch.equal(result, model.layout.unpack(ids, {"s": 3, "a": 5})["a"])


def test_relative_positions_equal_t5() -> None:
    """T5 of transformers has the same buckets and adds the same bias."""
    attention_class = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    relative = RelativePositions(heads=3)
    distances = torch.arange(0, 400)
    reference = attention_class._relative_position_bucket(
        -distances, bidirectional=False, num_buckets=32, max_distance=128
    )
    assert torch.equal(relative.buckets(distances), reference)
    bias = relative(torch.arange(200)[None], 200)
    for query, key in ((0, 0), (5, 2), (199, 0), (150, 20)):
        assert torch.equal(bias[0, :, query, key], relative.bias.weight[reference[query - key]])
    assert torch.equal(relative(torch.tensor([[7], [3]]), 8), bias[0, :, [7, 3], :8].transpose(0, 1).unsqueeze(2))


def test_grouped_queries_share_keys_and_values() -> None:
    """Two heads of keys for four heads of queries equal four heads of keys that occur twice each."""
    few, many = SelfAttention(24, 4, 6, kv_heads=2), SelfAttention(24, 4, 6)
    queries, keys, values = few.to_qkv.weight.data.split((24, 12, 12))
    twice = [part.view(2, 6, 24).repeat_interleave(2, dim=0).flatten(0, 1) for part in (keys, values)]
    many.to_qkv.weight.data = torch.cat((queries, *twice))
    many.to_out.weight.data = few.to_out.weight.data
    x, context = torch.randn(2, 5, 24), AttentionContext(None, None, is_causal=True)
    torch.testing.assert_close(few(x, context), many(x, context))
    for count, valid in ((3, False), (0, False), (4, True), (1, True)):
        if valid:
            SelfAttention(24, 4, 6, kv_heads=count)
        else:
            with pytest.raises(ValueError, match="kv_heads must divide heads"):
                SelfAttention(24, 4, 6, kv_heads=count)


@pytest.mark.parametrize(("shared", "masked"), product([False, True], [None, "bool", "float", "causal"]))
def test_plain_product_and_fused_kernel_agree(shared: bool, masked: str | None) -> None:
    """In bfloat16 on a CPU, with any mask and with shared heads."""
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 4 - 2 * shared, 7, 16), torch.randn(2, 4 - 2 * shared, 7, 16)
    bias = {"bool": torch.rand(2, 1, 7, 7) < 0.7, "float": torch.randn(1, 4, 7, 7)}.get(masked or "")
    if masked == "bool":
        bias |= torch.eye(7, dtype=torch.bool)
    half = bias if bias is None or bias.dtype == torch.bool else bias.bfloat16()
    result = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), half, is_causal=masked == "causal")
    torch.testing.assert_close(result.float(), attend(q, k, v, bias, masked == "causal"), atol=0.05, rtol=0.05)


def test_padding_of_a_prefix_has_no_influence() -> None:
    """Large values in the padding of a prefix change no row."""
    stack = Transformer(**SIZES).eval()
    x, prefix = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    skip = torch.tensor([0, 2])
    out = stack(x, FusedConditions(prefix, skip))
    prefix[1, :2] = 1e3 * torch.randn(2, 32)
    torch.testing.assert_close(stack(x, FusedConditions(prefix, skip)), out)
    torch.testing.assert_close(stack(x[1:], FusedConditions(prefix[1:, 2:]))[0], out[1], atol=1e-5, rtol=1e-5)


def test_forgetful_masking_is_active_in_training_only() -> None:
    """Rows after hidden rows change; prefix, first row and the row itself are never hidden."""
    stack = Transformer(**SIZES, forget_prob=0.9)
    x, prefix = torch.randn(1, 30, 32), torch.randn(1, 3, 32)
    plain = Transformer(**SIZES)
    plain.load_state_dict(stack.state_dict())
    torch.testing.assert_close(stack.eval()(x, FusedConditions(prefix)), plain(x, FusedConditions(prefix)))
    stack.train()
    hidden = stack._hidden_positions(torch.zeros(200, 33, 32), num_prefix=3)
    assert hidden is not None and not hidden[..., :4].any() and not hidden.diagonal(dim1=-2, dim2=-1).any()
    share = hidden[:, 0, -1, 4:-1].float().mean(dim=-1)
    assert share.min() < 0.2 and 0.6 < share.max() <= 1 and 0.35 < share.mean() < 0.55  # uniform in 0..0.9
    torch.testing.assert_close(stack(x, FusedConditions(prefix))[:, 0], plain(x, FusedConditions(prefix))[:, 0])
    assert not torch.allclose(stack(x, FusedConditions(prefix))[:, -1], plain(x, FusedConditions(prefix))[:, -1])


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "forget_prob": 0.3}, {"positions": "relative"}], ids=str)
def test_checkpointed_blocks_give_the_same_gradients(options: dict) -> None:
    """Checkpointing computes blocks again with the same random numbers, and stores less."""
    grads, saved = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        stack = Transformer(**SIZES, **options, checkpoint_blocks=checkpointed).train()
        x = torch.randn(2, 20, 32, requires_grad=True)
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out = stack(x)
        out.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in stack.parameters())])
        saved.append(sum(kept))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)
    assert saved[1] < saved[0] / 3


def test_every_option_can_be_trained_and_saved(tmp_path: Path) -> None:
    """All parameters get gradients; a saved model is the same model."""
    from audiolm_pytorch.saving.modules import load_module, save_module

    for number, options in enumerate(OPTIONS):
        model = model_of(**options)
        packed = model.layout.pack({**inputs(3), "a": torch.randint(0, 20, (3, 6, 2))}, ends=torch.ones(3).bool())
        conditions = conditions_of(model)
        loss = model(packed, conditions).loss
        loss.backward()
        if model.cond_dim is not None:  # without a condition, the null embedding is used
            model(packed, None).loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, (options, missing)
        save_module(model, tmp_path / str(number))
        loaded = load_module(tmp_path / str(number)).eval()
        assert torch.equal(loaded(packed, conditions).loss, loss)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pauses_of_decoding_change_no_token(options: dict) -> None:
    """Frame by frame and in one call; at every pause all returned frames are complete."""
    model = model_of(**options)
    conditions = conditions_of(model)
    whole = decode(model, inputs(3), {"a": 6}, conditioning=conditions, seeds=[1, 2, 3]).streams["a"]
    decoding = DecodeSession(model, inputs(3), {"a": 6}, conditioning=conditions, seeds=[1, 2, 3])
    for frames in range(1, 7):
        decoding.advance(frames)
        assert decoding.known_frames.min() >= frames
        so_far = decoding.decoded()
        for item, count in enumerate(so_far.lengths["a"].tolist()):
            assert torch.equal(so_far.streams["a"][item, :count], whole[item, :count])
    assert decoding.is_done and torch.equal(decoding.decoded().streams["a"], whole)


def change_logits(monkeypatch: pytest.MonkeyPatch, change: Callable[[decode_session._Heads, Tensor], None]) -> None:
    """Let `change` modify the logits `[n, heads, num_logits]` of every row of decoding."""
    original = decode_session._Heads.logits

    def logits(self: decode_session._Heads) -> Tensor:
        result = original(self)
        change(self, result)
        return result

    monkeypatch.setattr(decode_session._Heads, "logits", logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_raise_an_error(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message contains step and item."""
    calls = []

    def broken(heads: decode_session._Heads, logits: Tensor) -> None:
        calls.append(heads)
        if len(calls) > 2:
            logits[1] = bad

    change_logits(monkeypatch, broken)
    with pytest.raises(ValueError, match=r"items \[1\] are not finite.* at step 3 of 7"):
        decode(model_of(), inputs(2), {"a": 6}, seeds=[0, 1])


def test_an_item_has_at_least_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that would end immediately ends after one frame, because the codec cannot decode an empty item."""

    def ending(heads: decode_session._Heads, logits: Tensor) -> None:
        if any(heads.has_eos):
            logits[..., 20] = 50

    change_logits(monkeypatch, ending)
    result = decode(model_of(), inputs(2), {"a": 6}, seeds=[0, 1], allow_eos=True)
    assert result.lengths["a"].tolist() == [1, 1] and (result.streams["a"] >= 0).all()


@pytest.mark.slow
def test_transformer_compiles_without_a_graph_break() -> None:
    """One graph for a whole pass, and the same numbers."""
    counter = CompileCounter()
    stack = Transformer(**SIZES).eval()
    x = torch.randn(2, 30, 32)
    compiled = torch.compile(stack, backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stack(x))
        assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_stage_samples_the_same_tokens() -> None:
    """The prompt is computed by the compiled transformer, the other rows by the cached transformer."""
    stage = tiny_stages()["semantic"].eval()
    prompt = {"semantic": torch.ones(2, 5, 1, dtype=torch.long)}
    expected = decode(stage, prompt, {"semantic": 12}, seeds=[1, 2]).streams["semantic"]
    stage.transformer.compile(backend="aot_eager")
    assert torch.equal(decode(stage, prompt, {"semantic": 12}, seeds=[1, 2]).streams["semantic"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kv_heads": 1}, {"positions": "relative", "checkpoint_blocks": True}], ids=str)
def test_training_compiles_without_a_graph_break(options: dict) -> None:
    """One forward and one backward graph, with the gradients of the eager pass."""
    torch.manual_seed(0)
    stack = Transformer(**{**SIZES, "depth": 1}, **options).train()
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 12, 32)
    grads = [torch.autograd.grad(run(x).square().sum(), list(stack.parameters())) for run in (stack, compiled)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [None, "items", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_with_shared_keys_equals_repeated_keys(masked: str | None, dtype: torch.dtype) -> None:
    """With masks per item (padding) and biases per head (positions)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    bias = {"items": torch.rand(3, 1, 1, 9) < 0.7, "heads": torch.randn(1, 6, 1, 9)}.get(masked or "")
    expected = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), bias)
    half = bias if bias is None or bias.dtype == torch.bool else bias.to(dtype)
    result = attend(q.to(dtype), k.to(dtype), v.to(dtype), half).float()
    torch.testing.assert_close(result, expected, **({} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}))


@pytest.mark.parametrize("text_as", ["cross", "prefix"])
def test_nan_in_padding_reaches_no_weight(text_as: str) -> None:
    """Padding has no influence on the loss or on gradients; 0 times NaN would be NaN."""
    model = model_of(text_dim=6, text_as=text_as, cond_dim=8).train()
    conditions = conditions_of(model)
    for part in conditions.values():
        part.mask[1, 1:] = False
        part.embeddings[~part.mask] = float("nan")
    loss = model(model.layout.pack({**inputs(3), "a": torch.randint(0, 20, (3, 6, 2))}), conditions).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("extra", only_quick([{}, CHECKPOINTED], [CHECKPOINTED]), ids=str)
def test_bfloat16_autocast_trains_every_option(options: dict, extra: dict) -> None:
    """Loss and gradients are close to float32 and finite, for all masks."""
    model = model_of(**options, **extra).train()
    for weight in model.heads.parameters():
        weight.data.div_(40)
    packed = model.layout.pack({**inputs(3), "a": torch.randint(0, 20, (3, 6, 2))}, {"a": torch.tensor([6, 1, 4])})
    conditions, results = conditions_of(model), []
    for is_half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = model(packed, conditions).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach()[None], *grads])
    for exact, near in zip(*results):
        assert near.isfinite().all() and (near - exact).norm() <= 0.15 * exact.norm() + 1e-3


def test_a_cached_transformer_can_be_used_again() -> None:
    """It uses the conditions of its latest prefill; cross-attention without states raises an error."""
    torch.manual_seed(0)
    stack = Transformer(**SIZES, cross=True).eval()
    x, states, prefix = torch.randn(2, 4, 32), torch.randn(2, 2, 3, 32), torch.randn(2, 2, 32)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    first, second = (
        FusedConditions(prefix, torch.tensor([0, 1]), states[0], mask),
        FusedConditions(None, None, states[1]),
    )
    used, unused = (CachedTransformer(stack, 2) for _ in range(2))
    with torch.no_grad():
        used.prefill(x, first, [4, 4], 200)  # a larger cache, with padding in the prefix and in the states
        used.step(x[:, 3], [150, 2])
        used.release()
        results = []
        for cached in (used, unused):
            first_rows = cached.prefill(x[:, :3], second, [3, 3], 4).clone()
            results.append(torch.stack((first_rows, cached.step(x[:, 3], [3, 3])), dim=1))
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], stack(x, second)[:, 2:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs states"):
        stack(x)
    with pytest.raises(ValueError, match="needs states"):
        used.prefill(x, FusedConditions(prefix), [4, 4], 8)
    for wrong in ({"causal": False}, {"position_bias": WavePositionBias(2)}):
        with pytest.raises(ValueError, match="needs a transformer with causal=True and position_bias=None"):
            CachedTransformer(Transformer(**SIZES, **wrong), 2)


def test_invalid_options_raise_errors() -> None:
    """The message contains the name of the option."""
    with pytest.raises(ValueError, match="forget_prob"):
        Transformer(**SIZES, forget_prob=1.0)
    with pytest.raises(ValueError, match="sizes must be positive, got .*ff_mult=0"):
        Transformer(**{**SIZES, "ff_mult": 0})
    for positions in ("relative", "sinusoidal"):
        with pytest.raises(ValueError, match="pass positions=None"):
            Transformer(**SIZES, positions=positions)(torch.randn(1, 3, 32), positions=torch.arange(3))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        decode(model_of(), {}, {"a": 6}, batch_size=0)
    for embeddings, mask in (((1, 0, 6), torch.ones(1, 0).bool()), ((1, 2, 6), torch.ones(1, 2))):
        with pytest.raises(ValueError, match="with m >= 1, and a bool mask"):
            ConditionTensor(torch.zeros(embeddings), mask)
    with pytest.raises(ValueError, match="does not accept text conditions"):
        model_of().fuse({"text": ConditionTensor.of(torch.randn(1, 2, 6))}, 1)
    with pytest.raises(ValueError, match="text conditions of width 6, got width 5"):
        model_of(text_dim=6).fuse({"text": ConditionTensor.of(torch.randn(1, 2, 5))}, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gpu_and_cpu_decode_the_same_tokens(options: dict) -> None:
    """Noise and the control tensors of the loop are on the CPU."""
    model = model_of(**options)
    conditions = conditions_of(model)
    settings = SamplingSettings(temperature=0.3, guidance_scale=1.0 if conditions is None else 1.5)
    expected = decode(
        model, inputs(3), {"a": 6}, conditioning=conditions, settings=settings, seeds=[1, 2, 3], allow_eos=True
    )
    result = decode(
        model.cuda(), inputs(3), {"a": 6}, conditioning=conditions, settings=settings, seeds=[1, 2, 3], allow_eos=True
    )
    assert torch.equal(result.streams["a"].cpu(), expected.streams["a"])
    assert torch.equal(result.lengths["a"], expected.lengths["a"])


@pytest.mark.gpu
def test_logits_that_are_not_finite_raise_an_error_on_a_gpu() -> None:
    """A GPU is checked after many rows; the message contains the first bad step."""
    model = model_of().cuda()
    model.heads[0].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite.* at step 1 of 7"):
        decode(model, inputs(2), {"a": 6}, seeds=[0, 1])
