"""Each stage memorises sequences and must generate them again token by token, which checks all positions and masks.

Cases are combinations of stage, pattern, positions and condition. The default run covers all pairs of these options;
the other cases are marked `slow`.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from math import ceil, log
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.generation import decode_session
from audiolm_pytorch.generation.decode_session import Decoded
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode, decode_in_windows
from tests.helpers.fakes import SIZES, memorise, select, tiny_stages

STAGES = ["semantic", "coarse", "fine"]
PATTERNS = ["flat", "delayed", "parallel"]
POSITIONS = ["rotary", "relative"]
CONDITIONS = ["none", "codes", "text cross", "text prefix", "both", "not in time"]
LONG, SHORT = 16, 11  # frames
WORDS = Stream("words", 30, 1, None, is_input=True)
GREEDY = SamplingSettings(temperature=0)


class Case(NamedTuple):
    """One way to build a stage."""

    stage: str
    pattern: str
    positions: str
    condition: str


def is_quick(case: Case) -> bool:
    """Whether a case is part of the default run, which has 18 of 108 cases."""
    number = STAGES.index(case.stage) + CONDITIONS.index(case.condition)
    return case.pattern == PATTERNS[number % 3] and case.positions == POSITIONS[number % 2]


CASES = [Case(*choice) for choice in product(STAGES, PATTERNS, POSITIONS, CONDITIONS)]


def every_case(keep=lambda case: True, is_quick=is_quick):
    cases = [
        pytest.param(case, marks=() if is_quick(case) else pytest.mark.slow, id="-".join(case))
        for case in CASES
        if keep(case)
    ]
    return pytest.mark.parametrize("case", cases)


@dataclass
class Memorised:
    """A stage that has memorised sequence i under condition i.

    Attributes:
        model: The stage.
        streams: Tokens `[i, f, levels]` of every stream, by name.
        counts: Frames of each sequence.
        words: Frames of the stream that is not in time, per sequence.
        conditions: Condition of each sequence; None without condition embeddings.
    """

    model: TokenTransformer
    streams: dict[str, Tensor]
    counts: Tensor
    words: Tensor
    conditions: Conditions | None

    @property
    def target(self) -> str:
        return self.model.layout.predicted[0].name

    def frames(self, stream: Stream, counts: Tensor, items: Tensor) -> Tensor:
        """Frames of a stream for numbers of predicted frames."""
        if stream.rate_hz is None:
            return self.words[items]
        ratio = stream.exact_hz / self.model.layout.predicted[0].exact_hz
        return torch.tensor([ceil(count * ratio) for count in counts.tolist()])


def text_states(num_items: int, lengths: list[int]) -> ConditionTensor:
    """States of different texts of unequal length."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ConditionTensor(torch.randn(num_items, max(lengths), 6), mask)


def conditions_of(kind: str) -> Conditions | None:
    """Conditions of the sequences; with `both`, neither part alone identifies the sequence."""
    codes = ConditionTensor(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    text = text_states(2, [5, 3])
    if kind == "codes":
        return {"codes": codes}
    if kind in ("text cross", "text prefix"):
        return {"text": text}
    if kind == "both":
        return {"codes": codes.select(torch.tensor([0, 0, 1])), "text": text.select(torch.tensor([0, 1, 0]))}
    return None


def build(case: Case) -> TokenTransformer:
    options: dict[str, object] = {"positions": case.positions, "cond_drop_prob": 0.0}
    if case.condition in ("codes", "both"):
        options.update(audio_text_condition=True, cond_dim=8)
    if case.condition in ("text cross", "text prefix", "both"):
        options.update(text_dim=6, text_as="prefix" if case.condition == "text prefix" else "cross")
    if case.condition == "not in time":
        options.update(extra_streams=[WORDS])
    model = tiny_stages(**options)[case.stage]
    return type(model)(**{**model.config, "pattern": case.pattern})


@cache
def memorised(case: Case) -> Memorised:
    """Train a stage. Input streams in time are equal for all sequences if there is a condition."""
    torch.manual_seed(CASES.index(case))
    model = build(case)
    num_items = 3 if case.condition in ("both", "not in time") else 2
    streams = {}
    for stream in model.layout.streams:
        frames = LONG if stream.rate_hz is None else ceil(LONG * stream.exact_hz / model.layout.predicted[0].exact_hz)
        is_shared = stream.is_input and stream.is_in_time and case.condition != "none"
        tokens = torch.randint(0, stream.vocab_size, (1 if is_shared else num_items, frames, stream.num_levels))
        streams[stream.name] = tokens.expand(num_items, -1, -1).clone()
    target = streams[model.layout.predicted[0].name]
    target[:, 0, 0] = torch.arange(num_items)  # they differ from the first token on
    # The second semantic sequence ends, the others are crops; other stages also learn shorter crops.
    is_semantic = case.stage == "semantic"
    counts = torch.tensor([LONG, SHORT if is_semantic else LONG, LONG][:num_items])
    own = Memorised(model, streams, counts, torch.tensor([4, 2, 0][:num_items]), conditions_of(case.condition))
    items = torch.arange(num_items) if is_semantic else torch.arange(num_items).repeat(2)
    frames = counts if is_semantic else torch.cat((counts, torch.full_like(counts, SHORT)))
    lengths = {stream.name: own.frames(stream, frames, items) for stream in model.layout.streams}
    ends = items == 1 if is_semantic else None
    packed = model.layout.pack({name: tokens[items] for name, tokens in streams.items()}, lengths, ends)
    # The first semantic token of an unconditional stage is not predictable: its entropy remains.
    unknowable = num_items * log(num_items) / int(packed.loss_mask.sum()) if is_ambiguous(case) else 0.0
    conditions = select(own.conditions, items)
    assert memorise(model, packed, conditions, steps=500, floor=unknowable) < unknowable + 0.02
    return own


def is_ambiguous(case: Case) -> bool:
    """Whether nothing but a prompt identifies the sequence."""
    return case.stage == "semantic" and case.condition == "none"


def wanted_frames(case: Case, order: list[int]) -> Tensor:
    """Unequal numbers of frames, independent of the condition for stages without ends."""
    is_semantic = case.stage == "semantic"
    return (
        memorised(case).counts[torch.tensor(order)] if is_semantic else torch.tensor([LONG, SHORT, LONG])[: len(order)]
    )


def complete(case: Case, prompts: list[int], order: list[int], **options) -> tuple[Decoded, list[Tensor]]:
    """Greedy completion of prompts of these lengths, item i under condition `order[i]`, and the right result."""
    own = memorised(case)
    items, wanted = torch.tensor(order), wanted_frames(case, order)
    lengths = {stream.name: own.frames(stream, wanted, items) for stream in own.model.layout.inputs}
    lengths[own.target] = torch.minimum(torch.tensor(prompts), wanted)
    found = decode(
        own.model,
        {name: tokens[items] for name, tokens in own.streams.items()},
        {own.target: wanted},
        **{"lengths": lengths, "settings": GREEDY, **options},
        conditioning=select(own.conditions, items),
    )
    assert torch.equal(found.lengths[own.target], wanted)
    return found, [own.streams[own.target][item, :count] for item, count in zip(order, wanted.tolist())]


def check(case: Case, prompts: list[int], order: list[int], **options) -> list[Tensor]:
    """Check that every item is right up to its length, and -1 after it."""
    found, right = complete(case, prompts, order, **options)
    tokens = found.streams[memorised(case).target]
    for item, sequence in enumerate(right):
        assert torch.equal(tokens[item, : len(sequence)], sequence), (prompts, order, item)
        assert (tokens[item, len(sequence) :] == -1).all()
    return right


def orders(case: Case) -> list[list[int]]:
    """Orders of the sequences in which every condition has several positions in the batch."""
    return [[0, 1], [1, 0]] if len(memorised(case).counts) == 2 else [[0, 1, 2], [1, 2, 0]]


def test_default_run_covers_all_pairs_of_options():
    """Every pair of stage, pattern, positions and condition is in the default run."""
    quick = [case for case in CASES if is_quick(case)]
    for one, other in combinations(range(4), 2):
        assert {(case[one], case[other]) for case in quick} == {(case[one], case[other]) for case in CASES}
    assert len(quick) == 18 and len(CASES) == 108


@pytest.mark.slow
@every_case(lambda case: not is_ambiguous(case))
def test_the_condition_decides_the_sequence(case):
    """Without a prompt each condition generates its sequence, in any order and with unequal lengths."""
    straight, swapped = (check(case, [0, 0, 0][: len(order)], order) for order in orders(case))
    assert not torch.equal(straight[0][:SHORT], swapped[0][:SHORT])


@pytest.mark.slow
@every_case()
def test_prompts_of_any_and_of_unequal_length_are_continued(case):
    """Prompts of 1 frame, half, all but one and all frames, also of unequal length in one batch."""
    first = 1 if is_ambiguous(case) else 0
    for prompts in ([1, 1, 1], [8, 8, 8], [15, 10, 15], [first, 7, 3], [16, first, 9]):
        for order in orders(case):
            check(case, prompts[: len(order)], order)


@pytest.mark.slow
@every_case(lambda case: case.condition != "none")
def test_guidance_keeps_memorised_sequences(case):
    """Both halves of the doubled batch receive the same tokens, so certain tokens stay certain."""
    order = orders(case)[0]
    check(case, [0, 3, 1][: len(order)], order, settings=SamplingSettings(temperature=0, guidance_scale=1.3))


@pytest.mark.slow
@every_case()
def test_teacher_forced_logits_equal_those_of_decoding(case, monkeypatch):
    """Whole sequences and single rows with a cache have equal logits, to 1e-5, for unequal lengths."""
    own = memorised(case)
    model, order = own.model, orders(case)[1]
    read = {}

    class Spied(CachedTransformer):
        def prefill(self, x, conditions, counts, num_positions):
            states = super().prefill(x, conditions, counts, num_positions)
            read.update({(item, count - 1): states[item].clone() for item, count in enumerate(counts)})
            return states

        def step(self, x, rows):
            states = super().step(x, rows)
            read.update({(item, row): states[item].clone() for item, row in enumerate(rows)})
            return states

    monkeypatch.setattr(decode_session, "CachedTransformer", Spied)
    complete(case, [1, 5, 2][: len(order)], order)
    monkeypatch.undo()
    items, wanted = torch.tensor(order), wanted_frames(case, order)
    lengths = {stream.name: own.frames(stream, wanted, items) for stream in model.layout.streams}
    packed = model.layout.pack({name: tokens[items] for name, tokens in own.streams.items()}, lengths)
    with torch.inference_mode():
        conditions = select(own.conditions, items)
        whole = model.hidden(packed.ids, packed.input_mask, model.fuse(conditions, len(items)))
        found = torch.stack(list(read.values()))
        right = torch.stack([whole[place] for place in read])
        for head in range(len(model.layout.heads)):
            torch.testing.assert_close(model.logits(found, head), model.logits(right, head), rtol=1e-5, atol=1e-5)
    last_read = packed.loss_mask.any(-1).int().cumsum(1).argmax(1) - 1
    assert {(item, int(row)) for item, row in enumerate(last_read)} <= set(read)


@every_case(lambda case: case.stage == "semantic", lambda case: is_quick(case) and case.condition == "none")
def test_the_end_is_learned_where_the_file_ends(case):
    """Only the sequence whose file ended stops by itself, at the right frame, in one batch with crops."""
    own = memorised(case)
    order = torch.tensor([1, 0])
    found = decode(
        own.model,
        {name: tokens[order, : 4 if name == own.target else None] for name, tokens in own.streams.items()},
        {own.target: LONG + 6},
        lengths={"words": own.words[order]} if case.condition == "not in time" else None,
        conditioning=select(own.conditions, order),
        settings=GREEDY,
        allow_eos=True,
    )
    assert found.lengths[own.target][0] == SHORT
    assert torch.equal(found.streams[own.target][0, :SHORT], own.streams[own.target][1, :SHORT])
    assert torch.equal(found.streams[own.target][1, :LONG], own.streams[own.target][0])
    assert (found.streams[own.target][0, SHORT:] == -1).all() and found.lengths[own.target][1] >= LONG


@pytest.mark.slow
def test_windows_continue_memorised_sequences():
    """A window that starts with half of the previous one continues a sequence learned from random crops."""
    torch.manual_seed(0)
    model: TokenTransformer = tiny_stages()["semantic"]
    song = torch.randperm(12).repeat(4)[None, :, None]  # 48 tokens; four frames identify the position
    crops = torch.cat([song[:, start : start + 16] for start in range(12)])
    memorise(model, model.layout.pack({"semantic": crops}), steps=150)
    found = decode_in_windows(model, {"semantic": song[:, :4]}, 48, window_frames=16, settings=GREEDY)
    assert torch.equal(found.streams["semantic"], song)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guidance_by_streams_not_in_time_follows_the_formula(pattern, scale):
    """Decoding equals a loop without cache that applies the formula to rows with and without null tokens."""
    torch.manual_seed(3)
    layout = TokenLayout([WORDS, Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50)], pattern)
    model = TokenTransformer(layout=layout, **SIZES).eval()
    for weight in (*model.heads.parameters(), *(block.attention.to_out.weight for block in model.transformer.blocks)):
        weight.data.mul_(40)  # larger weights make the logits of an untrained model depend clearly on its inputs
    given = {"words": torch.randint(0, 30, (2, 3, 1)), "s": torch.randint(0, 10, (2, 3, 1))}
    lengths = {"words": torch.tensor([3, 1])}
    settings = SamplingSettings(temperature=0, guidance_scale=scale)
    found = decode(model, given, {"a": 6}, lengths=lengths, settings=settings).streams["a"]
    grid = layout.grid(given, {"a": 6}, 2, lengths)
    packed, wanted = grid.packed, grid.packed.loss_mask
    with torch.inference_mode():
        for row in range(1, packed.ids.shape[1]):
            nothing = layout.without_conditions(packed, torch.tensor([True, True]))
            conditional, unconditional = (
                model.hidden(one.ids[:, :row], one.input_mask[:, :row])[:, -1] for one in (packed, nothing)
            )
            for item, column in wanted[:, row].nonzero().tolist():
                head = int(grid.head[item, row, column])
                logits, null = model.logits(conditional[item], head), model.logits(unconditional[item], head)
                token = (null + scale * (logits - null)).argmax()
                packed.ids[item, row, column] = layout.heads[head].first_id + token
    assert torch.equal(found, layout.unpack(packed.ids, grid.num_frames)["a"])
    plain = decode(model, given, {"a": 6}, lengths=lengths, settings=GREEDY).streams["a"]
    assert torch.equal(found, plain) == (scale == 1)


def test_training_drops_streams_not_in_time_as_guidance_does():
    """With all conditions dropped, the loss equals that of null tokens in their place."""
    torch.manual_seed(0)
    model = tiny_stages(extra_streams=[WORDS], cond_drop_prob=1.0)["semantic"]
    streams = {"words": torch.randint(0, 30, (2, 3, 1)), "semantic": torch.randint(0, 12, (2, 8, 1))}
    packed = model.layout.pack(streams)
    dropped = model.train()(packed).loss
    nothing = model.layout.without_conditions(packed, torch.tensor([True, True]))
    conditional, unconditional = model.eval()(packed).loss, model(nothing).loss
    torch.testing.assert_close(dropped, unconditional)
    assert (conditional - unconditional).abs() > 1e-4
