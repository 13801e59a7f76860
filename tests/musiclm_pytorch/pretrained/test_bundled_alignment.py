"""A click track through the bundled codec and tokenizer: clicks keep their times."""

from functools import cache
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor, nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.data import load_items
from audiolm_pytorch.lm.stages import CoarseTransformer
from audiolm_pytorch.lm.training_data import WaveSource
from audiolm_pytorch.semantic.base import SemanticTokenizer

FILE_HZ, MODEL_HZ = 22050, 16000
CLICKS = torch.tensor([0.311, 0.722, 1.148, 1.571, 2.032, 2.469])
CODEC_FRAME_SECONDS, TOKENS_PER_SECOND = 0.02, 25


@cache
def parts():
    return SemanticTokenizer.from_pretrained("semantic_16khz"), Codec.from_pretrained("codec_16khz")


def click_track(times: Tensor, seconds: float, sample_hz: int) -> Tensor:
    """Bumps of a millisecond at given times, `[n]`."""
    at = torch.arange(round(seconds * sample_hz)) / sample_hz
    return 0.9 * torch.exp(-(((at[:, None] - times) / 0.0004) ** 2)).sum(dim=1)


def click_times(wave: Tensor, times: Tensor) -> Tensor:
    """Times (s) of the maxima of `wave [n]`, smoothed over 4 ms, within 0.1 s of each expected time."""
    loudness = nn.functional.avg_pool1d(wave.abs()[None], 65, 1, 32)[0]
    found = []
    for time in times.tolist():
        first = max(0, round((time - 0.1) * MODEL_HZ))
        found.append((first + int(loudness[first : round((time + 0.1) * MODEL_HZ)].argmax())) / MODEL_HZ)
    return torch.tensor(found)


@pytest.mark.slow
@torch.inference_mode()
def test_the_codec_keeps_the_times_of_clicks():
    """No click moves by half a frame (10 ms; measured: 3 ms)."""
    codec = parts()[1]
    wave = click_track(CLICKS, 3.0, MODEL_HZ)
    decoded = codec.decode_from_codebook_indices(codec.tokenize(wave[None]), num_samples=len(wave))[0, 0]
    assert ((click_times(decoded, CLICKS) - CLICKS).abs() < CODEC_FRAME_SECONDS / 2).all()
    late = torch.cat((torch.zeros(480), decoded))  # a codec that is late fails
    assert not ((click_times(late, CLICKS) - CLICKS).abs() < CODEC_FRAME_SECONDS / 2).all()


@torch.inference_mode()
def test_semantic_tokens_change_where_a_click_is():
    """Without a click the token of its frame changes; the changed tokens are centered on it within a frame (40 ms)."""
    tokenizer = parts()[0]
    wave = click_track(CLICKS, 3.0, MODEL_HZ)
    ids = tokenizer(wave[None])[0]
    shifts = []
    for number, time in enumerate(CLICKS.tolist()):
        others = CLICKS[torch.arange(len(CLICKS)) != number]
        changed = (tokenizer(click_track(others, 3.0, MODEL_HZ)[None])[0] != ids).nonzero().flatten()
        frame = int(time * TOKENS_PER_SECOND)
        assert frame in changed.tolist()
        shifts.append(abs(changed.float().quantile(0.5).item() - frame))
    # a single other token moves a median by half a frame; tokens that are one frame late have a mean of 0.9
    assert max(shifts) <= 1.5 and sum(shifts) < 0.7 * len(shifts)


def crops(tmp_path: Path) -> tuple[WaveSource, CoarseTransformer]:
    """Crops of a file with another sample rate than the models."""
    soundfile.write(tmp_path / "clicks.wav", click_track(CLICKS, 3.0, FILE_HZ).numpy(), FILE_HZ)
    tokenizer, codec = parts()
    stage = CoarseTransformer(
        num_semantic_tokens=tokenizer.codebook_size,
        codebook_size=codec.codebook_size,
        num_coarse_quantizers=codec.num_quantizers,
        **{"dim": 16, "depth": 1, "heads": 1, "dim_head": 16},
    )
    made = {"wav2vec": tokenizer, "codec": codec, "audio_conditioner": None}
    return WaveSource(load_items(tmp_path).items, stage, seconds=1.2, **made), stage


@pytest.mark.slow
@torch.inference_mode()
def test_semantic_and_acoustic_tokens_of_a_crop_are_aligned(tmp_path):
    """After packing and unpacking, both kinds of tokens start with the crop, not a frame earlier or later."""
    source, stage = crops(tmp_path)
    tokenizer, codec = parts()
    pairs = [(epoch, 0) for epoch in range(6)]
    read = source.read(source.batch(pairs))
    streams, lengths = stage.streams_of(read.tokens)
    unpacked = stage.layout.unpack(stage.packed(read.tokens, read.ends).ids, lengths)
    whole = tokenizer(click_track(CLICKS, 3.0, MODEL_HZ)[None])[0]
    agreement = dict.fromkeys((-1, 0, 1), 0)
    for item, pair in enumerate(pairs):
        start = source.crops.get(*pair).start_seconds
        inside = CLICKS[(CLICKS > start + 0.1) & (CLICKS < start + 1.1)] - start
        wave = codec.decode_from_codebook_indices(unpacked["coarse"][item : item + 1])[0, 0]
        assert len(inside) and ((click_times(wave, inside) - inside).abs() < CODEC_FRAME_SECONDS / 2).all()
        first = round(start * TOKENS_PER_SECOND)
        own = unpacked["semantic"][item, 2:-2, 0]  # at the edges a crop has less context than the file
        for shift in agreement:
            at = first + 2 + shift
            agreement[shift] += int((whole[at : at + len(own)] == own).sum())
    total = len(pairs) * len(own)
    assert agreement[0] > 0.9 * total and max(agreement[-1], agreement[1]) < 0.6 * total
