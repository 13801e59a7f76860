import copy
import json
import logging
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from audiolm_pytorch import SemanticTransformer, TextConditioner
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.saving.hub import LoadedModel, load_model, load_tokenizer
from audiolm_pytorch.saving.modules import load_module, save_module
from tests.helpers.published_texts import (
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


@pytest.fixture
def folder(encoder_folders, tmp_path):
    return Path(shutil.copytree(encoder_folders["t5"], tmp_path / "t5"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test may open a socket or look up a host."""
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_states_equal_those_of_transformers(encoder_folders, kind):
    """Tokens, special tokens, padding, mask and eval mode are right on the path from files to states."""
    conditioner = TextConditioner(encoder_folders[kind])
    found = conditioner(TEXTS)
    assert isinstance(found, ConditionTensor) and conditioner.dim == found.embeddings.shape[-1] == 16
    length = found.mask.shape[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folders[kind])
    model = getattr(transformers, ORACLES[kind]).from_pretrained(encoder_folders[kind]).eval()
    inputs = tokenizer(CLEAN, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    mask = inputs.attention_mask.bool()
    assert found.mask.dtype == torch.bool and torch.equal(found.mask, mask)
    assert not mask.all() and mask.any(dim=0).all(), "there is padding, and no more of it than needed"
    assert found.embeddings.dtype == torch.float32
    close(found.embeddings[mask], expected[mask])
    assert (found.embeddings[~mask] == 0).all(), "nothing of other texts past the end"
    assert (expected[0, 1] - expected[1, 1]).abs().max() > 0.01, "the oracle tells texts apart"


@pytest.mark.parametrize("name", only_quick(FAMILIES, QUICK_FAMILIES))
def test_states_of_every_architecture_do_not_depend_on_the_batch(name):
    """A text has equal states alone, in a batch and from transformers directly, for every architecture."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = randomised(model_class(model_class.config_class(**FAMILIES[name])))
    tokenizer = TextTokenizer()
    conditioner = TextConditioner(LoadedModel(copy.deepcopy(model).train()), tokenizer=tokenizer)
    texts = ["harp in hall", "a jig", "x"]
    together = conditioner(texts)
    lengths = together.mask.sum(dim=1).tolist()
    assert len(set(lengths)) == 3 and together.mask.shape[1] == max(lengths)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = conditioner(text)
        assert alone.mask.all() and alone.embeddings.shape == (1, length, 16)
        close(together.embeddings[row : row + 1, :length], alone.embeddings)
        with torch.no_grad():
            close(alone.embeddings, model(input_ids=tokenizer.encode([text])).last_hidden_state)
    further = conditioner([texts[2], "so much longer that everything else is mostly padding"])
    close(further.embeddings[:1, : lengths[2]], together.embeddings[2:, : lengths[2]])


def test_a_str_is_one_text(encoder_folders):
    """A str is one text, not a list of letters."""
    conditioner = TextConditioner(encoder_folders["t5"])
    one, listed = conditioner("slow piano"), conditioner(("slow piano",))
    assert len(one) == 1 and torch.equal(one.mask, listed.mask)
    close(one.embeddings, listed.embeddings, atol=1e-6)


def test_stays_frozen_and_in_eval_mode(encoder_folders):
    """In a model that trains, the encoder has no dropout, no gradients, and float32 states under autocast."""
    conditioner = TextConditioner(encoder_folders["bert"])
    before = conditioner(TEXTS).embeddings
    reader = nn.ModuleDict({"conditioner": conditioner, "head": nn.Linear(16, 1)}).train().requires_grad_(True)
    assert reader.training and not any(part.training for part in conditioner.modules())
    with torch.autocast("cpu", torch.bfloat16):
        states = conditioner(TEXTS).embeddings
    close(states, before, atol=1e-6)
    assert states.dtype == torch.float32 and not states.requires_grad
    reader["head"](states).sum().backward()
    assert all(weight.grad is None for weight in conditioner.parameters()) and reader["head"].weight.grad is not None
    assert not any(weight.requires_grad for weight in TextConditioner(encoder_folders["bert"]).parameters())
    halved = conditioner.to(torch.bfloat16)(TEXTS).embeddings
    assert halved.dtype == torch.float32
    close(halved, before, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_conditioner_is_self_contained(encoder_folders, kind, tmp_path):
    """A saved conditioner loads without the source folder and without a network."""
    copied = shutil.copytree(encoder_folders[kind], tmp_path / "copied")
    conditioner = TextConditioner(copied, max_tokens=12)
    save_module(conditioner, tmp_path / "saved")
    shutil.rmtree(copied)
    again = load_module(tmp_path / "saved", TextConditioner)
    close(again(TEXTS).embeddings, conditioner(TEXTS).embeddings, atol=1e-6)
    assert torch.equal(again(TEXTS).mask, conditioner(TEXTS).mask)
    assert again.fingerprint() == conditioner.fingerprint() and again.config == conditioner.config
    assert again.config["origin"]["source"] == "copied", "no path of this machine"
    assert not any(weight.requires_grad for weight in again.parameters()) and not again.train().training


def test_special_tokens_option_is_saved(encoder_folders, tmp_path):
    """Whether texts have special tokens is saved and is part of the fingerprint."""
    bare = TextTokenizer(load_tokenizer(encoder_folders["bert"]))
    loaded = load_model(encoder_folders["bert"], {"bert": "BertModel"}, unneeded=("pooler.",))
    conditioner = TextConditioner(loaded, tokenizer=bare)
    framed = TextConditioner(encoder_folders["bert"])
    assert framed("drums").mask.sum() == conditioner("drums").mask.sum() + 2
    save_module(conditioner, tmp_path / "bare")
    again = load_module(tmp_path / "bare", TextConditioner)
    close(again("drums").embeddings, conditioner("drums").embeddings, atol=1e-6)
    assert again.fingerprint() == conditioner.fingerprint() != framed.fingerprint()


def test_fingerprint_depends_on_everything_that_changes_states(encoder_folders, folder, tmp_path):
    """A weight, a setting or the token limit changes the fingerprint; the folder does not."""
    known = TextConditioner(encoder_folders["t5"])
    assert TextConditioner(folder).fingerprint() == known.fingerprint()
    other = TextConditioner(write_text_encoder(tmp_path / "other", "t5", seed=1))
    shorter = TextConditioner(folder, max_tokens=9)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "relative_attention_max_distance": 7}))
    nearer = TextConditioner(folder)
    changed = TextConditioner(encoder_folders["t5"])
    with torch.no_grad():
        changed.model.encoder.final_layer_norm.weight[0] += 1e-3
    every = [known, other, shorter, nearer, changed]
    assert len({one.fingerprint() for one in every}) == len(every)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_text_logs_a_warning(encoder_folders, kind, caplog):
    """The first tokens are kept, with special tokens around them."""
    conditioner = TextConditioner(encoder_folders[kind], max_tokens=9)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="audiolm_pytorch"):
        conditioner("drums")
        assert not caplog.records
        cut = conditioner(["drums", "drums " * 40])
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "truncated to max_tokens=9" in caplog.text
    assert cut.mask.shape == (2, 9)
    wanted = transformers.AutoTokenizer.from_pretrained(encoder_folders[kind])(
        " ".join(["drums"] * 40), truncation=True, max_length=9, padding=False
    )
    with torch.no_grad():
        expected = conditioner.model(input_ids=torch.tensor([wanted.input_ids])).last_hidden_state
    close(cut.embeddings[1:], expected)


def refused(match, *args, **kwargs):
    """Check that the constructor raises a ValueError of one line that matches."""
    with pytest.raises(ValueError, match=match) as caught:
        TextConditioner(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_wrong_texts_raise_errors(encoder_folders):
    """Errors name the text and what is needed."""
    conditioner = TextConditioner(encoder_folders["t5"])
    for texts, match in (
        ("", "text 0 of 1 is empty"),
        (["drums", " \n"], "text 1 of 2 is empty"),
        ([], "empty list"),
    ):
        with pytest.raises(ValueError, match=match):
            conditioner(texts)
    for wrong in (3, None, [None], torch.zeros(1, 2, dtype=torch.long)):
        with pytest.raises(TypeError):
            conditioner(wrong)
    for _ in range(20):  # `typed` checks one random item
        with pytest.raises(TypeError, match="NoneType"):
            conditioner(["drums", None, "harp"])


def test_wrong_sources_raise_errors(encoder_folders, folder, tmp_path):
    """Each error is one line with the problem and the fix."""
    refused("no folder .*nowhere", tmp_path / "nowhere")
    refused("offline: nothing is downloaded", "owner/name", offline=True, cache_dir=tmp_path)
    refused("2 or more for this model, got 1", folder, max_tokens=1)
    refused(r"3\.\.40 for this model, got 41", encoder_folders["bert"], max_tokens=41)
    refused(
        "pass the tokenizer of this model",
        encoder_folders["bert"],
        tokenizer=TextTokenizer(load_tokenizer(encoder_folders["roberta"])),
    )
    refused("tokenizer=", load_model(folder, {"t5": "T5EncoderModel"}))
    gpt = LoadedModel(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=300)))
    refused("'gpt2' are not supported; pass a model of a type in .*'t5'", gpt, tokenizer=TextTokenizer())
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    refused("'gpt2'.*'t5'", tmp_path / "gpt2")


def test_a_raw_tokenizer_json_is_enough(folder):
    """A folder without other files of a tokenizer has the same states."""
    before = TextConditioner(folder)(["slow piano", "a fast jig"])
    kept = ("config.json", "tokenizer.json", "model.safetensors")
    for file in [file for file in folder.iterdir() if file.name not in kept]:
        file.unlink()
    after = TextConditioner(folder)(["slow piano", "a fast jig"])
    assert torch.equal(before.embeddings, after.embeddings) and torch.equal(before.mask, after.mask)


def test_damaged_folders_raise_errors(folder):
    """The error names a file that is truncated, missing, changed or a pickle, in one line."""
    files = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors")}
    config = json.loads(files["config.json"])
    changes = {"d_ff": 16}, {"num_layers": 3}, {"d_ff": "wide"}
    for change, match in zip(changes, ("DenseReluDense", "block.2.*missing|missing.*block.2", "d_ff"), strict=True):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        refused(match, folder)
    (folder / "config.json").unlink()
    refused("no config.json", folder)
    (folder / "config.json").write_bytes(files["config.json"])
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer in .* cannot be read .*it has no model", folder)
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer", folder)
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    (folder / "model.safetensors").write_bytes(files["model.safetensors"][:-100])
    refused("cannot be loaded as T5EncoderModel", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("only pytorch_model.bin, which can run code", folder)


@pytest.mark.parametrize("text_as", ["cross", "prefix"])
def test_stage_with_text_dim_needs_no_text_encoder(encoder_folders, text_as, monkeypatch):
    """A stage is built from the width of its text states alone, and its loss depends on the texts."""
    conditioner = TextConditioner(encoder_folders["t5"])
    said = {"text": conditioner(["slow piano", "a fast jig, with drums"])}
    monkeypatch.setitem(sys.modules, "transformers", None)
    stage = SemanticTransformer(
        num_semantic_tokens=8, dim=16, depth=1, heads=1, dim_head=16, text_dim=conditioner.dim, text_as=text_as
    ).eval()
    for weight in stage.parameters():
        nn.init.normal_(weight, std=0.3)
    packed = stage.layout.pack({"semantic": torch.randint(0, 8, (2, 5, 1))})
    losses = [
        stage(packed, conditions).loss for conditions in (said, {"text": said["text"].select(torch.tensor([1, 0]))})
    ]
    assert losses[0].isfinite() and (losses[0] - losses[1]).abs() > 1e-4
