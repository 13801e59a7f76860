import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from audiolm_pytorch.conditioning import Conditioner
from audiolm_pytorch.io import load_module, save_module
from musiclm_pytorch.embed_quantizer import Modality, MuLaNEmbedQuantizer

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tiny_mulan import tiny_mulan, tones


def _quantizer(**changes: object) -> MuLaNEmbedQuantizer:
    parts = {"mulan": tiny_mulan(), "conditioning_dims": (12, 20), "namespaces": ("semantic", "coarse")}
    torch.manual_seed(1)
    return MuLaNEmbedQuantizer(**{**parts, "rq_num_quantizers": 3, "codebook_size": 8, **changes})


def _latents(size: int = 120) -> Tensor:
    """Unit vectors in twelve loose clusters."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(12, 16, generator=generator)
    noise = torch.randn(size, 16, generator=generator)
    return F.normalize(centres[torch.arange(size) % 12] + 0.3 * noise, dim=-1)


def test_snippet_of_the_design_runs() -> None:
    """Eight levels of 1024 codes and a namespace for each stage, before any fit."""
    quantizer = MuLaNEmbedQuantizer(
        mulan=tiny_mulan(), conditioning_dims=(1024, 1024, 1024), namespaces=("semantic", "coarse", "fine")
    )
    assert quantizer(wavs=torch.randn(2, 1024), namespace="semantic").shape == (2, 8, 1024)


def test_unfitted_quantizer_warns_once_and_is_fixed(caplog: pytest.LogCaptureFixture) -> None:
    """Random codebooks are the same in every object, and only the first use says that they are random."""
    quantizer, latents = _quantizer(), _latents()
    with caplog.at_level(logging.WARNING):
        codes = quantizer.codes(latents=latents)
        quantizer.codes(latents=latents)
    assert sum("not fitted" in record.message for record in caplog.records) == 1
    assert torch.equal(_quantizer().codes(latents=latents), codes)
    assert all(len(codes[:, level].unique()) > 1 for level in range(3))


def test_codes_equal_a_naive_loop_over_k_means() -> None:
    """Oracle: scikit-learn's k-means and its predictions, level by level on residuals, on centred latents."""
    quantizer, latents = _quantizer(), _latents()
    quantizer.fit(latents, seed=3)
    residual = (latents - latents.mean(dim=0)).numpy()
    expected = []
    for level in range(3):
        kmeans = KMeans(8, n_init=1, random_state=3 + level).fit(residual)
        expected.append(torch.from_numpy(kmeans.predict(residual)).long())
        residual = residual - kmeans.cluster_centers_[kmeans.predict(residual)]
    codes = quantizer.codes_from_latents(latents)
    assert (codes == torch.stack(expected, dim=1)).float().mean() > 0.99
    assert quantizer.codes_from_latents(latents.view(4, 30, 16)).shape == (4, 30, 3)


def _check_that_use_changes_nothing() -> None:
    quantizer, latents = _quantizer(), _latents()
    quantizer.fit(latents)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    codes = quantizer.eval().codes(latents=latents)
    quantizer.train()
    order = torch.randperm(120)
    for part in order.split(17):
        assert torch.equal(quantizer.codes(latents=latents[part]), codes[part])
        quantizer(codes=codes[part], namespace="semantic").sum().backward()
    assert not quantizer.mulan.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_use_in_training_mode_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 3: no batch initialises or moves a codebook; one that drifts towards what it sees is noticed."""
    _check_that_use_changes_nothing()
    original = MuLaNEmbedQuantizer.codes_from_latents

    def drifting(self: MuLaNEmbedQuantizer, latents: Tensor, modality: Modality = "audio") -> Tensor:
        codes = original(self, latents, modality)
        if self.training:
            self.codebooks[0, codes[:, 0]] = self.codebooks[0, codes[:, 0]].lerp(latents - self.audio_mean, 0.2)
        return codes

    monkeypatch.setattr(MuLaNEmbedQuantizer, "codes_from_latents", drifting)
    with pytest.raises(AssertionError):
        _check_that_use_changes_nothing()


def test_each_modality_is_centred_by_its_own_mean() -> None:
    """Texts that stand apart from audio by a constant, and spread less, get the codes of their audio."""
    quantizer, audio = _quantizer(), _latents()
    text = 0.5 * audio + torch.linspace(-1, 1, 16)
    quantizer.fit(audio, text)
    assert quantizer.code_agreement(audio, text) == [1.0, 1.0, 1.0]
    naive = (quantizer.codes_from_latents(text, "audio") == quantizer.codes_from_latents(audio)).float().mean()
    assert naive < 0.5


def test_ridge_learns_where_texts_are() -> None:
    """Texts turned by an unknown rotation come back by regression, not by centring."""
    audio = _latents()
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    agreements = []
    for ridge in (None, 1e-3):
        quantizer = _quantizer()
        quantizer.fit(audio, audio @ rotation, ridge=ridge)
        agreements.append(quantizer.code_agreement(audio, audio @ rotation)[0])
    assert agreements[0] < 0.5 and agreements[1] > 0.95


def test_more_levels_are_closer() -> None:
    """Every level of codes brings the sum of its vectors closer to the latent."""
    quantizer, latents = _quantizer(), _latents()
    quantizer.fit(latents)
    codes = quantizer.codes(latents=latents)
    left, errors = latents - latents.mean(dim=0), []
    for level in range(3):
        left = left - quantizer.codebooks[level][codes[:, level]]
        errors.append(left.square().sum(dim=1).mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_audio_text_and_codes_take_the_same_way() -> None:
    """Embeddings of audio and of texts are those of their codes, also for audio longer than a window."""
    quantizer = _quantizer()
    wavs = tones(220, 880, seconds=1.2)
    codes = quantizer.codes(wavs=wavs)
    expected = quantizer.codes_from_latents(quantizer.mulan.get_long_audio_latents(wavs))
    assert torch.equal(codes, expected)
    assert torch.equal(quantizer(wavs=wavs, namespace="coarse"), quantizer(codes=codes, namespace="coarse"))
    texts = quantizer.codes_from_latents(quantizer.mulan.get_text_latents(["a", "b"]), "text")
    assert torch.equal(quantizer.codes(texts=["a", "b"]), texts)
    conditioning = quantizer.conditioning(texts=["a", "b"], namespace="coarse")
    assert torch.equal(conditioning.embeddings, quantizer(codes=texts, namespace="coarse"))
    assert conditioning.mask.shape == (2, 3) and conditioning.mask.all()


def test_namespaces_have_tables_of_their_own() -> None:
    """Only the table asked for gets a gradient; every (level, code) has its own row."""
    quantizer = _quantizer()
    codes = torch.tensor([[0, 0, 0], [7, 7, 7]])
    quantizer(codes=codes, namespace="coarse").sum().backward()
    touched = quantizer.table("coarse").weight.grad.sum(dim=1).nonzero().flatten().tolist()
    assert touched == [0, 7, 8, 15, 16, 23]
    assert quantizer.table("semantic").weight.grad is None
    assert all(parameter.grad is None for parameter in quantizer.mulan.parameters())
    assert (quantizer.dim("semantic"), quantizer.dim("coarse")) == (12, 20)
    assert isinstance(quantizer, Conditioner)


def test_quantizer_survives_saving(tmp_path: Path) -> None:
    """A loaded quantizer is fitted, has the same codes of audio and text, and the same tables."""
    quantizer, latents = _quantizer(), _latents()
    quantizer.fit(latents, latents.flip(1), ridge=0.1)
    save_module(quantizer, tmp_path)
    again = load_module(tmp_path, MuLaNEmbedQuantizer)
    assert bool(again.fitted) and again.config == quantizer.config
    assert torch.equal(again.codes(latents=latents), quantizer.codes(latents=latents))
    assert torch.equal(again(texts="low tone", namespace="semantic"), quantizer(texts="low tone", namespace="semantic"))


def test_quantizer_rejects_what_does_not_fit() -> None:
    """Errors name what was given and what is needed."""
    quantizer, latents = _quantizer(), _latents()
    with pytest.raises(ValueError, match="more audio"):
        quantizer.fit(latents[:7])
    with pytest.raises(ValueError, match="pair"):
        quantizer.fit(latents, latents[:50])
    with pytest.raises(ValueError, match="text_latents"):
        quantizer.fit(latents, ridge=0.1)
    with pytest.raises(ValueError, match="NaN"):
        quantizer.fit(latents.masked_fill(latents > 0.5, torch.nan))
    quantizer.fit(latents)
    with pytest.raises(ValueError, match="already"):
        quantizer.fit(latents)
    with pytest.raises(ValueError, match="exactly one"):
        quantizer(namespace="semantic")
    with pytest.raises(ValueError, match="exactly one"):
        quantizer(wavs=torch.randn(1, 100), texts="a", namespace="semantic")
    with pytest.raises(ValueError, match="'fine'"):
        quantizer(texts="a", namespace="fine")
    with pytest.raises(ValueError, match=r"0\.\.7"):
        quantizer(codes=torch.full((1, 3), 8), namespace="semantic")
    with pytest.raises(ValueError, match=r"\[b, 3\]"):
        quantizer(codes=torch.zeros(1, 4, dtype=torch.long), namespace="semantic")
    with pytest.raises(ValueError, match="16"):
        quantizer.codes_from_latents(torch.randn(2, 15))
    with pytest.raises(ValueError, match="one conditioning dim"):
        _quantizer(namespaces=("semantic", "semantic"))
