"""`musiclm evaluate music` from clips on disk, from a model, and from MusicCaps."""

import json
import sys

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from musiclm_pytorch.cli import evaluate_music
from musiclm_pytorch.cli.evaluate_music import generate_clips, read_prompts
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.bad_input import listing

SAMPLE_HZ = 16_000
CAPTIONS = ("slow cello", "fast flute", "slow flute", "fast violin", "a calm piano", "choir with guitars")


def written_clips(folder, seed=0, captions=CAPTIONS, prefix="clip"):
    """A folder of clips with a manifest."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number, caption in enumerate(captions):
        pulse = (torch.arange(3 * SAMPLE_HZ) % (4000 + 500 * number) < 800).float()
        wave = 0.2 * pulse * torch.randn(3 * SAMPLE_HZ, generator=generator)
        write_audio(folder / f"{prefix}{number}.wav", wave, SAMPLE_HZ)
        labels = {"instrument": caption.split()[-1], "tempo": caption.split()[0], "bpm": 100.0}
        lines.append(json.dumps({"audio": f"{prefix}{number}.wav", "caption": caption, **labels}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


class FakeMusicLM:
    """Noise whose seed is that of the candidate."""

    sample_hz = SAMPLE_HZ

    def __call__(self, texts, *, num_samples, seconds, seeds, max_batch):
        assert len(seeds) == num_samples and len(texts) * num_samples <= max_batch
        generator = torch.Generator().manual_seed(seeds[0])
        return 0.1 * torch.randn(len(texts), round(seconds * SAMPLE_HZ), generator=generator)


@pytest.mark.slow
def test_report_of_clips_and_codec_copies(musiclm_command, tmp_path, capsys):
    """All metrics that need no captions of others; values, floors, notes, a plot, and the command to repeat."""
    real = written_clips(tmp_path / "real")
    generated = written_clips(tmp_path / "made", seed=1)
    out = tmp_path / "report"
    options = ["--generated", tmp_path / "made", "--real", real, "--codec", "codec_16khz", "--training", generated]
    assert musiclm_command("evaluate", "music", *options, "--out", out) == 0
    written = json.loads((out / "metrics.json").read_text())
    values = {value["name"]: value for value in written["metrics"]}
    assert written["settings"]["clips"] == {"codec copies": 6, "made": 6, "real clips": 6, "training clips": 6}
    for name in (
        "Fréchet distance (musicnn) / made",
        "Fréchet distance (MuLan) / two halves of real clips",
        "kernel distance (musicnn) / codec copies",
        "KL divergence (musicnn) / made",
        "inception score (musicnn) / real clips",
        "text similarity (MuLan) / made",
        "beat / codec copies / onsets follow the real clip",
        "chroma cosine similarity / made",
        "nearest training clip (MuLan) / made / mean",
        "memorisation / made / exact matches of 2 s",
    ):
        value = values[name]
        assert value["low"] <= value["value"] <= value["high"] and value["count"] > 0 and value["note"]
    assert values["memorisation / made / exact matches of 2 s"]["value"] == 1.0
    assert values["beat / codec copies / onsets follow the real clip"]["value"] > 0.5
    assert (out / "metrics.png").stat().st_size > 1000
    text = (out / "metrics.md").read_text()
    assert text in capsys.readouterr().out and "| made " in text and "musiclm evaluate music" in text


@pytest.mark.slow
def test_selected_metrics_of_a_model(musiclm_command, tmp_path, monkeypatch):
    """A model generates from captions; its clips are paired with the real clips, and stay in the folder."""

    monkeypatch.setattr(MusicLM, "from_pretrained", lambda **source: FakeMusicLM())
    real = written_clips(tmp_path / "real")
    options = ["--model", "fake", "--real", real, "--num-samples", "2", "--seconds", "3", "--metrics", "beat", "tags"]
    assert musiclm_command("evaluate", "music", *options, "--out", tmp_path / "out") == 0
    values = {value["name"] for value in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]}
    assert "beat / fake, best of 2 / onsets follow the real clip" in values
    assert all(name.startswith(("beat", "musicnn tags")) for name in values)
    assert len(list((tmp_path / "out" / "generated").glob("*.flac"))) == len(CAPTIONS)
    # The same without real clips, from captions alone
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"caption": "slow cello"}\n{"caption": "fast flute"}\n')
    options = ["--model", "fake", "--captions", captions, "--metrics", "beat", "--out", tmp_path / "alone"]
    assert musiclm_command("evaluate", "music", *options) == 0


def test_without_matplotlib_the_report_has_no_picture(musiclm_command, tmp_path, caplog, monkeypatch):
    """The table and the values are written, and one warning names what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    written_clips(tmp_path / "made")
    options = ["--generated", tmp_path / "made", "--metrics", "beat", "--out", tmp_path / "out"]
    assert musiclm_command("evaluate", "music", *options) == 0
    assert 'the report has no picture; plots need matplotlib: pip install "musiclm[plot]"' in caplog.messages
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "metrics.md"]


def test_generated_clips_are_deterministic_and_carry_labels(tmp_path):
    """Equal seeds give equal files; caption, labels and real clip are in the manifest."""
    prompts = read_prompts(written_clips(tmp_path / "real"), None)
    manifests = [generate_clips(FakeMusicLM(), prompts, tmp_path / name, 1.0, 2, seed=3) for name in "ab"]
    lines = [json.loads(line) for line in manifests[0].read_text().splitlines()]
    assert lines[1] == {
        "audio": "00001.flac", "caption": "fast flute", "reference": "clip1.wav",
        "instrument": "flute", "tempo": "fast", "bpm": 100.0,
    }  # fmt: skip
    assert (tmp_path / "a" / "00004.flac").read_bytes() == (tmp_path / "b" / "00004.flac").read_bytes()


def test_generated_nan_names_the_caption(tmp_path):
    """A broken model is not measured as silence."""

    class Broken(FakeMusicLM):
        def __call__(self, texts, **options):
            return super().__call__(texts, **options) * float("nan")

    with pytest.raises(RuntimeError, match="slow cello"):
        generate_clips(Broken(), read_prompts(written_clips(tmp_path / "real"), None), tmp_path / "a", 1.0)


def test_musiccaps(tmp_path):
    """The table gives captions for generation, and captions of real clips in a folder."""
    table = tmp_path / "musiccaps-public.csv"
    rows = ["ytid,start_s,end_s,aspect_list,caption"]
    rows += [f"{'abcdefghij' + letter},0,3,\"['slow']\",a calm song {letter}" for letter in "klm"]
    table.write_text("\n".join(rows) + "\n")
    prompts = read_prompts(table, None)
    assert [prompt.caption for prompt in prompts] == [f"a calm song {letter}" for letter in "klm"]
    for letter in "kl":
        write_audio(tmp_path / "clips" / f"abcdefghij{letter}-0.wav", torch.zeros(3 * SAMPLE_HZ), SAMPLE_HZ)
    items = evaluate_music.load_real(tmp_path / "clips", table, None, 0)
    assert [item.caption for item in items] == ["a calm song k", "a calm song l"]


def test_options_and_folders_are_checked_before_the_work(musiclm_command, tmp_path, capsys):
    """Wrong numbers, options without use, and files of the user, which stay as they are."""
    real = written_clips(tmp_path / "real").parent
    for name in ("report/metrics.json", "plot/metrics.png", "copies/codec_copies/00000.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    inside = written_clips(tmp_path / "inside" / "codec_copies").parent
    before = listing(tmp_path)
    for out, options, message in (
        ("out", ["--num-samples", 0, "--model", "tiny"], "--num-samples must be at least 1, got 0"),
        ("out", ["--limit", -1], "--limit must be at least 1, got -1"),
        ("out", ["--seconds", "inf"], "--seconds must be above 0 and at most 3600, got inf"),
        ("out", ["--captions", "none.jsonl"], "--captions needs --model; add it, or leave out --captions"),
        ("report", [], "metrics.json exists, and was not written by this library"),
        ("plot", [], "metrics.png exists, and was not written by this library"),
        ("copies", ["--codec", "codec_16khz"], "do not belong to the clips of this command (00000.flac)"),
        ("inside", ["--codec", "codec_16khz", "--generated", inside], "codec_copies is read, and would be overwritten"),
    ):
        words = ("evaluate", "music", "--real", real, *options, "--metrics", "beat", "--out", tmp_path / out)
        assert musiclm_command(*words) == 2
        assert message in capsys.readouterr().err
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_mistakes_are_one_line(musiclm_command, tmp_path, capsys):
    """Nothing to measure, unknown metrics, and options that need another one."""
    real = written_clips(tmp_path / "real")
    for options, message in (
        ([], "pass --generated"),
        (["--codec", "codec_16khz"], "needs --real"),
        (["--model", "tiny"], "--captions"),
        (["--real", real, "--metrics", "swing"], "no metric has such a name"),
        (["--musiccaps", tmp_path / "x.csv"], "needs --real"),
        (["--real", real, "--classifier", tmp_path / "none"], "pass --labelled"),
    ):
        assert musiclm_command("evaluate", "music", *options, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
