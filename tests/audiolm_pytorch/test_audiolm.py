"""AudioLM without inputs, with texts and with waves: lengths, namespaces, prompts, seeds and batches."""

from dataclasses import replace

import pytest
import torch

from audiolm_pytorch import audiolm
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from tests.helpers import fakes
from tests.helpers.toy_audiolm import audiolm_of, wrapped_stages

pytestmark = pytest.mark.usefixtures("low_rates")


def check_lengths(audio_lm):
    """Semantic, coarse and fine tokens and the wave last the same seconds, rounded up to whole frames."""
    for seconds, samples in ((0.02, 16), (0.33, 272), (1.0, 800), (1.001, 816)):
        result = audio_lm.generate(GenerationRequest(batch_size=2, seconds=seconds, seeds=0))
        assert result.wave.shape == (2, samples) and result.sample_hz == fakes.SAMPLE_HZ
        assert result.acoustic.shape == (2, samples // 16, 4)
        assert result.semantic.shape == (2, -(-samples // 32))
        assert result.acoustic.min() >= 0 and result.acoustic.max() < 16


@pytest.mark.slow
def test_lengths_follow_the_seconds(monkeypatch):
    """Fault 4: no stage has a fixed number of steps; 512 steps for all stages fail the check."""
    audio_lm = audiolm_of()
    check_lengths(audio_lm)

    class FixedLength(audiolm.SlidingWindowDecoder):
        def __init__(self, model, num_frames, **rest):
            super().__init__(model, 512, **rest)

    monkeypatch.setattr(audiolm, "SlidingWindowDecoder", FixedLength)
    with pytest.raises(AssertionError):
        check_lengths(audio_lm)


def test_tokenizer_that_drops_frames_does_not_shorten_the_wave():
    """HuBERT returns 49 tokens per second: the coarse stage repeats the last token, and the wave has all frames."""
    result = audiolm_of(lost_frames=1).generate(GenerationRequest(seconds=1.0))
    assert result.semantic.shape == (1, 24) and result.wave.shape == (1, 800)


def check_namespaces(audio_lm):
    """Every stage receives embeddings of its resampled table, for the codes of its resampled item."""
    prefixes = {}
    for name, stage in audio_lm.stages.items():
        original = stage.fuse

        def spied(conditioning, batch, name=name, original=original):
            prefixes[name] = conditioning["codes"].embeddings
            return original(conditioning, batch)

        stage.fuse = spied
    try:
        audio_lm(text=["one", "three"], seconds=0.1)
    finally:
        for stage in audio_lm.stages.values():
            del stage.fuse
    for name, table in audio_lm.audio_conditioner.tables.items():
        codes = torch.tensor([[3, 0, 0], [5, 0, 0]]) + torch.tensor([0, 10, 20])
        assert torch.equal(prefixes[name], table(codes)), name


def test_every_stage_is_conditioned_through_its_own_namespace(monkeypatch):
    """Fault 1: at inference all stages received the semantic namespace. The check fails for this fault."""
    audio_lm = audiolm_of(conditioned=True)
    check_namespaces(audio_lm)
    assert audio_lm.audio_conditioner.asked == ["semantic", "coarse", "fine"]

    def stage_conditions(stage, audio_conditioner, text_conditioner, *, text, **nothing):
        return {"codes": audio_conditioner.conditioning(texts=text, namespace="semantic")}

    monkeypatch.setattr("audiolm_pytorch.generation.inputs.stage_conditions", stage_conditions)
    with pytest.raises(AssertionError):
        check_namespaces(audio_lm)


def test_conditions_of_the_caller_equal_those_of_the_conditioner():
    """Conditions that the caller computes give the same audio."""
    audio_lm = audiolm_of(conditioned=True)
    conditions = {
        name: {"codes": audio_lm.audio_conditioner.conditioning(texts=["four", "seventy"], namespace=name)}
        for name in audio_lm.stages
    }
    by_text = audio_lm(text=["four", "seventy"], seconds=0.3, seeds=1)
    assert torch.equal(by_text, audio_lm(conditioning=conditions, seconds=0.3, seeds=1))
    assert torch.equal(by_text[:1], audio_lm(text="four", seconds=0.3, seeds=1))
    assert not torch.equal(by_text, audio_lm(seconds=0.3, seeds=1, batch_size=2))


@pytest.mark.parametrize("input_hz", [fakes.SAMPLE_HZ, 1600])
def test_a_prompt_is_continued_in_all_tokens(input_hz):
    """The result starts with the semantic and acoustic tokens of the prompt; the seconds include it."""
    audio_lm = audiolm_of()
    prompt = torch.rand(2, input_hz // 2 + 6) * 0.9
    resampled = resample(prompt, input_hz, fakes.SAMPLE_HZ)
    result = audio_lm.generate(
        GenerationRequest(prime_wave=prompt, prime_wave_input_sample_hz=input_hz, seconds=1.0, seeds=[1, 2])
    )
    assert result.wave.shape == (2, 800)
    assert torch.equal(result.acoustic[:, :25], audio_lm.codec.tokenize(resampled)[:, :25])
    assert torch.equal(result.semantic[:, :12], audio_lm.wav2vec(resampled)[:, :12])
    free = audio_lm.generate(GenerationRequest(seconds=1.0, seeds=[1, 2]))
    assert not torch.equal(result.acoustic[:, 25:], free.acoustic[:, 25:])


def test_prompts_of_unequal_length_are_independent():
    """The padding of a short prompt has no influence."""
    audio_lm = audiolm_of()
    prompts = torch.rand(2, 480) * 0.9
    together = audio_lm.generate(
        GenerationRequest(prime_wave=prompts, prime_lengths=torch.tensor([480, 160]), seconds=1.0, seeds=[1, 2])
    )
    alone = audio_lm.generate(GenerationRequest(prime_wave=prompts[1, :160], seconds=1.0, seeds=[2]))
    assert torch.equal(together.acoustic[1], alone.acoustic[0])
    assert torch.equal(together.acoustic[0, :30], audio_lm.codec.tokenize(prompts[:1])[0])


@pytest.mark.slow
def test_default_length_is_five_seconds_after_the_prompt():
    """Without `seconds`; a prompt longer than `seconds` raises an error."""
    audio_lm = audiolm_of()
    whole = {"allow_eos": False, "sampling": {name: {"temperature": 0} for name in audio_lm.stages}}
    assert audio_lm(batch_size=1, **whole).shape == (1, 4000)
    assert audio_lm(prime_wave=torch.rand(800), prime_wave_input_sample_hz=fakes.SAMPLE_HZ, **whole).shape == (1, 4800)
    with pytest.raises(ValueError, match="longer than the requested"):
        audio_lm(prime_wave=torch.rand(1600), seconds=1.0)


def test_an_item_depends_on_its_seed_alone():
    """An item is the same alone, in a batch and in another order; None draws seeds from torch's generator."""
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
    """Sixteen candidates need as many model calls as one."""
    calls = []

    def spied(call):
        return lambda self, x, *rest: calls.append(len(x)) or call(self, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("prefill", "step"):
            patch.setattr(CachedTransformer, name, spied(getattr(CachedTransformer, name)))
        audio_lm(batch_size=1, seconds=0.2)
        alone = len(calls)
        audio_lm(batch_size=16, seconds=0.2)
    assert len(calls) == 2 * alone and set(calls[alone:]) == {16}


@pytest.mark.slow
def test_candidates_are_sampled_as_one_batch(monkeypatch):
    """Fault 6: candidates that are sampled one after another fail the check."""
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


def test_long_results_are_generated_in_windows(monkeypatch):
    """Stages trained on half a second generate two; no cache is longer than the training sequences."""
    audio_lm = audiolm_of(max_seconds=0.5)
    slots = []
    original = CachedTransformer.prefill
    monkeypatch.setattr(
        CachedTransformer, "prefill", lambda self, *args: slots.append(args[-1]) or original(self, *args)
    )
    result = audio_lm.generate(GenerationRequest(seconds=2.0, seeds=0))
    assert result.wave.shape == (1, 1600) and result.acoustic.min() >= 0
    assert max(slots) <= 25 + 2


def test_sampling_is_set_by_stage():
    """Greedy stages do not depend on the seed; unknown stages raise an error."""
    audio_lm = audiolm_of()
    greedy = {name: {"temperature": 0} for name in audio_lm.stages}
    assert torch.equal(
        audio_lm(seconds=0.3, sampling=greedy, seeds=[1]), audio_lm(seconds=0.3, sampling=greedy, seeds=[2])
    )
    audio_lm.sampling = {name: SamplingSettings(temperature=0) for name in audio_lm.stages}
    assert torch.equal(audio_lm(seconds=0.3, seeds=[1]), audio_lm(seconds=0.3, sampling=greedy, seeds=[2]))
    with pytest.raises(ValueError, match="unknown stages"):
        audio_lm(sampling={"midfine": {}})


def test_without_a_fine_stage_coarse_levels_are_decoded():
    """As in AudioLM's piano model, which had no third stage."""
    stages = fakes.tiny_stages()
    audio_lm = AudioLM(
        wav2vec=fakes.FakeSemanticTokenizer(),
        codec=fakes.FakeCodec(),
        semantic_transformer=stages["semantic"],
        coarse_transformer=stages["coarse"],
    )
    assert audio_lm.generate(GenerationRequest(seconds=0.2)).acoustic.shape == (1, 10, 2)
    assert audio_lm.semantic_transformer is stages["semantic"] and audio_lm.coarse_transformer is stages["coarse"]
    assert audio_lm.fine_transformer is None


def test_incompatible_parts_raise_errors():
    """Vocabularies, levels and batch sizes are checked before generation."""
    stages = {f"{name}_transformer": stage for name, stage in fakes.tiny_stages().items()}
    parts = {"wav2vec": fakes.FakeSemanticTokenizer(), "codec": fakes.FakeCodec()}
    with pytest.raises(ValueError, match="its tokenizer has 12"):
        AudioLM(
            **parts, **{**stages, "semantic_transformer": SemanticTransformer(num_semantic_tokens=9, **fakes.SIZES)}
        )
    small = fakes.FakeCodec()
    small.num_quantizers = 3
    with pytest.raises(ValueError, match="the codec has 3"):
        AudioLM(**{**parts, "codec": small}, **stages)
    with pytest.raises(ValueError, match="numbers of items"):
        AudioLM(**parts, **stages)(batch_size=3, seeds=[1, 2])
    with pytest.raises(ValueError, match="needs an audio_conditioner"):
        AudioLM(**parts, **stages)(text="anything")


@pytest.mark.parametrize("name", ["semantic", "coarse", "fine"])
def test_wrapper_computes_losses_of_waves_and_tokens(name):
    """A wave and its tokens have the same loss; a wave is also its resampled condition."""
    audio_lm = audiolm_of(conditioned=True)
    stage = wrapped_stages(audio_lm)[name].eval()
    wave = torch.rand(2, 320) * 0.9
    tokens = AudioTokens({"semantic": audio_lm.wav2vec(wave), "acoustic": audio_lm.codec.tokenize(wave)}, {})
    by_wave = stage(wave)
    by_tokens = stage(tokens=tokens, conditioning=stage.condition(wavs=wave))
    assert by_wave.loss.item() == pytest.approx(by_tokens.loss.item(), abs=1e-6)
    by_wave.loss.backward()
    assert audio_lm.audio_conditioner.table(name).weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="both or neither of wave and tokens"):
        stage()


def test_a_request_can_change_single_fields_of_sampling():
    """Another temperature keeps the guidance of the model."""
    audio_lm = audiolm_of(conditioned=True)
    audio_lm.sampling = {name: SamplingSettings(temperature=0.9, guidance_scale=2.0) for name in audio_lm.stages}
    whole = {name: SamplingSettings(temperature=0.5, guidance_scale=2.0) for name in audio_lm.stages}
    fields = {name: {"temperature": 0.5} for name in audio_lm.stages}
    request = {"text": ["four", "seventy"], "seconds": 0.3, "seeds": 1}
    assert torch.equal(audio_lm(**request, sampling=fields), audio_lm(**request, sampling=whole))


def test_guidance_of_the_model_is_off_without_a_condition():
    """A model with guidance by default can continue waves and generate without a text."""
    audio_lm = audiolm_of(conditioned=True)
    plain = audio_lm(seconds=0.3, seeds=1)
    audio_lm.sampling = {name: replace(settings, guidance_scale=3.0) for name, settings in audio_lm.sampling.items()}
    assert torch.equal(audio_lm(seconds=0.3, seeds=1), plain)
    assert audio_lm(prime_wave=torch.rand(160), seconds=0.3, seeds=1).shape == plain.shape
    with pytest.raises(ValueError, match="needs `conditioning`"):
        audio_lm(seconds=0.3, sampling={"coarse": {"guidance_scale": 3.0}})


def test_a_text_conditions_the_stages_that_accept_it():
    """Unconditional stages ignore it; conditions of an unknown stage raise an error."""
    conditioned, plain = fakes.tiny_stages(**fakes.CONDITION), fakes.tiny_stages()
    audio_lm = AudioLM(
        wav2vec=fakes.FakeSemanticTokenizer(),
        codec=fakes.FakeCodec(),
        semantic_transformer=conditioned["semantic"],
        coarse_transformer=plain["coarse"],
        fine_transformer=plain["fine"],
        audio_conditioner=fakes.FakeConditioner(),
    )
    assert audio_lm(text=["one", "three"], seconds=0.2).shape == (2, 160)
    assert audio_lm.audio_conditioner.asked == ["semantic"]
    with pytest.raises(ValueError, match=r"the stages are \['semantic', 'coarse', 'fine'\]"):
        audio_lm(conditioning={"semantics": fakes.random_conditions(1)}, seconds=0.2)
