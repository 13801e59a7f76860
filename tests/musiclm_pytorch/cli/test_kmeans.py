import re
import shutil
import subprocess
import sys

import pytest
import torch

from audiolm_pytorch.saving.modules import load_module, read_config, save_module
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from musiclm_pytorch.cli.convert import VqWav2vec
from musiclm_pytorch.cli.evaluate import EvaluateSemantic
from tests.helpers.bad_input import bad_input, check_bad_input, listing


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny encoder at 4 kHz with random weights."""
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=2, heads=1, dim_head=16, sample_hz=4000, num_mels=20, n_fft=256, hop_length=40)
    save_module(BestRQEncoder(**sizes), tmp_path_factory.mktemp("encoder") / "encoder")
    return tmp_path_factory.getbasetemp() / "encoder0" / "encoder"


@pytest.fixture
def sounds(write_folder):
    """Six tones of half a second: 13 tokens each, one of them held out."""
    return write_folder("sounds", num_files=6, seconds=0.5, sample_hz=8000)


@pytest.fixture
def words(encoder, sounds, tmp_path):
    """A command that works."""
    return ("train", "kmeans", "--encoder", encoder, "--layer", 1, "--data", sounds, "--out", tmp_path / "run")


@pytest.mark.slow
def test_kmeans_from_a_folder_to_a_tokenizer(musiclm_command, words, tmp_path, capsys):
    """The command writes a tokenizer and prints the use of its clusters; a second call changes nothing."""
    assert musiclm_command(*words, "--num-clusters", 8) == 0
    first = capsys.readouterr()
    printed = r"65 tokens: (\d) of 8 clusters used, perplexity (\d\.\d), (\d\d)\.\d% of the variance explained\n"
    used, perplexity, explained = map(float, re.match(printed, first.out).groups())
    assert 1 <= perplexity <= used <= 8 and explained > 20 and first.err == ""
    tokenizer = load_module(tmp_path / "run" / "tokenizer", KMeansTokenizer)
    assert tokenizer.fingerprint() in first.out and (tokenizer.layer, tokenizer.codebook_size) == (1, 8)
    assert tokenizer(torch.rand(1, 1600)).shape == (1, 10)
    assert read_config(tmp_path / "run" / "tokenizer")["usage"]["used"] == used
    assert "features (0.0 MB) is no longer needed" in first.out
    shutil.rmtree(tmp_path / "run" / "features")
    before = listing(tmp_path / "run")
    del before[".lock"]
    assert musiclm_command(*words, "--num-clusters", 8) == 0
    second = capsys.readouterr()
    assert "(done before)" in second.out and tokenizer.fingerprint() in second.out and "features" not in second.out
    after = listing(tmp_path / "run")
    assert {name: after[name] for name in after if name != ".lock"} == before


@pytest.mark.slow
def test_an_encoder_is_found_in_a_tokenizer(musiclm_command, words, tmp_path, capsys):
    """A tokenizer folder is accepted as encoder, and every option has its effect."""
    assert musiclm_command(*words, "--num-clusters", 8) == 0
    again = list(words)
    again[3], again[-1] = tmp_path / "run" / "tokenizer", tmp_path / "other"
    assert musiclm_command(*again, "--num-clusters", 8) == 0
    first, second = (load_module(tmp_path / name / "tokenizer") for name in ("run", "other"))
    assert first.fingerprint() == second.fingerprint()
    capsys.readouterr()
    again[-1] = tmp_path / "third"
    assert musiclm_command(*again, "--num-clusters", 5, "--max-tokens", 40, "--seconds", 0.2, "--seed", 3) == 0
    assert capsys.readouterr().out.startswith("40 tokens: ")
    assert read_config(tmp_path / "third" / "tokenizer")["fit"] == {
        **read_config(tmp_path / "other" / "tokenizer")["fit"],
        "num_clusters": 5,
        "max_tokens": 40,
        "seconds": 0.2,
        "seed": 3,
    }


@pytest.mark.slow
def test_kmeans_of_a_published_checkpoint(musiclm_command, write_folder, tmp_path, capsys):
    """A HuBERT checkpoint of fairseq is accepted, and the tokenizer opens without the checkpoint."""
    pytest.importorskip("transformers")
    from tests.helpers.published_files import tiny_hubert, write_hubert_checkpoint

    write_hubert_checkpoint(tmp_path / "hubert.pt", tiny_hubert(num_layers=3))
    sounds = write_folder("sounds", num_files=4, seconds=0.5, sample_hz=16000)
    words = ("--encoder", tmp_path / "hubert.pt", "--layer", 2, "--num-clusters", 5, "--seconds", 0.4)
    assert musiclm_command("train", "kmeans", *words, "--data", sounds, "--out", tmp_path / "run") == 0
    assert "layer 2, 50 tokens a second" in capsys.readouterr().out
    (tmp_path / "hubert.pt").unlink()
    tokenizer = load_module(tmp_path / "run" / "tokenizer", KMeansTokenizer)
    assert read_config(tmp_path / "run" / "tokenizer")["usage"]["num_tokens"] == 3 * tokenizer.num_frames(6400) == 57
    assert tokenizer(torch.randn(1, 16000)).shape == (1, 49)


# Each with a pattern of the message. SOUNDS, ENCODER, EMPTY and TMP are folders.
BAD_INPUT = r"""
no data | --encoder ENCODER --layer 1 --data TMP/none --out TMP/out | TMP/none: no such folder
empty data | --encoder ENCODER --layer 1 --data EMPTY --out TMP/out | EMPTY: the folder has no audio files
no encoder | --encoder TMP/none/model --layer 1 --data SOUNDS --out TMP/out --offline | none/model
no layer | --encoder ENCODER --layer 3 --data SOUNDS --out TMP/out | layer must be in 0\.\.2.*got 3
few tokens | --encoder ENCODER --layer 1 --data SOUNDS --out TMP/out |
    65 tokens, too few for 500 clusters; use more audio or fewer clusters
no clusters | --encoder ENCODER --layer 1 --data SOUNDS --out TMP/out --num-clusters 0 | num_clusters
seconds nan | --encoder ENCODER --layer 1 --data SOUNDS --out TMP/out --seconds nan | seconds must be a number, got NaN
out is a file | --encoder ENCODER --layer 1 --data SOUNDS --out SOUNDS/000.wav | 000.wav is a file
device | --encoder ENCODER --layer 1 --data SOUNDS --out TMP/out --device gpu | the device gpu cannot be used
"""


@bad_input(BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(words, message, musiclm_command, encoder, sounds, tmp_path, capfd):
    """Every error has one line with the reason and what to do, and nothing is written."""
    (tmp_path / "empty").mkdir()
    places = {"SOUNDS": sounds, "ENCODER": encoder, "EMPTY": tmp_path / "empty", "TMP": tmp_path}
    check_bad_input(musiclm_command, ["train", "kmeans", *words], message, places, capfd)


@pytest.mark.slow
def test_another_run_is_refused(musiclm_command, words, tmp_path, capsys):
    """A folder belongs to one run: the message shows the difference, and the tokenizer is not changed."""
    assert musiclm_command(*words, "--num-clusters", 8) == 0
    before = (tmp_path / "run" / "tokenizer" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert musiclm_command(*words, "--num-clusters", 9) == 2
    printed = capsys.readouterr().err
    assert "num_clusters: found 8, expected 9" in printed and "another folder" in printed and printed.count("\n") == 1
    assert (tmp_path / "run" / "tokenizer" / "model.safetensors").read_bytes() == before


def test_kmeans_has_separate_options(musiclm_command, capsys):
    """`train kmeans --help` lists only options of k-means, `train --help` only those of the pipeline."""
    assert musiclm_command("train", "kmeans", "--help") == 0
    own = capsys.readouterr().out
    assert "--num-clusters" in own and "--preset" not in own and "usage: musiclm train kmeans" in own
    assert musiclm_command("train", "--help") == 0
    stages = capsys.readouterr().out
    assert "--dry-run" in stages and "--num-clusters" not in stages and "train kmeans --help" in stages
    assert musiclm_command("train", "--data", "a", "--out", "b", "kmeans") == 2
    assert "musiclm train kmeans --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (("convert", "hubert"), ("--checkpoint", "--kmeans", "--out", "--output-layer")),
        (("convert", "vq-wav2vec"), ("--checkpoint", "--out")),
        (("evaluate", "semantic"), ("--encoder", "--data", "--labels", "--out")),
    ],
)
def test_help_names_the_options(command, options, musiclm_command, capsys):
    """Help names the options."""
    assert musiclm_command(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in options)


@pytest.mark.parametrize("name", ["convert", "evaluate"])
def test_exit_status_and_errors_of_commands(name, musiclm_command, tmp_path, monkeypatch, capsys):
    """The result of a command is the exit status, and an error becomes one line."""
    words = {
        "convert": ("convert", "vq-wav2vec", "--checkpoint", "x.pt", "--out", tmp_path),
        "evaluate": ("evaluate", "semantic", "--encoder", "e", "--data", "d", "--labels", "l", "--out", tmp_path),
    }[name]
    seen, commands = [], {"convert": VqWav2vec, "evaluate": EvaluateSemantic}
    monkeypatch.setattr(commands[name], "execute", lambda command: seen.append(command) or 7)
    assert musiclm_command(*words) == 7 and str(seen[0].out) == str(tmp_path)

    def refuse(command):
        raise ValueError("no such\nfile")

    monkeypatch.setattr(commands[name], "execute", refuse)
    assert musiclm_command(*words) == 2
    assert capsys.readouterr().err == "musiclm: no such file\n"


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    """The command line starts without scikit-learn, transformers, accelerate and matplotlib."""
    program = """
import sys
from musiclm_pytorch.cli import main
main(["--help"])
heavy = {"sklearn", "transformers", "matplotlib", "joblib", "accelerate", "musiclm_pytorch.evaluation.semantic_probes"}
sys.exit(len(heavy & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600, stdout=subprocess.DEVNULL)
