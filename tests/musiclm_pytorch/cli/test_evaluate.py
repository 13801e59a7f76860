import json
import re
import sys

import pytest
import torch

from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from audiolm_pytorch.semantic.pretrained import FairseqVQWav2Vec
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.recipes.corpus.corpus import make_corpus
from musiclm_pytorch.recipes.semantic import write_probe_manifests
from tests.helpers.installed_sounds import sounds_are_missing
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
    """An encoder and a manifest of music and digits; read only."""
    folder = tmp_path_factory.mktemp("places")
    corpus, digits = written_corpus(folder / "corpus"), written_digits(folder / "digits")
    write_probe_manifests(corpus, digits, folder / "probes")
    return {
        "--encoder": saved_encoder(folder / "encoder"),
        "--data": folder / "probes",
        "--labels": "pitch_class,digit",
    }


def words(places, out, **changes):
    """The command line, with some options changed."""
    options = {**places, "--out": out, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    words = ["evaluate", "semantic"]
    for name, value in options.items():
        words += [name, *(str(value).split(",") if name in ("--labels", "--layers", "--clusters") else [value])]
    return words


@pytest.mark.slow
def test_the_whole_command(musiclm_command, places, tmp_path, capsys):
    """One table on stdout and in metrics.md, every number with its interval in metrics.json."""
    out = tmp_path / "new" / "report"
    labels = "pitch_class,digit,speaker"
    assert musiclm_command(*words(places, out, labels=labels, layers="1,2", clusters="8", seed=3)) == 0
    printed = capsys.readouterr().out
    text, written = (out / "metrics.md").read_text(), json.loads((out / "metrics.json").read_text())
    assert text in printed and f"wrote {out / 'metrics.json'}" in printed
    settings, metrics = written["settings"], {metric["name"]: metric for metric in written["metrics"]}
    assert (
        settings["fingerprint"] == fingerprint_of(load_module(places["--encoder"])) and settings["fingerprint"] in text
    )
    # 6 and 4 clips of music, 24 and 30 digits; two digits of 30 ms are shorter than two frames
    assert settings["num_train_clips"] == 28 and settings["num_test_clips"] == 34
    names = [f"{view}{kind}" for view in ("log-mel", "layer 1", "layer 2") for kind in ("", ", 8 clusters")]
    assert list(metrics) == [f"{name} / {label}" for name in names for label in labels.split(",")]
    for metric in metrics.values():
        assert metric["low"] <= metric["value"] <= metric["high"] and metric["count"] in (4, 30)
    # tones are easy to read from log-mel frames
    assert metrics["log-mel / pitch_class"]["value"] > 0.4
    assert metrics["log-mel / digit"]["value"] > 0.9


@pytest.mark.slow
def test_the_command_in_the_report_repeats_it(musiclm_command, places, tmp_path):
    """Metrics can be computed again from the report alone."""
    options = words(places, tmp_path / "out", layers="1", clusters="4", seed=2, limit=20)
    assert musiclm_command(*options, "--offline") == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    program, *again = written["settings"]["command"].split(" ")
    assert program == "musiclm" and "--offline" in again
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert musiclm_command(*again) == 0
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["metrics"] == written["metrics"]


@pytest.mark.slow
def test_a_tokenizer_is_measured_with_its_encoder(musiclm_command, places, tmp_path, capsys):
    """The folder of a k-means tokenizer: layers of its encoder and its tokens; without clusters no k-means."""
    encoder = load_module(places["--encoder"])
    tokenizer = KMeansTokenizer(encoder=encoder.truncated(1), layer=1, centroids=torch.randn(4, 16))
    save_module(tokenizer, tmp_path / "tokenizer")
    assert musiclm_command(*words({**places, "--encoder": tmp_path / "tokenizer"}, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "| layer 1 " in printed and "layer 2" not in printed and "clusters" not in printed
    assert "| tokens " in printed


@pytest.mark.slow
def test_a_bundled_tokenizer_by_name(musiclm_command, places, tmp_path):
    """Its tokens are measured beside a layer."""
    options = words({**places, "--encoder": "semantic_16khz"}, tmp_path / "out", labels="digit", layers="1", limit=20)
    assert musiclm_command(*options) == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [metric["name"] for metric in written["metrics"]] == ["log-mel / digit", "layer 1 / digit", "tokens / digit"]


@pytest.mark.slow
def test_a_tokenizer_without_layers(musiclm_command, places, tmp_path, capsys):
    """vq-wav2vec has tokens alone; layers cannot be selected."""
    from tests.helpers.published_vq_wav2vec import vq_settings, write_vq_wav2vec

    tokenizer = FairseqVQWav2Vec(write_vq_wav2vec(tmp_path / "vq.pt", vq_settings()))
    save_module(tokenizer, tmp_path / "vq")
    changed = {**places, "--encoder": tmp_path / "vq"}
    assert musiclm_command(*words(changed, tmp_path / "out", limit=20)) == 0
    printed = capsys.readouterr().out
    assert "- frames_per_second: 200.0" in printed and "| tokens " in printed and "| layer" not in printed
    assert musiclm_command(*words(changed, tmp_path / "other", layers="1")) == 2
    assert "vq has no layers, only tokens; leave --layers out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1,9"}, r"got --layers \(1, 9\), but the encoder .*encoder has layers 0\.\.2"),
        ({"clusters": "1"}, r"at least 2 for --limit and for each of --clusters; .*--clusters \(1,\)"),
        ({"clusters": "4,100000"}, r"100000 clusters need at least \d+ training frames.*more clips"),
        ({"limit": 0}, r"at least 2 for --limit and for each of --clusters; .*--limit 0"),
        ({"seed": -1}, r"--seed must be at least 0"),
        ({"labels": "singer"}, r"'singer' needs two classes.*'digit'"),
        ({"data": "nowhere"}, r"nowhere: no such folder"),
        ({"device": "abacus"}, r"the device abacus cannot be used"),
    ],
)
def test_mistakes_are_named_in_one_line(musiclm_command, places, tmp_path, capsys, changes, message):
    """What is wrong and what to do, in one line, and nothing is written."""
    assert musiclm_command(*words(places, tmp_path / "out", **changes)) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and printed.count("\n") == 1 and printed.startswith("musiclm: ")
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


@pytest.mark.slow
def test_an_encoder_in_transformers_format(musiclm_command, places, tmp_path, capsys):
    """HuBERT has 49 frames in a second, and 50 per second on average."""
    pytest.importorskip("transformers")
    from tests.helpers.published_files import tiny_hubert

    tiny_hubert(num_layers=2).save_pretrained(tmp_path / "hubert")
    changed = {**places, "--encoder": tmp_path / "hubert"}
    assert musiclm_command(*words(changed, tmp_path / "out", layers="0,2", limit=30)) == 0
    assert "- frames_per_second: 50.0" in capsys.readouterr().out
    metrics = {one["name"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]}
    assert metrics["log-mel / pitch_class"]["value"] > 0.4
    assert "layer 2 / digit" in metrics


@pytest.fixture
def planted(tmp_path):
    """A saved joint embedding that understands every word, and a folder of clips with captions and labels."""
    save_module(PlantedMuLaN(), tmp_path / "mulan")
    items = planted_items(tmp_path)
    lines = [json.dumps({"audio": item.path.name, "caption": item.caption, **item.labels}) for item in items]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines))
    return ["evaluate", "mulan", "--model", tmp_path / "mulan", "--data", tmp_path, "--out", tmp_path / "out"]


@pytest.mark.slow
def test_a_joint_embedding_is_measured_and_plotted(musiclm_command, planted, tmp_path, capsys):
    """A table on stdout and in metrics.md, metrics in metrics.json, one plot; the reported command is complete."""
    pytest.importorskip("matplotlib")
    assert musiclm_command(*planted) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "metrics.md").read_text()
    assert text in printed and f"wrote {tmp_path / 'out' / 'metrics.json'}" in printed
    assert "| retrieval / text to audio / R@1 " in text and "'music with drums'" in text
    assert "- num_clips: 12\n- num_texts: 12\n- texts: captions\n" in text
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["settings"]["fingerprint"] == fingerprint_of(PlantedMuLaN())
    assert (tmp_path / "out" / "similarities.png").read_bytes().startswith(b"\x89PNG")
    for metric in written["metrics"]:
        assert metric["low"] <= metric["value"] + 1e-9 and metric["value"] <= metric["high"] + 1e-9
    program, *again = written["settings"]["command"].split(" ")
    assert program == "musiclm" and "--label" not in again
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert musiclm_command(*again, "--limit", 8, "--seed", 1, "--label", "tempo", "--offline") == 0
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["settings"]["num_clips"] == 8
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--limit 8", "--seed 1", "--offline"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "nowhere", "no folder nowhere.* bundled model: .*tiny"),
        ("--model", "BARE", "bare contains no complete JointEmbedding"),
        ("--model", "codec_16khz", "codec_16khz holds a SoundStream, but a JointEmbedding is needed"),
        ("--data", "nowhere", "nowhere: no such folder"),
        ("--label", "mood", "--label must be one of instrument, tempo, drums, got mood"),
        ("--limit", 1, "at least 2 clips"),
        ("--seed", -1, "--seed must be at least 0"),
        ("--device", "abacus", "the device abacus cannot be used"),
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


def test_without_matplotlib_the_report_has_no_picture(musiclm_command, planted, tmp_path, caplog, monkeypatch):
    """The table and the metrics are written, and one warning names what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert musiclm_command(*planted) == 0
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        'the report has no picture; plots need matplotlib: pip install "musiclm[plot]"'
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "metrics.md"]


def test_a_joint_embedding_is_found_wherever_runs_and_models_have_it(tmp_path):
    """The same one by the folder of its run, of the model, of the quantizer in it, or its own; tiny by name."""
    mulan = PlantedMuLaN(gap=0.5)
    for below in ("own", "model/quantizer", "begun/mulan/model", "trainer/mulan"):
        save_module(mulan, tmp_path / below)
    for name in ("own", "", "model", "begun", "begun/mulan", "trainer"):
        found = JointEmbedding.from_pretrained(str(tmp_path / name))
        assert isinstance(found, PlantedMuLaN) and found.gap == 0.5 and not found.training
    tiny = JointEmbedding.from_pretrained("tiny")
    assert tiny.get_text_latents("a flute").shape == (1, tiny.dim_latent)
    with pytest.raises(ValueError, match="but a JointEmbedding is needed"):
        JointEmbedding.from_pretrained(str(saved_encoder(tmp_path / "encoder")))


@pytest.mark.slow
@pytest.mark.skipif(sounds_are_missing(), reason="sounds are not installed")
def test_a_rendered_corpus_from_end_to_end(musiclm_command, tmp_path, places):
    """The real corpus, compressed and at another rate: log-mel frames hold the pitch class."""
    corpus = make_corpus(tmp_path / "corpus", num_train=40, num_valid=12, seed=1)
    encoder = saved_encoder(tmp_path / "encoder", 16_000)
    changed = {"--encoder": encoder, "--data": corpus, "--labels": "pitch_class,instrument"}
    assert musiclm_command(*words(changed, tmp_path / "out", layers="1")) == 0
    metrics = {one["name"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]}
    pitch = metrics["log-mel / pitch_class"]
    assert pitch["low"] > pitch["chance"] + 0.2
