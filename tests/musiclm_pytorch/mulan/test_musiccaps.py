"""MusicCaps: a table with every trap of CSV, and a folder that never holds all of its clips."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiolm_pytorch.data.manifest import AudioItem, captions_of, load_items, load_split, manifest_text
from musiclm_pytorch.mulan.captions import CaptionSampler, aspects_of
from musiclm_pytorch.mulan.musiccaps import musiccaps_items, read_musiccaps
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from tests.helpers.tiny_mulan import tiny_mulan

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "musiccaps" / "musiccaps-public.csv"
COLUMNS = (
    "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"
).split(",")
IDS = ("-0Gj8-vB1q4", "_aSdAVK79lg", "0xzrMun0Rs1", "AAAAAAAAAAA", "BBBBBBBBBBB")


def row(ytid, start=30, caption="A song.", aspects="['slow', \"children's song\"]", **others):
    """A row as the published table has it; a clip is one second here."""
    cells = {"ytid": ytid, "start_s": start, "end_s": start + 1, "aspect_list": aspects, "caption": caption}
    about = {"audioset_positive_labels": "/m/04rlf,/m/06bz3", "author_id": 4, "is_balanced_subset": False}
    return {**about, "is_audioset_eval": True, **cells, **others}


def write_table(path, rows):
    """Write rows with the quoting of the published table."""
    with path.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_and_its_clips_become_items(tmp_path, write_tone, caplog):
    """All ways of naming clips, folders, missing clips by name, quotes and line ends in captions, the table's order."""
    hostile = "A \"slow\" song,\r\nwith flöte; 'x' and, more"
    rows = [row(ytid, start=30 + 10 * place, author_id=place) for place, ytid in enumerate(IDS)]
    rows[1] |= {"caption": hostile, "is_audioset_eval": False}
    table = write_table(tmp_path / "table.csv", rows)
    paths = [f"[{IDS[4]}]-[70-71].wav", f"x/{IDS[1]}-40.WAV", f"{IDS[0]}.flac"]
    clips = [write_tone(f"clips/{name}") for name in paths]
    write_tone("clips/unrelated.wav")
    with caplog.at_level(logging.WARNING):
        found = musiccaps_items(table, str(tmp_path / "clips"))
    assert [item.path for item in found.items] == [clips[2], clips[1], clips[0]]
    assert [item.caption for item in found.items] == ["A song.", hostile, "A song."]
    assert aspects_of(found.items[0]) == ["slow", "children's song"]
    about = {"audioset_positive_labels": ["/m/04rlf", "/m/06bz3"], "author_id": 1}
    about |= {"is_balanced_subset": False, "is_audioset_eval": False}
    assert found.items[1].labels["musiccaps"] == {"ytid": IDS[1], "start_s": 40.0, "end_s": 41.0, **about}
    assert [clip.ytid for clip in found.missing] == [IDS[2], IDS[3]] and found.rejected == []
    assert len(caplog.records) == 1 and f"2 of 5 clips of {table} are missing: {IDS[2]}, {IDS[3]}" in caplog.text


def test_items_written_as_a_manifest_read_the_same(tmp_path, write_tone):
    """Items read from the written manifest equal those of the table, and so do the texts of an epoch."""
    write_tone(f"clips/{IDS[0]}.wav")
    rows = [row(IDS[0]), row(IDS[0], caption='Another "one",\nlonger.', aspects="['loud']")]
    found = musiccaps_items(write_table(tmp_path / "table.csv", rows), tmp_path / "clips")
    (tmp_path / "train.jsonl").write_text(manifest_text(found.items, tmp_path))
    (item,) = load_items(tmp_path).items
    assert item == found.items[0]
    assert captions_of(item) == ["A song.", 'Another "one",\nlonger.'] and aspects_of(item)[2:] == ["loud"]
    sampler = CaptionSampler(seed=3)
    assert [sampler.sample(item, epoch, 0) for epoch in range(9)] == [
        sampler.sample(found.items[0], epoch, 0) for epoch in range(9)
    ]


def test_parts_of_one_video_are_not_mixed_up(tmp_path, write_tone):
    """For two parts of a video only names with their start are used, since the id alone is ambiguous."""
    table = write_table(tmp_path / "table.csv", [row(IDS[0]), row(IDS[0], start=60.5)])
    write_tone(f"clips/{IDS[0]}.wav")
    second = write_tone(f"clips/{IDS[0]}-60.5.wav")
    found = musiccaps_items(table, tmp_path / "clips")
    assert [item.path for item in found.items] == [second]
    assert [(clip.ytid, clip.start_seconds) for clip in found.missing] == [(IDS[0], 30.0)]


def test_whole_videos_and_damaged_clips_are_rejected(tmp_path, write_tone, caplog):
    """A file much longer than the described part is rejected, and a damaged file is named."""
    table = write_table(tmp_path / "table.csv", [row(ytid) for ytid in IDS[:3]])
    whole, _ = write_tone(f"clips/{IDS[0]}.wav", seconds=4), write_tone(f"clips/{IDS[2]}.wav", seconds=1.1)
    (tmp_path / "clips" / f"{IDS[1]}.wav").write_text("no sound" * 20)
    found = musiccaps_items(table, tmp_path / "clips")
    assert [item.path.stem for item in found.items] == [IDS[2]]
    reasons = {rejected.path.stem: rejected.reason for rejected in found.rejected}
    assert reasons[IDS[0]] == "lasts 4.0 s, but 30 to 31 s are described; cut these out of it"
    assert "cannot be read as audio" in reasons[IDS[1]] and IDS[0] in caplog.text and IDS[1] in caplog.text
    (tmp_path / "clips" / f"{IDS[2]}.wav").unlink()
    (tmp_path / "clips" / f"{IDS[1]}.wav").unlink()
    with pytest.raises(ValueError, match=f"no clip in .* can be used: {whole} .lasts 4.0 s"):
        musiccaps_items(table, tmp_path / "clips")


def test_a_folder_without_the_clips_is_an_error(tmp_path, write_tone):
    """A wrong folder or other file names: the message has the expected name of the first clip."""
    table = write_table(tmp_path / "table.csv", [row(IDS[0])])
    with pytest.raises(ValueError, match="clips: no such folder"):
        musiccaps_items(table, tmp_path / "clips")
    write_tone("clips/song.wav")
    names = rf"{IDS[0]}\]-\[30-31\].wav or {IDS[0]}_30_31.wav or {IDS[0]}-30.wav or {IDS[0]}.wav or \[{IDS[0]}\].wav"
    with pytest.raises(ValueError, match=rf"contains none of the 1 clips of .*table.csv; expected e.g. \[{names}"):
        musiccaps_items(table, tmp_path / "clips")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            ({"ytid": ytid}, "'ytid' must be 11 letters")
            for ytid in ("../../secret", "/etc/passwd", "..\\..\\secre", "AAAAAAAAAAA/../x", "AAAAAAAAAAA\n", "#NAME?")
        ],
        *[
            (cells, "'start_s' and 'end_s' must be seconds")
            for cells in ({"start_s": "x"}, {"start_s": "40"}, {"end_s": "inf"}, {"end_s": "nan"})
        ],
        ({"aspect_list": "[__import__('os').abort()]"}, "'aspect_list': need a list of texts"),
        ({"aspect_list": "[" * 70_000}, "'aspect_list': the aspects have 70000 characters"),
        ({"aspect_list": "[]", "caption": " "}, "the row has neither a caption nor aspects; remove it"),
        ({"caption": "la " * 50_000}, "not a row of a CSV table .field larger than field limit"),
        ({"is_audioset_eval": "maybe"}, "'is_audioset_eval' must be True or False"),
    ],
)
def test_hostile_rows_are_named(tmp_path, change, message):
    """Paths, code, nested lists and endless texts in cells are refused with the line where the row begins."""
    rows = [row(IDS[0], caption="two\nlines"), row(IDS[1]) | change]
    with pytest.raises(ValueError, match=f"table.csv, line 4: {message}"):
        read_musiccaps(write_table(tmp_path / "table.csv", rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table has no rows"),
        (",".join(COLUMNS) + "\n", "the table has no rows"),
        ("ytid,caption\nx,y\n", r"line 1: the columns \['start_s', 'end_s', 'aspect_list'\] must occur once"),
        (",".join([*COLUMNS, "ytid"]) + "\n", r"line 1: the columns \['ytid'\] must occur once"),
        (",".join(COLUMNS) + "\nAAAAAAAAAAA,30,40,x\n", "line 2: got 4 values, need 9"),
        (",".join(COLUMNS) + '\nAAAAAAAAAAA,30,40,"/m,[],open,4,True,True\n' * 9, "line 2: not a row of a CSV table"),
        (",".join(COLUMNS) + "\nAAAAAAAAAAA,30,40,,[],fl\xf6te,4,,\n", "after line [12]: not UTF-8"),
    ],
)
def test_malformed_tables_are_named(tmp_path, text, message):
    """Truncated, re-encoded and other tables: the message has the fault and the line."""
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"table.csv(:|,) {message}"):
        read_musiccaps(path)


def test_tables_of_hostile_size_are_not_read(tmp_path):
    """A sparse file of a terabyte costs nothing."""
    with (tmp_path / "table.csv").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="table.csv: has 1099511627776 bytes"):
        read_musiccaps(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="gone.csv: no such file; download musiccaps-public.csv"):
        read_musiccaps(tmp_path / "gone.csv")


def test_items_split_by_a_column(tmp_path, write_tone):
    """Clips of AudioSet's evaluation part are the second half; a table without values raises an error."""
    rows = [row(IDS[0]), row(IDS[1], is_audioset_eval=False), row(IDS[2], is_balanced_subset="")]
    for ytid in IDS[:3]:
        write_tone(f"clips/{ytid}.wav", seconds=0.1)
    found = musiccaps_items(write_table(tmp_path / "table.csv", rows), tmp_path / "clips")
    train, valid = found.split("is_audioset_eval")
    assert [item.path.stem for item in train] == [IDS[1]] and [item.path.stem for item in valid] == [IDS[0], IDS[2]]
    with pytest.raises(ValueError, match=f"{IDS[2]}.wav: column 'is_balanced_subset' of the table must be True or"):
        found.split("is_balanced_subset")


@pytest.fixture
def convert(musiclm_command, tmp_path, write_tone):
    """`musiclm convert musiccaps` on a table of four clips, three of which are there."""
    rows = [row(ytid, is_audioset_eval=place == 0) for place, ytid in enumerate(IDS[:4])]
    write_table(tmp_path / "table.csv", rows)
    for ytid in IDS[:3]:
        write_tone(f"data/clips/{ytid}.wav", seconds=0.1)
    words = ["convert", "musiccaps", "--csv", tmp_path / "table.csv", "--clips", tmp_path / "data" / "clips"]
    return lambda *further: musiclm_command(*words, *further)


def test_the_command_writes_a_manifest_that_trainers_read(convert, tmp_path, capsys):
    """One line a clip, relative to the manifest; the same command again changes nothing, missing clips are listed."""
    out, gone = tmp_path / "data" / "train.jsonl", tmp_path / "gone.txt"
    assert convert("--out", out, "--missing", gone) == 0
    said = capsys.readouterr().out
    summary = "of 4 described clips 3 can be used, 0 cannot, 1 are missing\n"
    assert said == f"wrote {out}  3 clips\nwrote {gone}  1 ids of missing clips\n{summary}"
    assert gone.read_text() == f"{IDS[3]}\n" and '"audio": "clips/' in out.read_text()
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert convert("--out", out) == 0
    assert capsys.readouterr().out == f"unchanged: {out}  3 clips\n{summary}"
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    train, valid = load_split(tmp_path / "data", valid_fraction=0.3)
    assert len(train) + len(valid) == 3 and all(captions_of(item) for item in train + valid)


def test_the_command_trains_mulan_on_what_it_wrote(convert, tmp_path):
    """End to end: the evaluation part is held out, and a MuLaN takes a step on the rest."""
    assert convert("--out", tmp_path / "data" / "train.jsonl", "--split", "eval") == 0
    train, valid = load_split(tmp_path / "data")
    assert [item.path.stem for item in train] == [*IDS[1:3]] and [item.path.stem for item in valid] == [IDS[0]]
    trainer = MuLaNTrainer(
        mulan=tiny_mulan(),
        folder=tmp_path / "data",
        batch_size=2,
        num_train_steps=1,
        seconds=0.1,
        results_folder=tmp_path / "run",
    )
    assert trainer.train().step == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "data/songs.txt"], "name a file that ends in .jsonl"),
        (["--out", "data/all.jsonl", "--split", "eval"], "with --split, --out must be called train.jsonl; pass --out"),
        (
            ["--out", "data/train.jsonl", "--split", "balanced"],
            "--split balanced leaves 3 training and 0 held-out clips",
        ),
        (
            ["--out", "data/mine.jsonl"],
            "data/mine.jsonl exists with other contents; move that file away",
        ),
        (["--out", "data/new.jsonl", "--missing", "notes.txt"], "notes.txt exists with other contents"),
        (["--out", "data/new.jsonl", "--missing", "table.wav"], "name a file that ends in .txt, .csv"),
        (["--out", "data/new.jsonl", "--csv", "gone.csv"], "gone.csv: no such file"),
        (["--out", "data/new.jsonl", "--clips", "gone"], "gone: no such folder"),
    ],
)
def test_the_command_refuses_in_one_line(convert, tmp_path, monkeypatch, words, message, capsys):
    """Exit status 2, one line with fault and fix, and no file is written or changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine.jsonl").write_text('{"audio": "mine.wav"}')
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert convert(*words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("musiclm: ")]
    assert len(error) == 1 and message in error[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published table is not here")
def test_the_published_table(tmp_path):
    """5,521 clips of ten seconds, 2,858 of AudioSet's evaluation part and 1,000 balanced; every aspect list is read."""
    clips = read_musiccaps(PUBLISHED)
    assert len(clips) == len({clip.ytid for clip in clips}) == 5521
    assert {clip.end_seconds - clip.start_seconds for clip in clips} == {10.0}
    assert sum(clip.about["is_audioset_eval"] for clip in clips) == 2858
    assert sum(clip.about["is_balanced_subset"] for clip in clips) == 1000
    assert all(len(clip.captions) == 1 and clip.aspects for clip in clips)
    assert clips[0].aspects[:2] == ("low quality", "sustained strings melody") and clips[0].captions[0].endswith(
        "services."
    )
    assert sum("\n" in clip.captions[0] for clip in clips) == 5
    labels = {"aspects": list(clips[0].aspects)}
    texts = CaptionSampler(aspect_prob=1.0).sample(AudioItem(tmp_path, clips[0].captions[0], labels, 1, 1), 0, 0)
    assert set(texts[0].split(", ")) <= set(clips[0].aspects)


def test_clips_as_yt_dlp_leaves_them(tmp_path, write_tone, caplog):
    """`ID.opus` is read, `ID.m4a` and `ID.webm.part` are named with a reason, and the rest is missing."""
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 48000)
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / f"{IDS[0]}.opus", wave, 48000, format="OGG", subtype="OPUS")
    for name in (f"{IDS[1]}.m4a", f"[{IDS[2]}]-[30-31].webm"):
        (tmp_path / "clips" / name).write_bytes(b"\0" * 100)
    write_tone(f"clips/{IDS[3]}.flac")
    (tmp_path / "clips" / f"{IDS[3]}.m4a").write_bytes(b"\0" * 100)
    table = write_table(tmp_path / "table.csv", [row(ytid) for ytid in IDS])
    with caplog.at_level(logging.WARNING):
        found = musiccaps_items(table, tmp_path / "clips")
    assert [item.path.name for item in found.items] == [f"{IDS[0]}.opus", f"{IDS[3]}.flac"]
    assert [(item.path.suffix, "cannot be decoded" in item.reason) for item in found.rejected] == [
        (".m4a", True),
        (".webm", True),
    ]
    assert [clip.ytid for clip in found.missing] == [IDS[4]]
    assert "1 of 5 clips" in caplog.messages[0] and "left out 2 files" in caplog.messages[1]
    for name in (f"{IDS[0]}.opus", f"{IDS[3]}.flac"):
        (tmp_path / "clips" / name).unlink()
    with pytest.raises(ValueError, match="can be used: .*m4a .*cannot be decoded; convert it"):
        musiccaps_items(table, tmp_path / "clips")


def test_names_that_download_tools_write(tmp_path, write_tone):
    """The title before the id of yt-dlp, the id in brackets, and the times of the clip after underscores."""
    names = [f"A title (live) [{IDS[0]}].wav", f"[{IDS[1]}].wav", f"{IDS[2]}_30_31.wav"]
    for name in names:
        write_tone(f"clips/{name}")
    table = write_table(tmp_path / "table.csv", [row(ytid) for ytid in IDS[:3]])
    assert [item.path.name for item in musiccaps_items(table, tmp_path / "clips").items] == names


def test_missing_captions_of_tables(tmp_path):
    """Cells that table tools write for a missing value are no captions."""
    rows = [row(IDS[0], caption="nan"), row(IDS[1], aspects="NaN"), row(IDS[2], is_audioset_eval="nan")]
    clips = read_musiccaps(write_table(tmp_path / "table.csv", rows))
    assert clips[0].captions == () and clips[1].aspects == () and clips[2].about["is_audioset_eval"] is None
