"""Each stage learns two sequences by heart and must give them back token by token: the proof of all bookkeeping."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.sampling import SamplingSettings
from audiolm_pytorch.stages import TokenTransformer
from audiolm_pytorch.stages.decoding import Decoded, decode
from audiolm_pytorch.stages.windows import decode_in_windows

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from fakes import CONDITION, memorise, random_conditions, tiny_stages

FRAMES = 24
STAGES = ["semantic", "coarse", "fine", "coarse flat", "fine flat"]
GREEDY = SamplingSettings(temperature=0)


@cache
def memorised(name):
    """A stage that knows sequence 0 under condition 0 and 1 under condition 1; its given streams do not differ."""
    torch.manual_seed(1)
    kind, _, pattern = name.partition(" ")
    model = tiny_stages(**CONDITION, cond_drop_prob=0.0)[kind]
    if pattern:
        model = type(model)(**{**model.config, "pattern": pattern})
    target = model.layout.predicted[0]
    streams = {}
    for stream in model.layout.streams:
        frames = int(FRAMES * stream.rate_hz / target.rate_hz)
        items = 1 if stream.given else 2
        streams[stream.name] = torch.randint(0, stream.vocab_size, (items, frames, stream.num_levels)).expand(2, -1, -1)
    conditioning = random_conditions(2)
    ends = torch.tensor([False, True]) if target.eos else None
    assert memorise(model, model.layout.pack(streams, ends=ends), conditioning) < 0.02
    return model, streams, conditioning


def complete(name, prompts, order=(0, 1), **options) -> tuple[Decoded, torch.Tensor]:
    """Greedy completion of prompts of given lengths, one per item; and what is right."""
    model, streams, conditioning = memorised(name)
    items = torch.tensor(order)
    target = model.layout.predicted[0].name
    found = decode(
        model,
        {key: tokens[items] for key, tokens in streams.items()},
        {target: FRAMES},
        lengths={target: torch.tensor(prompts)},
        conditioning=conditioning.chosen(items),
        settings=GREEDY,
        **options,
    )
    return found, streams[target][items]


@pytest.mark.parametrize("name", STAGES)
def test_greedy_decoding_returns_what_was_learnt(name):
    """Without a prompt the condition alone decides which sequence comes, exactly."""
    found, right = complete(name, [0, 0])
    assert torch.equal(found.streams[memorised(name)[0].layout.predicted[0].name], right)
    assert not torch.equal(right[0], right[1])


@pytest.mark.parametrize("name", STAGES)
def test_prompts_of_any_and_of_unequal_length_are_continued(name):
    """Prompts of 1 frame, of half, of all but one, and different ones in one batch."""
    for prompts in ([1, 1], [12, 12], [23, 23], [0, 17], [24, 5]):
        found, right = complete(name, prompts)
        assert torch.equal(next(iter(found.streams.values())), right), prompts


@pytest.mark.parametrize("name", STAGES)
def test_swapped_conditions_swap_the_sequences(name):
    """The condition is heard, item by item."""
    found, right = complete(name, [0, 0], order=(1, 0))
    assert torch.equal(next(iter(found.streams.values())), right)


@pytest.mark.parametrize("name", STAGES)
def test_guidance_keeps_what_was_learnt(name):
    """The doubled batch gives each half the same tokens: certain tokens stay certain."""
    model, streams, conditioning = memorised(name)
    given = {stream.name: streams[stream.name] for stream in model.layout.given}
    target = model.layout.predicted[0].name
    found = decode(
        model,
        given,
        {target: FRAMES},
        batch_size=2,
        conditioning=conditioning,
        settings=SamplingSettings(temperature=0, guidance_scale=1.5),
    )
    assert torch.equal(found.streams[target], streams[target])


def test_the_end_is_learnt_where_the_file_ends():
    """Sequence 1 really ends, sequence 0 was a crop: only the former ends by itself, and at the right frame."""
    model, streams, conditioning = memorised("semantic")
    found = decode(
        model,
        {"semantic": streams["semantic"][:, :4]},
        {"semantic": FRAMES + 6},
        conditioning=conditioning,
        settings=GREEDY,
        allow_eos=True,
    )
    assert found.lengths["semantic"][1] == FRAMES
    assert torch.equal(found.streams["semantic"][1, :FRAMES], streams["semantic"][1])
    assert torch.equal(found.streams["semantic"][0, :FRAMES], streams["semantic"][0])


def test_windows_continue_what_was_learnt():
    """A window that carries half of the one before finds its place again in a sequence learnt from random crops."""
    torch.manual_seed(0)
    model: TokenTransformer = tiny_stages()["semantic"]
    song = torch.randperm(12).repeat(4)[None, :, None]  # 48 tokens; four frames tell where one is
    crops = torch.cat([song[:, start : start + 16] for start in range(12)])
    memorise(model, model.layout.pack({"semantic": crops}), steps=150)
    found = decode_in_windows(model, {"semantic": song[:, :4]}, 48, window_frames=16, settings=GREEDY)
    assert torch.equal(found.streams["semantic"], song)
