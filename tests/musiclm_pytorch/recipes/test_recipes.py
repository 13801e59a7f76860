"""The corpus recipe: tunes are music, performances obey their labels, and the corpus is the same for a seed."""

import json
import struct
from pathlib import Path
from random import Random

import pytest

from musiclm_pytorch.recipes.corpus import corpus
from musiclm_pytorch.recipes.corpus.composition import HIGHEST_PITCH, LOWEST_PITCH, Tune, compose_tune
from musiclm_pytorch.recipes.corpus.corpus import make_corpus
from musiclm_pytorch.recipes.corpus.dances import DANCES
from musiclm_pytorch.recipes.corpus.instruments import INSTRUMENTS, REGISTERS
from musiclm_pytorch.recipes.corpus.midi import DRUM_CHANNEL, TICKS_PER_SECOND, Note, ProgramChange, midi_bytes
from musiclm_pytorch.recipes.corpus.performance import TEMPI_BPM, ClipLabels, perform
from musiclm_pytorch.recipes.corpus.planning import HELD_OUT_PAIRS, plan_clip
from musiclm_pytorch.recipes.corpus.render import SOUNDFONTS, Soundfont, find_synthesizer, render_performances
from musiclm_pytorch.recipes.corpus.repertoire import STYLES
from musiclm_pytorch.recipes.corpus.theory import SCALES, Chord, Scale


def _synthesizer_is_missing() -> bool:
    try:
        find_synthesizer()
    except RuntimeError:
        return True
    return False


needs_synthesizer = pytest.mark.skipif(_synthesizer_is_missing(), reason="fluidsynth or its soundfont is not installed")


def _tune(dance: str, seed: int, mode: str = "major") -> Tune:
    return compose_tune(dance, mode, Random(seed))


def _labels(**changes: object) -> ClipLabels:
    values = {"instrument": "flute", "tempo": "fast", "chords": None, "drums": False, "register": "mid", "bpm": 168.0}
    return ClipLabels(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tonic", "steps", "degree", "leading", "triad"),
    [
        (60, (0, 2, 4, 5, 7, 9, 11), 0, False, (36, 40, 43)),  # C E G
        (62, (0, 2, 4, 5, 7, 9, 11), 4, False, (45, 49, 52)),  # the dominant of D: A C-sharp E
        (64, (0, 2, 3, 5, 7, 8, 10), 4, False, (47, 50, 54)),  # B minor in e minor
        (64, (0, 2, 3, 5, 7, 8, 10), 4, True, (47, 51, 54)),  # B major: D is raised
    ],
)
def test_triads_match_the_textbook(tonic: int, steps: tuple, degree: int, leading: bool, triad: tuple) -> None:
    """A wrong third would turn major into minor."""
    assert Scale(tonic, steps).chord(Chord(degree, leading), lowest=36) == triad


@pytest.mark.parametrize("dance", sorted(DANCES))
@pytest.mark.parametrize("mode", sorted(SCALES))
def test_tunes_fill_their_bars_and_stay_in_range(dance: str, mode: str) -> None:
    """Melody and chords have no gaps, a note starts on every bar, and the range is playable."""
    for seed in range(6):
        tune = _tune(dance, seed, mode)
        for line in (tune.notes, tune.chords):
            position = 0.0
            for item in line:
                assert item.start_quarters == pytest.approx(position)
                position += item.duration_quarters
            assert position == pytest.approx(tune.quarters)
        starts = {round(note.start_quarters, 6) for note in tune.notes}
        assert {round(bar * tune.metre.quarters_per_bar, 6) for bar in range(tune.num_bars)} <= starts
        assert all(LOWEST_PITCH <= note.pitch <= HIGHEST_PITCH + 1 for note in tune.notes)


def test_melodies_have_chord_tones_steps_and_a_tonic() -> None:
    """Chord tones on strong beats, motion mostly by step, endings on the tonic."""
    strong = fitting = steps = moves = 0
    for seed in range(40):
        tune = _tune("reel", seed)
        for note in tune.notes:
            if note.strong:
                chord = next(
                    span for span in reversed(tune.chords) if span.start_quarters <= note.start_quarters + 1e-6
                )
                strong += 1
                fitting += any((note.pitch - pitch) % 12 == 0 for pitch in chord.pitches)
        leaps = [abs(after.pitch - before.pitch) for before, after in zip(tune.notes, tune.notes[1:], strict=False)]
        steps += sum(1 <= leap <= 2 for leap in leaps)
        moves += len(leaps)
        last_bar = tune.quarters - tune.metre.groups[-1] - 1e-6
        ending = next(note for note in tune.notes if note.start_quarters >= last_bar)
        assert (ending.pitch - tune.scale.tonic) % 12 == 0
    assert fitting / strong > 0.97
    assert steps / moves > 0.5


def test_parts_repeat_and_phrases_answer() -> None:
    """AABB: bars 8..15 equal bars 0..7, and the second phrase repeats the first two bars of the first."""

    def bars(tune: Tune, first: int, count: int) -> list[tuple[float, int]]:
        start, end = (bar * tune.metre.quarters_per_bar for bar in (first, first + count))
        inside = [note for note in tune.notes if start - 1e-6 <= note.start_quarters < end - 1e-6]
        return [(round(note.start_quarters - start, 4), note.pitch) for note in inside]

    for seed in range(10):
        tune = _tune("jig", seed)
        assert bars(tune, 0, 8) == bars(tune, 8, 8)
        assert bars(tune, 16, 8) == bars(tune, 24, 8)
        assert bars(tune, 0, 1) == bars(tune, 4, 1)
        assert bars(tune, 0, 8) != bars(tune, 16, 8)


def test_dances_have_their_rhythm() -> None:
    """A jig in groups of three eighths, a hornpipe dotted, a waltz in three, a slip jig in nine."""
    bar_quarters = {
        dance: _tune(dance, 0).metre.quarters_per_bar for dance in ("jig", "reel", "waltz", "slip jig", "hornpipe")
    }
    assert bar_quarters == {"jig": 3.0, "reel": 4.0, "waltz": 3.0, "slip jig": 4.5, "hornpipe": 4.0}
    assert _tune("jig", 0).metre.groups == (1.5, 1.5)
    dotted = [note.duration_quarters for seed in range(5) for note in _tune("hornpipe", seed).notes]
    assert dotted.count(0.75) + dotted.count(0.25) > 0.5 * len(dotted)


def test_unknown_dances_and_modes_are_an_error() -> None:
    """The message lists the known names."""
    with pytest.raises(ValueError, match="polka.*reel"):
        compose_tune("polka", "major", Random(0))
    with pytest.raises(ValueError, match="lydian"):
        compose_tune("reel", "lydian", Random(0))


def test_performance_follows_its_labels() -> None:
    """Program, register, tempo, chords and drums."""
    tune = _tune("reel", 4)
    plain = perform(tune, _labels(), 3, 5.0, Random(0))
    melody = [event for event in plain if isinstance(event, Note)]
    assert {event.channel for event in melody} == {0}
    assert [event.program for event in plain if isinstance(event, ProgramChange)] == [INSTRUMENTS["flute"].program]
    assert min(note.start_seconds for note in melody) == 0.0
    assert max(note.start_seconds + note.duration_seconds for note in melody) <= 5.0 + 1e-9

    high = [event for event in perform(tune, _labels(register="high"), 3, 5.0, Random(0)) if isinstance(event, Note)]
    assert [note.pitch for note in high] == [note.pitch + REGISTERS["high"] for note in melody]
    slow = [
        event for event in perform(tune, _labels(tempo="slow", bpm=84.0), 3, 5.0, Random(0)) if isinstance(event, Note)
    ]
    assert slow[1].start_seconds == pytest.approx(2 * melody[1].start_seconds)

    full = perform(tune, _labels(chords="string chords", drums=True), 3, 5.0, Random(0))
    channels = [event.channel for event in full if isinstance(event, Note)]
    assert channels.count(1) >= 3 and channels.count(DRUM_CHANNEL) > 10


def test_perform_wraps_around_the_end_of_the_tune() -> None:
    """A clip that starts in the last bar continues with the first bar."""
    tune = _tune("jig", 1)
    notes = [event for event in perform(tune, _labels(), tune.num_bars - 1, 5.0, Random(0)) if isinstance(event, Note)]
    assert max(note.start_seconds for note in notes) > 3.5
    with pytest.raises(ValueError, match="start_bar"):
        perform(tune, _labels(), tune.num_bars, 5.0, Random(0))


def test_midi_bytes_match_a_hand_written_file() -> None:
    """Equal bytes for one note of a second after half a second."""
    events = [Note(0.5, 1.0, 60, 100, 0), ProgramChange(0.0, 73, 0)]
    track = (
        b"\x00\xff\x51\x03\x07\xa1\x20"
        + b"\x00\xc0\x49"
        + b"\x83\x60\x90\x3c\x64"
        + b"\x87\x40\x80\x3c\x00"
        + b"\x00\xff\x2f\x00"
    )
    assert TICKS_PER_SECOND == 960
    assert (
        midi_bytes(events)
        == b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480) + b"MTrk" + struct.pack(">I", len(track)) + track
    )


def test_midi_ends_a_note_before_it_repeats() -> None:
    """A note-off after the note-on of the same tick would cut the second of two equal notes."""
    data = midi_bytes([Note(0.0, 0.5, 60, 100, 0), Note(0.5, 0.5, 60, 100, 0)])
    assert data.index(b"\x80\x3c\x00") < data.index(b"\x90\x3c\x64", data.index(b"\x90\x3c\x64") + 1)


@pytest.mark.parametrize(
    "event",
    [Note(0.0, 1.0, 128, 100, 0), Note(0.0, 0.0, 60, 100, 0), Note(-1.0, 1.0, 60, 100, 0), ProgramChange(0.0, 5, 16)],
)
def test_midi_numbers_out_of_range_are_an_error(event: Note | ProgramChange) -> None:
    """They would become other messages."""
    with pytest.raises(ValueError):
        midi_bytes([event])


@pytest.mark.slow
def test_plans_are_deterministic_and_split_by_tune() -> None:
    """Equal seeds give equal labels, other seeds other labels, and no tune is in both splits."""
    plans = {split: [plan_clip(split, index, 0) for index in range(30)] for split in ("train", "valid")}
    assert [plan.row for plan in plans["train"]] == [plan_clip("train", index, 0).row for index in range(30)]
    assert plans["train"][0].row != plan_clip("train", 0, 1).row
    tunes = {split: {plan.row["tune"] for plan in plans[split]} for split in plans}
    melodies = {split: {plan.tune.notes for plan in plans[split]} for split in plans}
    assert not tunes["train"] & tunes["valid"]
    assert not melodies["train"] & melodies["valid"]


@pytest.mark.slow
def test_held_out_pairs_are_held_out_and_tested() -> None:
    """No training clip has a held-out pair; valid clips with one are marked; the tempo label fits the bpm."""
    for split, count in (("train", 400), ("valid", 100)):
        rows = [plan_clip(split, index, 0).row for index in range(count)]
        marked = [row for row in rows if row["held_out_pair"]]
        paired = [
            row for row in rows if any(all(row[name] == value for name, value in pair) for pair in HELD_OUT_PAIRS)
        ]
        assert marked == paired
        assert len(marked) == 0 if split == "train" else 5 <= len(marked) <= 40
        for row in rows:
            if row["style"] == "folk dance":
                assert abs(row["bpm"] / TEMPI_BPM[row["tempo"]] - 1) <= 0.061
            else:
                low, high = STYLES[row["style"]].tempi[row["tempo"]]
                assert low - 0.1 <= row["bpm"] <= high + 0.1
    assert {"caption", "caption_seen"} <= set(rows[0])


def test_find_synthesizer_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the package to install."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"apt-get install fluidsynth"):
        find_synthesizer()
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/fluidsynth")
    monkeypatch.setitem(SOUNDFONTS, "FluidR3 GM", Soundfont(Path("/nowhere/font.sf2"), "fluid-soundfont-gm"))
    with pytest.raises(RuntimeError, match="fluid-soundfont-gm"):
        find_synthesizer()


def test_make_corpus_continues_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run has no manifest and is completed by the next run; other folders are an error."""
    np = pytest.importorskip("numpy")
    monkeypatch.setattr(corpus, "find_synthesizer", lambda name: "fluidsynth")
    monkeypatch.setattr(corpus, "CLIPS_PER_RUN", 2)
    monkeypatch.setattr(corpus, "NUM_WORKERS", 1)
    rendered: list[int] = []

    def fake(performances: list, peaks: list, seconds: float, sample_hz: int, soundfont: str) -> list:
        if len(rendered) == 1:
            rendered.append(0)
            raise RuntimeError("interrupted")
        rendered.append(len(performances))
        return [np.zeros(1200, dtype="float32") for _ in peaks]

    monkeypatch.setattr(corpus, "render_performances", fake)
    with pytest.raises(RuntimeError, match="interrupted"):
        make_corpus(tmp_path, 4, 2, soundfont="FluidR3 GM")
    assert not (tmp_path / "train.jsonl").exists()
    rendered[:] = [9, 9]
    make_corpus(tmp_path, 4, 2, soundfont="FluidR3 GM")
    # The first run of the first attempt is not rendered again.
    assert len(rendered) <= 4
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["audio"] for row in rows] == [f"clips/train-{index:05d}.ogg" for index in range(4)]
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match="another folder"):
        make_corpus(tmp_path, 4, 2, seed=1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="contains files, but no corpus"):
        make_corpus(tmp_path / "foreign", 4, 2)


@pytest.mark.slow
@needs_synthesizer
def test_render_is_deterministic_and_starts_on_time() -> None:
    """Two clips in one run: equal to a second run, with the requested peak, on time, and silent without notes."""
    np = pytest.importorskip("numpy")
    pytest.importorskip("soundfile")
    first = [ProgramChange(0.0, 12, 0), Note(0.0, 0.4, 72, 100, 0)]
    second = [ProgramChange(0.0, 0, 0), Note(0.5, 0.4, 60, 100, 0)]
    waves, again = (render_performances([first, second], [0.5, 0.8], seconds=1.0) for _ in range(2))
    for wave, same, peak in zip(waves, again, (0.5, 0.8), strict=True):
        assert wave.shape == (24_000,) and wave.dtype == np.float32
        assert np.array_equal(wave, same)
        assert np.abs(wave).max() == pytest.approx(peak, rel=1e-4)
    assert np.abs(waves[0][:480]).max() > 0.1
    assert np.abs(waves[1][:11_000]).max() < 0.01
    assert np.abs(waves[1][12_000:13_000]).max() > 0.1
