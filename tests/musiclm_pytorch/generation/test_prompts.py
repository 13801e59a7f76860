"""Mixtures, stories and negative texts: each against an oracle, offline and in streams."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe, write_audio
from audiolm_pytorch.generation.request import GeneratedAudio
from musiclm_pytorch.generation.prompts import Mixture, embed_prompts, stories_of
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.fakes import SAMPLE_HZ
from tests.helpers.tiny_mulan import tones
from tests.helpers.toy_musiclm import STAGES, musiclm_of

LOW, HIGH = "low tone", "a very high tone"
GUIDED = {"sampling": {name: {"guidance_scale": 3.0} for name in STAGES}}
REQUEST = {"num_samples": 2, "seconds": 0.5, "seed": 3}


def musiclm_of_texts(**changes: Any) -> MusicLM:
    """A MusicLM of random weights in which the texts of these tests have different codes."""
    model = musiclm_of(**changes)
    quantizer = model.mulan_embed_quantizer
    latents = quantizer.mulan.get_text_latents([LOW, HIGH, "something else", "a third", "noise"])
    with torch.no_grad():
        quantizer.codebooks[0, :5] = quantizer.centred(latents, "text")
    return model


@pytest.fixture(scope="module")
def musiclm() -> MusicLM:
    """Tests must not change it."""
    return musiclm_of_texts()


@pytest.fixture(scope="module")
def with_melody() -> MusicLM:
    """With stages that are also conditioned on a melody; tests must not change it."""
    return musiclm_of_texts(melody=True)


def codes_of(musiclm: MusicLM, prompt: Any) -> Tensor:
    """Codes of a text or mixture."""
    ((entry,),) = embed_prompts(stories_of([prompt]), musiclm.mulan_embed_quantizer, SAMPLE_HZ)
    return entry.codes


def tokens_of(musiclm: MusicLM, text: Any, seconds: float, **options: Any) -> GeneratedAudio:
    """Tokens of one candidate with seed 3."""
    request = musiclm._request([text], seconds, None, None, **options)
    return musiclm.audio_lm.generate(replace(request, seeds=[3]))


def test_a_mixture_with_weights_1_and_0_is_its_first_part(musiclm: MusicLM) -> None:
    """Texts, and a text and a recording; only the ratio of the weights matters."""
    wave, quantizer = torch.rand(SAMPLE_HZ) - 0.5, musiclm.mulan_embed_quantizer
    plain = musiclm(LOW, **REQUEST)
    for mixture in ([(LOW, 1.0), (HIGH, 0.0)], [(LOW, 2), (wave, 0)], [(LOW, 0.5), (LOW, 0.5)], [(LOW, 1)]):
        assert torch.equal(codes_of(musiclm, Mixture(mixture)), quantizer.codes(texts=LOW)[0])
        assert torch.equal(musiclm(Mixture(mixture), **REQUEST), plain)
    assert not torch.equal(musiclm(Mixture([(LOW, 0), (HIGH, 1)]), **REQUEST), plain)
    pairs = [Mixture([(LOW, 1), (HIGH, 2)]), Mixture([(LOW, 10), (HIGH, 20)])]
    assert torch.equal(codes_of(musiclm, pairs[0]), codes_of(musiclm, pairs[1]))


def test_a_recording_in_a_mixture_has_the_codes_of_its_audio(musiclm: MusicLM, tmp_path) -> None:
    """As a wave at the rate of the model, and as a file of another rate."""
    quantizer = musiclm.mulan_embed_quantizer
    wave = torch.rand(2 * quantizer.sample_hz) - 0.5
    write_audio(tmp_path / "x.wav", wave, quantizer.sample_hz)
    ((entry,),) = embed_prompts(stories_of([Mixture([(wave, 1), (LOW, 0)])]), quantizer, sample_hz=quantizer.sample_hz)
    assert torch.equal(entry.codes, quantizer.codes(wavs=wave[None])[0])
    torch.testing.assert_close(entry.latent, quantizer.mulan.get_long_audio_latents(wave[None])[0])
    ((of_file,),) = embed_prompts(stories_of([Mixture([(tmp_path / "x.wav", 1)])]), quantizer, SAMPLE_HZ)
    torch.testing.assert_close(of_file.latent, entry.latent, atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(2, 800), (2, 1, 800), (1, 2, 800)])
def test_a_recording_in_a_mixture_is_one_mono_wave(shape: tuple[int, ...]) -> None:
    """Of a batch or of several channels, only the first row would be used."""
    with pytest.raises(ValueError, match="the wave of part 1 must be .*mix"):
        Mixture([(LOW, 1), (torch.zeros(shape), 1)])
    Mixture([(torch.zeros(1, 1, 800), 1)])


def test_weights_move_a_mixture_from_one_part_to_the_other(musiclm: MusicLM) -> None:
    """The similarity to one text falls and that to the other rises with the weight; halfway, they are equal."""
    quantizer = musiclm.mulan_embed_quantizer
    mixtures = [Mixture([(LOW, 1 - weight / 8), (HIGH, weight / 8)]) for weight in range(9)]
    entries = embed_prompts(stories_of(mixtures), quantizer, SAMPLE_HZ)
    similarities = torch.stack([entry.latent for (entry,) in entries]) @ quantizer.mulan.get_text_latents([LOW, HIGH]).T
    assert (similarities.diff(dim=0)[:, 0] < 0).all() and (similarities.diff(dim=0)[:, 1] > 0).all()
    torch.testing.assert_close(similarities[4, 0], similarities[4, 1])


@torch.no_grad()
def test_every_code_of_a_mixture_is_the_code_of_a_part(musiclm: MusicLM) -> None:
    """The one that is nearest to what the levels before leave of the mixture; equals a naive loop."""
    quantizer = musiclm.mulan_embed_quantizer
    parts, books = quantizer.codes(texts=[LOW, HIGH]), quantizer.codebooks.float()
    vectors = quantizer.centred(quantizer.mulan.get_text_latents([LOW, HIGH]), "text")

    def vector_of(codes: Tensor) -> Tensor:
        return sum((book[code] for book, code in zip(books, codes)), torch.zeros(()))

    for weight in (0.1, 0.5, 0.8):
        codes = codes_of(musiclm, Mixture([(LOW, 1 - weight), (HIGH, weight)]))
        assert (codes == parts).any(dim=0).all()
        mean = (1 - weight) * vectors[0] + weight * vectors[1]
        mean = mean * ((1 - weight) * vectors[0].norm() + weight * vectors[1].norm()) / mean.norm()
        residual = mean
        for book, options, code in zip(books, parts.T, codes):
            distances = [float((residual - book[option]).norm()) for option in options]
            assert code == options[distances.index(min(distances))]
            residual = residual - book[code]
        torch.testing.assert_close(mean - residual, vector_of(codes))


def test_a_story_of_one_entry_is_the_plain_call(musiclm: MusicLM) -> None:
    """Also among other prompts in one batch, and in its scores."""
    plain = musiclm([LOW, HIGH], return_all=True, **REQUEST)
    story = musiclm([[(0, LOW)], HIGH], return_all=True, **REQUEST)
    assert torch.equal(plain.waves, story.waves) and torch.equal(plain.scores, story.scores)
    assert torch.equal(musiclm([(0, LOW)], **REQUEST), musiclm(LOW, **REQUEST))


@pytest.mark.parametrize("change", [0.2, *(pytest.param(at, marks=pytest.mark.slow) for at in (0.32, 0.5))])
def test_tokens_before_a_change_are_those_of_music_that_ends_there(musiclm: MusicLM, change: float) -> None:
    """Inside a window, at its end and in a later window; after the change, the tokens depend on the new text."""
    before, plain = tokens_of(musiclm, LOW, change), tokens_of(musiclm, LOW, 0.8)
    stories = [tokens_of(musiclm, [(0, LOW), (change, text)], 0.8) for text in (HIGH, "something else")]
    num_semantic, num_frames = before.semantic.shape[1], before.acoustic.shape[1]
    for story in stories:
        assert torch.equal(story.semantic[:, :num_semantic], before.semantic)
        assert torch.equal(story.acoustic[:, :num_frames], before.acoustic)
        assert story.acoustic.shape == plain.acoustic.shape
    assert not torch.equal(stories[0].acoustic[:, num_frames:], stories[1].acoustic[:, num_frames:])
    assert not torch.equal(stories[0].semantic, plain.semantic)


@pytest.mark.slow
def test_a_model_that_depends_on_the_text_alone_changes_exactly_at_the_change() -> None:
    """Without token embeddings and noise, a story consists of the music of its texts."""
    musiclm = musiclm_of_texts()
    stage = musiclm.audio_lm.semantic_transformer
    stage.embedding.weight.data.zero_()
    greedy = {"sampling": {"semantic": {"temperature": 0.0}}}
    low, high = (tokens_of(musiclm, text, 1.2, **greedy).semantic for text in (LOW, HIGH))
    assert (low != high).all()
    for change, tokens in ((0.16, 4), (0.4, 10), (0.8, 20)):
        story = tokens_of(musiclm, [(0, LOW), (change, HIGH), (1.0, LOW)], 1.2, **greedy).semantic
        assert torch.equal(story, torch.cat((low[:, :tokens], high[:, tokens:25], low[:, 25:]), dim=1))


@pytest.mark.slow
def test_stories_with_other_changes_do_not_change_each_other(musiclm: MusicLM) -> None:
    """A story among others equals the story alone, for all batch sizes."""
    prompts = [[(0, LOW), (0.2, HIGH)], LOW, [(0, HIGH), (0.1, LOW), (0.36, "a third")], Mixture([(LOW, 1), (HIGH, 1)])]
    alone = torch.cat([musiclm(prompt, **REQUEST) for prompt in prompts])
    for max_batch in (16, 3):
        torch.testing.assert_close(musiclm(prompts, max_batch=max_batch, **REQUEST), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_story_is_scored_part_by_part(musiclm: MusicLM) -> None:
    """Equals a naive loop over the parts, weighted by their durations."""
    waves, mulan = torch.rand(1, 2, 800) - 0.5, musiclm.mulan_embed_quantizer.mulan
    mulan_hz = mulan.sample_hz
    musiclm = musiclm_of_texts()
    musiclm.audio_lm.codec.target_sample_hz = mulan_hz
    scores = musiclm.scores([[(0, LOW), (200 / mulan_hz, HIGH)]], waves)
    texts = mulan.get_text_latents([LOW, HIGH])
    for candidate in range(2):
        parts = waves[0, candidate, :200], waves[0, candidate, 200:]
        similarities = [float(mulan.get_audio_latents(part[None])[0] @ text) for part, text in zip(parts, texts)]
        assert float(scores[0, candidate]) == pytest.approx(0.25 * similarities[0] + 0.75 * similarities[1], abs=1e-5)


def test_a_negative_text_replaces_the_unconditional_half_of_guidance(musiclm: MusicLM) -> None:
    """Away from the text itself, guidance has no effect; away from another text, the music changes."""
    unguided = {"sampling": {name: {"guidance_scale": 1.0} for name in STAGES}}
    plain, guided = musiclm(LOW, **REQUEST, **unguided), musiclm(LOW, **REQUEST, **GUIDED)
    assert torch.equal(musiclm(LOW, negative_text=LOW, **REQUEST, **GUIDED), plain)
    negative = musiclm(LOW, negative_text=HIGH, **REQUEST, **GUIDED)
    assert not torch.equal(negative, plain) and not torch.equal(negative, guided)
    both = musiclm([HIGH, LOW], negative_text=[LOW, HIGH], **REQUEST, **GUIDED)
    torch.testing.assert_close(both[1], negative[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="negative conditions need guidance, but its scale is 1"):
        musiclm(LOW, negative_text=HIGH, **REQUEST)


OPTIONS: dict[str, dict[str, Any]] = {
    "story": {"text": [(0, LOW), (0.4, Mixture([(HIGH, 1), (LOW, 1)]))]},
    "negative": {"negative_text": "noise", **GUIDED},
    "prompt": {"prime_wave": torch.linspace(-0.9, 0.9, 160)},
    "long": {"seconds": 1.1},
    "candidates": {"num_samples": 2},
    "seeds": {"seed": 9},
    "mixture": {"text": Mixture([(LOW, 1), (HIGH, 1)])},
    "melody": {"melody": tones(300, 500, 700, seconds=0.2).flatten(), "melody_sample_hz": 8000},
}
# Both are the text.
PAIRS = [names for names in combinations(OPTIONS, 2) if names != ("story", "mixture")]


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_options_combine_and_a_stream_equals_the_offline_music(with_melody: MusicLM, names: tuple[str, ...]) -> None:
    """All pairs of options; the stream is that of the selected seed."""
    musiclm = with_melody
    request = {"text": LOW, "seconds": 0.7, "seed": 3, "num_samples": 1}
    for name in names:
        request |= OPTIONS[name]
    chunks = list(musiclm.stream(**request, chunk_seconds=0.1, rank_seconds=0.3))
    assert len(chunks) > 2
    wave = torch.cat([chunk.wave for chunk in chunks], dim=-1)
    offline = musiclm(**{**request, "num_samples": 1, "seed": chunks[0].seeds[0]})
    torch.testing.assert_close(peak_safe(wave[0]), offline[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_memory_of_a_long_story_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the music with twice the changes needs as much."""
    monkeypatch.setattr("audiolm_pytorch.codecs.convolutional._CHUNK_SAMPLES_CPU", 80)
    musiclm = musiclm_of_texts(depth=1, dim=8, dim_head=4, ff_mult=1.0)

    def peak_of(num_parts: int) -> int:
        story = [(0.24 * part, (LOW, HIGH)[part % 2]) for part in range(num_parts)]
        # Texts are embedded before.
        chunks = musiclm.stream(story, seconds=0.24 * num_parts, num_samples=1, seed=0, chunk_seconds=0.16)
        with AliveTensors([*musiclm.parameters(), *musiclm.buffers()]) as alive:
            for _ in chunks:
                pass
        return alive.peak_bytes

    peak_of(8)
    assert peak_of(8) <= 1.01 * peak_of(4)


def test_wrong_prompts_are_one_line(musiclm: MusicLM) -> None:
    """The message has the value and the rule."""
    for message, prompt in {
        r"times of a story must start with 0 and increase, got \[1.0\]": [(1, LOW)],
        r"increase, got \[0.0, 2.0, 1.0\]": [(0, LOW), (2, HIGH), (1, LOW)],
        "text must be a number, got NaN": [(0, LOW), (float("nan"), HIGH)],
        "a story changes after 3 s, but the music ends after 0.5 s": [(0, LOW), (3, HIGH)],
        "got an empty list of texts": [],
        "empty": [(0, LOW), (0.1, " ")],
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            musiclm(prompt, **REQUEST)
        assert "\n" not in str(caught.value)
    for weights in ([-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="parts (need finite weights that are|must be a (finite )?number)"):
            Mixture([(LOW, weights[0]), (HIGH, weights[1])])
    with pytest.raises(ValueError, match="1 item per text|different numbers of items"):
        musiclm([LOW, HIGH], negative_text=[LOW, HIGH, LOW], **REQUEST, **GUIDED)
