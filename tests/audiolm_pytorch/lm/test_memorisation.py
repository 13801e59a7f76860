"""Each stage learns sequences by heart and must give them back token by token: the proof of all bookkeeping.

Every stage x pattern x kind of positions x kind of condition is learnt once; the default run takes a subset in which
every two of these choices meet, the rest is marked `slow`.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from math import ceil, log
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.generation.decode_session import Decoded
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.windows import decode_in_windows
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode
from tests.helpers.fakes import SIZES, memorise, tiny_stages

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
    """Whether a case is part of the default run: 18 of 108."""
    number = STAGES.index(case.stage) + CONDITIONS.index(case.condition)
    return case.pattern == PATTERNS[number % 3] and case.positions == POSITIONS[number % 2]


CASES = [Case(*choice) for choice in product(STAGES, PATTERNS, POSITIONS, CONDITIONS)]


def every_case(keep=lambda case: True):
    cases = [
        pytest.param(case, marks=() if is_quick(case) else pytest.mark.slow, id="-".join(case))
        for case in CASES
        if keep(case)
    ]
    return pytest.mark.parametrize("case", cases)


@dataclass
class Learnt:
    """A stage that knows sequence i under condition i.

    Attributes:
        model: The stage.
        streams: Tokens `[i, f, levels]` of every stream, by name.
        counts: Frames of each sequence.
        words: Frames of the stream not in time of each sequence.
        conditions: What each sequence was learnt under; None where no embeddings condition.
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
        """Frames of a stream that go with so many predicted frames."""
        if stream.rate_hz is None:
            return self.words[items]
        ratio = stream.exact_hz / self.model.layout.predicted[0].exact_hz
        return torch.tensor([ceil(count * ratio) for count in counts.tolist()])


def text_states(num_items: int, lengths: list[int]) -> ConditionTensor:
    """States of different texts of unequal length."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ConditionTensor(torch.randn(num_items, max(lengths), 6), mask)


def conditions_of(kind: str) -> Conditions | None:
    """Conditions of the sequences; of `both`, neither part alone tells which sequence is meant."""
    codes = ConditionTensor(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    text = text_states(2, [5, 3])
    if kind == "codes":
        return Conditions(codes=codes)
    if kind in ("text cross", "text prefix"):
        return Conditions(text=text)
    if kind == "both":
        return Conditions(codes=codes.select(torch.tensor([0, 0, 1])), text=text.select(torch.tensor([0, 1, 0])))
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
def learnt(case: Case) -> Learnt:
    """Train a stage. What is given in time is the same for all sequences, where anything else tells them apart."""
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
    # A semantic sequence is heard to its real end (the second), or cut; others are also learnt as shorter crops.
    is_semantic = case.stage == "semantic"
    counts = torch.tensor([LONG, SHORT if is_semantic else LONG, LONG][:num_items])
    own = Learnt(model, streams, counts, torch.tensor([4, 2, 0][:num_items]), conditions_of(case.condition))
    items = torch.arange(num_items) if is_semantic else torch.arange(num_items).repeat(2)
    frames = counts if is_semantic else torch.cat((counts, torch.full_like(counts, SHORT)))
    lengths = {stream.name: own.frames(stream, frames, items) for stream in model.layout.streams}
    ends = items == 1 if is_semantic else None
    packed = model.layout.pack({name: tokens[items] for name, tokens in streams.items()}, lengths, ends)
    # Nothing tells the first semantic token of an unconditional stage; its own entropy stays.
    unknowable = num_items * log(num_items) / int(packed.loss_mask.sum()) if tells_nothing(case) else 0.0
    conditions = None if own.conditions is None else own.conditions.select(items)
    assert memorise(model, packed, conditions, steps=500, floor=unknowable) < unknowable + 0.02
    return own


def tells_nothing(case: Case) -> bool:
    """Whether without a prompt nothing says which sequence is meant."""
    return case.stage == "semantic" and case.condition == "none"


def wanted_frames(case: Case, order: list[int]) -> Tensor:
    """Unequal numbers of frames, which do not depend on the condition where the stage cannot end by itself."""
    is_semantic = case.stage == "semantic"
    return learnt(case).counts[torch.tensor(order)] if is_semantic else torch.tensor([LONG, SHORT, LONG])[: len(order)]


def complete(case: Case, prompts: list[int], order: list[int], **options) -> tuple[Decoded, list[Tensor]]:
    """Greedy completion of prompts of given lengths, item i under condition `order[i]`; and what is right."""
    own = learnt(case)
    items, wanted = torch.tensor(order), wanted_frames(case, order)
    lengths = {stream.name: own.frames(stream, wanted, items) for stream in own.model.layout.inputs}
    lengths[own.target] = torch.minimum(torch.tensor(prompts), wanted)
    found = decode(
        own.model,
        {name: tokens[items] for name, tokens in own.streams.items()},
        {own.target: wanted},
        **{"lengths": lengths, "settings": GREEDY, **options},
        conditioning=None if own.conditions is None else own.conditions.select(items),
    )
    assert torch.equal(found.lengths[own.target], wanted)
    return found, [own.streams[own.target][item, :count] for item, count in zip(order, wanted.tolist())]


def check(case: Case, prompts: list[int], order: list[int], **options) -> list[Tensor]:
    """Every item is right up to its own length, and -1 stands beyond."""
    found, right = complete(case, prompts, order, **options)
    tokens = found.streams[learnt(case).target]
    for item, sequence in enumerate(right):
        assert torch.equal(tokens[item, : len(sequence)], sequence), (prompts, order, item)
        assert (tokens[item, len(sequence) :] == -1).all()
    return right


def orders(case: Case) -> list[list[int]]:
    """The sequences in order, and in others: every condition meets another place of the batch."""
    return [[0, 1], [1, 0]] if len(learnt(case).counts) == 2 else [[0, 1, 2], [1, 2, 0]]


def test_the_default_run_lets_every_two_choices_meet():
    """No pair of stage, pattern, positions and condition is left to the slow run alone."""
    quick = [case for case in CASES if is_quick(case)]
    for one, other in combinations(range(4), 2):
        assert {(case[one], case[other]) for case in quick} == {(case[one], case[other]) for case in CASES}
    assert len(quick) == 18 and len(CASES) == 108


@every_case(lambda case: not tells_nothing(case))
def test_the_condition_alone_decides_which_sequence_comes(case):
    """Without a prompt A gives A, B gives B, and swapped conditions swap the sequences, in unequal lengths."""
    straight, swapped = (check(case, [0, 0, 0][: len(order)], order) for order in orders(case))
    assert not torch.equal(straight[0][:SHORT], swapped[0][:SHORT])


@every_case()
def test_prompts_of_any_and_of_unequal_length_are_continued(case):
    """Prompts of 1 frame, of half, of all but one, of all, and different ones in one batch; in any order."""
    first = 1 if tells_nothing(case) else 0
    for prompts in ([1, 1, 1], [8, 8, 8], [15, 10, 15], [first, 7, 3], [16, first, 9]):
        for order in orders(case):
            check(case, prompts[: len(order)], order)


@every_case(lambda case: case.condition != "none")
def test_guidance_keeps_what_was_learnt(case):
    """The doubled batch gives each half the same tokens: certain tokens stay certain."""
    order = orders(case)[0]
    check(case, [0, 3, 1][: len(order)], order, settings=SamplingSettings(temperature=0, guidance_scale=1.3))


@every_case()
def test_teacher_forced_logits_are_those_of_decoding(case, monkeypatch):
    """Reading whole sequences at once and row by row from a cache give the same logits, to 1e-5, in unequal lengths."""
    own = learnt(case)
    model, order = own.model, orders(case)[1]
    read, prefix_rows = {}, []

    def hidden(ids, mask, condition_tensors=None, cache=None, cache_positions=None):
        states = type(model).hidden(model, ids, mask, condition_tensors, cache, cache_positions)
        if condition_tensors is not None:
            prefix_rows.append(condition_tensors.num_rows)
        rows = cache_positions.positions.expand(len(ids), -1)[:, -ids.shape[1] :] - prefix_rows[0]
        for item, numbers in enumerate(rows.tolist()):
            read.update({(item, row): states[item, number] for number, row in enumerate(numbers)})
        return states

    monkeypatch.setattr(model, "hidden", hidden)
    complete(case, [1, 5, 2][: len(order)], order)
    monkeypatch.undo()
    items, wanted = torch.tensor(order), wanted_frames(case, order)
    lengths = {stream.name: own.frames(stream, wanted, items) for stream in model.layout.streams}
    packed = model.layout.pack({name: tokens[items] for name, tokens in own.streams.items()}, lengths)
    with torch.inference_mode():
        conditions = None if own.conditions is None else own.conditions.select(items)
        whole = model.hidden(packed.ids, packed.input_mask, model.condition_tensors(conditions, len(items)))
        found = torch.stack(list(read.values()))
        right = torch.stack([whole[place] for place in read])
        for head in range(len(model.layout.heads)):
            torch.testing.assert_close(model.logits(found, head), model.logits(right, head), rtol=1e-5, atol=1e-5)
    last_read = packed.loss_mask.any(-1).int().cumsum(1).argmax(1) - 1
    assert {(item, int(row)) for item, row in enumerate(last_read)} <= set(read)


@every_case(lambda case: case.stage == "semantic")
def test_the_end_is_learnt_where_the_file_ends(case):
    """Sequence 1 really ends, others were crops: only the former ends by itself, at the right frame, in one batch."""
    own = learnt(case)
    order = torch.tensor([1, 0])
    found = decode(
        own.model,
        {name: tokens[order, : 4 if name == own.target else None] for name, tokens in own.streams.items()},
        {own.target: LONG + 6},
        lengths={"words": own.words[order]} if case.condition == "not in time" else None,
        conditioning=None if own.conditions is None else own.conditions.select(order),
        settings=GREEDY,
        allow_eos=True,
    )
    assert found.lengths[own.target][0] == SHORT
    assert torch.equal(found.streams[own.target][0, :SHORT], own.streams[own.target][1, :SHORT])
    assert torch.equal(found.streams[own.target][1, :LONG], own.streams[own.target][0])
    assert (found.streams[own.target][0, SHORT:] == -1).all() and found.lengths[own.target][1] >= LONG


def test_windows_continue_what_was_learnt():
    """A window that carries half of the one before finds its place again in a sequence learnt from random crops."""
    torch.manual_seed(0)
    model: TokenTransformer = tiny_stages()["semantic"]
    song = torch.randperm(12).repeat(4)[None, :, None]  # 48 tokens; four frames tell where one is
    crops = torch.cat([song[:, start : start + 16] for start in range(12)])
    memorise(model, model.layout.pack({"semantic": crops}), steps=150)
    found = decode_in_windows(model, {"semantic": song[:, :4]}, 48, window_frames=16, settings=GREEDY)
    assert torch.equal(found.streams["semantic"], song)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guidance_by_streams_not_in_time_is_the_formula(pattern, scale):
    """Decoding equals a loop without cache that guides by hand, away from the same rows with null tokens in them."""
    torch.manual_seed(3)
    layout = TokenLayout([WORDS, Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50)], pattern)
    model = TokenTransformer(layout=layout, **SIZES).eval()
    for weight in (*model.heads.parameters(), *(block.attention.to_out.weight for block in model.transformer.blocks)):
        weight.data.mul_(40)  # an untrained model is undecided and hardly hears; this one has opinions
    given = {"words": torch.randint(0, 30, (2, 3, 1)), "s": torch.randint(0, 10, (2, 3, 1))}
    lengths = {"words": torch.tensor([3, 1])}
    settings = SamplingSettings(temperature=0, guidance_scale=scale)
    found = decode(model, given, {"a": 6}, lengths=lengths, settings=settings).streams["a"]
    grid = layout.grid(given, {"a": 6}, 2, lengths)
    packed, wanted = grid.packed, grid.packed.loss_mask
    with torch.inference_mode():
        for row in range(1, packed.ids.shape[1]):
            nothing = layout.without_conditions(packed, torch.tensor([True, True]))
            told, untold = (model.hidden(one.ids[:, :row], one.input_mask[:, :row])[:, -1] for one in (packed, nothing))
            for item, column in wanted[:, row].nonzero().tolist():
                head = int(grid.head[item, row, column])
                logits, null = model.logits(told[item], head), model.logits(untold[item], head)
                token = (null + scale * (logits - null)).argmax()
                packed.ids[item, row, column] = layout.heads[head].first_id + token
    assert torch.equal(found, layout.unpack(packed.ids, grid.num_frames)["a"])
    plain = decode(model, given, {"a": 6}, lengths=lengths, settings=GREEDY).streams["a"]
    assert torch.equal(found, plain) == (scale == 1)


def test_training_drops_streams_not_in_time_as_guidance_does():
    """Where every condition is dropped, the loss is that of the null token in their place."""
    torch.manual_seed(0)
    model = tiny_stages(extra_streams=[WORDS], cond_drop_prob=1.0)["semantic"]
    streams = {"words": torch.randint(0, 30, (2, 3, 1)), "semantic": torch.randint(0, 12, (2, 8, 1))}
    packed = model.layout.pack(streams)
    dropped = model.train()(packed).loss
    nothing = model.layout.without_conditions(packed, torch.tensor([True, True]))
    told, untold = model.eval()(packed).loss, model(nothing).loss
    torch.testing.assert_close(dropped, untold)
    assert (told - untold).abs() > 1e-4
