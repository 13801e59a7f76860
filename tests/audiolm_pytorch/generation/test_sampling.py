"""Logit filters, sampling, and the decode session: seeds, prompts, guidance, ends and cost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audiolm_pytorch.conditioning.base import ConditionTensor, guide
from audiolm_pytorch.generation import decode_session
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings, filter_logits, sample_tokens
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.transformer import FusedConditions
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.patterns import cell_table
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode
from tests.helpers.fakes import SIZES, random_conditions, select

GREEDY = SamplingSettings(temperature=0)
GIVEN = torch.randint(0, 10, (3, 5, 1), generator=torch.Generator().manual_seed(1))


def model_of(pattern="delayed", eos=True, **changes):
    layout = TokenLayout([Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50, eos=eos)], pattern)
    model = TokenTransformer(layout=layout, **{**SIZES, "cond_dim": 8, **changes}).eval()
    for weight in model.heads.parameters():
        weight.data.mul_(40)  # distinct logits, although the model is untrained
    return model


def test_filters_match_naive_loops():
    """Top-k keeps k tokens. Top-p keeps the smallest set with probability p, and always the most likely token."""
    logits = torch.randn(5, 9)
    kept = filter_logits(logits, SamplingSettings(top_k=3)).isfinite()
    assert (
        kept.sum(-1).tolist() == [3] * 5
        and (logits[kept].view(5, 3).min(1).values >= logits.sort().values[:, -3]).all()
    )
    for row, keep in zip(logits, filter_logits(logits, SamplingSettings(top_p=0.7)).isfinite()):
        order, held, expected = row.argsort(descending=True).tolist(), 0.0, set()
        for token in order:
            if held < 0.7:
                expected.add(token)
            held += row.softmax(-1)[token].item()
        assert set(keep.nonzero().flatten().tolist()) == expected
    assert filter_logits(logits, SamplingSettings(top_p=1e-6)).isfinite().sum(-1).tolist() == [1] * 5


def test_sampled_tokens_follow_the_distribution():
    """Frequencies of 20,000 samples are within 4.5 standard deviations (random failure below 1 in 10^4)."""
    logits = torch.tensor([0.0, 1.0, float("-inf"), 2.0])
    drawn = sample_tokens(logits.expand(20000, -1), torch.rand(20000), SamplingSettings(temperature=0.7))
    expected = (logits / 0.7).softmax(-1)
    result = torch.bincount(drawn, minlength=4) / 20000
    assert ((result - expected).abs() <= 4.5 * (expected * (1 - expected) / 20000).sqrt()).all()
    extremes = sample_tokens(logits.expand(2, -1), torch.tensor([0.0, 1.0]), SamplingSettings())
    assert extremes.tolist() == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["flat", "delayed"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_decoding_equals_a_loop_without_cache(pattern, scale):
    """A loop that computes all rows again for every row, with guidance by formula, returns the same tokens."""
    model, conditioning = model_of(pattern), random_conditions(2)
    inputs = {"s": GIVEN[:2, :3]}
    settings = SamplingSettings(temperature=0, guidance_scale=scale)
    result = decode(model, inputs, {"a": 6}, conditioning=conditioning, settings=settings).streams["a"]
    grid = model.layout.grid(inputs, {"a": 6}, 2)
    ids, mask = grid.packed.ids, grid.packed.input_mask
    both_conditions = [
        model.fuse(conditioning, 2),
        FusedConditions(model.fuser.entries["codes"].null.expand(2, 3, -1)),
    ]
    for row in range(1, ids.shape[1]):
        for item, column in grid.packed.loss_mask[:, row].nonzero().tolist():
            head = int(grid.head[item, row, column])
            logits = [
                model.logits(model.hidden(ids[:, :row], mask[:, :row], fused)[item, -1], head)
                for fused in both_conditions
            ]
            token = guide(logits[0], logits[1], scale)[:20].argmax()
            ids[item, row, column] = model.layout.heads[head].first_id + token
    assert torch.equal(result, model.layout.unpack(ids, {"s": 3, "a": 6})["a"])


def test_guidance_follows_its_formula(monkeypatch):
    """null + s * (cond - null); at scale 1 the batch is not doubled."""
    conditional, null = torch.randn(2, 4, 7)
    torch.testing.assert_close(guide(conditional, null, 3.0), null + 3.0 * (conditional - null))
    torch.testing.assert_close(guide(conditional, null, 0.0), null)
    model = model_of()
    batches = []
    original = CachedTransformer.step
    monkeypatch.setattr(
        CachedTransformer, "step", lambda self, x, rows: batches.append(len(x)) or original(self, x, rows)
    )
    for scale in (1.0, 2.0):
        settings = SamplingSettings(guidance_scale=scale)
        decode(model, {"s": GIVEN}, {"a": 4}, conditioning=random_conditions(1), settings=settings)
    assert batches == [3] * 4 + [6] * 4
    with pytest.raises(ValueError, match="needs `conditioning`"):
        decode(model, {"s": GIVEN}, {"a": 4}, settings=SamplingSettings(guidance_scale=2.0))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["flat", "delayed"])
def test_an_item_depends_on_its_seed_and_inputs_alone(pattern):
    """An item is the same alone, in another order, and next to items of other lengths and prompts."""
    model, conditioning = model_of(pattern), random_conditions(3)
    prompt = torch.randint(0, 20, (3, 4, 2))
    known, expected = torch.tensor([0, 4, 2]), torch.tensor([9, 7, 8])
    settings = SamplingSettings(temperature=0.9, top_k=15, guidance_scale=1.5)

    def run(items):
        return decode(
            model,
            {"s": GIVEN[items], "a": prompt[items]},
            {"a": expected[items]},
            lengths={"a": known[items]},
            conditioning=select(conditioning, torch.tensor(items)),
            settings=settings,
            seeds=[100 + i for i in items],
        )

    together, turned = run([0, 1, 2]), run([2, 0, 1])
    assert together.lengths["a"].tolist() == [9, 7, 8]
    for place, item in enumerate([2, 0, 1]):
        alone = run([item]).streams["a"][0]
        count = int(expected[item])
        assert torch.equal(together.streams["a"][item, :count], alone)
        assert torch.equal(turned.streams["a"][place, :count], alone)
        assert torch.equal(alone[: known[item]], prompt[item, : known[item]])
        assert (together.streams["a"][item, count:] == -1).all()


def test_seeds_determine_the_tokens():
    """Equal seeds, equal tokens; other seeds, other tokens; a wrong number of seeds raises an error."""
    model = model_of()
    runs = [
        decode(model, {"s": GIVEN}, {"a": 12}, seeds=seeds).streams["a"] for seeds in ([1, 2, 3], [1, 2, 3], [4, 2, 5])
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0][1], runs[2][1])
    assert not torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][0], runs[0][2])
    with pytest.raises(ValueError, match="one seed per item"):
        decode(model, {"s": GIVEN}, {"a": 12}, seeds=[1])


def test_ends_are_sampled_only_when_allowed():
    """Without `allow_eos` the end id never occurs. With it, each item has its own length."""
    model = model_of()
    model.heads[0].weight.data.zero_()  # about one frame in 21 is the last
    seeds = [1, 2, 3]
    closed = decode(model, {"s": GIVEN}, {"a": 40}, seeds=seeds)
    assert closed.lengths["a"].tolist() == [40] * 3 and (closed.streams["a"] < 20).all()
    opened = decode(model, {"s": GIVEN}, {"a": 40}, seeds=seeds, allow_eos=True)
    lengths = opened.lengths["a"].tolist()
    assert len(set(lengths)) == 3 and min(lengths) < 40
    for tokens, length in zip(opened.streams["a"], lengths):
        assert ((tokens[:length] >= 0) & (tokens[:length] < 20)).all() and (tokens[length:] == -1).all()


class OperatorLog(TorchDispatchMode):
    """Names and result sizes of all operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators.append((str(func), *(part.numel() for part in tree_leaves(result) if torch.is_tensor(part))))
        return result


def check_cost(monkeypatch, faulty=CachedTransformer):
    """A whole sequence is computed once, of the first row; every later row needs the same operators of equal sizes."""
    num_rows, logs, memories = [], [], set()

    class Spied(faulty):
        def prefill(self, x, *rest):
            num_rows.append(x.shape[1])
            return super().prefill(x, *rest)

        def step(self, x, rows):
            num_rows.append(len(x) // self.batch)
            with OperatorLog() as log:
                hidden = super().step(x, rows)
            logs.append(log.operators)
            memories.add(tuple(block._memory.data_ptr() for block in self._blocks))
            return hidden

    monkeypatch.setattr(decode_session, "CachedTransformer", Spied)
    decode(model_of(), {"s": GIVEN}, {"a": 10})
    assert num_rows == [1] * 11 and len(logs) == 10 and len(logs[0]) > 20
    assert all(log == logs[0] for log in logs)
    assert len(memories) == 1


class Concatenating(CachedTransformer):
    """Fault 5: the keys and values of a row are concatenated to those of earlier rows."""

    def step(self, x, rows):
        hidden = super().step(x, rows)
        row = self._buffers.keys_values
        self.held = torch.cat((self.held, row), dim=3) if hasattr(self, "held") else row.clone()
        return hidden


class Reallocating(CachedTransformer):
    """Fault 5: a row creates a new cache."""

    def step(self, x, rows):
        for block in self._blocks:
            block._memory = block._memory.clone()
            block.extend()
        return super().step(x, rows)


class Recomputing(CachedTransformer):
    """Fault 5: earlier rows are computed again for every row."""

    def prefill(self, x, conditions, counts, num_positions):
        self.held, self.conditions = x, conditions
        return super().prefill(x, conditions, counts, num_positions)

    def step(self, x, rows):
        self.held = torch.cat((self.held, x.unsqueeze(1)), dim=1)
        return self.hidden.copy_(self.transformer(self.held, self.conditions)[:, -1])


def test_cost_of_a_row_does_not_grow(monkeypatch):
    """Fault 5: caches are not concatenated, and nothing is computed again."""
    check_cost(monkeypatch)
    for faulty in (Concatenating, Reallocating, Recomputing):
        with pytest.raises(AssertionError):
            check_cost(monkeypatch, faulty)


def test_dropout_is_off_while_decoding():
    """The model is in training mode again afterwards."""
    model = model_of(dropout=0.5).train()
    runs = [decode(model, {"s": GIVEN}, {"a": 8}, settings=GREEDY).streams["a"] for _ in range(2)]
    assert torch.equal(*runs) and model.training


def test_progress_is_reported_for_every_row():
    """The callback receives the number of every row."""
    seen = []
    decode(model_of(), {"s": GIVEN}, {"a": 5}, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(row, 7) for row in range(2, 8)]


def test_unconditional_decoding_needs_no_input():
    """A model without input streams starts from the start row."""
    model = TokenTransformer(layout=TokenLayout([Stream("a", 7)]), **SIZES)
    assert decode(model, {}, {"a": 5}, batch_size=4).streams["a"].shape == (4, 5, 1)


def test_settings_out_of_range_raise_errors():
    """The message contains the name of the setting."""
    nan, inf = float("nan"), float("inf")
    wrong = {"temperature": (-1, nan, inf), "top_k": (0,), "top_p": (0.0, nan), "guidance_scale": (-0.5, nan, inf)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                SamplingSettings(**{name: value})


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-7, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature):
    """Logits divided by a tiny temperature must not overflow to NaN, for which token 0 would be sampled."""
    drawn = sample_tokens(torch.tensor([[1.0, 40.0, 3.0]]), torch.tensor([0.999]), SamplingSettings(temperature))
    assert drawn.tolist() == [1]


def test_streams_end_together():
    """At the end of one stream the grid has the end ids of all streams, as in training."""
    layout = TokenLayout([Stream("a", 6, 2, eos=True), Stream("b", 5, eos=True)], "delayed")
    torch.manual_seed(0)
    model = TokenTransformer(layout=layout, **SIZES).eval()
    for weight in model.heads.parameters():
        weight.data.zero_()
    run = DecodeSession(model, {}, {"a": 9, "b": 9}, batch_size=6, seeds=range(6), allow_eos=True)
    run.advance()
    result = run.decoded()
    assert torch.equal(result.lengths["a"], result.lengths["b"]) and len(result.lengths["a"].unique()) > 2
    for item, length in enumerate(result.lengths["a"].tolist()):
        if length < 9:
            whole = {name: tokens[item : item + 1, :length] for name, tokens in result.streams.items()}
            trained = layout.pack(whole, ends=torch.tensor([True]))
            rows = trained.ids.shape[1]
            is_used = run.ids[item] != layout.num_ids
            assert torch.equal(is_used[:rows], trained.input_mask[0]) and not is_used[rows:].any()
            assert torch.equal(run.ids[item][is_used], trained.ids[trained.input_mask])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["flat", "delayed", "parallel"])
def test_decoding_fills_the_cells_that_packing_fills(pattern):
    """With prompts and texts of several lengths, groups and early ends, the grid equals the packed result."""
    streams = [Stream("s", 10, 1, 25, is_input=True), Stream("t", 7, 1, None, is_input=True)]
    layout = TokenLayout([*streams, Stream("a", 20, 4, 50, eos=True, num_groups=2)], pattern)
    model = TokenTransformer(layout=layout, **SIZES).eval()
    for weight in model.heads.parameters():
        weight.data.zero_()
    tokens = {"s": torch.ones(4, 3).long(), "t": torch.ones(4, 2).long(), "a": torch.ones(4, 3, 4).long()}
    counts = {"t": torch.tensor([0, 1, 2, 1]), "a": torch.tensor([0, 1, 2, 3])}
    run = DecodeSession(model, tokens, {"a": 20}, lengths=counts, seeds=range(4), allow_eos=True)
    run.advance()
    assert len(run.num_frames["a"].unique()) > 1
    result = run.decoded().streams["a"]
    for item, length in enumerate(run.num_frames["a"].tolist()):
        assert length > 0
        text = tokens["t"][item : item + 1, : counts["t"][item]]
        whole = {"s": tokens["s"][item : item + 1], "t": text, "a": result[item : item + 1, :length]}
        packed = layout.pack(whole, ends=torch.tensor([length < 20]))
        num_rows = packed.ids.shape[1]
        is_used = run.ids[item] != layout.num_ids
        assert torch.equal(is_used[:num_rows], packed.input_mask[0]) and not is_used[num_rows:].any()
        assert torch.equal(run.ids[item, :num_rows][packed.input_mask[0]], packed.ids[packed.input_mask])


def test_decoded_lengths_are_copies():
    """Changes of the returned lengths do not change the session."""
    run = DecodeSession(model_of(), {"s": GIVEN}, {"a": 4})
    run.advance()
    run.decoded().lengths["a"].zero_()
    assert run.decoded().lengths["a"].tolist() == [4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["flat", "delayed", "parallel"])
@pytest.mark.parametrize("rates_hz", [(50, 50), (25, 50), (50, 25)])
def test_known_frames_are_complete_in_all_streams(pattern, rates_hz):
    """At every pause all streams have the known frames, and one stream lacks the next frame."""
    if pattern != "flat" and rates_hz[0] != rates_hz[1]:
        return
    streams = [Stream("a", 6, 4, rates_hz[0], num_groups=2), Stream("b", 5, 1, rates_hz[1])]
    model = TokenTransformer(layout=TokenLayout(streams, pattern), **SIZES).eval()
    num_frames = {stream.name: stream.rate_hz * 8 // 50 for stream in streams}
    prompt = {"a": torch.ones(2, 2, 4).long()}
    run = DecodeSession(model, prompt, num_frames, lengths={"a": torch.tensor([0, 2])}, seeds=[1, 2])
    whole = decode(model, prompt, num_frames, lengths={"a": torch.tensor([0, 2])}, seeds=[1, 2]).streams
    for until in range(1, 9):
        run.advance(until)
        result = run.decoded()
        for item, known in enumerate(run.known_frames.tolist()):
            to_do = [
                int(run.frame[item, row, column]) for row, cells in run.pending[item].items() for _, column in cells
            ]
            assert known == min([*to_do, max(num_frames.values())]) >= until
            for name, tokens in result.streams.items():
                count = int(result.lengths[name][item])
                assert count == min(known, num_frames[name])
                assert torch.equal(tokens[item, :count], whole[name][item, :count])


@pytest.mark.parametrize("pattern", ["flat", "delayed", "parallel"])
def test_a_model_can_be_trained_after_decoding(pattern):
    """Decoding leaves no inference tensors where gradients need tensors, and keeps the modes of submodules."""
    cell_table.cache_clear()
    model = model_of(pattern).train()
    model.fuser.eval()
    with torch.inference_mode():
        decode(model, {"s": GIVEN}, {"a": 8}, seeds=[1, 2, 3], allow_eos=True)
    assert model.training and model.transformer.blocks[0].training and not model.fuser.training
    packed = model.layout.pack({"s": GIVEN, "a": torch.randint(0, 20, (3, 8, 2))})
    model(packed, random_conditions(3)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["flat", "delayed", "parallel"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_item_is_the_same_alone_with_texts_ends_and_groups(pattern, scale):
    """Streams without a rate, texts of several lengths or none, prompts and early ends."""
    streams = [Stream("s", 10, 1, 25, is_input=True), Stream("t", 7, 1, None, is_input=True)]
    layout = TokenLayout([*streams, Stream("a", 20, 4, 50, eos=True, num_groups=2)], pattern)
    torch.manual_seed(0)
    model = TokenTransformer(layout=layout, **SIZES, cond_dim=8, text_dim=6, text_as="prefix").eval()
    model.heads[0].weight.data.zero_()  # about one frame in 21 is the last
    counts = {"s": [4, 2, 3, 1], "t": [3, 0, 1, 2], "a": [0, 5, 2, 3], "text": [3, 1, 0, 2]}
    tokens = {
        one.name: torch.randint(0, one.vocab_size, (4, max(counts[one.name]), one.num_levels)) for one in layout.streams
    }
    states, codes, expected = torch.randn(4, 3, 6), torch.randn(4, 3, 8), torch.tensor([40, 30, 2, 35])

    def run(items):
        cut = {
            name: max(1, *(counts[name][item] for item in items)) if len(items) > 1 else counts[name][items[0]]
            for name in counts
        }
        mask = torch.arange(max(1, cut["text"])) < torch.tensor([[counts["text"][item]] for item in items])
        return decode(
            model,
            {name: part[items, : cut[name]] for name, part in tokens.items()},
            {"a": expected[items]},
            lengths={name: torch.tensor([counts[name][item] for item in items]) for name in tokens},
            conditioning={
                "codes": ConditionTensor.of(codes[items]),
                "text": ConditionTensor(states[items, : mask.shape[1]], mask),
            },
            settings=SamplingSettings(guidance_scale=scale),
            seeds=[100 + item for item in items],
            allow_eos=True,
        )

    together = run([0, 1, 2, 3])
    lengths = together.lengths["a"]
    assert (lengths < expected).any() and len(lengths.unique()) > 2
    for item in range(4):
        alone = run([item])
        assert alone.lengths["a"].tolist() == [lengths[item]]
        assert torch.equal(together.streams["a"][item, : lengths[item]], alone.streams["a"][0])
