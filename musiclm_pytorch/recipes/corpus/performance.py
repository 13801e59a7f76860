"""Conversion of an excerpt of a tune to MIDI events; the labels of the clip set the instruments and the tempo."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.recipes.corpus.arrangement import Hit, bass_bar, chord_bar, drum_bar
from musiclm_pytorch.recipes.corpus.composition import ChordSpan, Tune
from musiclm_pytorch.recipes.corpus.dances import Metre
from musiclm_pytorch.recipes.corpus.instruments import (
    BASSES,
    CHORDS,
    DRUM_KITS,
    DRUM_PITCHES,
    INSTRUMENTS,
    REGISTERS,
)
from musiclm_pytorch.recipes.corpus.midi import DRUM_CHANNEL, ControlChange, Note, ProgramChange
from musiclm_pytorch.recipes.corpus.moods import MOODS, Mood
from musiclm_pytorch.recipes.corpus.repertoire import STYLES
from musiclm_pytorch.recipes.corpus.styles import Style

__all__ = ["MELODY_CHANNEL", "TEMPI_BPM", "TEMPO_JITTER", "ClipLabels", "perform"]

# Quarters per minute of folk dances; the tempo of a clip differs from it by at most the share `TEMPO_JITTER`.
TEMPI_BPM: dict[str, float] = {"slow": 66.0, "medium tempo": 108.0, "fast": 168.0}
TEMPO_JITTER = 0.06

MELODY_CHANNEL, _CHORD_CHANNEL, _PAD_CHANNEL, _BASS_CHANNEL = range(4)
_CHANNELS = (MELODY_CHANNEL, _CHORD_CHANNEL, _PAD_CHANNEL, _BASS_CHANNEL, DRUM_CHANNEL)
_ALL_SOUND_OFF, _EXPRESSION = 120, 11
# Velocity of the chords of folk dances, which are softer than the melody.
_FOLK_CHORD_VELOCITY = 56
_KICK_VELOCITY, _SNARE_VELOCITY, _HAT_VELOCITY = 92, 79, 68
# Share of the written duration for which a key is held.
_HELD_FRACTION = 0.97
BARS_PER_PHRASE = 4

_Event = Note | ProgramChange | ControlChange


@dataclass(frozen=True)
class ClipLabels:
    """Labels of a clip that determine its instruments, tempo and pitch range.

    Args:
        instrument: Instrument of the melody, a key of `INSTRUMENTS`.
        tempo: Name of the tempo, a key of `TEMPI_BPM`.
        chords: Instrument of the chords, a key of `CHORDS`; None = no chords.
        drums: Whether the clip has drums.
        register: Pitch range of the melody, a key of `REGISTERS`.
        bpm: Tempo in quarter notes per minute.
        style: A key of `STYLES`, or "folk dance".
        mood: A key of `MOODS`; None = no mood.
        pad: Instrument of further chords, a key of `CHORDS`; None = no further chords.
        bass: A key of `BASSES`; None = no bass.
    """

    instrument: str
    tempo: str
    chords: str | None
    drums: bool
    register: str
    bpm: float
    style: str = "folk dance"
    mood: str | None = None
    pad: str | None = None
    bass: str | None = None


@dataclass(frozen=True)
class _Excerpt:
    """Part of a tune that a clip plays, from its first bar on, with the tempo and the swing of the clip."""

    tune: Tune
    start_bar: int
    bpm: float
    seconds: float
    swing: float = 0.5
    bar_quarters: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bar_quarters", self.tune.metre.quarters_per_bar)

    def bars(self) -> Iterator[tuple[int, float, list[ChordSpan]]]:
        """Iterate over bars: number in the tune, start in the clip (in quarter notes), and chords."""
        count = math.ceil(self.seconds * self.bpm / 60.0 / self.bar_quarters)
        for index in range(count):
            bar = (self.start_bar + index) % self.tune.num_bars
            yield bar, index * self.bar_quarters, self.chords(bar)

    def chords(self, bar: int) -> list[ChordSpan]:
        """List the chords of a bar, with positions from the start of the bar."""
        start, end = bar * self.bar_quarters - 1e-6, (bar + 1) * self.bar_quarters - 1e-6
        return [
            ChordSpan(span.start_quarters - bar * self.bar_quarters, span.duration_quarters, span.pitches)
            for span in self.tune.chords
            if start <= span.start_quarters < end
        ]

    def _swung(self, quarters: float) -> float:
        beat, part = divmod(quarters + 1e-9, 1.0)
        return beat + (part * 2 * self.swing if part < 0.5 else self.swing + (part - 0.5) * 2 * (1 - self.swing))

    def span(self, start_quarters: float, duration_quarters: float, held: float = 1.0) -> tuple[float, float] | None:
        """Compute start and duration in seconds of a note in the clip; return None for a note outside the clip."""
        start_beat = self._swung(start_quarters)
        end_beat = start_beat + held * (self._swung(start_quarters + duration_quarters) - start_beat)
        start, end = (max(0.0, round(beat * 60.0 / self.bpm, 9)) for beat in (start_beat, end_beat))
        end = min(self.seconds, end)
        # A very short rest of a note at the end would sound like a click.
        return (start, end - start) if start_quarters > -1e-6 and end - start > 0.02 else None

    def notes(self, hits: list[Hit], offset_quarters: float, channel: int, held: float = 1.0) -> list[Note]:
        """Convert the hits of a bar that starts at `offset_quarters` to MIDI notes."""
        notes = []
        for hit in hits:
            span = self.span(offset_quarters + hit.start_quarters, hit.duration_quarters, held)
            if span is not None:
                notes.append(Note(*span, min(max(hit.pitch, 0), 127), min(max(hit.velocity, 1), 127), channel))
        return notes


def _melody(excerpt: _Excerpt, shift: int, held: float, mood: Mood, rng: Random) -> list[Note]:
    """Create the notes of the melody; the excerpt continues at the first bar after the last."""
    first = excerpt.start_bar * excerpt.bar_quarters
    notes = []
    laps = math.ceil((first + excerpt.seconds * excerpt.bpm / 60.0) / excerpt.tune.quarters)
    for lap in range(laps):
        for note in excerpt.tune.notes:
            span = excerpt.span(note.start_quarters + lap * excerpt.tune.quarters - first, note.duration_quarters, held)
            if span is not None:
                velocity = mood.velocity + (rng.randint(96, 104) if note.strong else rng.randint(88, 98))
                notes.append(Note(*span, note.pitch + shift, min(127, velocity), MELODY_CHANNEL))
    return notes


def _folk_drums(metre: Metre) -> list[Hit]:
    """Create the drum hits of a bar, with a hi-hat on every eighth note, and bass and snare drum as in the metre."""
    eighths = tuple(eighth / 2 for eighth in range(round(metre.quarters_per_bar * 2)))
    voices = (
        ("kick", _KICK_VELOCITY, metre.kick),
        ("snare", _SNARE_VELOCITY, metre.snare),
        ("hat", _HAT_VELOCITY, eighths),
    )
    return [
        Hit(position, 0.25, DRUM_PITCHES[name], velocity)
        for name, velocity, positions in voices
        for position in positions
    ]


def _folk_accompaniment(excerpt: _Excerpt, labels: ClipLabels) -> list[_Event]:
    """Create chords that are held, and drums."""
    events: list[_Event] = []
    if labels.chords is not None:
        events.append(ProgramChange(0.0, CHORDS[labels.chords].program, _CHORD_CHANNEL))
    if labels.drums:
        events.append(ProgramChange(0.0, DRUM_KITS["standard"], DRUM_CHANNEL))
    for _, offset, spans in excerpt.bars():
        if labels.chords is not None:
            hits = [
                Hit(span.start_quarters, span.duration_quarters, pitch, _FOLK_CHORD_VELOCITY)
                for span in spans
                for pitch in span.pitches
            ]
            events += excerpt.notes(hits, offset, _CHORD_CHANNEL, _HELD_FRACTION)
        if labels.drums:
            events += excerpt.notes(_folk_drums(excerpt.tune.metre), offset, DRUM_CHANNEL)
    return events


def _accompaniment(excerpt: _Excerpt, labels: ClipLabels, style: Style, mood: Mood, rng: Random) -> list[_Event]:
    """Create chords, bass and drums from randomly selected patterns of a style."""
    patterns = [pattern for pattern in style.comping if len(pattern) == len(style.comping[0])]
    comping = rng.choice(patterns)
    bass_line = rng.choice(style.bass_lines) if style.bass_lines else ""
    beat = rng.choice(style.beats) if style.beats else {}
    fill = rng.choice(style.fills) if style.fills and rng.random() < 0.8 else beat
    kit = DRUM_KITS[rng.choice(style.kits)]
    restrike = rng.random() < style.restrike
    programs = {
        _CHORD_CHANNEL: None if labels.chords is None else CHORDS[labels.chords].program,
        _PAD_CHANNEL: None if labels.pad is None else CHORDS[labels.pad].program,
        _BASS_CHANNEL: None if labels.bass is None else BASSES[labels.bass],
        DRUM_CHANNEL: kit if labels.drums else None,
    }
    events: list[_Event] = [
        ProgramChange(0.0, program, channel) for channel, program in programs.items() if program is not None
    ]
    players = ((labels.chords, _CHORD_CHANNEL), (labels.pad, _PAD_CHANNEL))
    for bar, offset, spans in excerpt.bars():
        quarters = excerpt.bar_quarters
        for chords, channel in players:
            if chords is not None:
                hits = chord_bar(chords, comping, quarters, spans, restrike)
                hits = [
                    Hit(hit.start_quarters, hit.duration_quarters, hit.pitch, hit.velocity + mood.velocity)
                    for hit in hits
                ]
                events += excerpt.notes(hits, offset, channel, min(_HELD_FRACTION, mood.held))
        if labels.bass is not None:
            next_root = excerpt.chords((bar + 1) % excerpt.tune.num_bars)[0].pitches[0]
            events += excerpt.notes(
                bass_bar(bass_line, quarters, spans, next_root), offset, _BASS_CHANNEL, _HELD_FRACTION
            )
        if labels.drums:
            last_of_phrase = bar % BARS_PER_PHRASE == BARS_PER_PHRASE - 1
            events += excerpt.notes(drum_bar(fill if last_of_phrase else beat, quarters), offset, DRUM_CHANNEL)
    return events


def _swell(excerpt: _Excerpt) -> list[ControlChange]:
    """Create a crescendo and a decrescendo in every phrase, for all channels but the drums."""
    events = []
    phrase = BARS_PER_PHRASE * excerpt.bar_quarters
    for step in range(math.ceil(excerpt.seconds * excerpt.bpm / 60.0 * 2)):
        seconds = step / 2 * 60.0 / excerpt.bpm
        position = (excerpt.start_bar * excerpt.bar_quarters + step / 2) % phrase / phrase
        value = round(88 + 38 * math.sin(math.pi * position))
        events += [ControlChange(seconds, _EXPRESSION, value, channel) for channel in _CHANNELS[:-1]]
    return events


@typed
def perform(tune: Tune, labels: ClipLabels, start_bar: int, seconds: float, rng: Random) -> list[_Event]:
    """Create the MIDI events of an excerpt of a tune; all sound stops shortly after `seconds`.

    Args:
        tune: Tune to play; an excerpt that reaches the last bar continues at the first bar.
        labels: Instrument, tempo, accompaniment, register, style and mood of the clip.
        start_bar: First bar of the excerpt.
        seconds: Length of the excerpt; notes are cut at the end.
        rng: Random generator of patterns and of small differences in loudness.
    """
    if not 0 <= start_bar < tune.num_bars:
        raise ValueError(f"start_bar must be in 0..{tune.num_bars - 1}, got {start_bar}")
    style = STYLES.get(labels.style)
    mood = MOODS[labels.mood] if labels.mood is not None else Mood()
    instrument = INSTRUMENTS[labels.instrument]
    excerpt = _Excerpt(tune, start_bar, labels.bpm, seconds, style.swing if style else 0.5)
    held = min(1.0, (style.held if style else _HELD_FRACTION) * mood.held)
    events: list[_Event] = [ProgramChange(0.0, instrument.program, MELODY_CHANNEL)]
    events += _melody(excerpt, REGISTERS[labels.register] + instrument.shift, held, mood, rng)
    if style is None:
        events += _folk_accompaniment(excerpt, labels)
    else:
        events += _accompaniment(excerpt, labels, style, mood, rng)
    if style is not None and style.swell:
        events += _swell(excerpt)
    else:
        # The clip before this clip in the same run of the synthesizer can have a swell.
        events += [ControlChange(0.0, _EXPRESSION, 127, channel) for channel in _CHANNELS]
    events.extend(ControlChange(seconds + 0.05, _ALL_SOUND_OFF, 0, channel) for channel in _CHANNELS)
    return events
