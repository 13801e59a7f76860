"""MusicLM.stream: equals the offline music of the selected seed, ranks first parts, needs bounded memory."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe
from musiclm_pytorch.generation.candidates import MusicChunk
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.fakes import SAMPLE_HZ
from tests.helpers.toy_audiolm import audiolm_of
from tests.helpers.toy_musiclm import musiclm_of

TEXTS = ["low tone", "a very high tone"]


def joined(chunks: list[MusicChunk]) -> list[Tensor]:
    """The whole wave of every text."""
    return [torch.cat(waves, dim=-1) for waves in zip(*(chunk.waves for chunk in chunks))]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["causal", "spectral"])
def test_a_stream_equals_the_offline_music_of_the_selected_seeds(codec: str) -> None:
    """With several texts, audio prompts of unequal length, and one or several candidates."""
    musiclm = musiclm_of(codec)
    primes = [torch.rand(160) * 0.9, torch.rand(410) * 0.9]
    for num_samples, prime_wave in ((3, None), (3, primes), (1, primes), (1, None)):
        request = {"num_samples": num_samples, "seconds": 1.3, "prime_wave": prime_wave, "seed": 5}
        chunks = list(musiclm.stream(TEXTS, rank_seconds=0.3, chunk_seconds=0.1, **request))
        assert len(chunks) > 4 and len({chunk.seeds for chunk in chunks}) == 1
        assert (chunks[0].scores is None) == (num_samples == 1)
        for item, (text, wave) in enumerate(zip(TEXTS, joined(chunks))):
            seed = chunks[0].seeds[item]
            assert seed in range(5, 5 + num_samples)
            prime = None if prime_wave is None else prime_wave[item]
            offline = musiclm(text, num_samples=1, seconds=1.3, seeds=[seed], prime_wave=prime)
            torch.testing.assert_close(peak_safe(wave), offline[0], atol=1e-5, rtol=1e-5)
    assert chunks[1].wave.shape == (2, 80)


def test_only_the_best_first_part_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first parts have the requested length after the prompt; a part with NaN is ranked last."""
    musiclm, scored, batches = musiclm_of(), [], []
    fixed = [torch.tensor([[0.1, torch.nan, 0.3, 0.2]]), torch.tensor([[0.4, 0.1, 0.1, 0.2]])]
    stream = type(musiclm.audio_lm).stream

    def scores(self: MusicLM, prompts: list[str], waves: Tensor) -> Tensor:
        scored.append((prompts, tuple(waves.shape), waves.abs().max().item()))
        return fixed[len(scored) - 1]

    def recorded(self: Any, request: Any, **options: Any) -> Any:
        batches.append((request.batch_size, list(request.seeds)))
        return stream(self, request, **options)

    monkeypatch.setattr(MusicLM, "scores", scores)
    monkeypatch.setattr(type(musiclm.audio_lm), "stream", recorded)
    primes = [torch.rand(80), torch.rand(320)]
    chunks = musiclm.stream(TEXTS, seeds=[7, 3, 9, 4], num_samples=4, seconds=1.0, rank_seconds=0.2, prime_wave=primes)
    first = next(chunks)
    assert [(texts, shape) for texts, shape, _ in scored] == [([TEXTS[0]], (1, 4, 240)), ([TEXTS[1]], (1, 4, 480))]
    assert all(peak <= 0.99 for *_, peak in scored)
    assert first.seeds == (9, 7) and torch.equal(first.scores.nan_to_num(-2), torch.cat(fixed).nan_to_num(-2))
    assert [wave.shape[-1] for wave in first.waves] == [240, 480] and first.sample_hz == SAMPLE_HZ
    assert batches == [(4, [7, 3, 9, 4])] * 2 + [(2, [9, 7])]
    rest = list(chunks)
    assert [len(wave) for wave in joined([first, *rest])] == [800, 800] and len(batches) == 3


def test_a_first_part_of_the_whole_length_is_the_whole_music(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rank_seconds` and `chunk_seconds` can be longer than the music, which is then generated only once."""
    musiclm, streams = musiclm_of(), []
    stream = type(musiclm.audio_lm).stream
    monkeypatch.setattr(
        type(musiclm.audio_lm), "stream", lambda self, *rest, **named: streams.append(1) or stream(self, *rest, **named)
    )
    request = {"num_samples": 4, "seconds": 0.3, "seed": 1}
    chunks = list(musiclm.stream(TEXTS[0], rank_seconds=9.0, chunk_seconds=float("inf"), **request))
    assert len(chunks) == len(streams) == 1 and chunks[0].wave.shape == (1, 240)
    best = musiclm(TEXTS[0], **request)
    torch.testing.assert_close(peak_safe(chunks[0].wave), best, atol=1e-5, rtol=1e-5)


def peak_of(musiclm: MusicLM, seconds: float) -> int:
    """Largest memory in bytes while a stream is read and its chunks are dropped."""
    with AliveTensors([*musiclm.parameters(), *musiclm.buffers()]) as alive:
        lengths = {"seconds": seconds, "chunk_seconds": 0.16, "rank_seconds": 0.16}
        for _ in musiclm.stream(TEXTS[0], num_samples=4, seed=0, **lengths):
            pass
    return alive.peak_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the music needs as much; caches of candidates that are not selected are freed after the ranking."""
    monkeypatch.setattr("audiolm_pytorch.codecs.convolutional._CHUNK_SAMPLES_CPU", 80)
    musiclm = musiclm_of(depth=1, dim=8, dim_head=4, ff_mult=1.0)
    peak_of(musiclm, 0.96)  # fills the caches of layouts
    assert peak_of(musiclm, 0.96) <= peak_of(musiclm, 0.48)


def test_modules_keep_their_mode_between_chunks() -> None:
    """A model in training mode generates in eval mode."""
    musiclm = musiclm_of()
    request = {"num_samples": 2, "seconds": 0.4, "rank_seconds": 0.1, "chunk_seconds": 0.1, "seed": 1}
    wanted = joined(list(musiclm.stream(TEXTS[0], **request)))
    musiclm.audio_lm.train()
    chunks = []
    for chunk in musiclm.stream(TEXTS[0], **request):
        assert musiclm.audio_lm.training and musiclm.audio_lm.codec.training
        chunks.append(chunk)
    assert torch.equal(joined(chunks)[0], wanted[0])


def test_invalid_arguments_raise_errors_before_the_first_chunk() -> None:
    """The errors of `forward`, and those of the arguments that only `stream` has."""
    musiclm = musiclm_of()
    for message, wrong in {
        "seconds must be positive and finite, got 0": {"seconds": 0},
        "chunk_seconds must be positive and finite, got 0.0": {"chunk_seconds": 0.0},
        "rank_seconds must be a number, got NaN": {"rank_seconds": float("nan")},
        "num_samples must be at least 1": {"num_samples": 0},
        "one per candidate; got seed None and 2 seeds": {"seeds": [1, 2]},
        "num_levels must be in 1..2, got 3": {"num_levels": 3},
        "longer than the requested": {"prime_wave": torch.rand(1600), "seconds": 1.0},
        "1 item per text .1.; got 2 items": {"prime_wave": torch.rand(2, 160)},
    }.items():
        with pytest.raises(ValueError, match=message):
            musiclm.stream("low tone", **wrong)
    with pytest.raises(ValueError, match="empty"):
        musiclm.stream(" ")
    musiclm.audio_lm.codec = audiolm_of().codec
    for num_samples in (1, 4):
        with pytest.raises(ValueError, match="FakeCodec has no decoder_stream"):
            musiclm.stream("low tone", num_samples=num_samples)


class Cancelled(Exception):
    """Raised by a callback."""


def test_a_callback_reports_all_stages_and_can_end_a_stream() -> None:
    """The error of a callback arrives at the caller, and the model can be used again."""
    musiclm, reports, limit = musiclm_of(), [], [10]
    request = {"num_samples": 2, "seconds": 0.4, "rank_seconds": 0.1, "chunk_seconds": 0.1, "seed": 1}
    wanted = joined(list(musiclm.stream(TEXTS[0], **request)))

    def report(stage: str, known_frames: int, requested_frames: int) -> None:
        reports.append((stage, known_frames, requested_frames))
        if len(reports) > limit[0]:
            raise Cancelled

    musiclm.train()
    with pytest.raises(Cancelled):
        list(musiclm.stream(TEXTS[0], **request, callback=report))
    assert len(reports) == 11 and musiclm.training
    limit[0] = 10**6
    assert torch.equal(joined(list(musiclm.stream(TEXTS[0], **request, callback=report)))[0], wanted[0])
    assert {stage for stage, *_ in reports} == {"semantic", "coarse", "fine"}
    assert max(known / requested for _, known, requested in reports) == 1


def test_without_a_seed_torch_draws_one() -> None:
    """Every stream has another seed, and torch.manual_seed repeats it."""
    musiclm, seeds = musiclm_of(), []
    for seed in (3, None, 3):
        if seed is not None:
            torch.manual_seed(seed)
        seeds.append(next(musiclm.stream(TEXTS[0], num_samples=1, seconds=0.1)).seeds)
    assert seeds[0] == seeds[2] and all(a != b for a, b in pairwise(seeds))
