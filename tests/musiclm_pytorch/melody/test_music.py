"""Music that follows a melody: stages that are extended by it, requests, and saved models."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from musiclm_pytorch.cli.app import main
from musiclm_pytorch.melody.embedder import per_frame
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.fakes import CONDITION, SAMPLE_HZ, memorise, random_conditions, tiny_stages
from tests.helpers.small_models import small_audiolm
from tests.helpers.tiny_mulan import tones
from tests.helpers.toy_musiclm import STAGES, musiclm_of, toy_embedder

REQUEST = {"num_samples": 2, "seconds": 0.5, "seed": 3}
MELODY = {"melody": tones(300, 500, 700, seconds=0.2).flatten(), "melody_sample_hz": 8000}


@pytest.fixture(scope="module")
def musiclm() -> MusicLM:
    """Tests must not change it."""
    return musiclm_of(melody=True)


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_a_stage_with_a_new_melody_has_the_same_logits(name: str) -> None:
    """With the text alone, always; with a melody, until the stage is trained. Gradients reach the projection."""
    stage = tiny_stages(**CONDITION)[name].eval()
    extended = stage.with_condition("melody", 4, drop_prob=0.5)
    tokens = {"semantic": torch.randint(0, 12, (2, 10)), "acoustic": torch.randint(0, 16, (2, 20, 4))}
    packed, text = stage.packed(AudioTokens(tokens, {})), random_conditions(2)
    melody = {"melody": ConditionTensor.of(torch.randn(2, 20, 4))}

    def logits(model: torch.nn.Module, conditions: dict[str, ConditionTensor]) -> torch.Tensor:
        hidden = model.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1], model.fuse(conditions, 2))
        return torch.stack([model.logits(hidden, head).sum(-1) for head in range(len(model.heads))])

    assert torch.equal(logits(extended, text), logits(stage, text))
    assert torch.equal(logits(extended, {**text, **melody}), logits(stage, text))
    assert extended.config["max_seconds"] == stage.config["max_seconds"] and not extended.training
    for parameter in extended.fuser.entries["melody"].parameters():
        parameter.copy_(torch.randn_like(parameter))
    assert torch.equal(logits(extended, text), logits(stage, text))
    assert not torch.equal(logits(extended, {**text, **melody}), logits(stage, text))
    with torch.enable_grad():
        stage.with_condition("melody", 4).train()(packed, {**text, **melody}).loss.backward()
    with pytest.raises(ValueError, match="already has the condition melody"):
        extended.with_condition("melody", 4)


def test_the_condition_of_a_frame_is_that_of_its_time(musiclm: MusicLM) -> None:
    """Semantic tokens of 25 Hz and frames of 50 Hz have the vectors of windows of 12.5 Hz; silence has zeros."""
    embedder = musiclm.melody_embedder
    wave = torch.cat((torch.zeros(1600), MELODY["melody"]))
    codes = embedder.codes(wave)
    assert codes.shape == (1, 10, 2) and (codes[0, 0] == -1).all() and (codes[0, 3:] >= 0).all()
    vectors = embedder.vectors(codes[0])
    assert not vectors[0].any() and vectors[3:].any(dim=1).all()
    conditions = embedder.conditions([(wave[None], 8000)], musiclm.audio_lm.stages)
    for name, repeats in (("semantic", 2), ("coarse", 4), ("fine", 4)):
        condition = conditions[name]["melody"]
        assert torch.equal(condition.embeddings[0], vectors.repeat_interleave(repeats, dim=0)) and condition.mask.all()
    assert per_frame(torch.arange(6.0)[:, None], Fraction(4), Fraction(3)).flatten().tolist() == [0, 1, 2, 4, 5]
    assert per_frame(torch.arange(2.0)[:, None], Fraction(3), Fraction(5)).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.slow
def test_a_melody_changes_the_music_and_no_melody_does_not(musiclm: MusicLM, tmp_path: Path) -> None:
    """As wave, file, list, and in a batch with texts; the text alone needs no embedder."""
    plain, music = musiclm("a", **REQUEST), musiclm("a", **MELODY, **REQUEST)
    assert not torch.equal(plain, music)
    text_only = MusicLM(audio_lm=musiclm.audio_lm, mulan_embed_quantizer=musiclm.mulan_embed_quantizer)
    assert torch.equal(text_only("a", **REQUEST), plain)
    write_audio(tmp_path / "hum.wav", MELODY["melody"], 8000)
    of_file = musiclm("a", melody=tmp_path / "hum.wav", **REQUEST)
    rounded = read_audio(tmp_path / "hum.wav")[0]
    assert torch.equal(musiclm("a", melody=rounded, melody_sample_hz=8000, **REQUEST), of_file)
    other = tones(600, seconds=0.5)
    both = musiclm(["a", "a"], melody=[MELODY["melody"], other[0]], melody_sample_hz=8000, **REQUEST)
    torch.testing.assert_close(both[:1], music, atol=1e-5, rtol=1e-5)
    alone = musiclm("a", melody=other, melody_sample_hz=8000, **REQUEST)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    shared = musiclm(["a", "b"], **MELODY, **REQUEST)
    torch.testing.assert_close(shared[:1], music, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_model_with_a_melody_is_saved_and_loaded(tmp_path: Path) -> None:
    """The loaded model generates the same music."""
    audio_lm = small_audiolm()
    for name, stage in audio_lm.stages.items():
        extended = stage.with_condition("melody", 4)
        torch.nn.init.normal_(extended.fuser.entries["melody"].projection.weight)
        setattr(audio_lm, f"{name}_transformer", extended)
    musiclm = MusicLM(
        audio_lm=audio_lm, mulan_embed_quantizer=audio_lm.audio_conditioner, melody_embedder=toy_embedder()
    ).eval()
    musiclm.save_pretrained(tmp_path / "model")
    loaded = MusicLM.from_pretrained(tmp_path / "model")
    music = musiclm("a", **MELODY, **REQUEST)
    assert torch.equal(loaded("a", **MELODY, **REQUEST), music)
    assert not torch.equal(loaded("a", **REQUEST), music)
    write_audio(tmp_path / "hum.wav", MELODY["melody"], 8000)
    words = ["--model", tmp_path / "model", "--melody", tmp_path / "hum.wav", "--out", tmp_path / "a.wav"]
    words += ["--seconds", 0.5, "--num-samples", 2, "--seed", 3]
    assert main(["generate", "a", *map(str, words)]) == 0
    of_file = musiclm("a", melody=tmp_path / "hum.wav", **REQUEST)
    torch.testing.assert_close(read_audio(tmp_path / "a.wav")[0], of_file, atol=1e-4, rtol=0)
    assert main(["generate", "a", *map(str, [*words, "--stream"])]) == 0


def test_wrong_melodies_are_one_line(musiclm: MusicLM) -> None:
    """The message has the value and what to do."""
    plain = musiclm_of()
    quantizer = musiclm.mulan_embed_quantizer
    for model, message, melody in (
        (musiclm, "melody 0 is empty or silent", torch.zeros(SAMPLE_HZ)),
        (musiclm, "melody 0 contains NaN", torch.full((SAMPLE_HZ,), torch.nan)),
        (musiclm, "different numbers of items", [torch.rand(90), torch.rand(90)]),
        (musiclm, r"melody 1 must be \[n\] or \[c, n\]", [torch.rand(90), torch.rand(1, 1, 90)]),
        (musiclm, "nowhere.wav", "nowhere.wav"),
        (plain, "the model does not follow melodies", torch.rand(SAMPLE_HZ)),
        (
            MusicLM(audio_lm=plain.audio_lm, mulan_embed_quantizer=quantizer, melody_embedder=toy_embedder()),
            "no stage of the model is conditioned on a melody",
            torch.rand(SAMPLE_HZ),
        ),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            model(["a", "b", "c"] if "numbers" in message else "a", melody=melody, **REQUEST)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="melody_sample_hz must be in"):
        musiclm("a", melody=torch.rand(90), melody_sample_hz=1, **REQUEST)
    with pytest.raises(ValueError, match="got melody_sample_hz without melody"):
        musiclm("a", melody_sample_hz=8000, **REQUEST)
    with pytest.raises(ValueError, match="semantic transformer was trained with another melody embedder"):
        MusicLM(audio_lm=musiclm.audio_lm, mulan_embed_quantizer=quantizer, melody_embedder=toy_embedder(dim_latent=5))


@pytest.mark.slow
def test_memorised_melodies_decide_the_music_of_one_text() -> None:
    """Two melodies with equal texts generate their own tokens, in any order; text alone generates neither part."""
    torch.manual_seed(2)
    musiclm = musiclm_of(melody=True, cond_drop_prob=0.0)
    stage, embedder = musiclm.audio_lm.semantic_transformer, musiclm.melody_embedder
    embedder.codebooks.mul_(10)  # so that the few random codes are far from each other
    melodies = [tones(440, seconds=0.32)[0], 0.3 * torch.randn(2560)]
    conditions = musiclm._melody_conditions(melodies, 8000)["semantic"]
    assert not torch.equal(*conditions["melody"].embeddings)
    with torch.no_grad():
        text = musiclm.mulan_embed_quantizer.conditioning(texts="a", namespace="semantic")
        for weight in stage.heads.parameters():
            weight.div_(40)  # that of a new stage
    tokens = torch.randint(0, 12, (2, 8))
    packed = stage.packed(AudioTokens({"semantic": tokens}, {}))
    assert memorise(stage, packed, {"codes": text.expand(2), **conditions}) < 0.05
    greedy = {"sampling": {"semantic": {"temperature": 0.0, "guidance_scale": 1.0}}}
    for order in ([0, 1], [1, 0]):
        chosen = musiclm._melody_conditions([melodies[index] for index in order], 8000)
        request = musiclm._request(["a", "a"], 0.32, None, None, chosen, **greedy)
        found = musiclm.audio_lm.generate(replace(request, seeds=[0, 1])).semantic
        assert torch.equal(found, tokens[order])
