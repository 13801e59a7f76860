"""Arguments of AudioLM: prompts of all forms, input tokens, ends, lengths, progress, and invalid values."""

import inspect
from dataclasses import replace

import pytest
import torch

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.tokens.streams import Stream
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.fakes import SAMPLE_HZ, FakeTextConditioner, random_conditions
from tests.helpers.toy_audiolm import audiolm_of, streaming_codec, wrapped_stages

pytestmark = pytest.mark.usefixtures("low_rates")

WINDOWS = {"max_seconds": 0.32}  # 8 semantic tokens, 16 acoustic frames


def public_methods(model):
    """The methods of a class that users call, without properties and inherited methods."""
    return [method for name, method in vars(model).items() if inspect.isfunction(method) and not name.startswith("_")]


def same(one, other, item=0):
    """Whether one item of a result equals the only item of another result, in tokens and wave."""
    lengths = int(one.semantic_lengths[item]), int(one.acoustic_lengths[item])
    return (
        torch.equal(one.semantic[item, : lengths[0]], other.semantic[0])
        and torch.equal(one.acoustic[item, : lengths[1]], other.acoustic[0])
        and torch.equal(one.waves[item], other.waves[0])
    )


@pytest.mark.slow
def test_audiolm_equals_its_stage_wrappers():
    """Three calls of the stage wrappers return the same tokens as AudioLM."""
    audio_lm = audiolm_of(**WINDOWS)
    greedy = {name: {"temperature": 0} for name in audio_lm.stages}
    result = audio_lm.generate(GenerationRequest(seconds=1.4, sampling=greedy))
    settings, wrapped = {"settings": SamplingSettings(temperature=0)}, wrapped_stages(audio_lm)
    semantic = wrapped["semantic"].generate(35, **settings).streams["semantic"]
    coarse = wrapped["coarse"].generate(70, streams={"semantic": semantic}, **settings).streams["coarse"]
    fine = wrapped["fine"].generate(70, streams={"coarse": coarse}, **settings).streams["fine"]
    assert torch.equal(result.semantic, semantic[..., 0])
    assert torch.equal(result.acoustic, torch.cat((coarse, fine), dim=-1))


@pytest.mark.slow
@pytest.mark.parametrize("file_hz", [SAMPLE_HZ, 1200])
def test_a_file_is_continued_like_its_wave(tmp_path, file_hz):
    """A file of any rate and channels, alone and in a list with a wave; channels are averaged."""
    audio_lm = audiolm_of()
    path = tmp_path / "prompt.wav"
    write_audio(path, torch.rand(2, file_hz // 2) - 0.5, file_hz)
    wave, rate_hz = read_audio(path, channels=1)
    by_wave = audio_lm.generate(
        GenerationRequest(prime_wave=wave, prime_wave_input_sample_hz=rate_hz, seconds=0.8, seeds=[3])
    )
    for by_file in (path, str(path), [path]):
        assert same(by_wave, audio_lm.generate(GenerationRequest(prime_wave=by_file, seconds=0.8, seeds=[3])))
    other = torch.rand(200)
    both = audio_lm.generate(GenerationRequest(prime_wave=[other, path], seconds=0.8, seeds=[2, 3]))
    assert same(both, by_wave, 1) and same(
        both, audio_lm.generate(GenerationRequest(prime_wave=other, seconds=0.8, seeds=[2]))
    )
    with pytest.raises(ValueError, match="nowhere.wav"):
        audio_lm(prime_wave=tmp_path / "nowhere.wav")


@pytest.mark.slow
def test_prompts_of_unequal_length_are_extended_by_five_seconds(monkeypatch):
    """The result is then a list of waves. With `seconds` all waves have this length, prompt included."""
    monkeypatch.setattr("audiolm_pytorch.generation.inputs.DEFAULT_SECONDS", 0.2)
    audio_lm = audiolm_of()
    prompts = [torch.rand(160), torch.rand(400)]
    result = audio_lm.generate(GenerationRequest(prime_wave=prompts, seeds=[1, 2], allow_eos=False))
    assert [len(wave) for wave in result.waves] == [320, 560] and result.acoustic_lengths.tolist() == [20, 35]
    assert (result.acoustic[0, 20:] == -1).all() and (result.semantic[0, 10:] == -1).all()
    for item, prompt in enumerate(prompts):
        assert same(
            result, audio_lm.generate(GenerationRequest(prime_wave=prompt, seeds=[1 + item], allow_eos=False)), item
        )
    with pytest.raises(ValueError, match=r"\[320, 560\] samples.*request `seconds`"):
        _ = result.wave
    listed = audio_lm(prime_wave=prompts, seeds=[1, 2], allow_eos=False)
    assert isinstance(listed, list) and torch.equal(listed[1], result.waves[1])
    assert audio_lm(prime_wave=prompts, seeds=[1, 2], seconds=0.7).shape == (2, 560)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [0, 15])
def test_a_prompt_shorter_than_a_frame_is_ignored(samples):
    """Alone, next to a longer prompt, and in a padded batch."""
    audio_lm = audiolm_of()
    free = audio_lm.generate(GenerationRequest(seconds=0.4, seeds=[1]))
    assert same(free, audio_lm.generate(GenerationRequest(prime_wave=torch.rand(samples), seconds=0.4, seeds=[1])))
    padded, lengths = torch.rand(2, 100), torch.tensor([samples, 100])
    both = audio_lm.generate(GenerationRequest(prime_wave=padded, prime_lengths=lengths, seconds=0.4, seeds=[1, 2]))
    assert same(both, free)
    default = audio_lm.generate(GenerationRequest(prime_wave=torch.rand(samples), seeds=[1], allow_eos=False))
    assert default.wave.shape == (1, 5 * SAMPLE_HZ)


def test_a_prompt_longer_than_the_windows_is_kept_whole():
    """The result starts with all its semantic and acoustic tokens."""
    audio_lm = audiolm_of(**WINDOWS)
    prompt = torch.rand(1, 1280) * 0.9
    result = audio_lm.generate(GenerationRequest(prime_wave=prompt, seconds=2.0, seeds=0))
    assert torch.equal(result.acoustic[:, :80], audio_lm.codec.tokenize(prompt))
    assert torch.equal(result.semantic[:, :40], audio_lm.wav2vec(prompt)) and result.wave.shape == (1, 1600)


def test_one_prompt_and_one_text_are_used_for_all_seeds():
    """Inputs of one item are expanded to the batch."""
    audio_lm = audiolm_of(conditioned=True)
    request = {"prime_wave": torch.rand(160), "text": "one", "seconds": 0.4}
    result = audio_lm.generate(GenerationRequest(**request, seeds=[1, 2, 3]))
    assert same(result, audio_lm.generate(GenerationRequest(**request, seeds=[2])), 1)


def test_a_codec_of_several_channels_continues_prompts():
    """A stereo codec continues mono and stereo prompts; semantic tokens belong to the mean of the channels."""
    audio_lm = audiolm_of(codec=streaming_codec(audio_channels=2))
    stereo = torch.rand(1, 2, 160) - 0.5
    result = audio_lm.generate(GenerationRequest(prime_wave=stereo, seconds=0.4, seeds=1))
    assert result.wave.shape == (1, 2, 320)
    assert torch.equal(result.acoustic[:, :10], audio_lm.codec.tokenize(stereo))
    assert torch.equal(result.semantic[:, :5], audio_lm.wav2vec(stereo.mean(dim=1)))
    mono = audio_lm.generate(GenerationRequest(prime_wave=stereo[:, 0], seconds=0.4, seeds=1))
    assert torch.equal(mono.acoustic[:, :10], audio_lm.codec.tokenize(stereo[:, :1].expand(-1, 2, -1)))
    with pytest.raises(ValueError, match="3 channels, need 1 or 2"):
        audio_lm(prime_wave=torch.rand(1, 3, 160), seconds=0.4)


@pytest.mark.slow
def test_semantic_tokens_of_the_request_replace_the_first_stage(monkeypatch):
    """The semantic tokens of a result generate its audio again, for items of unequal length as for single items."""
    audio_lm = audiolm_of(**WINDOWS)
    whole = audio_lm.generate(GenerationRequest(batch_size=2, seconds=1.0, seeds=4))
    monkeypatch.setattr(SemanticTransformer, "embed", lambda *rows: pytest.fail("the semantic stage is to rest"))
    again = audio_lm.generate(GenerationRequest(semantic_tokens=whole.semantic, seeds=[4, 5]))
    assert torch.equal(again.semantic, whole.semantic) and torch.equal(again.acoustic, whole.acoustic)
    assert torch.equal(again.wave, whole.wave)
    lengths = torch.tensor([25, 11])
    both = audio_lm.generate(GenerationRequest(semantic_tokens=whole.semantic, semantic_lengths=lengths, seeds=[4, 5]))
    assert both.acoustic_lengths.tolist() == [50, 22] and both.semantic_lengths.tolist() == [25, 11]
    assert same(both, audio_lm.generate(GenerationRequest(semantic_tokens=whole.semantic[1:, :11], seeds=[5])), 1)
    assert audio_lm(semantic_tokens=whole.semantic, seconds=0.5, seeds=[4, 5]).shape == (2, 400)
    primed = audio_lm.generate(
        GenerationRequest(semantic_tokens=whole.semantic[:1], prime_wave=torch.rand(1, 160) * 0.9, seeds=[4])
    )
    assert torch.equal(primed.semantic, whole.semantic[:1]) and not torch.equal(primed.acoustic, whole.acoustic[:1])


def test_invalid_semantic_tokens_raise_errors():
    """Too few tokens for the seconds, no tokens, and tokens outside the vocabulary."""
    audio_lm = audiolm_of()
    with pytest.raises(ValueError, match="needs .25. semantic tokens per item, the request has .5."):
        audio_lm(semantic_tokens=torch.zeros(1, 5).long(), seconds=1.0)
    with pytest.raises(ValueError, match="at least one token per item"):
        audio_lm(semantic_tokens=torch.zeros(1, 0).long())
    with pytest.raises(ValueError, match="outside"):
        audio_lm(semantic_tokens=torch.full((1, 5), 12))
    with pytest.raises(ValueError, match="pass both or neither"):
        audio_lm(semantic_lengths=torch.tensor([3]))


def test_coarse_only_skips_the_fine_stage():
    """The coarse levels equal those of the whole result, and the codec decodes them alone."""
    audio_lm = audiolm_of()
    whole = audio_lm.generate(GenerationRequest(seconds=0.4, seeds=1))
    coarse = audio_lm.generate(GenerationRequest(seconds=0.4, seeds=1, coarse_only=True))
    assert torch.equal(coarse.acoustic, whole.acoustic[..., :2])
    assert torch.equal(coarse.wave[:, None], audio_lm.codec.decode_from_codebook_indices(whole.acoustic[..., :2]))


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, WINDOWS])
def test_items_can_end_by_themselves_without_seconds(windows):
    """Every item ends at its own time, as if it were alone; with `seconds` all items have this length."""
    audio_lm = audiolm_of(ends=True, **windows)
    result = audio_lm.generate(GenerationRequest(batch_size=4, seeds=0))
    lengths = result.acoustic_lengths.tolist()
    assert len(set(lengths)) == 4 and torch.equal(result.acoustic_lengths, 2 * result.semantic_lengths)
    assert [len(wave) for wave in result.waves] == [16 * length for length in lengths]
    for item, length in enumerate(lengths):
        assert (result.acoustic[item, :length] >= 0).all() and (result.acoustic[item, length:] == -1).all()
        assert same(result, audio_lm.generate(GenerationRequest(seeds=[item])), item)
    assert audio_lm(batch_size=4, seeds=0, seconds=1.0).shape == (4, 800)
    capped = audio_lm.generate(GenerationRequest(batch_size=4, seeds=0, seconds=0.4, allow_eos=True))
    assert capped.acoustic_lengths.tolist() == [min(length, 20) for length in lengths]
    assert audio_lm(seeds=[0], allow_eos=False).shape == (1, 5 * SAMPLE_HZ)


@pytest.mark.slow
def test_an_early_end_keeps_the_whole_prompt():
    """The result keeps all prompt frames, also if the semantic tokens cover fewer frames."""
    audio_lm = audiolm_of(lost_frames=1)
    head = audio_lm.semantic_transformer.heads[0].weight.data
    head.zero_()
    prompt = torch.rand(1, 400)
    for seed in range(12):
        result = audio_lm.generate(GenerationRequest(prime_wave=prompt, seeds=[seed]))
        assert result.acoustic_lengths[0] >= 25
        assert torch.equal(result.acoustic[:, :25], audio_lm.codec.tokenize(prompt))


@pytest.mark.slow
def test_allow_eos_needs_a_stage_trained_with_ends():
    """Without trained ends the default length is five seconds, and `allow_eos` raises an error."""
    audio_lm = audiolm_of()
    stage = SemanticTransformer(num_semantic_tokens=12, eos=False, dim=32, depth=1, heads=2, dim_head=16)
    audio_lm.semantic_transformer = stage
    assert audio_lm(seeds=[0]).shape == (1, 5 * SAMPLE_HZ)
    with pytest.raises(ValueError, match="eos=True"):
        audio_lm(allow_eos=True)


@pytest.mark.slow
def test_texts_are_used_by_both_conditioners():
    """States of a text encoder, codes, and both together; each stage uses the conditions that it accepts."""
    both, states = audiolm_of(conditioned=True, hears_text=True), audiolm_of(hears_text=True)
    for audio_lm in (both, states):
        result = audio_lm.generate(GenerationRequest(text=["one", "three"], seconds=0.2, seeds=1))
        assert isinstance(audio_lm.text_conditioner, FakeTextConditioner)
        assert audio_lm.text_conditioner.asked[-1] == ["one", "three"]
        assert same(result, audio_lm.generate(GenerationRequest(text="three", seconds=0.2, seeds=[2])), 1)
        assert not torch.equal(
            result.acoustic, audio_lm.generate(GenerationRequest(seconds=0.2, seeds=[1, 2])).acoustic
        )
    assert both.audio_conditioner.asked[:3] == ["semantic", "coarse", "fine"]
    for texts in ({}, {"text": "one"}):  # also together with a text
        with pytest.raises(ValueError, match="does not accept the passed text, wavs or codes"):
            states(codes=torch.zeros(1, 3).long(), seconds=0.2, **texts)


@pytest.mark.slow
def test_extra_input_streams_reach_their_stages():
    """A melody, and ids of a text that some items do not have; single items equal batches, also in windows."""
    melody, ids = Stream("melody", 5, rate_hz=25, is_input=True), Stream("text", 7, rate_hz=None, is_input=True)
    audio_lm = audiolm_of(extra_streams=[melody, ids], **WINDOWS)
    tokens = {"melody": torch.randint(0, 5, (2, 25)), "text": torch.randint(0, 7, (2, 3))}
    inputs = AudioTokens(tokens, {"text": torch.tensor([3, 0])})
    result = audio_lm.generate(GenerationRequest(input_streams=inputs, seconds=1.0, seeds=[1, 2]))
    alone = AudioTokens({"melody": tokens["melody"][1:]}, {})
    assert same(result, audio_lm.generate(GenerationRequest(input_streams=alone, seconds=1.0, seeds=[2])), 1)
    other = AudioTokens({"melody": 4 - tokens["melody"][1:]}, {})
    assert not same(result, audio_lm.generate(GenerationRequest(input_streams=other, seconds=1.0, seeds=[2])), 1)
    with pytest.raises(ValueError, match="needs melody tokens"):
        audio_lm(seconds=1.0)
    with pytest.raises(ValueError, match=r"\['chords'\], the stages accept only \['melody', 'text'\]"):
        audio_lm(seconds=1.0, input_streams=AudioTokens({"chords": tokens["melody"]}, {}))


@pytest.mark.slow
def test_guidance_of_the_model_is_off_with_a_melody_only():
    """The unconditional copy keeps streams that have a rate, so guidance would have no effect."""
    audio_lm = audiolm_of(extra_streams=[Stream("melody", 5, rate_hz=25, is_input=True)])
    inputs = AudioTokens({"melody": torch.randint(0, 5, (1, 8))}, {})
    plain = audio_lm(input_streams=inputs, seconds=0.3, seeds=1)
    audio_lm.sampling = {name: replace(settings, guidance_scale=3.0) for name, settings in audio_lm.sampling.items()}
    assert torch.equal(audio_lm(input_streams=inputs, seconds=0.3, seeds=1), plain)


@pytest.mark.slow
def test_results_are_ordinary_tensors():
    """Gradients can flow through values that are computed from waves and tokens."""
    audio_lm = audiolm_of(codec=streaming_codec())
    scale = torch.ones((), requires_grad=True)
    for result in (
        audio_lm.generate(GenerationRequest(seconds=0.2)),
        next(audio_lm.stream(GenerationRequest(seconds=0.2))),
    ):
        (result.waves[0] * scale).sum().backward()
        assert not result.semantic.is_inference() and not result.acoustic.is_inference()


@pytest.mark.slow
def test_selected_items_of_a_request_equal_those_items_of_the_result():
    """Inputs of several items are selected, inputs of one item stay."""
    audio_lm = audiolm_of(conditioned=True)
    items = [2, 0, 2]
    several = {
        "text": ["one", "three", "seventy"],
        "prime_wave": torch.rand(3, 100),
        "prime_lengths": torch.tensor([100, 20, 60]),
        "semantic_tokens": torch.randint(0, 12, (3, 9)),
        "semantic_lengths": torch.tensor([5, 9, 8]),
        "seeds": 4,
    }
    alone = {"text": "one", "prime_wave": [torch.rand(100)], "conditioning": {"fine": random_conditions(1)}}
    mixed = {
        "prime_wave": [torch.rand(90), torch.rand(30), torch.rand(60)],
        "conditioning": {"semantic": random_conditions(3), "coarse": random_conditions(1)},
        "seeds": [7, 8, 9],
    }
    for request in (several, {**alone, "seeds": [1, 2, 3], "seconds": 0.3}, {**mixed, "seconds": 0.3}):
        whole = audio_lm.generate(GenerationRequest(**request))
        part = audio_lm.generate(GenerationRequest(**request).select(items))
        assert len(part.waves) == 3
        for number, item in enumerate(items):
            assert torch.equal(part.waves[number], whole.waves[item])
    melodies = AudioTokens(
        {"melody": torch.arange(6).view(3, 2), "key": torch.zeros(1, 2)}, {"melody": torch.arange(3)}
    )
    chosen = GenerationRequest(input_streams=melodies).select(items).input_streams
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match="items must be in 0..1"):
            GenerationRequest(batch_size=2, seeds=7).select(wrong)
    assert chosen.tokens["melody"].tolist() == [[4, 5], [0, 1], [4, 5]] and chosen.lengths["melody"].tolist() == [
        2,
        0,
        2,
    ]
    assert len(chosen.tokens["key"]) == 1


def test_a_prompt_that_is_too_long_raises_an_error():
    """The message contains the item, its seconds, and that the requested seconds include the prompt."""
    with pytest.raises(
        ValueError, match=r"prompt of item 1 lasts 1.00 s, longer than the requested 0.50 s.*; request more"
    ):
        audiolm_of()(prime_wave=[torch.rand(10), torch.rand(800)], seconds=0.5)


def test_forward_has_the_fields_of_a_request():
    """The arguments of `forward` are those of `GenerationRequest`, with equal types and defaults."""
    arguments = dict(inspect.signature(AudioLM.forward).parameters)
    del arguments["self"]
    assert arguments == dict(inspect.signature(GenerationRequest).parameters)


@pytest.mark.parametrize(
    "method", [*public_methods(AudioLM), *public_methods(MusicLM)], ids=lambda one: one.__qualname__
)
def test_public_methods_have_explicit_arguments(method):
    """`help` and completion cannot show the arguments behind `**request`."""
    parameters = inspect.signature(method).parameters.values()
    assert all(one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters)
    assert all(one.annotation is not one.empty for one in parameters if one.name != "self")


@pytest.mark.slow
def test_callback_and_progress_bars(monkeypatch, capsys):
    """The callback receives the progress of all stages to their end; bars appear only with `progress=True`."""
    bars = []

    class Bar:
        def __init__(self, name, done, total, shown):
            self.name, self.n, self.total, self.is_closed = name, done, total, False
            bars.append(self)

        def update(self, count):
            self.n += count

        def close(self):
            self.is_closed = True

    monkeypatch.setattr("audiolm_pytorch.generation.request.progress_bar", Bar)
    audio_lm, reports = audiolm_of(**WINDOWS), []
    report = {"callback": lambda stage, known, expected: reports.append((stage, known, expected))}
    audio_lm(seconds=1.0, **report)
    assert [stage for stage in dict.fromkeys(stage for stage, *_ in reports)] == ["semantic", "coarse", "fine"]
    assert {("semantic", 25, 25), ("coarse", 50, 50), ("fine", 50, 50)} <= set(reports) and not bars
    audio_lm(seconds=1.0, progress=True)
    assert [(bar.name, bar.n, bar.total, bar.is_closed) for bar in bars] == [
        ("semantic", 25, 25, True),
        ("coarse", 50, 50, True),
        ("fine", 50, 50, True),
    ]
    assert capsys.readouterr() == ("", "")


NONSENSE = {
    "seconds must be positive": [{"seconds": value} for value in (-1.0, 0)],
    "seconds must be a finite number": [{"seconds": float("inf")}],
    "seconds must be a number": [{"seconds": float("nan")}],
    "batch_size must be at least 1": [{"batch_size": 0}, {"batch_size": -2}],
    "top_k": [{"seconds": 0.1, "sampling": {"fine": {"top_k": 0}}}],
    "have no items": [{"text": []}, {"seeds": []}, {"prime_wave": []}, {"prime_wave": torch.zeros(0, 100)}],
    "NaN or infinite": [
        {"prime_wave": torch.tensor([0.0, float("nan")])},
        {"prime_wave": [torch.zeros(100), torch.tensor([float("inf")])]},
        {"wavs": torch.full((1, 100), float("nan"))},
    ],
    "must be a float tensor": [
        {"prime_wave": torch.zeros(100, dtype=torch.int16)},
    ],
    "must be .n. or .c, n.": [{"prime_wave": [torch.tensor(1.0)]}],
    "must be .n., .b, n. or": [{"prime_wave": torch.zeros(1, 1, 1, 100)}],
    "prime_wave_input_sample_hz must be in": [{"prime_wave_input_sample_hz": 0}],
    "got prime_wave_input_sample_hz without prime_wave": [{"prime_wave_input_sample_hz": 8000}],
    "prime_lengths must": [
        {"prime_wave": torch.zeros(2, 100), "prime_lengths": torch.tensor(lengths)}
        for lengths in ([5], [5, 101], [-1, 5])
    ],
    "different numbers of items": [
        {"batch_size": 3, "seeds": [1, 2]},
        {"text": ["a", "b"], "prime_wave": torch.zeros(3, 9)},
    ],
    "one seed per item": [{"batch_size": 3, "seeds": [1], "seconds": 0.1}],
}


@pytest.mark.parametrize("message", NONSENSE)
def test_invalid_values_raise_errors(message):
    """The error appears before generation, and contains the value and the allowed range."""
    audio_lm = audiolm_of(conditioned=True)
    for request in NONSENSE[message]:
        with pytest.raises(ValueError, match=message):
            audio_lm(**request)
    with pytest.raises(TypeError, match="second"):
        audio_lm(second=1.0)


def test_texts_are_encoded_once_for_all_stages():
    """The states of a text encoder are the same for all stages."""
    audio_lm = audiolm_of(hears_text=True)
    audio_lm.generate(GenerationRequest(text=["a", "bb"], seconds=0.2, seeds=0))
    assert audio_lm.text_conditioner.asked == [["a", "bb"]]
