"""AudioLM.stream: chunks equal the result of `generate`, start early and need little memory."""

import random
from itertools import zip_longest

import pytest
import torch

from audiolm_pytorch import audiolm
from audiolm_pytorch.generation.request import GeneratedAudio, GenerationRequest
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.fakes import SAMPLE_HZ
from tests.helpers.toy_audiolm import audiolm_of, streaming_codec

WINDOWS = {"max_seconds": 0.32}  # 8 semantic tokens, 16 acoustic frames


def check_stream(audio_lm, chunk_seconds, **request):
    """Return the chunks of a stream, and check that they concatenate to the result of `generate`."""
    whole = audio_lm.generate(GenerationRequest(**request))
    chunks = list(audio_lm.stream(GenerationRequest(**request), chunk_seconds=chunk_seconds))
    joined = GeneratedAudio.concatenate(chunks)
    assert torch.equal(joined.semantic, whole.semantic) and torch.equal(joined.acoustic, whole.acoustic)
    assert torch.equal(joined.semantic_lengths, whole.semantic_lengths)
    assert torch.equal(joined.acoustic_lengths, whole.acoustic_lengths)
    assert joined.sample_hz == whole.sample_hz == SAMPLE_HZ
    for result, expected in zip(joined.waves, whole.waves, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert all(any(wave.numel() for wave in chunk.waves) for chunk in chunks[:-1])
    return chunks


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["causal", "spectral"])
@pytest.mark.parametrize("pattern", ["windows", "no windows"])
def test_a_stream_equals_generate(codec, pattern):
    """Random seeds, batches, prompts, texts and lengths; codecs with and without look-ahead."""
    rng = random.Random(3)
    # A tokenizer can drop a frame at the end, like HuBERT.
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


@pytest.mark.slow
@pytest.mark.parametrize("fine", [True, False])
def test_items_stream_to_their_own_end(fine):
    """Items end at different times, some in the first window, and the others continue."""
    audio_lm = audiolm_of(codec=streaming_codec("spectral"), ends=True, **WINDOWS)
    result = set()
    for seed in (0, 4, 8):
        chunks = check_stream(audio_lm, 0.1, batch_size=3, seeds=seed, coarse_only=not fine)
        result |= {int(length) for length in GeneratedAudio.concatenate(chunks).acoustic_lengths}
    assert len(result) > 4 and min(result) < 16 < max(result)


@pytest.mark.slow
def test_streams_of_several_channels_and_of_semantic_tokens():
    """Chunks are `[c, n_i]`; the semantic tokens of the request have unequal lengths."""
    audio_lm = audiolm_of(codec=streaming_codec(audio_channels=2), **WINDOWS)
    tokens, lengths = torch.randint(0, 12, (2, 20)), torch.tensor([20, 7])
    chunks = check_stream(audio_lm, 0.1, semantic_tokens=tokens, semantic_lengths=lengths, seeds=1)
    assert chunks[0].waves[0].ndim == 2 and len(chunks[0].waves[0]) == 2
    assert [wave.shape[-1] for wave in GeneratedAudio.concatenate(chunks).waves] == [640, 224]


def test_a_stream_leaves_inference_mode():
    """A stream that is created in inference mode can be read outside of it, also if items end."""
    audio_lm = audiolm_of(codec=streaming_codec(), ends=True, **WINDOWS)
    request = GenerationRequest(batch_size=2, seeds=1)
    with torch.inference_mode():
        stream = audio_lm.stream(request, chunk_seconds=0.1)
        chunks = [next(stream)]
    joined = GeneratedAudio.concatenate([*chunks, *stream])
    assert torch.equal(joined.acoustic, audio_lm.generate(request).acoustic)


def test_the_first_chunk_needs_only_its_own_windows():
    """Before the first chunk no stage decodes more than the window of the next stage needs."""
    audio_lm = audiolm_of(codec=streaming_codec(), **WINDOWS)
    known = {}
    report = {"callback": lambda stage, *reports: known.update({stage: reports})}
    stream = audio_lm.stream(GenerationRequest(seconds=4.0, seeds=0, **report), chunk_seconds=0.1)
    chunk = next(stream)
    assert known == {"semantic": (8, 100), "coarse": (16, 200), "fine": (5, 200)}
    assert [len(wave) for wave in chunk.waves] == [5 * 16] and chunk.acoustic.shape == (1, 5, 4)
    assert chunk.semantic.shape == (1, 8)
    next(stream)
    assert known["semantic"] == (8, 100)


def test_tiny_chunks_have_one_frame():
    """A chunk that rounds to no sample has one frame, so the stream ends."""
    audio_lm = audiolm_of(codec=streaming_codec(), **WINDOWS)
    chunks = audio_lm.stream(GenerationRequest(seconds=0.1, seeds=1), chunk_seconds=1e-9)
    assert [next(chunks).acoustic.shape[1] for _ in range(5)] == [1] * 5 and not list(chunks)


@pytest.mark.slow
def test_streams_and_calls_of_one_model_are_independent():
    """Two streams alternate, with a call between their chunks."""
    audio_lm = audiolm_of(conditioned=True, codec=streaming_codec(), **WINDOWS)
    requests = [{"text": "one", "seeds": 1}, {"prime_wave": torch.rand(100), "seeds": 2}]
    streams = [audio_lm.stream(GenerationRequest(seconds=0.8, **request), chunk_seconds=0.1) for request in requests]
    chunks = [[], []]
    for pair in zip_longest(*streams):
        audio_lm.generate(GenerationRequest(seconds=0.1))
        for result, chunk in zip(chunks, pair):
            result += [] if chunk is None else [chunk]
    for result, request in zip(chunks, requests):
        whole = audio_lm.generate(GenerationRequest(seconds=0.8, **request))
        assert torch.equal(GeneratedAudio.concatenate(result).acoustic, whole.acoustic)


@pytest.mark.slow
def test_the_first_chunk_contains_the_prompt():
    """The prompt and the first new audio are one chunk."""
    audio_lm = audiolm_of(codec=streaming_codec(), **WINDOWS)
    chunks = check_stream(audio_lm, 0.1, prime_wave=torch.rand(480) * 0.9, seconds=1.0, seeds=1)
    assert chunks[0].acoustic.shape[1] == 35 and [chunk.acoustic.shape[1] for chunk in chunks[1:]] == [5, 5, 5]


def test_errors_are_raised_before_the_first_chunk():
    """Errors of the request appear in the call of `stream`."""
    audio_lm = audiolm_of(codec=streaming_codec())
    for wrong in ({"chunk_seconds": 0.0}, {"prime_wave": torch.rand(1600), "seconds": 1.0}):
        chunk = {"chunk_seconds": wrong.pop("chunk_seconds", 1.0)}
        with pytest.raises(ValueError, match="positive|longer than the requested"):
            audio_lm.stream(GenerationRequest(**wrong), **chunk)
    with pytest.raises(ValueError, match="FakeCodec has no decoder_stream; call generate"):
        audiolm_of().stream(GenerationRequest(seconds=1.0))


def test_closing_a_stream_closes_its_progress_bars(monkeypatch):
    """Also if the stream is not at its end."""
    closed = []
    monkeypatch.setattr(audiolm.ProgressBars, "close", lambda self: closed.append(1))
    stream = audiolm_of(codec=streaming_codec()).stream(
        GenerationRequest(seconds=1.0, progress=True), chunk_seconds=0.1
    )
    next(stream)
    assert not closed
    stream.close()
    assert closed


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["causal", "spectral"])
def test_chunked_codec_decoding_does_not_change_the_wave(codec, monkeypatch):
    """A codec that decodes few frames at a time returns the same waves, for several items of two lengths."""
    audio_lm = audiolm_of(codec=streaming_codec(codec))
    tokens, lengths = torch.randint(0, 12, (3, 20)), torch.tensor([20, 7, 20])
    request = {"semantic_tokens": tokens, "semantic_lengths": lengths, "seeds": 1}
    whole = audio_lm.generate(GenerationRequest(**request))
    monkeypatch.setattr("audiolm_pytorch.codecs.convolutional._CHUNK_SAMPLES_CPU", 96)
    for result, expected in zip(audio_lm.generate(GenerationRequest(**request)).waves, whole.waves, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def small_chunks(monkeypatch):
    """An AudioLM whose codec decodes five frames at a time."""
    monkeypatch.setattr("audiolm_pytorch.codecs.convolutional._CHUNK_SAMPLES_CPU", 80)
    return audiolm_of(codec=streaming_codec(), depth=1, dim=8, dim_head=4, ff_mult=1.0, **WINDOWS)


def peak_of_stream(audio_lm, seconds):
    """Largest memory in bytes while a stream is read and its chunks are dropped.

    The first chunk does not count, because preparing the weights for decoding needs more memory than short streams.
    """
    with AliveTensors(list(audio_lm.parameters())) as alive:
        for number, _ in enumerate(audio_lm.stream(GenerationRequest(seconds=seconds, seeds=0), chunk_seconds=0.16)):
            alive.peak_bytes = 0 if number == 0 else alive.peak_bytes
    return alive.peak_bytes


@pytest.mark.slow
def test_memory_of_a_stream_does_not_grow(small_chunks, monkeypatch):
    """A stream of twice the length has the same peak; stages that keep all tokens fail the check."""
    peak_of_stream(small_chunks, 1.28)  # fills the caches of layouts
    assert peak_of_stream(small_chunks, 1.28) <= peak_of_stream(small_chunks, 0.64)
    monkeypatch.setattr("audiolm_pytorch.generation.windows.GrowingTokens.drop_before", lambda self, frames: None)
    assert peak_of_stream(small_chunks, 1.28) > peak_of_stream(small_chunks, 0.64)


@pytest.mark.slow
def test_memory_of_generate_grows_by_tokens_and_waves_alone(small_chunks):
    """Parts of the result exist twice while they are concatenated."""
    peaks, given_out = [], []
    for seconds in (0.64, 1.28):
        with AliveTensors(list(small_chunks.parameters())) as alive:
            audio = small_chunks.generate(GenerationRequest(seconds=seconds, seeds=0))
        peaks.append(alive.peak_bytes)
        given_out.append(sum(part.nbytes for part in (*audio.waves, audio.semantic, audio.acoustic)))
    assert peaks[1] - peaks[0] <= 2 * (given_out[1] - given_out[0])
