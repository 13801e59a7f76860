import json
import re
import shutil
import sys

import pytest
import torch

from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from audiolm_pytorch.semantic.pretrained import FairseqVQWav2Vec
from musiclm_pytorch.pretrained.bundled import mulan_named
from musiclm_pytorch.recipes.corpus.corpus import make_corpus
from tests.helpers.planted_mulan import PlantedMuLaN, planted_items
from tests.helpers.semantic_sounds import RATE_HZ, written_corpus, written_digits


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
    """Tables and verdict on stdout and in metrics.md, every number with its interval in metrics.json."""
    out = tmp_path / "new" / "check"
    assert musiclm_command(*words(places, out, layers="1,2", clusters="8", seed=3)) == 0
    said = capsys.readouterr().out
    text, written = (out / "metrics.md").read_text(), json.loads((out / "metrics.json").read_text())
    assert text in said and f"wrote {out / 'metrics.json'}" in said
    settings, metrics = written["settings"], {metric["name"]: metric for metric in written["metrics"]}
    assert settings["encoder_fingerprint"] == fingerprint_of(load_module(places["--encoder"])) and (
        settings["encoder_fingerprint"] in text
    )
    assert settings["num_clips"] == {"music, train": 6, "music, test": 4, "speech, train": 24, "speech, test": 30}
    assert settings["num_frames"]["music, train"] == 6 * 125 and "- music, train: 6 clips, 750 frames" in text
    views = ("log-mel", "front end", "layer 1", "layer 2")
    for view in views:
        for probe in ("pitch class", "onset (balanced)", "digit", "speaker"):
            metric = metrics[f"{view} / linear probe / {probe}"]
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["count"] in (4, 30)
        for probe in ("pitch class", "digit", "speaker"):
            assert f"{view} / token, k 8 / {probe}" in metrics
        for probe in ("digit", "speaker", "instrument"):
            assert f"{view} / histogram, k 8 / {probe}" in metrics
    assert not any(name.startswith("layer 0") for name in metrics)
    best = settings["verdict"]["best_layer"]
    assert f"{best} less log-mel / linear probe / digit" in metrics
    gain = metrics[f"{best} less front end / token, k 8 / pitch class"]
    parts = (metrics[f"{view} / token, k 8 / pitch class"]["value"] for view in (best, "front end"))
    assert gain["value"] == pytest.approx(next(parts) - next(parts))
    assert len(settings["verdict"]["tokens"]) == 2 * 2
    # tones are easy: what a log-mel frame holds is found
    assert metrics["log-mel / linear probe / pitch class"]["value"] > 0.4
    assert metrics["log-mel / linear probe / digit"]["value"] > 0.9


def test_the_command_that_is_written_down_gives_the_same(musiclm_command, places, tmp_path):
    """Metrics can be made again from the report alone."""
    options = words(places, tmp_path / "out", layers="1", clusters="4", seed=2, probe_clips=5)
    assert musiclm_command(*options, "--offline") == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    program, *again = written["settings"]["command"].split(" ")
    assert program == "musiclm" and again[-1] == "--offline"
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert musiclm_command(*again) == 0
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["metrics"] == written["metrics"]


def test_a_tokenizer_stands_for_its_encoder(musiclm_command, places, tmp_path, capsys):
    """The folder of a k-means tokenizer is judged by its encoder and its own tokens; no clusters, no k-means."""
    encoder = load_module(places["--encoder"])
    tokenizer = KMeansTokenizer(encoder=encoder.truncated(1), layer=1, centroids=torch.randn(4, 16))
    save_module(tokenizer, tmp_path / "tokenizer")
    options = words({**places, "--encoder": tmp_path / "tokenizer"}, tmp_path / "out", clusters="none", probe_clips=3)
    assert musiclm_command(*options) == 0
    said = capsys.readouterr().out
    assert "layer 1" in said and "layer 2" not in said and "## Tokens" not in said
    assert "## Own tokens, k = 4\n" in said and f"- KMeansTokenizer {tokenizer.fingerprint()}: " in said
    assert "- speech, train: 3 clips" in said and "- music, test: 3 clips" in said


def test_a_bundled_tokenizer_and_its_own_tokens(musiclm_command, places, tmp_path):
    """By name: its own tokens have six metrics beside those of a layer, and the verdict is on layers alone."""
    options = words({**places, "--encoder": "16khz"}, tmp_path / "out", layers="1", clusters="4", probe_clips=4)
    assert musiclm_command(*options) == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    size = written["settings"]["codebook_size"]
    own = [metric["name"] for metric in written["metrics"] if metric["name"].startswith("own tokens")]
    token = [f"own tokens / token, k {size} / {probe}" for probe in ("pitch class", "digit", "speaker")]
    assert own == token + [
        f"own tokens / histogram, k {size} / {probe}" for probe in ("digit", "speaker", "instrument")
    ]
    assert {one["layer"] for one in written["settings"]["verdict"]["tokens"]} == {"layer 1"}
    assert f"## Own tokens, k = {size}\n" in (tmp_path / "out" / "metrics.md").read_text()


def test_a_tokenizer_without_layers(musiclm_command, places, tmp_path, capsys):
    """vq-wav2vec has tokens alone: one table, no verdict; layers cannot be asked for."""
    from tests.helpers.published_vq_wav2vec import vq_settings, write_vq_wav2vec

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
        ({"music": "nowhere"}, r"nowhere: no recipe.json.*recipes.corpus"),
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
    assert musiclm_command("evaluate", "codec", *words(places, tmp_path / "out")[2:]) == 2
    said = capsys.readouterr().err
    assert "semantic" in said and "mulan" in said


def test_an_encoder_in_transformers_format(musiclm_command, places, tmp_path, capsys):
    """HuBERT's frames (49 a second, each of 400 samples) are labelled and read too; it has no front end of ours."""
    pytest.importorskip("transformers")
    from tests.helpers.published_files import tiny_hubert

    tiny_hubert(num_layers=2).save_pretrained(tmp_path / "hubert")
    changed = {**places, "--encoder": tmp_path / "hubert"}
    assert musiclm_command(*words(changed, tmp_path / "out", layers="0,2", clusters="none", probe_clips=4)) == 0
    said = capsys.readouterr().out
    assert "16000 Hz, 50 frames a second, layers 0..2" in said and "front end" not in said
    assert "- music, train: 4 clips, 996 frames" in said  # 249 of 5 s
    metrics = {one["name"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]}
    assert metrics["log-mel / linear probe / pitch class"]["value"] > 0.4
    assert "layer 2 / linear probe / speaker" in metrics


@pytest.fixture
def planted(tmp_path):
    """A saved joint embedding that understands every word, and a folder of clips with captions and labels."""
    save_module(PlantedMuLaN(), tmp_path / "mulan")
    items = planted_items(tmp_path)
    lines = [json.dumps({"audio": item.path.name, "caption": item.caption, **item.labels}) for item in items]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines))
    return ["evaluate", "mulan", "--model", tmp_path / "mulan", "--data", tmp_path, "--out", tmp_path / "out"]


def test_a_joint_embedding_is_measured_and_drawn(musiclm_command, planted, tmp_path, capsys):
    """Tables on stdout and in metrics.md, metrics in metrics.json, two pictures; the command written down is whole."""
    pytest.importorskip("matplotlib")
    assert musiclm_command(*planted) == 0
    said, text = capsys.readouterr().out, (tmp_path / "out" / "metrics.md").read_text()
    assert text in said and f"wrote {tmp_path / 'out' / 'metrics.json'}" in said
    assert "| text to audio | 12 | 100.0 [100.0, 100.0]" in text and "'music with drums'" in text
    assert "- 12 clips and 12 different texts (captions)" in text
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["settings"]["model_fingerprint"] == fingerprint_of(PlantedMuLaN())
    for name in ("similarities.png", "latents.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    for metric in written["metrics"]:
        assert metric["low"] <= metric["value"] + 1e-9 and metric["value"] <= metric["high"] + 1e-9
    program, *again = written["settings"]["command"].split(" ")
    assert program == "musiclm" and "--label" not in again
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert musiclm_command(*again, "--limit", 8, "--seed", 1, "--label", "tempo", "--offline") == 0
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["settings"]["num_clips"] == 8
    assert "--limit 8 --seed 1 --device auto --offline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "nowhere", "no model .*nowhere.* bundled models: tiny"),
        ("--model", "BARE", "bare holds no MuLaN"),
        ("--model", "16khz", "no model '16khz'.* bundled models: tiny"),
        ("--data", "nowhere", "nowhere: no such folder"),
        ("--label", "mood", "no label 'mood'.* instrument, tempo, drums"),
        ("--limit", 1, "at least 2 clips"),
        ("--seed", -1, "--seed must be at least 0"),
        ("--device", "abacus", "--device abacus cannot be used"),
    ],
)
def test_mistakes_of_measuring_a_joint_embedding(musiclm_command, planted, tmp_path, capsys, option, value, message):
    """What is wrong and the mend, in one line, and nothing is written."""
    pytest.importorskip("matplotlib")
    (tmp_path / "bare").mkdir()
    if option in planted:
        planted[planted.index(option) + 1] = tmp_path / "bare" if value == "BARE" else value
    else:
        planted += [option, value]
    assert musiclm_command(*planted) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1 and said.startswith("musiclm: ")
    assert not (tmp_path / "out").exists()


def test_pictures_need_matplotlib(musiclm_command, planted, tmp_path, capsys, monkeypatch):
    """Said before anything is computed, with what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.metric", None)
    assert musiclm_command(*planted) == 2
    assert 'pip install "musiclm-pytorch[plot]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_joint_embedding_is_found_wherever_runs_and_models_have_it(tmp_path):
    """The same one by the folder of its run, of the model, of the quantizer in it, or its own; tiny by name."""
    mulan = PlantedMuLaN(gap=0.5)
    for below in ("own", "model/quantizer", "begun/mulan/model", "trainer/mulan"):
        save_module(mulan, tmp_path / below)
    for name in ("own", "", "model", "begun", "begun/mulan", "trainer"):
        found = mulan_named(str(tmp_path / name))
        assert isinstance(found, PlantedMuLaN) and found.gap == 0.5 and not found.training
    tiny = mulan_named("tiny")
    assert tiny.get_text_latents("a flute").shape == (1, tiny.dim_latent)
    with pytest.raises(ValueError, match="no joint embedding"):
        mulan_named(str(saved_encoder(tmp_path / "encoder")))


def test_a_hub_is_asked_only_for_its_ids(monkeypatch):
    """An owner and a name are CLAP on a hub; offline is passed on."""
    clap = pytest.importorskip("musiclm_pytorch.mulan.clap")
    asked = []

    def from_pretrained(source, *, offline=False):
        asked.append((source, offline))
        return PlantedMuLaN()

    monkeypatch.setattr(clap.ClapMuLaN, "from_pretrained", from_pretrained)
    assert isinstance(mulan_named("laion/clap", offline=True), PlantedMuLaN)
    assert asked == [("laion/clap", True)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="fluidsynth is not installed")
def test_a_rendered_corpus_from_end_to_end(musiclm_command, tmp_path, places, capsys):
    """The real corpus, compressed and at another rate: pitch class is far above guessing already in log-mel frames."""
    corpus = make_corpus(tmp_path / "corpus", num_train=40, num_valid=12, seed=1)
    encoder = saved_encoder(tmp_path / "encoder", 16_000)
    options = words({**places, "--encoder": encoder, "--music": corpus}, tmp_path / "out", clusters="16")
    assert musiclm_command(*options) == 0
    metrics = {one["name"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]}
    pitch = metrics["log-mel / linear probe / pitch class"]
    assert pitch["low"] > pitch["chance"] + 0.2
    assert metrics["front end / linear probe / onset (balanced)"]["low"] > 0.6
