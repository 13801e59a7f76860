"""Models composed of own parts become folders, from Python alone, and come back with equal tokens."""

import json
import random

import numpy as np
import pytest
import torch

import audiolm_pytorch
import musiclm_pytorch
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.lm.stages import CoarseTransformer, SemanticTransformer
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.saving.files import read_json, write_json
from audiolm_pytorch.saving.model_folder import PART_FILES, write_model_folder
from audiolm_pytorch.saving.modules import SavedModule, load_module, save_module
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.small_models import small_audiolm, small_musiclm, small_soundstream, small_spectral_codec

REQUEST = {"num_samples": 2, "seconds": 0.1, "seed": 3, "return_all": True}


@pytest.fixture(scope="module")
def musiclm():
    """A MusicLM with other than the default settings."""
    model = small_musiclm()
    model.audio_lm.sampling["coarse"] = type(model.audio_lm.sampling["coarse"])(temperature=0.5, top_k=3)
    model.num_levels = 1
    return model


@pytest.fixture(scope="module")
def folder(musiclm, tmp_path_factory):
    """The folder of the MusicLM; tests must not change it."""
    path = tmp_path_factory.mktemp("musiclm")
    musiclm.save_pretrained(path)
    return path


def test_musiclm_comes_back(musiclm, folder):
    """Weights, sampling settings and the number of levels."""
    loaded = MusicLM.from_pretrained(folder)
    assert not loaded.training and loaded.num_levels == 1 and loaded.audio_lm.sampling == musiclm.audio_lm.sampling
    assert torch.equal(loaded("a low tone", **REQUEST).waves, musiclm("a low tone", **REQUEST).waves)


@pytest.mark.parametrize("name", ["musiclm.json", "codec/config.json", "codec/model.safetensors"])
def test_files_of_others_are_not_overwritten(musiclm, tmp_path, name):
    """A file of the user is named before anything is written; a model, or a part of one, is replaced."""
    (tmp_path / "codec").mkdir()
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{name} exists, and was not written by this library"):
        musiclm.save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": 1}' and not (tmp_path / "semantic").exists()
    (tmp_path / name).unlink()
    for _ in range(2):
        musiclm.save_pretrained(tmp_path)
        (tmp_path / "musiclm.json").unlink()  # as after a save that was killed


def test_another_model_is_not_replaced_in_part(musiclm, tmp_path):
    """An AudioLM would replace the codec of a MusicLM in the folder, and leave its stages."""
    musiclm.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="contains another model .musiclm.json.*save to another folder"):
        musiclm.audio_lm.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_model_that_could_not_be_loaded_is_not_written(tmp_path):
    """A codec that was trained further does not match the stages: saving says so, and the folder does not change."""
    model = small_musiclm()
    audio_lm = model.audio_lm
    codec = audio_lm.codec.half().float()
    audio_lm.coarse_transformer.token_fingerprints = {"acoustic": codec.fingerprint()}
    codec.half()  # these weights are equal again after loading
    model.save_pretrained(tmp_path / "musiclm")
    assert MusicLM.from_pretrained(tmp_path / "musiclm").audio_lm.codec.fingerprint() == codec.float().fingerprint()
    audio_lm.save_pretrained(tmp_path / "audiolm")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        next(codec.parameters()).add_(1.0)
    for part, folder in ((model, "musiclm"), (audio_lm, "audiolm")):
        with pytest.raises(ValueError, match="nothing is written: the acoustic tokens have different fingerprints"):
            part.save_pretrained(tmp_path / folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    audio_lm.coarse_transformer.token_fingerprints.pop("acoustic")  # as the message says
    audio_lm.save_pretrained(tmp_path / "audiolm")


def test_a_stage_is_not_replaced_without_effect(musiclm):
    """`stages` is computed at every access: a stage that is put into it would never be used."""
    with pytest.raises(TypeError, match="does not support item assignment"):
        musiclm.audio_lm.stages["semantic"] = musiclm.audio_lm.semantic_transformer


def test_parts_that_the_new_model_lacks_are_removed(tmp_path):
    """Complaint: an export with --bundled codec left the codec of an older export. Other files and folders remain."""
    part = FiLM(dim=2)
    (tmp_path / "model").mkdir()
    save_module(part, tmp_path)  # beside the model
    save_module(part, tmp_path / "model" / "mine")
    parts = {name: part for name in ("codec", "fine", "coarse")}
    write_model_folder(tmp_path / "model", "card.json", parts, {})
    (tmp_path / "model" / "fine" / "notes.txt").write_text("mine")
    card = read_json(tmp_path / "model" / "card.json")
    write_json(tmp_path / "model" / "card.json", {**card, "parts": [*parts, "..", "../mine", ["x"]]})
    write_model_folder(tmp_path / "model", "card.json", {"coarse": part}, {})
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    saved = {f"{place}{file}" for place in ("", "model/mine/", "model/coarse/") for file in PART_FILES}
    assert files == saved | {"model/card.json", "model/fine/notes.txt"}
    assert not (tmp_path / "model" / "codec").exists()


def test_audiolm_comes_back(tmp_path):
    """An AudioLM without fine stage and conditioner keeps only the parts that it has."""
    whole = small_audiolm()
    sizes = {"num_semantic_tokens": 12, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
    rates = {"codebook_size": 16, "num_coarse_quantizers": 3, "semantic_rate_hz": 100, "rate_hz": 200}
    model = AudioLM(
        wav2vec=whole.wav2vec,
        codec=small_spectral_codec().eval(),
        semantic_transformer=SemanticTransformer(rate_hz=100, **sizes),
        coarse_transformer=CoarseTransformer(**sizes, **rates),
        sampling={"coarse": {"temperature": 0.3}},
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = AudioLM.from_pretrained(str(tmp_path))
    assert loaded.fine_transformer is None and loaded.sampling == model.sampling
    waves = [each(batch_size=2, seconds=0.1, seeds=[1, 2]) for each in (model, loaded)]
    assert torch.equal(*waves)
    with pytest.raises(ValueError, match="parts in .*audiolm.json must be a list of wav2vec, codec"):
        write_json(tmp_path / "audiolm.json", {"format_version": 1, "parts": ["../codec"]})
        AudioLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        AudioLM.from_pretrained(tmp_path / "nowhere")


def test_every_part_is_saved_and_loaded_by_its_class(musiclm, tmp_path):
    """All parts of a MusicLM, down to encoders and towers, have `save_pretrained` and `from_pretrained`."""
    parts = [module for module in musiclm.modules() if isinstance(module, SavedModule)]
    assert len(parts) > 12
    for number, module in enumerate(parts):
        place = tmp_path / str(number)
        module.save_pretrained(place)
        loaded = type(module).from_pretrained(place)
        assert type(loaded) is type(module)
        for name, value in module.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])
    with pytest.raises(ValueError, match="holds a SoundStream, but a FiLM is needed"):
        small_soundstream().save_pretrained(tmp_path / "codec")
        FiLM.from_pretrained(tmp_path / "codec")


def test_save_and_load_are_exported():
    """Both packages export the two functions."""
    for package in (audiolm_pytorch, musiclm_pytorch):
        assert package.save_module is save_module and package.load_module is load_module


def test_loading_leaves_global_state_alone(folder):
    """Random generators of torch, numpy and Python, the default dtype and the default device."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    MusicLM.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_default_dtype_and_device_do_not_change_what_is_loaded(folder, musiclm):
    """Weights are float32 on the CPU, so that fingerprints are those of training."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = MusicLM.from_pretrained(folder)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.mulan_embed_quantizer.fingerprint() == musiclm.mulan_embed_quantizer.fingerprint()
    assert torch.equal(loaded("a low tone", **REQUEST).waves, musiclm("a low tone", **REQUEST).waves)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "9" * 5000, "\ud800".encode("utf-8", "surrogatepass")])
def test_damaged_json_is_one_line(tmp_path, text):
    """Deep nesting, numbers that JSON does not have, integers of thousands of digits, bytes that are not UTF-8."""
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="x.json is not a JSON file") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_huge_json_is_not_read(tmp_path):
    """A sparse file of 6 GB, and millions of small lists, which need 50 times the memory of the file."""
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(6 * 2**30)
    with pytest.raises(ValueError, match="x.json has 6442450944 bytes, but JSON files have at most"):
        read_json(tmp_path / "x.json")
    (tmp_path / "y.json").write_text(json.dumps([[]] * (2**21 + 1)))
    with pytest.raises(ValueError, match="more than 2097152 lists and dicts"):
        read_json(tmp_path / "y.json")


HOSTILE = [
    {"config": {"depth": 20_000}},
    {"config": {"dim": 20_000}},
    {"config": {"dim": 1e25}},
    {"config": {"dim": 10**25}},
    {"config": {"heads": 0}},
    {"config": {"dim_head": -2}},
    {"config": {"num_semantic_tokens": 2**40}},
    {"config": {"rate_hz": "1e999999999"}},
    {"config": {"rate_hz": "1/0"}},
    {"config": {"extra_streams": [{"name": "x", "vocab_size": 4, "num_levels": 10**9, "is_input": True}]}},
    {"class": []},
    {"class": "SoundStream\x1b[2J"},
    {"class": "Linear"},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_config_is_refused_before_memory_is_needed(folder, tmp_path, change):
    """Sizes that the file of the weights cannot have, numbers that overflow, classes that are no names."""
    loaded = load_module(folder / "semantic")
    loaded.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    config |= {key: {**config[key], **value} if key == "config" else value for key, value in change.items()}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError) as caught:
        load_module(tmp_path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.slow
def test_nested_parts_and_quantizers_without_end_are_refused(tmp_path):
    """900 parts in each other, and 20,000 levels of a codec."""
    codec = small_soundstream()
    codec.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    levels = json.loads(json.dumps(config))
    levels["config"]["quantizer"]["config"]["num_quantizers"] = 20_000
    part = json.dumps(config["config"]["quantizer"])
    opening = '{"class": "GroupedQuantizer", "config": {"quantizers": ['
    nested = json.dumps(config).replace(part, 200 * opening + part + 200 * "]}}")
    deeper = json.dumps(config).replace(part, 900 * opening + part + 900 * "]}}")
    for bad in (json.dumps(levels), nested, deeper):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(ValueError) as caught:
            SoundStream.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
