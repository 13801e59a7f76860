import copy
import logging
import shutil
import socket
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.saving.hub import LoadedModel, load_model, load_tokenizer
from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.mulan import MuLaN, TextTower, TextTransformer, TransformersTextEncoder
from tests.helpers.published_texts import (
    CAPTIONS,
    CLEAN,
    FAMILIES,
    KINDS,
    ORACLES,
    QUICK_FAMILIES,
    TEXTS,
    randomised,
    write_text_encoder,
)
from tests.helpers.quick import only_quick
from tests.helpers.tiny_mulan import tiny_mulan, tones


@pytest.fixture
def folder(encoder_folders, tmp_path):
    return Path(shutil.copytree(encoder_folders["bert"], tmp_path / "bert"))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_means_of_transformers_hidden_states(encoder_folders, kind):
    """Guards the whole path from files to embeddings: tokens, special tokens, padding, mask, every layer."""
    encoder = TransformersTextEncoder(encoder_folders[kind])
    assert isinstance(encoder, TextTower) and (encoder.dim, encoder.depth) == (16, 2) and not encoder.training
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folders[kind])
    model = getattr(transformers, ORACLES[kind]).from_pretrained(encoder_folders[kind]).eval()
    inputs = tokenizer(
        CLEAN, padding=True, truncation=True, max_length=encoder.tokenize(TEXTS).shape[1], return_tensors="pt"
    )
    with torch.no_grad():
        states = model(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True
        ).hidden_states
    mask = inputs.attention_mask.unsqueeze(-1)
    expected = torch.stack([(state * mask).sum(1) / mask.sum(1) for state in states])
    torch.testing.assert_close(encoder.embed_layers(TEXTS, layers=(0, 1, 2)), expected, rtol=0, atol=1e-5)
    assert torch.equal(encoder(TEXTS), encoder.embed_layers(TEXTS, layers=(2,))[0]), "forward is the last layer"
    assert (expected[2, 0] - expected[2, 1]).abs().max() > 0.01, "the oracle distinguishes texts"
    with pytest.raises(ValueError, match=r"0\.\.2"):
        encoder.embed_layers(TEXTS, layers=(3,))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(encoder_folders, kind, caplog):
    """Guards special tokens at both ends, also of a text that is cut, and padding and truncation in the files."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folders[kind])
    encoder = TransformersTextEncoder(encoder_folders[kind], max_seq_len=9)
    wanted = tokenizer(CLEAN, truncation=True, max_length=9, padding=False).input_ids
    with caplog.at_level(logging.WARNING):
        ids = encoder.tokenize(TEXTS)
    assert (
        [row[row >= 0].tolist() for row in ids] == wanted
        and ids.shape[1] == 9
        and "truncated to max_tokens=9" in caplog.text
    )
    assert any(len(row) < 9 for row in wanted), "a row is padded"
    assert torch.equal(encoder.tokenize(ids), ids) and torch.equal(
        encoder.tokenize("drums"), encoder.tokenize(["drums"])
    )


@pytest.mark.parametrize("name", only_quick(FAMILIES, QUICK_FAMILIES))
def test_every_family_gives_a_text_the_same_embedding_in_any_batch(name):
    """Guards pads, masks and positions of every architecture that is read: alone = in a batch = padded = by hand."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = randomised(model_class(model_class.config_class(**FAMILIES[name])))
    encoder = TransformersTextEncoder(LoadedModel(copy.deepcopy(model)), tokenizer=TextTokenizer()).eval()
    assert (encoder.dim, encoder.depth) == (16, 2)
    ids = torch.randint(5, 300, (3, 12))
    ids[1, 7:], ids[2, 1:] = -1, -1
    together = encoder.embed_layers(ids, layers=(2, 0, 1))
    for row, length in enumerate((12, 7, 1)):
        alone = encoder.embed_layers(ids[row : row + 1, :length], layers=(2, 0, 1))
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=0, atol=1e-5)
        with torch.no_grad():
            out = model(input_ids=ids[row : row + 1, :length], output_hidden_states=True)
        assert len(out.hidden_states) == 3
        for found, state in zip(alone, (out.last_hidden_state, *out.hidden_states[:2]), strict=True):
            torch.testing.assert_close(found, state.mean(dim=1), rtol=0, atol=1e-5)
    assert torch.equal(encoder(ids), encoder(ids)), "two calls are the same"


@pytest.mark.parametrize("name", only_quick(FAMILIES, QUICK_FAMILIES))
def test_fine_tuned_encoders_learn_with_every_weight(name):
    """A weight without a gradient (a pooling layer, a decoder) stops data parallel training: there is none."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    loaded = LoadedModel(model_class(model_class.config_class(**FAMILIES[name])))
    encoder = TransformersTextEncoder(loaded, tokenizer=TextTokenizer(), frozen=False)
    assert encoder.training and encoder.model.training
    encoder(torch.randint(5, 300, (2, 12))).square().sum().backward()
    assert not [name for name, weight in encoder.named_parameters() if weight.grad is None]


def test_frozen_stays_frozen_in_train_mode(encoder_folders):
    """Guards dropout and gradients in a MuLaN that trains: the frozen tower stays as it is."""
    encoder = TransformersTextEncoder(encoder_folders["bert"])
    before = encoder(TEXTS)
    mulan = tiny_mulan(text_transformer=encoder)
    mulan.train()
    assert mulan.training and not any(part.training for part in encoder.modules())
    assert torch.equal(encoder(TEXTS), before)
    mulan(tones(220.0, 440.0), TEXTS[:2]).backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in encoder.parameters())
    assert mulan.text_to_latent.weight.grad.abs().max() > 0
    mulan.requires_grad_(True)
    assert not encoder(TEXTS).requires_grad, "not even when somebody wakes all weights of a model"
    tuned = TransformersTextEncoder(encoder_folders["bert"], frozen=False)
    assert not torch.equal(tuned(TEXTS), tuned(TEXTS)), "dropout of the model's own settings"
    torch.testing.assert_close(tuned.eval()(TEXTS), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", only_quick(KINDS, ["bert"]))
def test_saved_encoder_needs_no_files_of_others(encoder_folders, kind, tmp_path, monkeypatch):
    """Tokenizer, weights and settings are saved with the model, alone and in a MuLaN; no hub is needed."""
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    copied = shutil.copytree(encoder_folders[kind], tmp_path / "copied")
    encoder = TransformersTextEncoder(copied, max_seq_len=12)
    mulan = tiny_mulan(text_transformer=encoder)
    save_module(encoder, tmp_path / "encoder")
    save_module(mulan, tmp_path / "mulan")
    shutil.rmtree(copied)
    again = load_module(tmp_path / "encoder", TransformersTextEncoder)
    torch.testing.assert_close(again(TEXTS), encoder(TEXTS), rtol=0, atol=1e-6)
    assert torch.equal(again.tokenize(TEXTS), encoder.tokenize(TEXTS))
    old = {name: value for name, value in encoder.config.items() if name != "special_tokens"}
    assert TransformersTextEncoder.from_config(old).config == encoder.config, "as the first release wrote it"
    assert again.frozen and again.fingerprint() == encoder.fingerprint() and again.config == encoder.config
    assert encoder.config["origin"]["source"] == "copied", "no path of this machine"
    whole = load_module(tmp_path / "mulan", MuLaN)
    torch.testing.assert_close(whole.get_text_latents(TEXTS), mulan.get_text_latents(TEXTS), rtol=0, atol=1e-6)


def test_fingerprint_names_what_embeddings_depend_on(encoder_folders, folder, tmp_path):
    """Another place is the same model; other weights or another cut are others."""
    known = TransformersTextEncoder(encoder_folders["bert"])
    assert TransformersTextEncoder(folder, frozen=False).fingerprint() == known.fingerprint()
    other = TransformersTextEncoder(write_text_encoder(tmp_path / "other", "bert", seed=1))
    shorter = TransformersTextEncoder(folder, max_seq_len=9)
    assert len({known.fingerprint(), other.fingerprint(), shorter.fingerprint()}) == 3


def test_without_transformers_the_extra_is_named(encoder_folders, monkeypatch):
    """A missing package names the install command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    for source in (encoder_folders["t5"], "google/flan-t5-small"):
        with pytest.raises(ImportError, match=r'pip install "musiclm\[pretrained\]"'):
            TransformersTextEncoder(source)
    with pytest.raises(ImportError, match="pretrained"):
        load_tokenizer(encoder_folders["t5"])


def test_a_hub_id_takes_weights_and_tokenizer_of_one_commit(encoder_folders, tmp_path, monkeypatch):
    """Tokenizer files are among what is fetched, at the commit of the weights; offline is handed on."""
    snapshot = shutil.copytree(encoder_folders["bert"], tmp_path / "snapshots" / "0abc")
    asked = []

    def fetch(name, **settings):
        asked.append(settings)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    encoder = TransformersTextEncoder("google-bert/bert", offline=True)
    assert [(one["revision"], one["local_files_only"]) for one in asked] == [(None, True), ("0abc", True)]
    for name in ("vocab.txt", "tokenizer.json", "spiece.model", "merges.txt"):
        assert any(fnmatch(name, pattern) for pattern in asked[0]["allow_patterns"])
    assert encoder.config["origin"] == {
        "source": "google-bert/bert",
        "revision": "0abc",
        "licence": LoadedModel.licence,
    }


@pytest.mark.slow
def test_wrong_inputs_are_refused(encoder_folders, folder, tmp_path):
    """Each error names the fault and the fix."""
    with pytest.raises(ValueError, match=r"3\.\.40"):
        TransformersTextEncoder(folder, max_seq_len=41)
    with pytest.raises(ValueError, match=r"got 2"):
        TransformersTextEncoder(folder, max_seq_len=2)
    assert TransformersTextEncoder(encoder_folders["roberta"]).tokenize("x" * 500).shape == (1, 40), (
        "pads take two positions"
    )
    with pytest.raises(ValueError, match="pass the tokenizer of this model"):
        TransformersTextEncoder(folder, tokenizer=TextTokenizer(load_tokenizer(encoder_folders["roberta"])))
    with pytest.raises(ValueError, match="empty"):
        TransformersTextEncoder(folder)(["drums", "  "])
    loaded = load_model(folder, {"bert": "BertModel"}, unneeded=("pooler.",))
    with pytest.raises(ValueError, match="tokenizer="):
        TransformersTextEncoder(loaded)
    with pytest.raises(ValueError, match="pooler.dense"):
        load_model(folder, {"bert": "BertModel"})
    for name in ("vocab.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no tokenizer"):
        TransformersTextEncoder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        TransformersTextEncoder(folder)
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'gpt2'.*'albert'"):
        TransformersTextEncoder(tmp_path / "gpt2")


def test_our_own_tower_is_a_text_tower():
    """`TextTransformer` derives from the base class that MuLaN requires."""
    tower = TextTransformer(dim=8, depth=1, heads=1, dim_head=8, num_tokens=256)
    assert isinstance(tower, TextTower) and not isinstance(torch.nn.Linear(2, 2), TextTower)
    assert CAPTIONS[0] == TextTokenizer().decode(tower.tokenize(CAPTIONS[0]))[0]
