import re

import pytest
import torch

from audiolm_pytorch.saving.modules import load_module, read_config
from audiolm_pytorch.semantic.pretrained import FairseqVQWav2Vec, HubertWithKmeans
from musiclm_pytorch.cli import convert as convert_cli
from tests.helpers.published_files import tiny_hubert, write_hubert_checkpoint, write_kmeans
from tests.helpers.published_vq_wav2vec import vq_settings, write_vq_wav2vec

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with files in the published layouts."""
    folder = tmp_path_factory.mktemp("published")
    model = tiny_hubert()
    write_hubert_checkpoint(folder / "hubert.pt", model)
    frames = model(torch.randn(1, 16_000), output_hidden_states=True).hidden_states[9][0]
    write_kmeans(folder / "km.bin", frames[:20].numpy())
    write_vq_wav2vec(folder / "gumbel.pt", vq_settings())
    write_vq_wav2vec(folder / "kmeans.pt", vq_settings(vq_type="kmeans"))
    return folder


@pytest.fixture
def hubert_words(published, tmp_path):
    return ["convert", "hubert", "--checkpoint", published / "hubert.pt", "--kmeans", published / "km.bin", "--out"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_hubert_folder_returns_the_tokens_of_the_files(musiclm_command, hubert_words, published, tmp_path, capsys):
    """The folder returns the tokens of the two files, has no path of them, and is reported in one line."""
    out = tmp_path / "new" / "hubert"
    assert musiclm_command(*hubert_words, out) == 0
    printed = capsys.readouterr()
    files = HubertWithKmeans(published / "hubert.pt", published / "km.bin")
    folder = load_module(out, HubertWithKmeans)
    wave = torch.randn(2, 8000)
    assert torch.equal(folder(wave), files(wave)) and files(wave).unique().numel() > 3
    assert folder.fingerprint() == files.fingerprint()
    assert set(content(out)) == {"config.json", "model.safetensors"}
    assert str(published) not in (out / "config.json").read_text()
    assert read_config(out)["converted_from"] == ["hubert.pt", "km.bin"]
    size = sum(map(len, content(out).values())) / 1e6
    line = rf"wrote {out}  HubertWithKmeans, 20 tokens, {size:.1f} MB, fingerprint {files.fingerprint()}\n"
    assert re.fullmatch(line, printed.out) and not printed.err


def test_the_layer_can_be_chosen(musiclm_command, hubert_words, published, tmp_path):
    """Another layer than the ninth can be selected, and later blocks are not written."""
    assert musiclm_command(*hubert_words, tmp_path / "out", "--output-layer", 4) == 0
    files = HubertWithKmeans(published / "hubert.pt", published / "km.bin", output_layer=4)
    folder = load_module(tmp_path / "out")
    wave = torch.randn(1, 8000)
    assert torch.equal(folder(wave), files(wave)) and folder.layer == folder.encoder.depth == 4


@pytest.mark.parametrize("name", ["gumbel.pt", "kmeans.pt"])
def test_vq_wav2vec_folder_returns_the_tokens_of_the_file(musiclm_command, published, tmp_path, name, capsys):
    """Both variants of vq-wav2vec are converted without changes of the tokens."""
    words = ["convert", "vq-wav2vec", "--checkpoint", published / name, "--out", tmp_path / "out"]
    assert musiclm_command(*words) == 0
    files, folder = FairseqVQWav2Vec(published / name), load_module(tmp_path / "out", FairseqVQWav2Vec)
    wave = torch.randn(2, 4000)
    assert torch.equal(folder(wave), files(wave)) and folder.fingerprint() == files.fingerprint()
    assert f"FairseqVQWav2Vec, 24 tokens, 0.0 MB, fingerprint {files.fingerprint()}" in capsys.readouterr().out


def test_the_same_conversion_again_changes_nothing(musiclm_command, hubert_words, tmp_path, capsys):
    """A second call changes nothing, even beside the partial files of a killed one."""
    out = tmp_path / "out"
    (out / ".writing-killed").mkdir(parents=True)
    assert musiclm_command(*hubert_words, out) == 0
    before = content(out), (out / "model.safetensors").stat().st_mtime_ns
    assert musiclm_command(*hubert_words, out) == 0
    assert (content(out), (out / "model.safetensors").stat().st_mtime_ns) == before
    first, second = capsys.readouterr().out.splitlines()
    assert second == first.replace("wrote", "unchanged:")


def faulty(case, published, tmp_path):
    """Arguments that raise an error."""
    out = tmp_path / "out"
    hubert = ["--checkpoint", published / "hubert.pt", "--kmeans", published / "km.bin", "--out", out]
    match case:
        case "no file":
            hubert[1] = published / "nowhere.pt"
        case "damaged":
            hubert[1] = tmp_path / "half.pt"
            data = (published / "hubert.pt").read_bytes()
            hubert[1].write_bytes(data[: len(data) // 2])
        case "swapped":
            hubert[1], hubert[3] = hubert[3], hubert[1]
        case "layer":
            hubert += ["--output-layer", 99]
        case "of another":
            return ["vq-wav2vec", "--checkpoint", published / "hubert.pt", "--out", out]
        case "out is a file":
            hubert[-1] = published / "km.bin"
        case "other files":
            out.mkdir()
            (out / "notes.txt").write_text("mine")
        case "other config":
            out.mkdir()
            (out / "config.json").write_text('{"model_type": "hubert"}')
        case "other model":
            FOLDERS["gumbel"](published, out)
    return ["hubert", *hubert]


FOLDERS = {
    "gumbel": lambda published, out: convert_cli.VqWav2vec(checkpoint=published / "gumbel.pt", out=out).execute()
}
CASES = {
    "no file": "nowhere.pt: no such file",
    "damaged": "half.pt is damaged",
    "swapped": "hubert.pt|km.bin",
    "layer": "99",
    "of another": "no vq-wav2vec",
    "out is a file": "km.bin is a file",
    "other files": "contains files that do not belong to a converted model .notes.txt.; pass a new or empty folder",
    "other config": "config.json is damaged or does not belong to a converted model",
    "other model": "contains a model with fingerprint .*; pass a new folder",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_refusals_are_one_line_and_write_nothing(musiclm_command, published, tmp_path, case, capsys):
    """Exit status 2, one line with the reason, and existing files are not changed."""
    words = faulty(case, published, tmp_path)
    out = tmp_path / "out"
    before = content(out) if out.exists() else None
    capsys.readouterr()
    assert musiclm_command("convert", *words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and re.match(f"musiclm: .*({CASES[case]})", printed.err)
    assert (content(out) if out.exists() else None) == before


def test_help_names_all_conversions(musiclm_command, capsys):
    """Help lists the conversions and their options."""
    assert musiclm_command("convert", "--help") == 0
    printed = capsys.readouterr().out
    assert "hubert" in printed and "vq-wav2vec" in printed and "musiccaps" in printed
    assert musiclm_command("convert", "hubert", "--help") == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--checkpoint", "--kmeans", "--out", "--output-layer"))
    assert musiclm_command("convert", "musiccaps", "--help") == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--csv", "--clips", "--out", "{none,eval,balanced}", "--missing"))
