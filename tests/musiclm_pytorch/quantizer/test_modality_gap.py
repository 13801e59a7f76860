import numpy as np
import pytest
import torch
from torch import Tensor

from musiclm_pytorch.quantizer import modality_gap
from musiclm_pytorch.quantizer.modality_gap import align_texts


def _pairs(clips: int = 60, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Audio, two texts of each clip (a gap, a turn, noise) and their clip_index, in mixed order."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(clips, width, generator=generator) * torch.linspace(0.3, 2, width) + 3
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    clip_index = torch.randperm(2 * clips, generator=generator) % clips
    noise = torch.randn(2 * clips, width, generator=generator)
    return audio, 0.4 * (audio[clip_index] @ turn) + 0.1 * noise - 2, clip_index


def _aligned(text: Tensor, alignment: tuple[Tensor, ...]) -> np.ndarray:
    _, text_mean, text_map = alignment
    return ((text.double() - text_mean) @ text_map).numpy()


@pytest.mark.parametrize("ridge", [0.5, 40.0, 1e6])
def test_map_equals_gradient_descent_on_its_objective(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: minimise the squared distance of pairs plus the weighted squared change of the scaled texts."""
    monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", ridge)
    audio, text, clip_index = _pairs()
    a, t = (audio.double() - audio.double().mean(0)).numpy(), (text.double() - text.double().mean(0)).numpy()
    scale = np.sqrt((a**2).mean() / (t**2).mean())
    target = a[clip_index.numpy()]
    weight = ridge / len(audio) * (t**2).mean()
    change = np.zeros((5, 5))
    step = 0.9 / (np.linalg.eigvalsh(t.T @ t / len(t)).max() + weight)
    for _ in range(3000):
        gradient = t.T @ (scale * t + t @ change - target) / len(t) + weight * change
        change -= step * gradient
    expected = scale * t + t @ change
    expected *= np.sqrt((a**2).mean() / (expected**2).mean())
    np.testing.assert_allclose(_aligned(text, align_texts(audio, text, clip_index)), expected, atol=1e-6)


def test_few_pairs_leave_texts_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of a thousand clips undoes a rotation; one clip, or a huge prior, leaves centring and scale alone."""
    audio, text, clip_index = _pairs(1000)
    centred_audio, centred_text = (part.double() - part.double().mean(dim=0) for part in (audio, text))
    centred = (centred_text * (centred_audio.square().mean() / centred_text.square().mean()).sqrt()).numpy()
    monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", 10)
    mapped = _aligned(text, align_texts(audio, text, clip_index))
    target = (audio[clip_index] - audio.mean(dim=0)).numpy()
    assert ((mapped - target) ** 2).mean() < 0.2 * ((centred - target) ** 2).mean()
    one = align_texts(audio, text[:1], clip_index[:1])
    assert torch.equal(one.text_map, torch.eye(5, dtype=torch.float64))
    monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", 1e12)
    np.testing.assert_allclose(_aligned(text, align_texts(audio, text, clip_index)), centred, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6])
def test_one_text_for_all_clips_is_not_stretched_by_rounding(noise: float) -> None:
    """All clips have the same caption, whose latent differs by rounding from batch to batch: nothing is learned."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    text = audio[:1].expand(40, -1) + noise * torch.randn(40, 8, generator=generator)
    assert torch.equal(align_texts(audio, text, torch.arange(40)).text_map, torch.eye(8, dtype=torch.float64))


def test_spread_of_texts_becomes_that_of_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts do not stay in the middle of the codebooks, whatever the prior."""
    audio, text, clip_index = _pairs()
    spread = (audio - audio.mean(dim=0)).square().mean().item()
    for prior_clips in (1e-3, 400.0):
        monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", prior_clips)
        assert (_aligned(text, align_texts(audio, text, clip_index)) ** 2).mean() == pytest.approx(spread)


def test_repeated_rows_are_several_texts_of_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts with clip_index give what audio written out once for each text gives; how many clips there are counts."""
    audio, text, clip_index = _pairs()
    indexed = align_texts(audio, text, clip_index)
    monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", 800)
    written_out = align_texts(audio[clip_index], text, torch.arange(len(text)))
    for one, other in zip(indexed, written_out):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_wrong_inputs_are_refused() -> None:
    """Error messages name the input."""
    audio, text, clip_index = _pairs()
    with pytest.raises(ValueError, match=r"clip_index in 0\.\.59"):
        align_texts(audio, text, clip_index + 1)
    with pytest.raises(ValueError, match=r"clip_index in 0\.\.59"):
        align_texts(audio, text, clip_index[1:])
    with pytest.raises(ValueError, match="need at least one text"):
        align_texts(audio, text[:0], clip_index[:0])
