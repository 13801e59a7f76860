"""Sliding windows: positions, prompts, pauses, sources, batches, ends and memory."""

import random

import pytest
import torch

from audiolm_pytorch.generation import windows
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.windows import SlidingWindowDecoder, StagePipeline, plan_windows
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from audiolm_pytorch.tokens.token_batch import TokenBatch
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.decoding import decode, decode_in_windows
from tests.helpers.fakes import SIZES, random_conditions, select

GREEDY = SamplingSettings(temperature=0)
PATTERNS = ["flat", "delayed", "parallel"]


def model_of(pattern="delayed", eos=False, extra=(), **changes):
    """A model of 25 input tokens and 50 frames of 2 levels per second, with random but distinct logits."""
    layout = TokenLayout([Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50, eos=eos), *extra], pattern)
    model = TokenTransformer(layout=layout, **{**SIZES, "cond_dim": 8, **changes}).eval()
    for weight in model.heads.parameters():
        weight.data.mul_(40)
    if eos:  # about one frame in 21 is the last
        model.heads[0].weight.data.zero_()
    return model


def test_windows_start_in_the_middle_of_the_one_before():
    """Windows cover all frames, and their starts do not depend on the length."""
    for frames in range(1, 60):
        planned = plan_windows(frames, 10, 2)
        assert planned[0].start == 0 and planned[-1].stop == frames
        assert all(b.start - a.start == 4 and a.stop - a.start == 10 for a, b in zip(planned, planned[1:]))
        assert all(1 <= w.stop - w.start <= 10 for w in planned)
    assert plan_windows(50, None) == [range(50)]
    with pytest.raises(ValueError, match="half a window must have at least"):
        plan_windows(50, 3, 2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_second_half_of_a_window_is_the_prompt_of_the_next(pattern):
    """Three windows written out; items have different lengths and prompts."""
    model = model_of(pattern)
    inputs = torch.randint(0, 10, (2, 8, 1))
    prompt = torch.randint(0, 20, (2, 10, 2))
    result = decode_in_windows(
        model,
        {"s": inputs, "a": prompt},
        torch.tensor([14, 11]),
        lengths={"a": torch.tensor([2, 10])},
        window_frames=8,
        settings=GREEDY,
    )
    first = decode(model, {"s": inputs[:1, :4], "a": prompt[:1, :2]}, {"a": 8}, settings=GREEDY).streams["a"]
    second = decode(model, {"s": inputs[:1, 2:6], "a": first[:, 4:]}, {"a": 8}, settings=GREEDY).streams["a"]
    third = decode(model, {"s": inputs[:1, 4:7], "a": second[:, 4:]}, {"a": 6}, settings=GREEDY).streams["a"]
    assert torch.equal(result.streams["a"][0], torch.cat((first, second[:, 4:], third[:, 4:]), dim=1)[0])
    assert result.lengths["a"].tolist() == [14, 11]
    assert torch.equal(result.streams["a"][1, :10], prompt[1]) and (result.streams["a"][1, 11:] == -1).all()


def request_of(batch, rng):
    """Lengths, inputs, prompts and seeds of a batch; some prompts are empty, some are long."""
    expected = [rng.randint(1, 40) for _ in range(batch)]
    known = [rng.choice([0, rng.randint(0, count)]) for count in expected]
    inputs = [torch.randint(0, 10, (max(1, -(-count // 2) + rng.randint(-3, 3)), 1)) for count in expected]
    prompt = [torch.randint(0, 20, (count, 2)) for count in known]
    return expected, inputs, prompt, [rng.randint(0, 1000) for _ in range(batch)]


def decoder_of(model, expected, inputs, prompt, seeds, conditioning=None, **options):
    """A decoder with known inputs."""
    if conditioning is not None:
        options["settings"] = SamplingSettings(temperature=0.9, guidance_scale=1.5)
    return SlidingWindowDecoder(
        model,
        torch.tensor(expected),
        inputs={} if inputs is None else {"s": TokenBatch.of_items(inputs)},
        prompt=None if prompt is None else TokenBatch.of_items(prompt),
        batch_size=len(expected),
        seeds=seeds,
        conditioning=conditioning,
        **options,
    )


def decoded(decoder):
    """Decode to the end, and return the tokens of every item."""
    decoder.advance()
    return decoder.tokens.all().items()


def test_the_margin_of_a_window_is_decoded_only_at_the_end_of_an_item(monkeypatch):
    """A window ends before its margin if the item goes on, and after it if the item ends there."""
    stops, new_session = [], SlidingWindowDecoder._new_session

    def recorded(self, items, item_stops):
        stops.append(item_stops.tolist())
        return new_session(self, items, item_stops)

    monkeypatch.setattr(SlidingWindowDecoder, "_new_session", recorded)
    for expected, planned in ({16: [[16]], 17: [[12], [17]], 22: [[12], [22]], 23: [[12], [18], [23]]}).items():
        stops.clear()
        inputs = [torch.randint(0, 10, (40, 1))]
        result = decoded(decoder_of(model_of(), [expected], inputs, None, [0], window_frames=16, margin_frames=4))
        assert stops == planned and len(result[0]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("eos", [False, True])
def test_an_item_is_the_same_alone_and_in_a_batch(pattern, eos):
    """Other items, and windows that only other items need, change no token."""
    model, rng = model_of(pattern, eos), random.Random(1)
    for window, margin in ((None, 0), (8, 0), (11, 0), (11, 3), (16, 4)):
        expected, inputs, prompt, seeds = request_of(4, rng)
        conditions = random_conditions(4)
        options = {"window_frames": window, "margin_frames": margin, "allow_eos": eos}
        together = decoder_of(model, expected, inputs, prompt, seeds, conditions, **options)
        for item, result in enumerate(decoded(together)):
            alone = decoder_of(
                model, [expected[item]], [inputs[item]], [prompt[item]], [seeds[item]],
                select(conditions, torch.tensor([item])), **options,
            )  # fmt: skip
            assert torch.equal(decoded(alone)[0], result)
            assert torch.equal(result[: len(prompt[item])], prompt[item])
            assert len(result) <= expected[item] and (eos or len(result) == expected[item])
            assert ((result >= 0) & (result < 20)).all()


def source_model(eos=False):
    """A model that predicts the stream "s" without inputs."""
    model = TokenTransformer(layout=TokenLayout([Stream("s", 10, 1, 25, eos=eos)]), **SIZES).eval()
    for weight in model.heads.parameters():
        weight.data.mul_(0 if eos else 40)  # with `eos`, about one token in 11 is the last
    return model


def source_of(model, expected, seeds, **options):
    """A decoder of the inputs of `expected` frames."""
    counts = torch.tensor([max(1, -(-count // 2)) for count in expected])
    return SlidingWindowDecoder(model, counts, batch_size=len(expected), seeds=seeds, **options)


def chain_of(model, expected, prompt, seeds, source, **options):
    """A pipeline of two decoders; the second one reads the tokens of the first one."""
    prompts = TokenBatch.of_items(prompt)
    decoder = SlidingWindowDecoder(
        model,
        torch.tensor(expected),
        sources={"s": source},
        prompt=prompts,
        batch_size=len(expected),
        seeds=seeds,
        **options,
    )
    return StagePipeline(source, [decoder])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("eos", [False, True])
def test_pauses_and_late_inputs_change_no_token(pattern, eos):
    """`take` returns every frame once, also if the inputs arrive window by window."""
    model, before, rng = model_of(pattern, eos), source_model(eos), random.Random(2)
    num_shortened = 0
    for window in (None, 8, 8, 8):
        expected, _, prompt, seeds = request_of(3, rng)
        options = {"window_frames": window, "allow_eos": eos}
        paused = chain_of(model, expected, prompt, seeds, source_of(before, expected, seeds, **options), **options)
        parts, until = [paused.take()], 0
        while not paused.last.are_done.all():
            until += rng.randint(0, 5)
            paused.last.advance(until)
            parts.append(paused.take())
        inputs, results = ([torch.cat(item) for item in zip(*(part.items() for part in kind))] for kind in zip(*parts))
        source = source_of(before, expected, seeds, **options)
        known = decoded(source)  # all inputs are known before the decoder begins
        # If the inputs end early, the decoder stops with them.
        stops = [min(count, 2 * len(tokens)) for count, tokens in zip(expected, known)]
        num_shortened += sum(stop < count for stop, count in zip(stops, expected))
        counts = [max(stop, len(tokens)) for stop, tokens in zip(stops, prompt)]
        for result, wanted in zip(results, decoded(decoder_of(model, counts, known, prompt, seeds, **options))):
            assert torch.equal(result, wanted)
        for read, tokens in zip(inputs, known):
            assert torch.equal(read, tokens[: len(read)])
    assert (num_shortened > 0) == eos


def test_a_window_waits_only_for_its_own_inputs(monkeypatch):
    """A window needs the inputs up to its own end, and decodes nothing beyond `until_frames`."""
    model, source = model_of(), source_of(source_model(), [40], [1])
    rows, requests = [], []
    advance = SlidingWindowDecoder.advance
    for name, original in (("prefill", CachedTransformer.prefill), ("step", CachedTransformer.step)):

        def counted(self, *args, call=original):
            rows.extend([1] if self.transformer is model.transformer else [])
            return call(self, *args)

        monkeypatch.setattr(CachedTransformer, name, counted)

    def recorded(self, until_frames=None):
        requests.extend([until_frames] if self is source else [])
        advance(self, until_frames)

    monkeypatch.setattr(SlidingWindowDecoder, "advance", recorded)
    run = SlidingWindowDecoder(model, 40, sources={"s": source}, window_frames=8)
    assert not rows and not requests and run.known_frames.tolist() == [0]
    run.advance(5)
    assert run.known_frames.tolist() == [5] and len(rows) == 6
    assert requests == [4] and source.known_frames.tolist() == [4]
    run.advance(8)
    assert run.known_frames.tolist() == [8] and requests == [4] and not run.are_done.all()
    run.advance()
    assert run.are_done.all() and run.known_frames.tolist() == [40]
    assert requests == [4, 6, 8, 10, 12, 14, 16, 18, 20] and source.are_done.all()


def test_inputs_beyond_the_requested_frames_are_not_used(monkeypatch):
    """Each item receives the inputs that cover its own part of the window."""
    seen = []

    class Spy(DecodeSession):
        def __init__(self, model, streams, num_frames, **options):
            seen.append((options["lengths"]["s"].tolist(), num_frames["a"].tolist()))
            super().__init__(model, streams, num_frames, **options)

    monkeypatch.setattr(windows, "DecodeSession", Spy)
    inputs = [torch.randint(0, 10, (20, 1)) for _ in range(2)]
    decoder_of(model_of("flat"), [14, 9], inputs, None, [1, 2], window_frames=8).advance()
    assert seen == [([4, 4], [8, 8]), ([4, 3], [8, 5]), ([3], [6])]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["delayed", "parallel"])
def test_inputs_that_are_too_short_repeat_their_last_frame(pattern):
    """Also in windows that start after the inputs, as with a tokenizer that drops frames at the end."""
    model = model_of(pattern)
    inputs = torch.randint(0, 10, (6, 1))
    longer = torch.cat((inputs, inputs[-1:].expand(10, 1)))
    runs = [decoder_of(model, [32], [one], None, [3], window_frames=8) for one in (inputs, longer)]
    assert torch.equal(*(decoded(run)[0] for run in runs))


def test_a_prompt_longer_than_the_window():
    """The result keeps the whole prompt, and the model reads its end within the window."""
    model, inputs = model_of(), torch.randint(0, 10, (1, 10, 1))
    prompt = torch.randint(0, 20, (1, 17, 2))
    result = decode_in_windows(model, {"s": inputs, "a": prompt}, 20, window_frames=8, settings=GREEDY).streams["a"]
    assert torch.equal(result[:, :17], prompt)
    # windows start at 0, 4, 8 and 12; the fourth is the first with missing frames
    last = decode(model, {"s": inputs[:, 6:], "a": prompt[:, 12:]}, {"a": 8}, settings=GREEDY).streams["a"]
    assert torch.equal(result[:, 17:], last[:, 5:])


@pytest.mark.slow
def test_empty_and_complete_prompts(monkeypatch):
    """An empty prompt equals no prompt. A prompt of all requested frames needs no call of the model."""
    model, inputs = model_of(), torch.randint(0, 10, (2, 8, 1))
    prompt = torch.randint(0, 20, (2, 16, 2))
    without = decode_in_windows(model, {"s": inputs}, 16, window_frames=8, seeds=[1, 2])
    empty = decode_in_windows(model, {"s": inputs, "a": prompt[:, :0]}, 16, window_frames=8, seeds=[1, 2])
    zero_length = decode_in_windows(
        model, {"s": inputs, "a": prompt}, 16, lengths={"a": 0}, window_frames=8, seeds=[1, 2]
    )
    assert torch.equal(without.streams["a"], empty.streams["a"]) and torch.equal(
        without.streams["a"], zero_length.streams["a"]
    )
    for name in ("prefill", "step"):
        monkeypatch.setattr(CachedTransformer, name, lambda *rows: pytest.fail("nothing was to be decoded"))
    assert torch.equal(decode_in_windows(model, {"s": inputs, "a": prompt}, 16).streams["a"], prompt)


def test_streams_without_a_rate_belong_to_every_window(monkeypatch):
    """Each window has all text ids of its item; an item can have no text."""
    model = model_of(extra=[Stream("text", 7, rate_hz=None, is_input=True)])
    seen = []

    class Spy(DecodeSession):
        def __init__(self, model, streams, num_frames, **options):
            seen.append((streams["text"].clone(), options["lengths"]["text"].tolist()))
            super().__init__(model, streams, num_frames, **options)

    inputs, text = torch.randint(0, 10, (2, 8, 1)), torch.randint(0, 7, (2, 3, 1))
    alone = decode_in_windows(model, {"s": inputs[1:]}, 16, window_frames=8, seeds=[2])
    monkeypatch.setattr(windows, "DecodeSession", Spy)
    streams, lengths = {"s": inputs, "text": text}, {"text": torch.tensor([3, 0])}
    together = decode_in_windows(model, streams, 16, lengths=lengths, window_frames=8, seeds=[1, 2])
    assert [counts for _, counts in seen] == [[3, 0]] * 3
    assert all(torch.equal(tokens[0], text[0]) for tokens, _ in seen)
    assert torch.equal(together.streams["a"][1], alone.streams["a"][0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_progress_increases_to_the_end(pattern):
    """Known and requested frames over all windows and items."""
    inputs, seen = [torch.zeros(12, 1, dtype=torch.long)] * 2, []
    report = {"callback": lambda known, expected: seen.append((known, expected))}
    run = decoder_of(model_of(pattern), [5, 24], inputs, None, [1, 2], window_frames=8, **report)
    run.advance()
    known = [count for count, _ in seen]
    assert known == sorted(known) and known[-1] == 24 and {expected for _, expected in seen} == {24}


def peak_of(num_frames):
    """Largest memory in bytes while a long sequence is decoded and taken in parts."""
    model = model_of("parallel", depth=1, dim=8, dim_head=4)
    before = source_model()
    with AliveTensors([*model.parameters(), *before.parameters()]) as alive:
        source = source_of(before, [num_frames], [1], window_frames=4)
        run = chain_of(model, [num_frames], [torch.zeros(0, 2).long()], [1], source, window_frames=8)
        while not run.last.are_done.all():
            run.last.advance(int(run.last.known_frames) + 4)
            run.take()
    return alive.peak_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(monkeypatch):
    """Twice as many frames have the same peak; a decoder that keeps all tokens fails the check."""
    peak_of(64)  # fills the caches of layouts
    assert peak_of(64) <= peak_of(32)
    monkeypatch.setattr(windows.GrowingTokens, "drop_before", lambda self, frames: None)
    assert peak_of(64) > peak_of(32)


def test_invalid_inputs_raise_errors():
    """Prompts, batches, streams and items that are not valid."""
    model, inputs = model_of(), torch.randint(0, 10, (2, 8, 1))
    with pytest.raises(ValueError, match="longer than the requested"):
        decode_in_windows(model, {"s": inputs, "a": torch.zeros(2, 9, 2).long()}, 8)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        SlidingWindowDecoder(model, 8, batch_size=0)
    for empty in ({}, {"s": inputs[:0]}):
        with pytest.raises(ValueError, match=r"\['s'\] are missing|batch_size must be at least 1"):
            decode_in_windows(model, empty, 8)
    with pytest.raises(ValueError, match="\['s'\] are missing"):
        decode_in_windows(model, {}, 8)
    with pytest.raises(ValueError, match="are missing; pass tokens of"):
        decode_in_windows(model, {"s": inputs, "t": inputs}, 8)
    with pytest.raises(ValueError, match="the input streams of the model are"):
        SlidingWindowDecoder(model, 8, inputs={name: TokenBatch.of_items([inputs[0]]) for name in ("s", "a")})
    with pytest.raises(ValueError, match="tokens of 2 items, the decoder has 1"):
        SlidingWindowDecoder(model, 8, inputs={"s": TokenBatch.of_items(list(inputs))})
    with pytest.raises(ValueError, match="0 or more"):
        SlidingWindowDecoder(model, -1)
    two = TokenTransformer(layout=TokenLayout([Stream("a", 7), Stream("b", 7)]), **SIZES)
    with pytest.raises(ValueError, match="must predict one stream"):
        decode_in_windows(two, {}, 8)
