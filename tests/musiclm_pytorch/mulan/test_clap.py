import copy
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers

from audiolm_pytorch.saving.hub import LoadedModel, load_model
from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.mulan import ClapMuLaN, JointEmbedding
from musiclm_pytorch.mulan.clap import ClapSpectrogram
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from tests.helpers.published_texts import randomised, write_roberta_tokenizer

HZ = 48_000
TEXTS = ["Slow piano", "a fast jig with drums and a harp", "naïve 日本 🎻"]


def write_clap(folder: Path, *, fused: bool = False, seed: int = 0) -> Path:
    """A folder as laion/clap-htsat-unfused and -fused are published, with the front end of the published ones."""
    folder.mkdir(parents=True)
    num_tokens = write_roberta_tokenizer(folder)
    text = dict(vocab_size=num_tokens, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    audio = dict(
        patch_embeds_hidden_size=8,
        hidden_size=32,
        depths=[1, 1, 1],
        num_attention_heads=[2, 2, 4],
        num_hidden_layers=3,
        enable_fusion=fused,
        fusion_type="aff_2d" if fused else None,
    )
    config = transformers.ClapConfig(
        text_config=text | {"max_position_embeddings": 42}, audio_config=audio, projection_dim=12
    )
    torch.manual_seed(seed)
    model = randomised(transformers.ClapModel(config))
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-30.0).add_(torch.randn(64))
    norm.running_var.fill_(400.0)
    model.eval().save_pretrained(folder)
    extractor(fused).save_pretrained(folder)
    return folder


def extractor(fused: bool = False, **changes) -> "transformers.ClapFeatureExtractor":
    """The front end of the published models, as transformers has it."""
    truncation = "fusion" if fused else "rand_trunc"
    return transformers.ClapFeatureExtractor(frequency_min=50, truncation=truncation, **changes)


def sound(seconds: float, seed: int = 0) -> torch.Tensor:
    """A wave `[n]`: a chirp in noise of varying loudness, with silence in the middle."""
    count = round(seconds * HZ)
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(count // 4800 + 1, generator=generator).repeat_interleave(4800)[:count].square()
    time = torch.arange(count) / HZ
    wave = 0.3 * torch.sin(2 * torch.pi * (200 + 300 * seed + 700 * time) * time)
    wave = loudness * (wave + 0.1 * torch.randn(count, generator=generator))
    wave[count // 2 : count // 2 + 3000] = 0.0
    return wave


def theirs(folder: Path, waves: list[torch.Tensor], fused: bool = False) -> torch.Tensor:
    """Audio latents of transformers' model and feature extractor; no clip is marked as a crop of a longer one."""
    loader = transformers.ClapFeatureExtractor.from_pretrained(folder)
    inputs = loader([wave.numpy() for wave in waves], sampling_rate=HZ, return_tensors="pt")
    # fused: one clip of every batch is marked at random
    inputs["is_longer"] = torch.zeros(len(waves), 1, dtype=torch.bool)
    model = transformers.ClapModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = model.audio_model(**inputs).pooler_output
        return F.normalize(model.audio_projection(pooled), dim=-1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {fused: write_clap(root / f"clap{int(fused)}", fused=fused) for fused in (False, True)}


@pytest.fixture(scope="module")
def clap(folders):
    return ClapMuLaN.from_pretrained(folders[False])


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("fused", [False, True])
def test_spectrograms_are_those_of_transformers(fused, padding):
    """Guards the front end: mel scale, filter areas, reflection, repetition, decibels, to float32's grain."""
    original = extractor(fused, padding=padding)
    ours = ClapSpectrogram(json.loads(original.to_json_string()))
    for seconds in (0.25, 3.0, 10.0):
        wave = sound(seconds)
        expected = original(wave.numpy(), sampling_rate=HZ, return_tensors="np")["input_features"][0, 0]
        found = ours(wave[None])[0].numpy()
        assert found.shape == expected.shape == (1001, 64)
        assert np.abs(found - expected.astype(np.float32)).max() <= 1e-5, seconds
    assert expected.max() - expected.min() > 60, "from silence to loud"


def test_other_settings_of_the_extractor_are_followed():
    """All numbers come from preprocessor_config.json."""
    changes = dict(
        feature_size=32, sampling_rate=16_000, hop_length=160, fft_window_size=512, max_length_s=2, frequency_max=7000
    )
    original = extractor(**changes)
    ours = ClapSpectrogram(json.loads(original.to_json_string()))
    wave = sound(0.5)[:20_000]
    expected = original(wave.numpy(), sampling_rate=16_000, return_tensors="np")["input_features"][0, 0]
    np.testing.assert_allclose(ours(wave[None])[0].numpy(), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="repeatpad"):
        ClapSpectrogram({"padding": "mirror"})


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_latents_are_those_of_transformers(folders, fused):
    """Guards both towers from files to unit vectors, of models that fuse and that do not."""
    clap = ClapMuLaN.from_pretrained(folders[fused])
    assert isinstance(clap, JointEmbedding) and (clap.sample_hz, clap.dim_latent) == (HZ, 12)
    waves = [sound(10.0), sound(10.0, 1), sound(0.7, 2)]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=7.0)
    found = clap.get_audio_latents(padded, torch.tensor([len(wave) for wave in waves]))
    torch.testing.assert_close(found, theirs(folders[fused], waves), rtol=0, atol=2e-5)
    assert (found[0] - found[2]).abs().max() > 0.01, "the oracle distinguishes sounds"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[fused])
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model = transformers.ClapModel.from_pretrained(folders[fused]).eval()
    with torch.no_grad():
        expected = F.normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)
    torch.testing.assert_close(clap.get_text_latents(TEXTS), expected, rtol=0, atol=1e-5)


def test_alone_in_batch_and_padded_are_the_same(clap):
    """Guards padding on either side; and str, list and ids are one text."""
    waves = [sound(0.3), sound(0.2, 1), sound(0.3, 2)]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=-3.0)
    padded = F.pad(padded, (0, 900), value=float("nan"))
    together = clap.get_audio_latents(padded, torch.tensor([len(wave) for wave in waves]))
    for row, wave in enumerate(waves):
        torch.testing.assert_close(together[row], clap.get_audio_latents(wave[None])[0], rtol=0, atol=1e-5)
    texts = clap.get_text_latents(TEXTS)
    for row, text in enumerate(TEXTS):
        for form in (text, [text], F.pad(clap.tokenize(text), (0, 3), value=-1)):
            torch.testing.assert_close(clap.get_text_latents(form)[0], texts[row], rtol=0, atol=1e-5)
    for bad in (torch.full((1, 900), float("nan")), torch.zeros(1, 2, 900), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match="wav"):
            clap.get_audio_latents(bad)
    with pytest.raises(ValueError, match="empty"):
        clap.get_text_latents(" ")


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_the_same_sound_has_the_same_embedding(folders, fused):
    """The complaint of CLAP's users (LAION-AI/CLAP issues 90 and 166): two calls are bit-identical, at any length."""
    clap = ClapMuLaN(folders[fused], window_stride_seconds=2)
    for seconds in (0.4, 12.5):
        wave = sound(seconds)[None]
        first = clap.get_audio_latents(wave)
        np.random.seed(1)
        torch.manual_seed(1)
        clap.train()
        assert torch.equal(clap.get_audio_latents(wave), first)
    assert torch.equal(clap.get_text_latents(TEXTS), clap.get_text_latents(TEXTS))


@pytest.mark.slow
def test_long_audio_is_the_mean_over_fixed_windows(clap):
    """Long audio is the mean of all windows of 10 s, 1 s apart, as a clip and as a recording."""
    wave = sound(12.3)
    starts = (0, HZ, 2 * HZ)
    windows = torch.cat([clap.get_audio_latents(wave[None, start : start + 10 * HZ]) for start in starts])
    expected = F.normalize(windows.mean(dim=0), dim=-1)
    short = F.pad(sound(0.5, 1), (0, len(wave) - HZ // 2))
    batch, lengths = torch.stack([wave, short]), torch.tensor([len(wave), HZ // 2])
    for found in (clap.get_audio_latents(batch, lengths), clap.get_long_audio_latents(batch, lengths)):
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], clap.get_audio_latents(sound(0.5, 1)[None])[0], rtol=0, atol=1e-5)


def test_clap_is_frozen(clap):
    """Batch norm, dropout and weights do not change when the model is set to training mode."""
    wave = sound(0.3)[None]
    before = clap.get_audio_latents(wave)
    clap.train()
    assert not any(part.training for part in clap.modules())
    found = clap.get_audio_latents(wave)
    assert torch.equal(found, before) and not found.requires_grad
    assert not any(weight.requires_grad for weight in clap.parameters())


def test_saved_clap_needs_no_files_of_others(folders, tmp_path, monkeypatch):
    """Tokenizer, front end and weights are saved with the model, alone and in a quantizer; no hub is needed."""
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    copied = shutil.copytree(folders[False], tmp_path / "copied")
    clap = ClapMuLaN.from_pretrained(copied)
    save_module(clap, tmp_path / "clap")
    shutil.rmtree(copied)
    again = ClapMuLaN.from_pretrained(tmp_path / "clap")
    wave = sound(0.3)[None]
    torch.testing.assert_close(again.get_audio_latents(wave), clap.get_audio_latents(wave), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.get_text_latents(TEXTS), clap.get_text_latents(TEXTS), rtol=0, atol=1e-6)
    assert (again.fingerprint(), again.config) == (clap.fingerprint(), clap.config)
    assert clap.config["origin"]["source"] == "copied", "no path of this machine"
    quantizer = MuLaNEmbedQuantizer(mulan=clap, conditioning_dims=(8,), namespaces=("semantic",), codebook_size=4)
    save_module(quantizer, tmp_path / "quantizer")
    whole = load_module(tmp_path / "quantizer", MuLaNEmbedQuantizer).mulan
    assert isinstance(whole, ClapMuLaN)
    torch.testing.assert_close(whole.get_text_latents(TEXTS), again.get_text_latents(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_fingerprint_names_what_embeddings_depend_on(folders, clap, tmp_path):
    """Another place is the same model; other weights, windows or front ends are others."""
    copied = Path(shutil.copytree(folders[False], tmp_path / "copied"))
    assert ClapMuLaN(copied).fingerprint() == clap.fingerprint()
    found = [clap, ClapMuLaN(copied, window_stride_seconds=2), ClapMuLaN(write_clap(tmp_path / "other", seed=1))]
    extractor(padding="pad").save_pretrained(copied)
    found.append(ClapMuLaN(copied))
    assert len({one.fingerprint() for one in found}) == 4


@pytest.mark.slow
def test_processor_files_of_any_release_are_read(folders, tmp_path):
    """Releases from 5 on write the front end into processor_config.json; both files are read alike."""
    copied = Path(shutil.copytree(folders[False], tmp_path / "copied"))
    (copied / "preprocessor_config.json").unlink()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (copied / name).unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[False])
    transformers.ClapProcessor(extractor(), tokenizer).save_pretrained(copied)
    assert (copied / "tokenizer.json").is_file()
    found = ClapMuLaN(copied)
    assert found.fingerprint() == ClapMuLaN(folders[False]).fingerprint()
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copied / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        ClapMuLaN(copied)


def test_other_models_are_refused(folders, tmp_path, monkeypatch):
    """Each error names the fault; a missing package names the install command."""
    with pytest.raises(ValueError, match="there is no folder"):
        ClapMuLaN.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="offline: nothing is downloaded.*laion/clap"):
        ClapMuLaN.from_pretrained("laion/clap", offline=True, cache_dir=tmp_path / "cache")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="type 'bert', but a ClapMuLaN is needed .*: clap"):
        ClapMuLaN.from_pretrained(tmp_path / "bert")
    loaded = load_model(folders[False], {"clap": "ClapModel"})
    with pytest.raises(ValueError, match="tokenizer="):
        ClapMuLaN(LoadedModel(copy.deepcopy(loaded.model), preprocessor=loaded.preprocessor))
    save_module(ClapMuLaN(folders[False]), tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "musiclm\[pretrained\]"'):
        ClapMuLaN.from_pretrained(folders[False])
    with pytest.raises(ImportError, match="pretrained"):
        ClapMuLaN.from_pretrained(tmp_path / "ours")
