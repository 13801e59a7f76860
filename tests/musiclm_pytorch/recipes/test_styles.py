"""Styles of the corpus: every declaration is complete, composes in every mood, and sounds like its labels."""

from pathlib import Path
from random import Random

import pytest

from musiclm_pytorch.recipes.corpus.composition import compose_song
from musiclm_pytorch.recipes.corpus.corpus import make_corpus
from musiclm_pytorch.recipes.corpus.instruments import (
    BASSES,
    CHORDS,
    DRUM_KITS,
    DRUM_PITCHES,
    FOLK_INSTRUMENTS,
    INSTRUMENTS,
    REGISTERS,
)
from musiclm_pytorch.recipes.corpus.midi import DRUM_CHANNEL, Note
from musiclm_pytorch.recipes.corpus.moods import MOODS
from musiclm_pytorch.recipes.corpus.performance import MELODY_CHANNEL, TEMPI_BPM
from musiclm_pytorch.recipes.corpus.planning import perform_plan, plan_clip
from musiclm_pytorch.recipes.corpus.repertoire import STYLES
from musiclm_pytorch.recipes.corpus.samples import RECORDED_KITS, drum_track
from tests.helpers.installed_sounds import samples_are_missing, sounds_are_missing


def test_the_corpus_is_wide() -> None:
    """At least 12 styles, 25 instruments and the moods of the issue."""
    assert len(STYLES) >= 12 and len(INSTRUMENTS) >= 25
    assert set(FOLK_INSTRUMENTS) <= set(INSTRUMENTS)
    assert {"happy", "sad", "calm", "energetic", "dark", "dreamy", "tense"} <= set(MOODS)


@pytest.mark.parametrize("name", sorted(STYLES))
def test_declarations_have_known_names_and_patterns_of_a_bar(name: str) -> None:
    """A misspelled name or a pattern of the wrong length would raise in the middle of a corpus run."""
    style = STYLES[name]
    assert set(style.melody) <= set(INSTRUMENTS)
    assert {*style.chords, *style.pads} - {None} <= set(CHORDS)
    assert set(style.basses) - {None} <= set(BASSES)
    assert set(style.kits) <= set(DRUM_KITS)
    assert set(style.tempi) <= set(TEMPI_BPM)
    steps = round(style.metres[0].quarters_per_bar * 4)
    patterns = [*style.comping, *style.bass_lines]
    for beat in (*style.beats, *style.fills):
        assert set(beat) <= set(DRUM_PITCHES)
        patterns += beat.values()
    assert {len(pattern) for pattern in patterns} == {steps}
    assert bool(style.beats) == (style.drums > 0)
    for mood in style.moods:
        kind = MOODS[mood]
        assert set(kind.tempi) & set(style.tempi)
        assert any(progression.mode in kind.modes for progression in style.progressions)
        assert any(set(INSTRUMENTS[player].registers) & set(kind.registers) for player in style.melody)


@pytest.mark.parametrize("name", sorted(STYLES))
def test_songs_have_chords_without_gaps_and_melodies_in_range(name: str) -> None:
    """Every progression composes; melody notes do not overlap and are in the range of the middle register."""
    style = STYLES[name]
    for seed, progression in enumerate(style.progressions):
        song = compose_song(style, progression, Random(seed))
        position = 0.0
        for span in song.chords:
            assert span.start_quarters == pytest.approx(position)
            position += span.duration_quarters
        assert position == pytest.approx(song.quarters)
        ends = 0.0
        for note in song.notes:
            assert note.start_quarters >= ends - 1e-6
            ends = note.start_quarters + note.duration_quarters
            assert 60 <= note.pitch <= 84
        assert len(song.notes) >= song.num_bars


@pytest.mark.slow
def test_labels_agree_with_the_notes() -> None:
    """Drums, bass and chords sound exactly if the labels name them, in the register and at the tempo of the labels."""
    for index in range(120):
        plan = plan_clip("train", index, seed=4)
        row = plan.row
        notes = [event for event in perform_plan(plan) if isinstance(event, Note)]
        channels = {note.channel for note in notes}
        assert MELODY_CHANNEL in channels, row
        assert (DRUM_CHANNEL in channels) == row["drums"], row
        for channel, label in ((1, "chords"), (2, "pad"), (3, "bass")):
            assert (channel in channels) == (row[label] is not None), row
        melody = [note for note in notes if note.channel == MELODY_CHANNEL]
        shift = REGISTERS[row["register"]] + INSTRUMENTS[row["instrument"]].shift
        assert all(60 + shift <= note.pitch <= 84 + shift for note in melody)
        assert len(row["pitch_class"]) == len(melody)
        # Every clip starts with a bar, so that some onsets are on beats of the labelled tempo.
        beats = [note.start_seconds * row["bpm"] / 60.0 for note in notes]
        assert sum(abs(beat - round(beat)) < 0.02 for beat in beats) >= 0.2 * len(beats), row


def test_a_test_soundfont_changes_only_the_sounds() -> None:
    """Tunes and captions of the set of unknown timbres equal those of the corpus, without recorded drums."""
    for index in range(12):
        usual, other = plan_clip("valid", index, 0), plan_clip("valid", index, 0, soundfont="Csound GM")
        assert usual.soundfont in ("FluidR3 GM", "MuseScore General")
        assert other.row["soundfont"] == "Csound GM" and other.recorded is None
        changed = {name for name in usual.row if usual.row[name] != other.row[name]}
        assert changed == {"soundfont", "sources"}
        assert perform_plan(usual) == perform_plan(other)


@pytest.mark.slow
@pytest.mark.skipif(samples_are_missing(), reason="sonic-pi-samples is not installed")
def test_recorded_drums_are_on_time() -> None:
    """A loop at twice its tempo repeats after half its length, and the hits of a kit start with their notes."""
    np = pytest.importorskip("numpy")
    loop = drum_track("loop_breakbeat", [], 252.0, 5.0, 24_000)
    period = round(24_000 * 60 / 252.0 * 4)
    assert np.abs(loop[:period] - loop[period : 2 * period]).mean() < 0.1 * np.abs(loop).mean()
    for kit in RECORDED_KITS:
        track = drum_track(kit, [Note(1.0, 0.1, 36, 90, DRUM_CHANNEL)], 120.0, 5.0, 24_000)
        assert np.abs(track[:23_990]).max() == 0 and np.abs(track[24_000:26_400]).max() > 0.3


@pytest.mark.slow
@pytest.mark.skipif(sounds_are_missing(), reason="sounds are not installed")
@pytest.mark.parametrize("soundfont", [None, "Csound GM"])
def test_clips_of_all_styles_sound(tmp_path: Path, soundfont: str | None) -> None:
    """Every clip has the requested peak, and no clip is silent; a sounding melody is in every clip."""
    import json

    np = pytest.importorskip("numpy")
    soundfile = pytest.importorskip("soundfile")
    make_corpus(tmp_path, 80, 2, seed=3, soundfont=soundfont, num_workers=1)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len({row["style"] for row in rows}) >= 10
    for row in rows:
        wave, rate_hz = soundfile.read(tmp_path / row["audio"])
        assert rate_hz == 24_000 and len(wave) == 120_000
        assert 0.4 < np.abs(wave).max() < 1.0, row
        assert np.sqrt(np.mean(wave**2)) > 0.02, row
