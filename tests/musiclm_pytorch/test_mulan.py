import math
import sys
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.io import load_module, save_module
from musiclm_pytorch.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    SigmoidContrastiveLearning,
    TextTransformer,
    average_latents,
)

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tiny_mulan import tiny_mulan, tones

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
    """save_module / load_module gives the same latents, the same loss and the same windows."""
    mulan, wavs = tiny_mulan(loss=SigmoidContrastiveLearning(init_bias=-3.0)), torch.randn(4, 3000)
    save_module(mulan, tmp_path)
    again = load_module(tmp_path, MuLaN)
    assert torch.equal(again.get_audio_latents(wavs), mulan.get_audio_latents(wavs))
    assert torch.equal(again(wavs, TEXTS), mulan(wavs, TEXTS)) and again.config == mulan.config


def test_mulan_trains_in_bfloat16() -> None:
    """Autocast gives nearly the loss of float32, and unit latents in float32."""
    mulan, wavs = tiny_mulan(), tones(110, 330, 990, 2970)
    with torch.autocast("cpu", torch.bfloat16):
        loss, latents = mulan(wavs, TEXTS), mulan.get_audio_latents(wavs)
    loss.backward()
    assert abs(loss.item() - mulan(wavs, TEXTS).item()) < 0.1
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(4))


def test_mulan_rejects_what_does_not_fit() -> None:
    """Errors name what was given and what is needed."""
    mulan = tiny_mulan()
    with pytest.raises(ValueError, match="one text a clip"):
        mulan(torch.randn(3, 1000), TEXTS)
    with pytest.raises(ValueError, match="empty"):
        mulan(torch.randn(1, 1000), "")
    with pytest.raises(ValueError, match="window"):
        tiny_mulan(window_seconds=0)
    with pytest.raises(ValueError, match=r"\[n\]"):
        mulan.window_latents(torch.randn(2, 100))
