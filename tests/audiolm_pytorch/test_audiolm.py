"""From nothing, a text or a wave to a wave: lengths, namespaces, primes, seeds, batches."""

from dataclasses import replace

import pytest
import torch

from audiolm_pytorch import audiolm
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.wrappers import StageWrapper
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.lm.stages import SemanticTransformer
from tests.helpers.fakes import (
    CONDITION,
    SAMPLE_HZ,
    SIZES,
    FakeCodec,
    FakeConditioner,
    FakeSemanticTokenizer,
    random_conditions,
    tiny_stages,
)
from tests.helpers.toy_audiolm import audiolm_of


def check_lengths(audio_lm):
    """Semantic, coarse and fine tokens and the wave span the same seconds, rounded up to whole frames."""
    for seconds, samples in ((0.02, 16), (0.33, 272), (1.0, 800), (1.001, 816)):
        found = audio_lm.generate(batch_size=2, seconds=seconds, seeds=0)
        assert found.wave.shape == (2, samples) and found.sample_hz == SAMPLE_HZ
        assert found.acoustic.shape == (2, samples // 16, 4)
        assert found.semantic.shape == (2, -(-samples // 32))
        assert found.acoustic.min() >= 0 and found.acoustic.max() < 16


def test_lengths_follow_the_seconds(monkeypatch):
    """Fault 4: no stage runs a fixed number of steps; putting 512 back is noticed."""
    audio_lm = audiolm_of()
    check_lengths(audio_lm)
    windowed = audiolm.SlidingWindowDecoder
    monkeypatch.setattr(audiolm, "SlidingWindowDecoder", lambda model, num_frames, **rest: windowed(model, 512, **rest))
    with pytest.raises(AssertionError):
        check_lengths(audio_lm)


def test_tokenizer_that_loses_frames_does_not_shorten_the_wave():
    """HuBERT gives 49 tokens a second: the coarse stage repeats the last, the wave has every frame."""
    found = audiolm_of(lost_frames=1).generate(seconds=1.0)
    assert found.semantic.shape == (1, 24) and found.wave.shape == (1, 800)


def check_namespaces(audio_lm):
    """Every stage reads embeddings of its own table, of the codes of its own item."""
    prefixes = {}
    for name, stage in audio_lm.stages.items():
        original = stage.transformer.condition_tensors

        def spied(conditioning, batch, name=name, original=original):
            prefixes[name] = conditioning.codes.embeddings
            return original(conditioning, batch)

        stage.transformer.condition_tensors = spied
    try:
        audio_lm(text=["one", "three"], seconds=0.1)
    finally:
        for stage in audio_lm.stages.values():
            del stage.transformer.condition_tensors
    for name, table in audio_lm.audio_conditioner.tables.items():
        codes = torch.tensor([[3, 0, 0], [5, 0, 0]]) + torch.tensor([0, 10, 20])
        assert torch.equal(prefixes[name], table(codes)), name


def test_every_stage_is_conditioned_through_its_own_namespace(monkeypatch):
    """Fault 1: at inference all stages received the semantic namespace; putting that back is noticed."""
    audio_lm = audiolm_of(conditioned=True)
    check_namespaces(audio_lm)
    assert audio_lm.audio_conditioner.asked == ["semantic", "coarse", "fine"]

    def condition(self, text, **nothing):
        return Conditions(codes=self.audio_conditioner.conditioning(texts=text, namespace="semantic"))

    monkeypatch.setattr(StageWrapper, "condition", condition)
    with pytest.raises(AssertionError):
        check_namespaces(audio_lm)


def test_finished_conditions_equal_those_of_the_conditioner():
    """A caller that holds the conditioner itself gets the same audio."""
    audio_lm = audiolm_of(conditioned=True)
    conditions = {
        name: Conditions(codes=audio_lm.audio_conditioner.conditioning(texts=["four", "seventy"], namespace=name))
        for name in audio_lm.stages
    }
    by_text = audio_lm(text=["four", "seventy"], seconds=0.3, seeds=1)
    assert torch.equal(by_text, audio_lm(conditioning=conditions, seconds=0.3, seeds=1))
    assert torch.equal(by_text[:1], audio_lm(text="four", seconds=0.3, seeds=1))
    assert not torch.equal(by_text, audio_lm(seconds=0.3, seeds=1, batch_size=2))


@pytest.mark.parametrize("input_hz", [SAMPLE_HZ, 1600])
def test_prime_is_continued_in_every_kind_of_token(input_hz):
    """Semantic and acoustic tokens of the prime, all levels, stand at the beginning; the seconds count it in."""
    audio_lm = audiolm_of()
    prime = torch.rand(2, input_hz // 2 + 6) * 0.9
    own = resample(prime, input_hz, SAMPLE_HZ)
    found = audio_lm.generate(prime_wave=prime, prime_wave_input_sample_hz=input_hz, seconds=1.0, seeds=[1, 2])
    assert found.wave.shape == (2, 800)
    assert torch.equal(found.acoustic[:, :25], audio_lm.codec.tokenize(own)[:, :25])
    assert torch.equal(found.semantic[:, :12], audio_lm.wav2vec(own)[:, :12])
    free = audio_lm.generate(seconds=1.0, seeds=[1, 2])
    assert not torch.equal(found.acoustic[:, 25:], free.acoustic[:, 25:])


def test_primes_of_unequal_length_are_continued_as_if_alone():
    """The padding of a short prime is neither heard nor continued."""
    audio_lm = audiolm_of()
    primes = torch.rand(2, 480) * 0.9
    together = audio_lm.generate(prime_wave=primes, prime_lengths=torch.tensor([480, 160]), seconds=1.0, seeds=[1, 2])
    alone = audio_lm.generate(prime_wave=primes[1, :160], seconds=1.0, seeds=[2])
    assert torch.equal(together.acoustic[1], alone.acoustic[0])
    assert torch.equal(together.acoustic[0, :30], audio_lm.codec.tokenize(primes[:1])[0])


def test_default_length_is_five_seconds_beyond_the_prime():
    """Whoever asks for nothing gets five seconds, or five more."""
    audio_lm = audiolm_of()
    whole = {"allow_eos": False, "sampling": {name: {"temperature": 0} for name in audio_lm.stages}}
    assert audio_lm(batch_size=1, **whole).shape == (1, 4000)
    assert audio_lm(prime_wave=torch.rand(800), prime_wave_input_sample_hz=SAMPLE_HZ, **whole).shape == (1, 4800)
    with pytest.raises(ValueError, match="longer than the requested"):
        audio_lm(prime_wave=torch.rand(1600), seconds=1.0)


def test_an_item_depends_on_its_seed_alone():
    """Alone, in a batch, in another order: the same audio; None draws from torch's generator."""
    audio_lm = audiolm_of()
    batch = audio_lm(seconds=0.4, seeds=[7, 8, 9])
    assert torch.equal(batch, audio_lm(seconds=0.4, seeds=7, batch_size=3))
    assert torch.equal(batch[1:2], audio_lm(seconds=0.4, seeds=[8]))
    assert not torch.equal(batch[0], batch[1])
    torch.manual_seed(3)
    first = audio_lm(seconds=0.2)
    torch.manual_seed(3)
    assert torch.equal(first, audio_lm(seconds=0.2)) and not torch.equal(first, audio_lm(seconds=0.2))


def check_candidates_are_one_batch(audio_lm):
    """Sixteen candidates take as many calls of the models as one."""
    calls = []
    hidden = SemanticTransformer.hidden

    def counted(self, *args, **kwargs):
        calls.append(len(args[0]))
        return hidden(self, *args, **kwargs)

    SemanticTransformer.hidden = counted
    try:
        audio_lm(batch_size=1, seconds=0.2)
        alone = len(calls)
        audio_lm(batch_size=16, seconds=0.2)
    finally:
        del SemanticTransformer.hidden
    assert len(calls) == 2 * alone and set(calls[alone:]) == {16}


def test_candidates_are_sampled_as_one_batch(monkeypatch):
    """Fault 6: candidates one after another are noticed."""
    audio_lm = audiolm_of()
    check_candidates_are_one_batch(audio_lm)
    forward = AudioLM.forward
    monkeypatch.setattr(
        AudioLM,
        "forward",
        lambda self, batch_size, **request: torch.cat([forward(self, **request) for _ in range(batch_size)]),
    )
    with pytest.raises(AssertionError):
        check_candidates_are_one_batch(audio_lm)


def test_more_than_was_trained_on_is_generated_in_windows():
    """Stages trained on half a second give two; no model ever reads more rows than in training."""
    audio_lm = audiolm_of(max_seconds=0.5)
    slots = []
    for stage in audio_lm.stages.values():
        original = stage.transformer.new_cache
        stage.transformer.new_cache = lambda batch, n, original=original: slots.append(n) or original(batch, n)
    found = audio_lm.generate(seconds=2.0, seeds=0)
    assert found.wave.shape == (1, 1600) and found.acoustic.min() >= 0
    assert max(slots) <= 25 + 2


def test_sampling_is_set_by_stage_and_reaches_it():
    """Greedy stages need no seed; unknown stages are refused."""
    audio_lm = audiolm_of()
    greedy = {name: {"temperature": 0} for name in audio_lm.stages}
    assert torch.equal(
        audio_lm(seconds=0.3, sampling=greedy, seeds=[1]), audio_lm(seconds=0.3, sampling=greedy, seeds=[2])
    )
    audio_lm.sampling = {name: SamplingSettings(temperature=0) for name in audio_lm.stages}
    assert torch.equal(audio_lm(seconds=0.3, seeds=[1]), audio_lm(seconds=0.3, sampling=greedy, seeds=[2]))
    with pytest.raises(ValueError, match="by stage"):
        audio_lm(sampling={"midfine": {}})


def test_without_a_fine_stage_coarse_levels_are_decoded():
    """AudioLM's piano model dropped the third stage."""
    stages = tiny_stages()
    audio_lm = AudioLM(
        wav2vec=FakeSemanticTokenizer(),
        codec=FakeCodec(),
        semantic_transformer=stages["semantic"],
        coarse_transformer=stages["coarse"],
    )
    assert audio_lm.generate(seconds=0.2).acoustic.shape == (1, 10, 2)


def test_parts_that_do_not_fit_are_refused():
    """Vocabularies, levels and sizes of batches are checked before anything is generated."""
    stages = {f"{name}_transformer": stage for name, stage in tiny_stages().items()}
    parts = {"wav2vec": FakeSemanticTokenizer(), "codec": FakeCodec()}
    with pytest.raises(ValueError, match="its tokenizer 12"):
        AudioLM(**parts, **{**stages, "semantic_transformer": SemanticTransformer(num_semantic_tokens=9, **SIZES)})
    small = FakeCodec()
    small.num_quantizers = 3
    with pytest.raises(ValueError, match="the codec has 3"):
        AudioLM(**{**parts, "codec": small}, **stages)
    with pytest.raises(ValueError, match="numbers of items"):
        AudioLM(**parts, **stages)(batch_size=3, seeds=[1, 2])
    with pytest.raises(ValueError, match="needs an audio_conditioner"):
        AudioLM(**parts, **stages)(text="anything")


@pytest.mark.parametrize("name", ["semantic", "coarse", "fine"])
def test_wrapper_learns_from_waves_and_from_tokens(name):
    """A wave and its tokens give the same loss; a conditioned stage hears the wave itself."""
    audio_lm = audiolm_of(conditioned=True)
    stage = audio_lm.stages[name].eval()
    wave = torch.rand(2, 320) * 0.9
    tokens = AudioTokens({"semantic": audio_lm.wav2vec(wave), "acoustic": audio_lm.codec.tokenize(wave)}, {})
    by_wave = stage(wave)
    by_tokens = stage(tokens=tokens, conditioning=stage.condition(wavs=wave))
    assert by_wave.loss.item() == pytest.approx(by_tokens.loss.item(), abs=1e-6)
    by_wave.loss.backward()
    assert audio_lm.audio_conditioner.table(name).weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="either a wave or tokens"):
        stage()


def test_a_call_changes_single_fields_of_sampling():
    """Another temperature does not silently turn the guidance off that a model is shipped with."""
    audio_lm = audiolm_of(conditioned=True)
    audio_lm.sampling = {name: SamplingSettings(temperature=0.9, guidance_scale=2.0) for name in audio_lm.stages}
    whole = {name: SamplingSettings(temperature=0.5, guidance_scale=2.0) for name in audio_lm.stages}
    fields = {name: {"temperature": 0.5} for name in audio_lm.stages}
    request = {"text": ["four", "seventy"], "seconds": 0.3, "seeds": 1}
    assert torch.equal(audio_lm(**request, sampling=fields), audio_lm(**request, sampling=whole))


def test_guidance_of_the_model_rests_without_a_condition():
    """A model that is guided by default still continues a wave and plays without a text."""
    audio_lm = audiolm_of(conditioned=True)
    plain = audio_lm(seconds=0.3, seeds=1)
    audio_lm.sampling = {name: replace(settings, guidance_scale=3.0) for name, settings in audio_lm.sampling.items()}
    assert torch.equal(audio_lm(seconds=0.3, seeds=1), plain)
    assert audio_lm(prime_wave=torch.rand(160), seconds=0.3, seeds=1).shape == plain.shape
    with pytest.raises(ValueError, match="needs a conditioning"):
        audio_lm(seconds=0.3, sampling={"coarse": {"guidance_scale": 3.0}})


def test_stages_without_a_condition_leave_it_to_the_others():
    """A text reaches the stages that take one; a condition for a stage that does not exist is refused."""
    conditioned, plain = tiny_stages(**CONDITION), tiny_stages()
    audio_lm = AudioLM(
        wav2vec=FakeSemanticTokenizer(),
        codec=FakeCodec(),
        semantic_transformer=conditioned["semantic"],
        coarse_transformer=plain["coarse"],
        fine_transformer=plain["fine"],
        audio_conditioner=FakeConditioner(),
    )
    assert audio_lm(text=["one", "three"], seconds=0.2).shape == (2, 160)
    assert audio_lm.audio_conditioner.asked == ["semantic"]
    with pytest.raises(ValueError, match=r"conditioning is by stage, of \['semantic', 'coarse', 'fine'\]; got"):
        audio_lm(conditioning={"semantics": random_conditions(1)}, seconds=0.2)
