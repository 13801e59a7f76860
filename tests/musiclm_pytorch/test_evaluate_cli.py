import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from semantic_sounds import RATE_HZ, written_corpus, written_digits

from audiolm_pytorch.io import fingerprint_of, load_module, save_module
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from audiolm_pytorch.semantic.pretrained import FairseqVQWav2Vec
from musiclm_pytorch.recipes.corpus import make_corpus


def saved_encoder(folder, sample_hz=RATE_HZ):
    """A tiny BEST-RQ encoder with random weights, on disk."""
    torch.manual_seed(0)
    hop = sample_hz // 100
    sizes = dict(dim=16, depth=2, heads=1, dim_head=16, sample_hz=sample_hz, num_mels=20, n_fft=512, hop_length=hop)
    save_module(BestRQEncoder(**sizes), folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An encoder, a corpus and a folder of digits; read only."""
    folder = tmp_path_factory.mktemp("places")
    return {
        "--encoder": saved_encoder(folder / "encoder"),
        "--music": written_corpus(folder / "corpus"),
        "--speech": written_digits(folder / "digits"),
    }


def words(places, out, **changes):
    """The command line, with some options changed."""
    options = {**places, "--out": out, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return ["evaluate", "semantic", *(word for pair in options.items() for word in pair)]


def test_the_whole_command(musiclm_command, places, tmp_path, capsys):
    """Tables and verdict on stdout and in figures.md, every number with its interval in figures.json."""
    out = tmp_path / "new" / "check"
    assert musiclm_command(*words(places, out, layers="1,2", clusters="8", seed=3)) == 0
    said = capsys.readouterr().out
    text, written = (out / "figures.md").read_text(), json.loads((out / "figures.json").read_text())
    assert text in said and f"wrote {out / 'figures.json'}" in said
    settings, figures = written["settings"], {figure["name"]: figure for figure in written["figures"]}
    assert settings["encoder_fingerprint"] == fingerprint_of(load_module(places["--encoder"])) and (
        settings["encoder_fingerprint"] in text
    )
    assert settings["num_clips"] == {"music, train": 6, "music, test": 4, "speech, train": 24, "speech, test": 30}
    assert settings["num_frames"]["music, train"] == 6 * 125 and "- music, train: 6 clips, 750 frames" in text
    views = ("log-mel", "front end", "layer 1", "layer 2")
    for view in views:
        for probe in ("pitch class", "onset (balanced)", "digit", "speaker"):
            figure = figures[f"{view} / linear probe / {probe}"]
            assert figure["low"] <= figure["value"] <= figure["high"] and figure["count"] in (4, 30)
        for probe in ("pitch class", "digit", "speaker"):
            assert f"{view} / token, k 8 / {probe}" in figures
        for probe in ("digit", "speaker", "instrument"):
            assert f"{view} / histogram, k 8 / {probe}" in figures
    assert not any(name.startswith("layer 0") for name in figures)
    best = settings["verdict"]["best_layer"]
    assert f"{best} less log-mel / linear probe / digit" in figures
    gain = figures[f"{best} less front end / token, k 8 / pitch class"]
    parts = (figures[f"{view} / token, k 8 / pitch class"]["value"] for view in (best, "front end"))
    assert gain["value"] == pytest.approx(next(parts) - next(parts))
    assert len(settings["verdict"]["tokens"]) == 2 * 2
    # tones are easy: what a log-mel frame holds is found
    assert figures["log-mel / linear probe / pitch class"]["value"] > 0.4
    assert figures["log-mel / linear probe / digit"]["value"] > 0.9


def test_the_command_that_is_written_down_gives_the_same(musiclm_command, places, tmp_path):
    """Figures can be made again from the report alone."""
    options = words(places, tmp_path / "out", layers="1", clusters="4", seed=2, probe_clips=5)
    assert musiclm_command(*options, "--offline") == 0
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    program, *again = written["settings"]["command"].split(" ")
    assert program == "musiclm" and again[-1] == "--offline"
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert musiclm_command(*again) == 0
    assert json.loads((tmp_path / "again" / "figures.json").read_text())["figures"] == written["figures"]


def test_a_tokenizer_stands_for_its_encoder(musiclm_command, places, tmp_path, capsys):
    """The folder of a k-means tokenizer is judged by its encoder and its own tokens; no clusters, no k-means."""
    encoder = load_module(places["--encoder"])
    tokenizer = KMeansTokenizer(encoder=encoder.truncated(1), layer=1, centroids=torch.randn(4, 16))
    save_module(tokenizer, tmp_path / "tokenizer")
    options = words({**places, "--encoder": tmp_path / "tokenizer"}, tmp_path / "out", clusters="none", probe_clips=3)
    assert musiclm_command(*options) == 0
    said = capsys.readouterr().out
    assert "layer 1" in said and "layer 2" not in said and "## Tokens" not in said
    assert "## Own tokens, k = 4\n" in said and f"- KMeansTokenizer {tokenizer.fingerprint}: " in said
    assert "- speech, train: 3 clips" in said and "- music, test: 3 clips" in said


def test_a_bundled_tokenizer_and_its_own_tokens(musiclm_command, places, tmp_path):
    """Tiny, by name: its own tokens have six figures beside those of a layer, and the verdict is on layers alone."""
    options = words({**places, "--encoder": "tiny"}, tmp_path / "out", layers="1", clusters="4", probe_clips=4)
    assert musiclm_command(*options) == 0
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    size = written["settings"]["codebook_size"]
    own = [figure["name"] for figure in written["figures"] if figure["name"].startswith("own tokens")]
    token = [f"own tokens / token, k {size} / {probe}" for probe in ("pitch class", "digit", "speaker")]
    assert own == token + [
        f"own tokens / histogram, k {size} / {probe}" for probe in ("digit", "speaker", "instrument")
    ]
    assert {one["layer"] for one in written["settings"]["verdict"]["tokens"]} == {"layer 1"}
    assert f"## Own tokens, k = {size}\n" in (tmp_path / "out" / "figures.md").read_text()


def test_a_tokenizer_without_layers(musiclm_command, places, tmp_path, capsys):
    """vq-wav2vec has tokens alone: one table, no verdict; layers cannot be asked for."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "audiolm_pytorch"))
    from published_vq_wav2vec import vq_settings, write_vq_wav2vec

    tokenizer = FairseqVQWav2Vec(write_vq_wav2vec(tmp_path / "vq.pt", vq_settings()))
    save_module(tokenizer, tmp_path / "vq")
    changed = {**places, "--encoder": tmp_path / "vq"}
    assert musiclm_command(*words(changed, tmp_path / "out", probe_clips=4)) == 0
    said = capsys.readouterr().out
    assert "16000 Hz, 200 tokens a second, 24 different" in said and "## Own tokens, k = 24\n" in said
    assert said.count("\n## ") == 1 and "- k-means" not in said and "| layer" not in said and "layers 0" not in said
    assert musiclm_command(*words(changed, tmp_path / "other", layers="1")) == 2
    assert "vq has no layers, only tokens; leave --layers out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1,9"}, r"no layer 9, .*encoder has layers 0\.\.2"),
        ({"layers": "one"}, r"--layers takes numbers .*got 'one'"),
        ({"layers": "-1"}, r"--layers takes numbers"),
        ({"clusters": "64;256"}, r"--clusters takes numbers .*got '64;256'"),
        ({"clusters": "1"}, r"at least 2 each, got 1"),
        ({"clusters": "4,100000"}, r"k must lie in 2\.\.\d+.*fewer clusters"),
        ({"probe_clips": 0}, r"--probe-clips of at least 1"),
        ({"music": "nowhere"}, r"nowhere: no corpus .*musiclm corpus --out"),
        ({"speech": "nowhere"}, r"nowhere: no such folder"),
        ({"device": "abacus"}, r"--device abacus cannot be used"),
    ],
)
def test_mistakes_are_named_in_one_line(musiclm_command, places, tmp_path, capsys, changes, message):
    """What is wrong and the mend, in one line, and nothing is written."""
    assert musiclm_command(*words(places, tmp_path / "out", **changes)) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1 and said.startswith("musiclm: ")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_to_write(musiclm_command, places, tmp_path, capsys):
    """The folder is checked before the work is done."""
    (tmp_path / "taken").write_text("a file")
    assert musiclm_command(*words(places, tmp_path / "taken")) == 2
    assert "taken is a file" in capsys.readouterr().err


def test_another_thing_to_evaluate_is_refused(musiclm_command, places, tmp_path, capsys):
    """The word after `evaluate` is a choice."""
    assert musiclm_command("evaluate", "mulan", *words(places, tmp_path / "out")[2:]) == 2
    said = capsys.readouterr().err
    assert "semantic" in said and said.count("\n") == 1


def test_an_encoder_in_transformers_format(musiclm_command, places, tmp_path, capsys):
    """HuBERT's frames (49 a second, each of 400 samples) are labelled and read too; it has no front end of ours."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parent.parent / "audiolm_pytorch"))
    from published_files import tiny_hubert

    tiny_hubert(num_layers=2).save_pretrained(tmp_path / "hubert")
    changed = {**places, "--encoder": tmp_path / "hubert"}
    assert musiclm_command(*words(changed, tmp_path / "out", layers="0,2", clusters="none", probe_clips=4)) == 0
    said = capsys.readouterr().out
    assert "16000 Hz, 50 frames a second, layers 0..2" in said and "front end" not in said
    assert "- music, train: 4 clips, 996 frames" in said  # 249 of 5 s
    figures = {one["name"]: one for one in json.loads((tmp_path / "out" / "figures.json").read_text())["figures"]}
    assert figures["log-mel / linear probe / pitch class"]["value"] > 0.4
    assert "layer 2 / linear probe / speaker" in figures


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="fluidsynth is not installed")
def test_a_rendered_corpus_from_end_to_end(musiclm_command, tmp_path, places, capsys):
    """The real corpus, compressed and at another rate: pitch class is far above guessing already in log-mel frames."""
    corpus = make_corpus(tmp_path / "corpus", num_train=40, num_valid=12, seed=1)
    encoder = saved_encoder(tmp_path / "encoder", 16_000)
    options = words({**places, "--encoder": encoder, "--music": corpus}, tmp_path / "out", clusters="16")
    assert musiclm_command(*options) == 0
    figures = {one["name"]: one for one in json.loads((tmp_path / "out" / "figures.json").read_text())["figures"]}
    pitch = figures["log-mel / linear probe / pitch class"]
    assert pitch["low"] > pitch["chance"] + 0.2
    assert figures["front end / linear probe / onset (balanced)"]["low"] > 0.6
