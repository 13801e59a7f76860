import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from audiolm_pytorch.conditioning.base import Conditioner
from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.quantizer import modality_gap
from musiclm_pytorch.quantizer.embed_quantizer import Modality, MuLaNEmbedQuantizer
from musiclm_pytorch.quantizer.fit import measure_quantizer
from tests.helpers.tiny_mulan import tiny_mulan, tones


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
    """Random codebooks are the same in every object, and only the first use warns."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "size"), [(1, 2), (12, 16), (3, 64), (2, 120)])
def test_every_size_is_the_nearest_code_level_by_level(levels: int, size: int) -> None:
    """Oracle: loops in float64 over the codebooks; every level brings the sum of its vectors closer to the latent."""
    quantizer, latents = _quantizer(rq_num_quantizers=levels, codebook_size=size), _latents()
    quantizer.fit(latents)
    fresh = _latents(40).flip(1)
    expected = torch.zeros(40, levels, dtype=torch.long)
    for row, latent in enumerate((fresh - latents.mean(dim=0)).double()):
        left = latent
        for level, codebook in enumerate(quantizer.codebooks.double()):
            expected[row, level] = min(range(size), key=lambda code: float((left - codebook[code]).square().sum()))
            left = left - codebook[expected[row, level]]
    assert torch.equal(quantizer.codes(latents=fresh), expected)
    explained = measure_quantizer(quantizer, latents).explained
    assert all(now >= before - 1e-9 for before, now in zip((0.0, *explained), explained))


@pytest.mark.slow
def test_size_of_the_paper_codes_many_latents_in_little_memory() -> None:
    """12 x 1024: codes do not depend on how many latents are coded at once, nor on autocast, nor on the shape."""
    quantizer = _quantizer(rq_num_quantizers=12, codebook_size=1024)
    latents = F.normalize(torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    codes = quantizer.codes_from_latents(latents)
    assert codes.shape == (4096, 12) and 1000 < int(codes.max()) < 1024
    quantizer.text_map.copy_(torch.linalg.qr(latents[:16]).Q)
    of_texts = quantizer.codes_from_latents(latents, "text")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.codes_from_latents(latents), codes)
        assert torch.equal(quantizer.codes_from_latents(latents, "text"), of_texts)
    assert torch.equal(quantizer.codes_from_latents(latents[5]), codes[5])
    assert quantizer.codes_from_latents(latents[:0].view(2, 0, 16)).shape == (2, 0, 12)


def _check_that_use_changes_nothing(is_fitted: bool) -> None:
    """Use a quantizer as a language model's training does, batch by batch, in training mode."""
    quantizer, latents, wavs = _quantizer(), _latents(), tones(150, 400, 3000)
    if is_fitted:
        quantizer.fit(latents)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    codes, of_wavs = quantizer.eval().codes(latents=latents), quantizer.codes(wavs=wavs)
    quantizer.train()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    for part in order.split(17):
        assert torch.equal(quantizer.codes(latents=latents[part]), codes[part])
        quantizer(codes=codes[part], namespace="semantic").sum().backward()
    assert torch.equal(quantizer.codes(wavs=wavs), of_wavs)
    assert not quantizer.mulan.training and quantizer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    trained = {name for name, parameter in quantizer.named_parameters() if parameter.grad is not None}
    assert trained == {"tables.semantic.weight"}


@pytest.mark.parametrize("is_fitted", [True, False])
def test_use_in_training_mode_changes_nothing(is_fitted: bool) -> None:
    """Fault 3: one explicit fit makes the codebooks; no batch initialises them or moves them, fitted or not."""
    _check_that_use_changes_nothing(is_fitted)


def _initialised_by_the_first_batch(quantizer: MuLaNEmbedQuantizer, latents: Tensor, codes: Tensor) -> None:
    if not hasattr(quantizer, "has_seen"):
        quantizer.has_seen = True
        quantizer.codebooks[0] = latents[torch.arange(quantizer.codebook_size) % len(latents)] - quantizer.audio_mean


def _moving_average(quantizer: MuLaNEmbedQuantizer, latents: Tensor, codes: Tensor) -> None:
    chosen = quantizer.codebooks[0, codes[:, 0]]
    quantizer.codebooks[0, codes[:, 0]] = chosen.lerp(latents - quantizer.audio_mean, 0.2)


@pytest.mark.parametrize("is_fitted", [True, False])
@pytest.mark.parametrize("update", [_initialised_by_the_first_batch, _moving_average])
def test_a_quantizer_that_learns_while_it_conditions_is_noticed(
    update: Callable[[MuLaNEmbedQuantizer, Tensor, Tensor], None], is_fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 3 put in: codebooks of the first batch in training mode, or codes that drift towards what they code."""
    original = MuLaNEmbedQuantizer.codes_from_latents

    def learning(self: MuLaNEmbedQuantizer, latents: Tensor, modality: Modality = "audio") -> Tensor:
        if self.training:
            update(self, latents, original(self, latents, modality))
        return original(self, latents, modality)

    monkeypatch.setattr(MuLaNEmbedQuantizer, "codes_from_latents", learning)
    with pytest.raises(AssertionError):
        _check_that_use_changes_nothing(is_fitted)


def test_each_modality_is_centred_by_its_own_mean() -> None:
    """Texts that differ from audio by a constant and a scale have its codes; not if texts are not aligned."""
    audio = _latents()
    text = 0.5 * audio + torch.linspace(-1, 1, 16)
    quantizer = _quantizer()
    quantizer.fit(audio, text)
    assert measure_quantizer(quantizer, audio, text).agreement == (1.0, 1.0, 1.0)
    quantizer = _quantizer()
    quantizer.fit(audio)
    assert measure_quantizer(quantizer, audio, text).agreement[0] < 0.5
    assert torch.equal(quantizer.codes_from_latents(text, "text"), quantizer.codes_from_latents(text, "audio"))


def test_the_map_of_texts_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts turned by an unknown rotation come back by regression, not by centring."""
    audio = _latents()
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    agreements = []
    for prior_clips in (1e9, 0.1):
        monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", prior_clips)
        quantizer = _quantizer()
        quantizer.fit(audio, audio @ rotation)
        agreements.append(measure_quantizer(quantizer, audio, audio @ rotation).agreement[0])
    assert agreements[0] < 0.5 and agreements[1] > 0.95


def test_clip_index_assigns_texts_to_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts of each clip in any order teach the map; with the wrong clip_index nothing is learned."""
    monkeypatch.setattr(modality_gap, "_PRIOR_CLIPS", 1)
    audio, generator = _latents(), torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    clip_index = torch.randperm(240, generator=generator) % 120
    text = audio[clip_index] @ rotation + 0.02 * torch.randn(240, 16, generator=generator)
    agreements = []
    for given in (clip_index, clip_index.roll(1)):
        quantizer = _quantizer()
        quantizer.fit(audio, text, clip_index=given)
        agreements.append(measure_quantizer(quantizer, audio, text, clip_index=clip_index).agreement[0])
    assert agreements[0] > 0.9 and agreements[1] < 0.5


def test_audio_longer_than_a_window_is_averaged_before_it_is_quantized() -> None:
    """Oracle (MusicLM, sec. 3.2): a mean over windows cut by hand; padding, company and lengths change nothing."""
    quantizer = _quantizer(codebook_size=64)
    parts = [tones(low, seconds=0.7)[0] for low in (120, 700)] + [tones(3000, seconds=0.9)[0]]
    wav = torch.cat(parts)  # 2.3 s in windows of 0.5 s every 0.25 s
    windows = [wav[start : start + 4000] for start in range(0, 18400 - 4000 + 1, 2000)]
    with torch.no_grad():
        latents = torch.cat([quantizer.mulan.get_audio_latents(window[None]) for window in windows])
    expected = quantizer.codes_from_latents(F.normalize(latents.mean(dim=0), dim=0))
    assert torch.equal(quantizer.codes(wavs=wav[None])[0], expected)
    assert not torch.equal(quantizer.codes_from_latents(latents[0]), expected)
    noise = torch.randn(2, 60000, generator=torch.Generator().manual_seed(0))
    padded, lengths = torch.cat([F.pad(wav, (0, 41600), value=0.3)[None], noise]), torch.tensor([18400, 60000, 3000])
    assert torch.equal(quantizer.codes(wavs=padded, lengths=lengths)[0], expected)
    assert not torch.equal(quantizer.codes(wavs=padded)[0], expected)


class _Planted(JointEmbedding):
    """A joint embedding that is no MuLaN: loudness and the length of texts."""

    def __init__(self) -> None:
        super().__init__(dim_latent=2, sample_hz=8000, window_seconds=0.5, window_stride_seconds=0.25)

    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        angles = wavs.abs().mean(dim=1)
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        angles = torch.tensor([len(text) / 10 for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_any_joint_embedding_is_quantized() -> None:
    """A pretrained model in the place of MuLaN gives codes of audio, of long audio and of texts."""
    quantizer = _quantizer(mulan=_Planted(), codebook_size=4)
    wavs = torch.linspace(0, 1.5, 12)[:, None] * torch.ones(12, 4000)
    texts = ["x" * (1 + length) for length in range(12)]
    quantizer.fit(quantizer.mulan.get_audio_latents(wavs), quantizer.mulan.get_text_latents(texts))
    codes = quantizer.codes(wavs=wavs)
    assert len(codes[:, 0].unique()) == 4
    assert torch.equal(quantizer.codes(wavs=wavs.repeat(1, 3)), codes)
    assert (quantizer.codes(texts=texts)[:, 0] == codes[:, 0]).double().mean() > 0.8


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
    quantizer.fit(latents, latents.flip(1))
    save_module(quantizer, tmp_path)
    again = load_module(tmp_path, MuLaNEmbedQuantizer)
    assert bool(again.fitted) and again.config == quantizer.config
    assert torch.equal(again.codes(latents=latents), quantizer.codes(latents=latents))
    assert torch.equal(again(texts="low tone", namespace="semantic"), quantizer(texts="low tone", namespace="semantic"))


def _fitted(**changes: object) -> MuLaNEmbedQuantizer:
    quantizer, latents = _quantizer(**changes), _latents()
    quantizer.fit(latents, latents.flip(1))
    return quantizer


@pytest.mark.slow
def test_fingerprint_is_of_what_codes_depend_on(tmp_path: Path) -> None:
    """Every weight behind the codes changes it; the stages' tables, their widths and names, mode and file do not."""
    quantizer = _fitted()
    own = quantizer.fingerprint()
    assert own == _fitted().fingerprint() == _fitted(conditioning_dims=(4,), namespaces=("fine",)).fingerprint()
    assert own == quantizer.train().fingerprint() and own != _quantizer().fingerprint()
    with torch.no_grad():
        quantizer.tables["semantic"].weight.add_(1)
    save_module(quantizer, tmp_path)
    assert own == quantizer.fingerprint() == load_module(tmp_path).fingerprint()
    seen = {own, _fitted(rq_num_quantizers=2).fingerprint(), _fitted(codebook_size=4).fingerprint()}
    seen.add(_fitted(mulan=tiny_mulan(window_stride_seconds=0.5)).fingerprint())
    names = ("codebooks", "audio_mean", "text_mean", "text_map", "mulan.audio_to_latent.weight")
    for name in names:
        other = _fitted()
        with torch.no_grad():
            other.state_dict()[name].view(-1)[-1].mul_(1.001).add_(1e-3)
        seen.add(other.fingerprint())
    assert len(seen) == 4 + len(names)


def test_fingerprint_uses_that_of_a_published_model() -> None:
    """Names of its weights change between releases, so that its own fingerprint is used."""
    quantizer = _quantizer(mulan=_Planted())
    first = quantizer.fingerprint()
    quantizer.mulan.fingerprint = lambda: "the published one"
    named = quantizer.fingerprint()
    assert named != first
    quantizer.mulan.register_buffer("renamed", torch.ones(1))
    assert quantizer.fingerprint() == named


def test_quantizer_rejects_wrong_inputs() -> None:
    """Error messages name the input and the requirement."""
    quantizer, latents = _quantizer(), _latents()
    for name in ("a.b", "", "keys"):
        with pytest.raises(ValueError, match="namespaces cannot be called"):
            MuLaNEmbedQuantizer(mulan=quantizer.mulan, conditioning_dims=(4,), namespaces=(name,))
    with pytest.raises(ValueError, match=r"audio_latents must be \[n, "):
        quantizer.fit(latents[0])
    with pytest.raises(ValueError, match="more audio"):
        quantizer.fit(latents[:7])
    with pytest.raises(ValueError, match="text_latents"):
        quantizer.fit(latents, latents[:50])
    with pytest.raises(ValueError, match="text_latents"):
        quantizer.fit(latents, clip_index=torch.arange(120))
    with pytest.raises(ValueError, match="clip_index"):
        quantizer.fit(latents, latents[:50], clip_index=torch.arange(49))
    with pytest.raises(ValueError, match=r"clip_index in 0\.\.119"):
        quantizer.fit(latents, latents[:50], clip_index=torch.arange(50) + 71)
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
