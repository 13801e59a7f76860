"""AudioLM while it makes sound: streams equal what is made at one go, come early, and take little memory."""

import random
from itertools import zip_longest

import pytest
import torch

from audiolm_pytorch import audiolm
from audiolm_pytorch.generation.request import GeneratedAudio
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.fakes import SAMPLE_HZ
from tests.helpers.toy_audiolm import audiolm_of, streaming_codec

WINDOWS = {"max_seconds": 0.32}  # 8 semantic tokens, 16 acoustic frames


def check_stream(audio_lm, chunk_seconds, **request):
    """The chunks of a stream, which together are what is made at one go."""
    whole = audio_lm.generate(**request)
    chunks = list(audio_lm.stream(chunk_seconds=chunk_seconds, **request))
    joined = GeneratedAudio.concatenate(chunks)
    assert torch.equal(joined.semantic, whole.semantic) and torch.equal(joined.acoustic, whole.acoustic)
    assert torch.equal(joined.semantic_lengths, whole.semantic_lengths)
    assert torch.equal(joined.acoustic_lengths, whole.acoustic_lengths)
    assert joined.sample_hz == whole.sample_hz == SAMPLE_HZ
    for found, wanted in zip(joined.waves, whole.waves, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert all(any(wave.numel() for wave in chunk.waves) for chunk in chunks[:-1])
    return chunks


@pytest.mark.parametrize("codec", ["causal", "spectral"])
@pytest.mark.parametrize("pattern", ["windows", "no windows"])
def test_a_stream_is_what_is_made_at_one_go(codec, pattern):
    """Seeds, batches, primes, texts and lengths at random; codecs with and without a look ahead."""
    rng = random.Random(3)
    # A tokenizer may lose a frame at the end, as HuBERT does.
    changes = {"lost_frames": 1, **WINDOWS} if pattern == "windows" else {}
    audio_lm = audiolm_of(conditioned=True, codec=streaming_codec(codec), **changes)
    for _ in range(4):
        batch = rng.randint(1, 3)
        request = {"batch_size": batch, "seconds": rng.uniform(0.5, 1.2), "seeds": rng.randint(0, 99)}
        if rng.random() < 0.5:
            request["text"] = [rng.choice(["one", "three", "seventy"]) for _ in range(batch)]
            request["sampling"] = {"coarse": {"guidance_scale": 2.0}}
        if rng.random() < 0.7:
            request["prime_wave"] = [torch.rand(rng.randint(0, 380)) * 0.9 for _ in range(batch)]
        check_stream(audio_lm, rng.uniform(0.02, 0.3), **request)


@pytest.mark.parametrize("fine", [True, False])
def test_pieces_that_end_by_themselves_stream_to_their_own_end(fine):
    """Ends of items at different times, some in the first window; the others go on."""
    audio_lm = audiolm_of(codec=streaming_codec("spectral"), ends=True, **WINDOWS)
    found = set()
    for seed in (0, 4, 8):
        chunks = check_stream(audio_lm, 0.1, batch_size=3, seeds=seed, coarse_only=not fine)
        found |= {int(length) for length in GeneratedAudio.concatenate(chunks).acoustic_lengths}
    assert len(found) > 4 and min(found) < 16 < max(found)


def test_several_channels_and_given_semantic_tokens_stream_too():
    """Chunks are `[c, n_i]`; semantic tokens of unequal length."""
    audio_lm = audiolm_of(codec=streaming_codec(audio_channels=2), **WINDOWS)
    tokens, lengths = torch.randint(0, 12, (2, 20)), torch.tensor([20, 7])
    chunks = check_stream(audio_lm, 0.1, semantic_tokens=tokens, semantic_lengths=lengths, seeds=1)
    assert chunks[0].waves[0].ndim == 2 and len(chunks[0].waves[0]) == 2
    assert [wave.shape[-1] for wave in GeneratedAudio.concatenate(chunks).waves] == [640, 224]


def test_sound_comes_early():
    """Before the first chunk no stage has done more than what its window covers asks of it."""
    audio_lm = audiolm_of(codec=streaming_codec(), **WINDOWS)
    known = {}
    report = {"callback": lambda stage, *told: known.update({stage: told})}
    stream = audio_lm.stream(chunk_seconds=0.1, seconds=4.0, seeds=0, **report)
    chunk = next(stream)
    assert known == {"semantic": (8, 100), "coarse": (16, 200), "fine": (5, 200)}
    assert [len(wave) for wave in chunk.waves] == [5 * 16] and chunk.acoustic.shape == (1, 5, 4)
    assert chunk.semantic.shape == (1, 8)
    next(stream)
    assert known["semantic"] == (8, 100)


def test_chunks_of_next_to_nothing_are_frames():
    """What rounds to no sample at all is a frame, not a stream that never ends."""
    audio_lm = audiolm_of(codec=streaming_codec(), **WINDOWS)
    chunks = audio_lm.stream(chunk_seconds=1e-9, seconds=0.1, seeds=1)
    assert [next(chunks).acoustic.shape[1] for _ in range(5)] == [1] * 5 and not list(chunks)


def test_streams_and_calls_of_one_model_do_not_disturb_one_another():
    """Two streams taken in turns, a call between them: each is what it is alone."""
    audio_lm = audiolm_of(conditioned=True, codec=streaming_codec(), **WINDOWS)
    requests = [{"text": "one", "seeds": 1}, {"prime_wave": torch.rand(100), "seeds": 2}]
    streams = [audio_lm.stream(seconds=0.8, chunk_seconds=0.1, **request) for request in requests]
    chunks = [[], []]
    for pair in zip_longest(*streams):
        audio_lm.generate(seconds=0.1)
        for found, chunk in zip(chunks, pair):
            found += [] if chunk is None else [chunk]
    for found, request in zip(chunks, requests):
        whole = audio_lm.generate(seconds=0.8, **request)
        assert torch.equal(GeneratedAudio.concatenate(found).acoustic, whole.acoustic)


def test_a_prime_sounds_with_the_first_chunk():
    """Nobody waits for chunks of nothing: the prime and the first new sound come together."""
    audio_lm = audiolm_of(codec=streaming_codec(), **WINDOWS)
    chunks = check_stream(audio_lm, 0.1, prime_wave=torch.rand(480) * 0.9, seconds=1.0, seeds=1)
    assert chunks[0].acoustic.shape[1] == 35 and [chunk.acoustic.shape[1] for chunk in chunks[1:]] == [5, 5, 5]


def test_bad_requests_are_refused_before_the_first_chunk():
    """Not when somebody begins to listen."""
    audio_lm = audiolm_of(codec=streaming_codec())
    for wrong in ({"seconds": -1.0}, {"chunk_seconds": 0.0}, {"prime_wave": torch.rand(1600), "seconds": 1.0}):
        with pytest.raises(ValueError, match="positive|longer than the requested"):
            audio_lm.stream(**wrong)
    with pytest.raises(ValueError, match="FakeCodec does not decode streams: use generate"):
        audiolm_of().stream(seconds=1.0)


def test_who_stops_listening_leaves_no_bars_behind(monkeypatch):
    """Bars of an abandoned stream are closed."""
    closed = []
    monkeypatch.setattr(audiolm.ProgressBars, "close", lambda self: closed.append(1))
    stream = audiolm_of(codec=streaming_codec()).stream(seconds=1.0, chunk_seconds=0.1, progress=True)
    next(stream)
    assert not closed
    stream.close()
    assert closed


@pytest.mark.parametrize("codec", ["causal", "spectral"])
def test_long_results_are_decoded_in_parts_that_are_not_heard(codec, monkeypatch):
    """The wave of many frames, decoded some at a time, is that of decoding all at once; several items, two lengths."""
    audio_lm = audiolm_of(codec=streaming_codec(codec))
    tokens, lengths = torch.randint(0, 12, (3, 20)), torch.tensor([20, 7, 20])
    request = {"semantic_tokens": tokens, "semantic_lengths": lengths, "seeds": 1}
    whole = audio_lm.generate(**request)
    monkeypatch.setattr("audiolm_pytorch.codecs.convolutional._CHUNK_SAMPLES_CPU", 96)
    for found, wanted in zip(audio_lm.generate(**request).waves, whole.waves, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def small_pieces(monkeypatch):
    """The codec decodes five frames at a time, as a long one of real size does."""
    monkeypatch.setattr("audiolm_pytorch.codecs.convolutional._CHUNK_SAMPLES_CPU", 80)
    return audiolm_of(codec=streaming_codec(), depth=1, dim=8, dim_head=4, ff_mult=1.0, **WINDOWS)


def peak_of_stream(audio_lm, seconds):
    """Most bytes alive at once while somebody listens to a stream and keeps nothing."""
    with AliveTensors(list(audio_lm.parameters())) as alive:
        for _ in audio_lm.stream(chunk_seconds=0.16, seconds=seconds, seeds=0):
            pass
    return alive.peak_bytes


def test_memory_of_a_stream_does_not_grow(small_pieces, monkeypatch):
    """Twice as long, the same peak; stages that keep all tokens are noticed."""
    assert peak_of_stream(small_pieces, 0.96) <= peak_of_stream(small_pieces, 0.48)
    monkeypatch.setattr("audiolm_pytorch.generation.windows.ItemTokens.forget_before", lambda self, frame: None)
    assert peak_of_stream(small_pieces, 0.96) > peak_of_stream(small_pieces, 0.48)


def test_memory_at_one_go_grows_by_tokens_and_sound_alone(small_pieces):
    """A longer result takes no more than itself, of which parts stand twice while they are put together."""
    peaks, given_out = [], []
    for seconds in (0.64, 1.28):
        with AliveTensors(list(small_pieces.parameters())) as alive:
            made = small_pieces.generate(seconds=seconds, seeds=0)
        peaks.append(alive.peak_bytes)
        given_out.append(sum(part.nbytes for part in (*made.waves, made.semantic, made.acoustic)))
    assert peaks[1] - peaks[0] <= 2 * (given_out[1] - given_out[0])
