"""Models travel: through folders and through a hub, with cards, licences and revisions; damage is detected."""

import logging
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.saving.sharing import SharedModel
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from musiclm_pytorch.cli.checks import ModelOptions
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.local_hub import local_hub
from tests.helpers.small_models import small_musiclm, small_soundstream, small_spectral_codec, small_tokenizer


@pytest.fixture(scope="module")
def musiclm():
    """A MusicLM of random weights; tests must not change it."""
    return small_musiclm()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache."""
    with local_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


def kinds_of(musiclm: MusicLM) -> dict[str, tuple[SharedModel, type[SharedModel]]]:
    """A model of each kind, and the class that loads it."""
    audio_lm, quantizer = musiclm.audio_lm, musiclm.mulan_embed_quantizer
    own: dict[str, SharedModel] = {"quantizer": quantizer, **audio_lm.stages}
    return {
        "musiclm": (musiclm, MusicLM),
        "audiolm": (audio_lm, AudioLM),
        "soundstream": (small_soundstream(), Codec),
        "spectral": (small_spectral_codec(), Codec),
        "tokenizer": (audio_lm.wav2vec, SemanticTokenizer),
        "mulan": (quantizer.mulan, JointEmbedding),
        "musicgen": (MusicGen(codec=small_soundstream(), dim=16, depth=1, heads=2), MusicGen),
        **{name: (model, type(model)) for name, model in own.items()},
    }


def assert_equal(model: torch.nn.Module, loaded: torch.nn.Module) -> None:
    """Class, mode and all weights."""
    assert type(loaded) is type(model) and not loaded.training
    theirs = loaded.state_dict()
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in theirs.items()
    }


@pytest.mark.slow
def test_every_kind_travels_through_the_hub(musiclm, hub, tmp_path):
    """Uploaded by one line and loaded by one line, by the base class of its kind, with a card that the hub can read."""
    for name, (model, kind) in kinds_of(musiclm).items():
        address = model.push_to_hub(f"me/{name}", licence="mit")
        assert address.startswith(f"{hub.url}/me/{name}/commit/")
        assert_equal(model, kind.from_pretrained(f"me/{name}"))
        card = hub.files(f"me/{name}", "main")[1]["README.md"].decode()
        header = yaml.safe_load(card.split("---")[1])
        assert header["license"] == "mit" and header["library_name"] == "musiclm" and header["tags"]
        assert header.get("pipeline_tag", "none") in (
            *("text-to-audio", "audio-to-audio"),
            *("feature-extraction", "none"),
        )
        block = card.split("```python\n")[1].split("```")[0].replace("owner/name", f"me/{name}")
        names: dict = {}
        exec(block, names)
        assert_equal(model, names["model"])
    request = {"num_samples": 2, "seconds": 0.1, "seed": 3}
    assert torch.equal(MusicLM.from_pretrained("me/musiclm")("low", **request), musiclm("low", **request))
    assert_equal(musiclm.audio_lm.wav2vec.encoder, FrameEncoder.from_pretrained("me/tokenizer"))
    assert_equal(musiclm.mulan_embed_quantizer.mulan, JointEmbedding.from_pretrained("me/musiclm"))


def test_revisions_offline_and_own_cards(hub):
    """Branches, commits, a cache that needs no network, and a card that a later upload leaves alone."""
    first, second = small_soundstream(), small_soundstream()
    first.push_to_hub("me/codec", licence="mit")
    commit = hub.branches["me/codec"]["main"]
    hub.commit("me/codec", "main", {"README.md": b"---\nlicense: apache-2.0\n---\nmy text"})
    second.push_to_hub("me/codec", revision="v2", dtype=torch.float16)
    assert hub.files("me/codec", "v2")[1]["README.md"].endswith(b"my text")
    assert_equal(first, Codec.from_pretrained("me/codec"))
    assert_equal(first, Codec.from_pretrained("me/codec", revision=commit))
    loaded = Codec.from_pretrained("me/codec", revision="v2")
    weights = second.state_dict()
    assert all(torch.equal(value, weights[name].half().float()) for name, value in loaded.state_dict().items())
    hub.requests.clear()
    assert_equal(loaded, Codec.from_pretrained("me/codec", revision="v2", offline=True))
    for problem, arguments in {
        "has no model me/codec at revision v3": {"source": "me/codec", "revision": "v3"},
        "local cache .offline.* has no model me/other": {"source": "me/other", "offline": True},
        "there is no folder codek; pass .* name of a bundled model: codec_16khz, .*tiny": {"source": "codek"},
    }.items():
        with pytest.raises(ValueError, match=problem) as caught:
            Codec.from_pretrained(**arguments)
        assert "\n" not in str(caught.value)
    assert not any("main" in request or "v2" in request for request in hub.requests)


def test_a_refused_upload_is_one_line(hub, monkeypatch):
    """A wrong token, and a name that the hub does not accept."""
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    for name in ("me/codec", "no name"):
        with pytest.raises(ValueError, match=r"cannot upload the model to .*; .* hf auth login") as caught:
            small_soundstream().push_to_hub(name)
        assert "\n" not in str(caught.value)


def test_noncommercial_weights_need_consent(hub, tmp_path, caplog):
    """The card decides, for folders and for the hub; the licence is logged once."""
    codec = small_soundstream()
    codec.save_pretrained(tmp_path / "codec", licence="cc-by-nc-4.0")
    hub.add_folder("me/codec", tmp_path / "codec")
    for source in (tmp_path / "codec", "me/codec"):
        with pytest.raises(ValueError, match=r"licence cc-by-nc-4.0 .*forbids commercial use.*allow_noncommercial"):
            Codec.from_pretrained(source)
    with caplog.at_level(logging.WARNING, "audiolm_pytorch"):
        for _ in range(2):
            assert_equal(codec, Codec.from_pretrained("me/codec", allow_noncommercial=True))
    assert [record.getMessage() for record in caplog.records] == [
        "me/codec: licence of the weights cc-by-nc-4.0 (model card)"
    ]


def test_the_card_has_the_licence_of_the_published_weights_in_the_model(tmp_path):
    """A non-commercial part makes the whole model non-commercial."""
    codec = small_soundstream()
    codec.encoder.origin = {"source": "facebook/encodec_32khz", "licence": "CC-BY-NC 4.0 (audiocraft)"}
    with pytest.raises(ValueError, match="facebook/encodec_32khz with the licence CC-BY-NC 4.0.*; the licence mit"):
        codec.save_pretrained(tmp_path, licence="mit")
    assert not list(tmp_path.iterdir())
    codec.save_pretrained(tmp_path)
    assert "license: other\nlicense_name: cc-by-nc-4.0\n" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="licence cc-by-nc-4.0"):
        Codec.from_pretrained(tmp_path)
    codec.encoder.origin = {"source": "kyutai/mimi", "licence": "cc-by-4.0 (model card)"}
    (tmp_path / "README.md").unlink()
    codec.save_pretrained(tmp_path)
    assert "license: cc-by-4.0\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("licence", ["cc-by-nc-sa-4.0", "CC BY-NC 4.0", "fair-noncommercial-research-license"])
def test_names_of_noncommercial_licences(tmp_path, licence):
    """Names of the hub, and names in words."""
    small_soundstream().save_pretrained(tmp_path, licence=licence)
    with pytest.raises(ValueError, match="forbids commercial use"):
        Codec.from_pretrained(tmp_path)


@pytest.mark.parametrize("licence", ["mit", "ncsa", "cc-by-sa-4.0", "openrail", "bsd-3-clause"])
def test_names_of_other_licences(tmp_path, licence):
    """Letters inside a word are no restriction."""
    small_soundstream().save_pretrained(tmp_path, licence=licence)
    Codec.from_pretrained(tmp_path)


@pytest.mark.slow
def test_missing_truncated_and_edited_files_are_refused_in_one_line(musiclm, tmp_path):
    """Every file of every kind, from the card to the weights; the message names the file or its part."""
    num_files = 0
    for name, (model, kind) in kinds_of(musiclm).items():
        whole, folder = tmp_path / name, tmp_path / "damaged"
        model.save_pretrained(whole)
        assert_equal(model, kind.from_pretrained(whole))
        files = [path.relative_to(whole) for path in whole.rglob("*.*") if path.suffix != ".md"]
        num_files += len(files)
        for file in files:
            content = (whole / file).read_bytes()
            place = content.rindex(b"1") if file.suffix == ".json" else len(content) - 3
            edited = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            for damaged in (None, content[: len(content) // 2], b"", edited):
                shutil.copytree(whole, folder)
                (folder / file).unlink() if damaged is None else (folder / file).write_bytes(damaged)
                with pytest.raises(ValueError) as caught:
                    kind.from_pretrained(folder)
                message = str(caught.value)
                assert "\n" not in message and (file.name in message or file.parent.name in message), message
                shutil.rmtree(folder)
        for part in [path for path in whole.iterdir() if path.is_dir()]:
            shutil.copytree(whole, folder, ignore=lambda _, names, gone=part.name: {gone} & {*names})
            with pytest.raises(ValueError, match=f"lacks {part.name}/") as caught:
                kind.from_pretrained(folder)
            assert "\n" not in str(caught.value)
            shutil.rmtree(folder)
    assert num_files == 47


def test_revisions_on_the_command_line(tmp_path):
    """A hub id may end in a revision; a path may contain the same letter."""
    options = ModelOptions(offline=True)
    hub = {"offline": True, "allow_noncommercial": False}
    assert options.source_of("me/codec@v2") == {"source": "me/codec", "revision": "v2", **hub}
    assert options.source_of("me/codec") == {"source": "me/codec", "revision": None, **hub}
    (tmp_path / "a@b").mkdir()
    assert options.source_of(str(tmp_path / "a@b")) == {"source": str(tmp_path / "a@b"), "revision": None, **hub}


def test_wrong_devices_and_revisions_are_named(tmp_path):
    """Before anything is loaded; a local folder has no revisions."""
    for device in ("nosuch", "cuda:99"):
        with pytest.raises(ValueError, match=f"the device {device} cannot be used"):
            Codec.from_pretrained(tmp_path / "missing", device=device)
        with pytest.raises(ValueError, match=f"the device {device} cannot be used"):
            load_module(tmp_path / "missing", device=device)
    with pytest.raises(ValueError, match="revision=v2 .*only models on the hub"):
        Codec.from_pretrained(tmp_path, revision="v2")


def test_the_folders_of_parts_are_named(tmp_path):
    """The folder of a finished run, or of a composed model, is passed for a part: the message names the part's."""
    small_soundstream().save_pretrained(tmp_path / "run" / "codec")
    with pytest.raises(
        ValueError, match=r"run contains no complete Codec .*; pass the right one of the folders .*run/codec$"
    ):
        Codec.from_pretrained(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"audiolm.json is missing\); pass the folder of a saved model or of a finished"
    ):
        AudioLM.from_pretrained(tmp_path / "run")


def test_a_tokenizer_is_not_a_codec(tmp_path):
    """The class that loads decides."""
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a KMeansTokenizer, but a Codec is needed"):
        Codec.from_pretrained(tmp_path)


@pytest.mark.slow
def test_bundled_models_are_found_without_the_upper_package():
    """The names do not depend on what was imported before."""
    program = "from audiolm_pytorch import Codec; Codec.from_pretrained('codec_16khz')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
