"""Windows over long sequences: where they stand, what they carry, pauses, feeding, batches, ends, memory."""

import random

import pytest
import torch

from audiolm_pytorch.generation import windows
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.windows import SlidingWindowDecoder, decode_in_windows, plan_windows
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.decoding import decode
from tests.helpers.fakes import SIZES, random_conditions

GREEDY = SamplingSettings(temperature=0)
PATTERNS = ["flat", "delayed", "parallel"]


def model_of(pattern="delayed", eos=False, extra=(), **changes):
    """25 given tokens and 50 frames of 2 levels a second; untrained, but with opinions."""
    layout = TokenLayout([Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50, eos=eos), *extra], pattern)
    model = TokenTransformer(layout=layout, **{**SIZES, "cond_dim": 8, **changes}).eval()
    for weight in model.heads.parameters():
        weight.data.mul_(40)
    if eos:  # about one frame in 21 is the last
        model.heads[0].weight.data.zero_()
    return model


def test_windows_cover_everything_and_carry_half():
    """Every frame is decoded in some window; a window starts in the middle of the one before; starts are fixed."""
    for frames in range(1, 60):
        planned = plan_windows(frames, 10, 2)
        assert planned[0].start == 0 and planned[-1].stop == frames
        assert all(b.start - a.start == 4 and a.stop - a.start == 10 for a, b in zip(planned, planned[1:]))
        assert all(1 <= w.stop - w.start <= 10 for w in planned)
    assert plan_windows(50, None) == [range(50)]
    with pytest.raises(ValueError, match="advance by half"):
        plan_windows(50, 3, 2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_windowed_decoding_is_decoding_with_the_carried_half_as_prompt(pattern):
    """Written out for three windows; items of unequal length and prompt keep their own tokens."""
    model = model_of(pattern)
    given = torch.randint(0, 10, (2, 8, 1))
    prompt = torch.randint(0, 20, (2, 10, 2))
    found = decode_in_windows(
        model,
        {"s": given, "a": prompt},
        torch.tensor([14, 11]),
        lengths={"a": torch.tensor([2, 10])},
        window_frames=8,
        settings=GREEDY,
    )
    first = decode(model, {"s": given[:1, :4], "a": prompt[:1, :2]}, {"a": 8}, settings=GREEDY).streams["a"]
    second = decode(model, {"s": given[:1, 2:6], "a": first[:, 4:]}, {"a": 8}, settings=GREEDY).streams["a"]
    third = decode(model, {"s": given[:1, 4:7], "a": second[:, 4:]}, {"a": 6}, settings=GREEDY).streams["a"]
    assert torch.equal(found.streams["a"][0], torch.cat((first, second[:, 4:], third[:, 4:]), dim=1)[0])
    assert found.lengths["a"].tolist() == [14, 11]
    assert torch.equal(found.streams["a"][1, :10], prompt[1]) and (found.streams["a"][1, 11:] == -1).all()


def request_of(batch, rng):
    """Givens, prompts, wishes and seeds of a batch, of unequal lengths; some prompts are empty, some long."""
    wanted = [rng.randint(1, 40) for _ in range(batch)]
    known = [rng.choice([0, rng.randint(0, count)]) for count in wanted]
    given = [torch.randint(0, 10, (max(1, -(-count // 2) + rng.randint(-3, 3)), 1)) for count in wanted]
    prompt = [torch.randint(0, 20, (count, 2)) for count in known]
    return wanted, given, prompt, [rng.randint(0, 1000) for _ in range(batch)]


def run_of(model, wanted, given, prompt, seeds, conditioning=None, **options):
    """A windowed decoding that was fed everything."""
    if conditioning is not None:
        options["settings"] = SamplingSettings(temperature=0.9, guidance_scale=1.5)
    run = SlidingWindowDecoder(
        model,
        torch.tensor(wanted),
        prompt=prompt,
        batch_size=len(wanted),
        seeds=seeds,
        conditioning=conditioning,
        **options,
    )
    if given is not None:
        run.feed("s", given)
    return run


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("eos", [False, True])
def test_an_item_is_the_same_alone_and_in_a_batch(pattern, eos):
    """Other lengths, prompts, givens and ends beside it, and windows that only others need, change no token."""
    model, rng = model_of(pattern, eos), random.Random(1)
    for window in (None, 8, 11):
        wanted, given, prompt, seeds = request_of(4, rng)
        conditions = random_conditions(4)
        options = {"window_frames": window, "allow_eos": eos}
        together = run_of(model, wanted, given, prompt, seeds, conditions, **options)
        together.advance()
        for item, found in enumerate(together.take()):
            alone = run_of(
                model, [wanted[item]], [given[item]], [prompt[item]], [seeds[item]],
                conditions.select(torch.tensor([item])), **options,
            )  # fmt: skip
            alone.advance()
            assert torch.equal(alone.take()[0], found)
            assert torch.equal(found[: len(prompt[item])], prompt[item])
            assert len(found) <= wanted[item] and (eos or len(found) == wanted[item])
            assert ((found >= 0) & (found < 20)).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("eos", [False, True])
def test_pauses_and_feeding_bit_by_bit_change_nothing(pattern, eos):
    """Wherever one stops, and however little is given ahead, the tokens are those of one go, and none comes twice."""
    model, rng = model_of(pattern, eos), random.Random(2)
    for window in (None, 8):
        wanted, given, prompt, seeds = request_of(3, rng)
        options = {"window_frames": window, "allow_eos": eos}
        whole = run_of(model, wanted, given, prompt, seeds, **options)
        whole.advance()
        paused = run_of(model, wanted, None, prompt, seeds, **options)
        parts, fed, until = [paused.take()], 0, 0
        while not paused.are_done.all():
            until += rng.randint(0, 5)
            paused.advance(until)
            parts.append(paused.take())
            if paused.awaited:
                stop = rng.randint(fed, paused.awaited["s"])
                paused.feed("s", [one[fed:stop] for one in given], torch.tensor([stop >= len(one) for one in given]))
                fed = stop
        for item, found in enumerate(whole.take()):
            assert torch.equal(torch.cat([part[item] for part in parts]), found)


def test_a_window_waits_for_what_covers_it_and_asks_for_no_more(monkeypatch):
    """Low latency: the second window starts with the givens up to its own end; nothing is decoded ahead of `until`."""
    model = model_of()
    rows = []
    hidden = TokenTransformer.hidden
    monkeypatch.setattr(TokenTransformer, "hidden", lambda self, *args: rows.append(1) or hidden(self, *args))
    run = SlidingWindowDecoder(model, 40, window_frames=8)
    given = torch.randint(0, 10, (1, 20, 1))
    assert run.awaited == {"s": 4}
    run.feed("s", [given[0, :3]], torch.tensor([False]))
    run.advance()
    assert not rows and run.known_frames.tolist() == [0] and run.awaited == {"s": 4}
    run.feed("s", [given[0, 3:5]], torch.tensor([False]))
    run.advance(5)
    assert run.known_frames.tolist() == [5] and len(rows) == 6 and run.awaited == {}
    run.advance()
    assert run.known_frames.tolist() == [8] and run.awaited == {"s": 6} and not run.are_done.all()
    run.feed("s", [given[0, 5:]])
    run.advance()
    assert run.are_done.all() and run.known_frames.tolist() == [40]


def test_givens_longer_than_what_is_wanted_are_not_seen(monkeypatch):
    """Each item is handed what covers its own part of a window, else a flat layout would tell the items apart."""
    seen = []

    class Spy(DecodeSession):
        def __init__(self, model, streams, num_frames, **options):
            seen.append((options["lengths"]["s"].tolist(), num_frames["a"].tolist()))
            super().__init__(model, streams, num_frames, **options)

    monkeypatch.setattr(windows, "DecodeSession", Spy)
    given = [torch.randint(0, 10, (20, 1)) for _ in range(2)]
    run_of(model_of("flat"), [14, 9], given, None, [1, 2], window_frames=8).advance()
    assert seen == [([4, 4], [8, 8]), ([4, 3], [8, 5]), ([3], [6])]


@pytest.mark.parametrize("pattern", ["delayed", "parallel"])
def test_givens_that_are_too_short_repeat_their_last_frame(pattern):
    """Also in windows that begin behind them, as where a tokenizer loses frames at the end."""
    model = model_of(pattern)
    given = torch.randint(0, 10, (6, 1))
    longer = torch.cat((given, given[-1:].expand(10, 1)))
    runs = [run_of(model, [32], [one], None, [3], window_frames=8) for one in (given, longer)]
    for run in runs:
        run.advance()
    assert torch.equal(*(run.take()[0] for run in runs))


def test_a_prompt_longer_than_the_window_is_windowed():
    """It is kept whole, and the model sees its last part as far as the window reaches back."""
    model, given = model_of(), torch.randint(0, 10, (1, 10, 1))
    prompt = torch.randint(0, 20, (1, 17, 2))
    found = decode_in_windows(model, {"s": given, "a": prompt}, 20, window_frames=8, settings=GREEDY).streams["a"]
    assert torch.equal(found[:, :17], prompt)
    # windows start at 0, 4, 8, 12: the fourth is the first that holds anything unknown
    last = decode(model, {"s": given[:, 6:], "a": prompt[:, 12:]}, {"a": 8}, settings=GREEDY).streams["a"]
    assert torch.equal(found[:, 17:], last[:, 5:])


def test_no_prompt_an_empty_one_and_nothing_to_do(monkeypatch):
    """No frames are no prompt; a prompt that is all that is wanted comes back without a step of the model."""
    model, given = model_of(), torch.randint(0, 10, (2, 8, 1))
    prompt = torch.randint(0, 20, (2, 16, 2))
    without = decode_in_windows(model, {"s": given}, 16, window_frames=8, seeds=[1, 2])
    empty = decode_in_windows(model, {"s": given, "a": prompt[:, :0]}, 16, window_frames=8, seeds=[1, 2])
    said = decode_in_windows(model, {"s": given, "a": prompt}, 16, lengths={"a": 0}, window_frames=8, seeds=[1, 2])
    assert torch.equal(without.streams["a"], empty.streams["a"]) and torch.equal(
        without.streams["a"], said.streams["a"]
    )
    monkeypatch.setattr(TokenTransformer, "hidden", lambda self, *rows: pytest.fail("nothing was to be decoded"))
    assert torch.equal(decode_in_windows(model, {"s": given, "a": prompt}, 16).streams["a"], prompt)


def test_streams_that_are_not_in_time_are_carried_whole(monkeypatch):
    """Ids of a text, some of no text at all, stand before every window."""
    model = model_of(extra=[Stream("text", 7, rate_hz=None, is_input=True)])
    seen = []

    class Spy(DecodeSession):
        def __init__(self, model, streams, num_frames, **options):
            seen.append((streams["text"].clone(), options["lengths"]["text"].tolist()))
            super().__init__(model, streams, num_frames, **options)

    given, text = torch.randint(0, 10, (2, 8, 1)), torch.randint(0, 7, (2, 3, 1))
    alone = decode_in_windows(model, {"s": given[1:]}, 16, window_frames=8, seeds=[2])
    monkeypatch.setattr(windows, "DecodeSession", Spy)
    streams, lengths = {"s": given, "text": text}, {"text": torch.tensor([3, 0])}
    together = decode_in_windows(model, streams, 16, lengths=lengths, window_frames=8, seeds=[1, 2])
    assert [counts for _, counts in seen] == [[3, 0]] * 3
    assert all(torch.equal(tokens[0], text[0]) for tokens, _ in seen)
    assert torch.equal(together.streams["a"][1], alone.streams["a"][0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_progress_never_goes_back_and_reaches_the_end(pattern):
    """Frames known, of frames wanted, over all windows and items; in a flat layout too."""
    given, seen = [torch.zeros(12, 1, dtype=torch.long)] * 2, []
    report = {"callback": lambda known, wanted: seen.append((known, wanted))}
    run = run_of(model_of(pattern), [5, 24], given, None, [1, 2], window_frames=8, **report)
    run.advance()
    known = [count for count, _ in seen]
    assert known == sorted(known) and known[-1] == 24 and {wanted for _, wanted in seen} == {24}


def peak_of(num_frames):
    """Most bytes alive at once while a long sequence is decoded and taken bit by bit."""
    model = model_of("parallel", depth=1, dim=8, dim_head=4)
    with AliveTensors(list(model.parameters())) as alive:
        run = SlidingWindowDecoder(model, num_frames, window_frames=8)
        while not run.are_done.all():
            if run.awaited:
                run.feed("s", [torch.zeros(4, 1, dtype=torch.long)], torch.tensor([False]))
            run.advance()
            run.take()
    return alive.peak_bytes


def test_memory_does_not_grow_with_the_length(monkeypatch):
    """Twice as many frames, the same peak; keeping all tokens is noticed."""
    assert peak_of(64) <= peak_of(32)
    monkeypatch.setattr(windows.ItemTokens, "forget_before", lambda self, frame: None)
    assert peak_of(64) > peak_of(32)


def test_bad_input_is_refused_in_words():
    """Prompts, batches, streams and items that do not fit."""
    model, given = model_of(), torch.randint(0, 10, (2, 8, 1))
    with pytest.raises(ValueError, match="longer than the requested"):
        decode_in_windows(model, {"s": given, "a": torch.zeros(2, 9, 2).long()}, 8)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        SlidingWindowDecoder(model, 8, batch_size=0)
    with pytest.raises(ValueError, match="\['s'\] are missing"):
        decode_in_windows(model, {}, 8)
    with pytest.raises(ValueError, match="the streams are"):
        decode_in_windows(model, {"s": given, "t": given}, 8)
    with pytest.raises(ValueError, match="is not an input stream"):
        SlidingWindowDecoder(model, 8).feed("a", [given[0]])
    with pytest.raises(ValueError, match="of 1 items, got 2"):
        SlidingWindowDecoder(model, 8).feed("s", list(given))
    with pytest.raises(ValueError, match="0 or more"):
        SlidingWindowDecoder(model, -1)
    two = TokenTransformer(layout=TokenLayout([Stream("a", 7), Stream("b", 7)]), **SIZES)
    with pytest.raises(ValueError, match="one predicted stream"):
        decode_in_windows(two, {}, 8)
