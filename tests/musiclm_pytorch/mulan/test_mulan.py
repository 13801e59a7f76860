import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.mulan import (
    AudioSpectrogramTransformer,
    LayerContrast,
    MuLaN,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
    TextTransformer,
    average_latents,
)
from tests.helpers.tiny_mulan import tiny_mulan, tones

TEXTS = ["low tone", "middle tone", "high tone", "very high tone"]


def test_snippet_of_the_design_runs() -> None:
    """The keyword names that users rely on, with shapes and unit norm (narrower than in DESIGN, to be quick)."""
    audio_transformer = AudioSpectrogramTransformer(
        dim=64, depth=2, heads=8, dim_head=64, spec_n_fft=128, spec_win_length=24, spec_aug_stretch_factor=0.8
    )
    text_transformer = TextTransformer(dim=64, depth=2, heads=8, dim_head=64)
    mulan = MuLaN(audio_transformer=audio_transformer, text_transformer=text_transformer)
    wavs, texts = torch.randn(2, 1024), torch.randint(0, 20000, (2, 256))
    mulan(wavs, texts).backward()
    assert all(parameter.grad is not None for parameter in mulan.parameters())
    for latents in (mulan.get_audio_latents(wavs), mulan.get_text_latents(texts)):
        assert latents.shape == (2, 128)
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, SigmoidContrastiveLearning()])
def test_mulan_learns_which_text_belongs_to_which_sound(loss: torch.nn.Module | None) -> None:
    """Memorisation: every text finds its tone after few steps, from about the loss of chance."""
    mulan = tiny_mulan() if loss is None else tiny_mulan(loss=loss)
    wavs = tones(110, 330, 990, 2970)
    if loss is None:
        assert abs(mulan(wavs, TEXTS).item() - math.log(4)) < 1
    optimizer = torch.optim.Adam(mulan.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        mulan(wavs, TEXTS).backward()
        optimizer.step()
    nearest = (mulan.get_text_latents(TEXTS) @ mulan.get_audio_latents(wavs).T).argmax(dim=1)
    assert nearest.tolist() == [0, 1, 2, 3]


def test_equal_texts_are_not_held_against_each_other() -> None:
    """Two clips of the same words (in any case) are no contrasts: a batch of them has nothing to lose."""
    mulan, wavs = tiny_mulan(), tones(110, 990)
    assert mulan(wavs, ["a tone", "A  tone"]).item() == pytest.approx(0, abs=1e-6)
    assert mulan(wavs, ["a tone", "another tone"]).item() > 0.1
    ids = mulan.text.tokenize(["a tone", "a tone"])
    assert mulan(wavs, torch.nn.functional.pad(ids, (0, 3), value=-1)).item() == pytest.approx(0, abs=1e-6)


def test_several_texts_a_clip_are_all_matches() -> None:
    """Oracle: the loss of the latents with `clip_index`, which one text per clip in order does not need."""
    mulan, wavs = tiny_mulan(), tones(110, 330, 990)
    texts, clip_index = ["low", "deep", "high", "middle"], torch.tensor([0, 0, 2, 1])
    expected = mulan.loss(mulan.get_audio_latents(wavs), mulan.get_text_latents(texts), None, clip_index)
    torch.testing.assert_close(mulan(wavs, texts, clip_index=clip_index), expected)
    assert torch.equal(mulan(wavs, TEXTS[:3]), mulan(wavs, TEXTS[:3], clip_index=torch.arange(3)))
    same = ["low", "low", "high", "low"]
    assert mulan(wavs, same, clip_index=clip_index) < mulan(wavs, texts, clip_index=clip_index) - 0.1


@pytest.mark.slow
def test_mulan_learns_from_several_texts_a_clip() -> None:
    """Memorisation: every one of two texts finds its tone."""
    mulan, wavs = tiny_mulan(), tones(110, 990, 2970)
    texts, clip_index = ["low", "deep", "middle", "so so", "high", "shrill"], torch.tensor([0, 0, 1, 1, 2, 2])
    optimizer = torch.optim.Adam(mulan.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        mulan(wavs, texts, clip_index=clip_index).backward()
        optimizer.step()
    nearest = (mulan.get_text_latents(texts) @ mulan.get_audio_latents(wavs).T).argmax(dim=1)
    assert nearest.tolist() == clip_index.tolist()


def test_two_calls_are_bit_identical() -> None:
    """Eval mode uses no random numbers, for latents of clips, texts and long audio, and for the loss."""
    sizes = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "dropout": 0.5}
    noise = {"spec_aug_stretch_factor": 0.8, "spec_aug_freq_mask": 0.5, "spec_aug_time_mask": 0.5, "patch_dropout": 0.5}
    audio = AudioSpectrogramTransformer(**sizes, **noise, patch_size=8, sample_hz=8000, num_mels=24, spec_n_fft=256)
    mulan = tiny_mulan(audio_transformer=audio, text_transformer=TextTransformer(**sizes, num_tokens=256))
    wavs, lengths = torch.randn(4, 9000), torch.tensor([9000, 100, 4000, 7000])
    calls = {
        "audio": lambda: mulan.get_audio_latents(wavs, lengths),
        "text": lambda: mulan.get_text_latents(TEXTS),
        "long audio": lambda: mulan.get_long_audio_latents(wavs, lengths),
        "loss": lambda: mulan(wavs, TEXTS, lengths),
    }
    for call in calls.values():
        assert torch.equal(call(), call())
    mulan.train()
    for name in ("audio", "text", "loss"):
        assert not torch.equal(calls[name](), calls[name]()), f"{name} has no noise to be afraid of"


def test_strings_lists_and_ids_agree() -> None:
    """A text has one latent as a string, in a list, as ids, and as ids with padding."""
    mulan = tiny_mulan()
    expected = mulan.get_text_latents(TEXTS[0])
    ids = mulan.text.tokenize(TEXTS[0])
    assert torch.equal(mulan.get_text_latents(TEXTS[:1]), expected)
    assert torch.equal(mulan.get_text_latents(tuple(TEXTS[:1])), expected)
    assert torch.equal(mulan.get_text_latents(ids), expected)
    padded = mulan.get_text_latents(torch.nn.functional.pad(ids, (0, 9), value=-1))
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)
    wavs = tones(440)
    torch.testing.assert_close(mulan(wavs, ids), mulan(wavs, TEXTS[0]))


def _layered(weight: float = 0.5, loss: torch.nn.Module | None = None) -> MuLaN:
    """A MuLaN with two blocks a tower, of which two pairs of layers are contrasted too."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "heads": 2, "dim_head": 16}
    audio = AudioSpectrogramTransformer(
        dim=32, **sizes, patch_size=8, sample_hz=8000, num_mels=24, spec_n_fft=256, position_waves=0
    )
    text = TextTransformer(dim=24, **sizes, num_tokens=256)
    return tiny_mulan(
        audio_transformer=audio,
        text_transformer=text,
        loss=loss,
        layer_contrast=LayerContrast(((0, 1), (1, 2)), weight=weight),
    )


@pytest.mark.parametrize("loss", [SoftmaxContrastiveLearning(decoupled=True), SigmoidContrastiveLearning()])
def test_layers_are_contrasted_too(loss: torch.nn.Module) -> None:
    """Oracle: the loss of the outputs, and half of those of both pairs, each with projections and loss of its own."""
    mulan, wavs = _layered(0.5, loss), tones(110, 330, 990, 2970)
    expected = mulan.loss(mulan.get_audio_latents(wavs), mulan.get_text_latents(TEXTS))
    heads = mulan.layer_heads
    with torch.no_grad():
        heads.losses[1].log_temperature.fill_(math.log(0.5))
    for pair, (audio_layer, text_layer) in enumerate([(0, 1), (1, 2)]):
        audio = heads.audio_to_latent[pair](mulan.audio.embed_layers(wavs, layers=(audio_layer,))[0])
        text = heads.text_to_latent[pair](mulan.text.embed_layers(TEXTS, layers=(text_layer,))[0])
        latents = (torch.nn.functional.normalize(part, dim=-1) for part in (audio, text))
        expected = expected + 0.5 * heads.losses[pair](*latents)
    value = mulan(wavs, TEXTS)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(parameter.grad is not None for parameter in mulan.parameters())


def test_layer_contrast_survives_saving(tmp_path: Path) -> None:
    """Heads and temperatures of layers are saved; a MuLaN without them has neither weights nor a key for them."""
    mulan, wavs = _layered(0.25), tones(110, 330, 990, 2970)
    save_module(mulan, tmp_path)
    again = load_module(tmp_path, MuLaN)
    assert torch.equal(again(wavs, TEXTS), mulan(wavs, TEXTS)) and again.layer_contrast == mulan.layer_contrast
    plain = tiny_mulan()
    assert "layer_contrast" not in plain.config
    assert not [name for name in plain.state_dict() if name.startswith("layer")]


def test_latents_do_not_depend_on_the_batch() -> None:
    """Alone, in a batch and padded: the same to 1e-5, for audio and for text."""
    mulan, wavs = tiny_mulan(), torch.randn(3, 4000)
    lengths = torch.tensor([4000, 1500, 2500])
    latents = mulan.get_audio_latents(wavs, lengths)
    for item, size in enumerate(lengths.tolist()):
        alone = mulan.get_audio_latents(wavs[item : item + 1, :size])
        torch.testing.assert_close(latents[item : item + 1], alone, atol=1e-5, rtol=0)
    alone = torch.cat([mulan.get_text_latents(text) for text in TEXTS])
    torch.testing.assert_close(mulan.get_text_latents(TEXTS), alone, atol=1e-5, rtol=0)


def test_long_audio_is_averaged_over_windows() -> None:
    """Oracle: windows cut by hand; short audio is one window; a tail below one stride is left out."""
    mulan = tiny_mulan()
    wav = torch.randn(9000)  # windows of 4000 samples every 2000: 0, 2000, 4000
    expected = torch.cat([mulan.get_audio_latents(wav[None, start : start + 4000]) for start in (0, 2000, 4000)])
    torch.testing.assert_close(mulan.window_latents(wav, max_batch=2), expected, atol=1e-5, rtol=0)
    mean = torch.nn.functional.normalize(expected.mean(dim=0), dim=0)
    both = mulan.get_long_audio_latents(torch.stack([wav, wav]), torch.tensor([9000, 3000]))
    torch.testing.assert_close(both[0], mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:], mulan.get_audio_latents(wav[None, :3000]), atol=1e-5, rtol=0)
    torch.testing.assert_close(average_latents(expected), mean)
    assert mulan.window_latents(wav[:100]).shape == (1, 16)


def test_mulan_survives_saving(tmp_path: Path) -> None:
    """A saved and loaded model has the same latents, loss and windows."""
    mulan, wavs = tiny_mulan(loss=SigmoidContrastiveLearning(init_bias=-3.0)), torch.randn(4, 3000)
    save_module(mulan, tmp_path)
    again = load_module(tmp_path, MuLaN)
    assert torch.equal(again.get_audio_latents(wavs), mulan.get_audio_latents(wavs))
    assert torch.equal(again(wavs, TEXTS), mulan(wavs, TEXTS)) and again.config == mulan.config


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mulan_runs_with_weights_of_another_precision(dtype: torch.dtype) -> None:
    """A converted model has nearly the same latents and loss, in float32."""
    mulan, wavs = tiny_mulan(), tones(110, 330, 990, 2970)
    expected = mulan.get_audio_latents(wavs), mulan.get_text_latents(TEXTS), mulan(wavs, TEXTS)
    mulan.to(dtype)
    found = mulan.get_audio_latents(wavs), mulan.get_text_latents(TEXTS), mulan(wavs, TEXTS)
    for own, exact in zip(found, expected):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, exact, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_mulan_trains_in_bfloat16() -> None:
    """Under autocast the loss is close to that in float32, and latents are float32 unit vectors."""
    mulan, wavs = tiny_mulan(), tones(110, 330, 990, 2970)
    with torch.autocast("cpu", torch.bfloat16):
        loss, latents = mulan(wavs, TEXTS), mulan.get_audio_latents(wavs)
    loss.backward()
    assert abs(loss.item() - mulan(wavs, TEXTS).item()) < 0.1
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny_mulan()(torch.randn(3, 1000), TEXTS), "one text per clip"),
        (lambda: tiny_mulan()(torch.randn(3, 1000), TEXTS, clip_index=torch.tensor([0, 1, 1, 0])), "at least once"),
        (lambda: tiny_mulan()(torch.randn(1, 1000), ""), "empty"),
        (lambda: tiny_mulan()(torch.randn(1, 1000), "a", chunk_size=0), "chunk_size"),
        (lambda: tiny_mulan()(torch.randn(3, 1000), TEXTS[:3], negatives=["a"]), "negatives and negative_index"),
        (lambda: tiny_mulan(window_seconds=0), "window"),
        (lambda: tiny_mulan().window_latents(torch.randn(9000), max_batch=0), "max_batch"),
        (lambda: tiny_mulan().window_latents(torch.randn(2, 100)), r"\[n\]"),
        (lambda: tiny_mulan().get_long_audio_latents(torch.randn(1, 2, 9000)), r"\[b, n\]"),
        (lambda: tiny_mulan().get_long_audio_latents(torch.randn(1, 9000), torch.tensor([-5000])), "1..9000"),
        (lambda: tiny_mulan().get_long_audio_latents(torch.randn(1, 9000), torch.tensor([9001])), "1..9000"),
        (lambda: tiny_mulan().get_long_audio_latents(torch.randn(2, 9000), torch.tensor([9000])), "lengths"),
        (lambda: tiny_mulan(layer_contrast=LayerContrast(((1, 1), (2, 1)))), "layer_contrast must have layers"),
        (lambda: LayerContrast(()), "need layers >= 0"),
        (lambda: LayerContrast(((-1, 0),)), "need layers >= 0"),
        (lambda: LayerContrast(weight=0.0), "weight > 0"),
    ],
)
def test_mulan_rejects_wrong_inputs(call: Callable[[], object], words: str) -> None:
    """Error messages name the input and the requirement."""
    with pytest.raises(ValueError, match=words):
        call()


def test_a_text_tower_must_be_a_module() -> None:
    """Other objects would not be trained, moved or saved."""
    text = tiny_mulan().text
    names = ("dim", "depth", "tokenize", "embed_layers", "forward")
    with pytest.raises(TypeError, match="TextTower"):
        tiny_mulan(text_transformer=SimpleNamespace(**{name: getattr(text, name) for name in names}))
