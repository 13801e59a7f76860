"""Instruments of the corpus, with General MIDI programs (counted from 0), pitch ranges and loudness."""

from dataclasses import dataclass

__all__ = [
    "BASSES",
    "CHORDS",
    "DRUM_KITS",
    "DRUM_PITCHES",
    "FOLK_INSTRUMENTS",
    "INSTRUMENTS",
    "REGISTERS",
    "Accompaniment",
    "Instrument",
]

# Transposition of the melody by register, in semitones.
REGISTERS: dict[str, int] = {"low": -12, "mid": 0, "high": 12}


@dataclass(frozen=True)
class Instrument:
    """A melody instrument.

    Args:
        program: General MIDI program.
        registers: Registers in which the instrument plays.
        shift: Further transposition in semitones.
    """

    program: int
    registers: tuple[str, ...] = ("low", "mid", "high")
    shift: int = 0


INSTRUMENTS: dict[str, Instrument] = {
    "accordion": Instrument(21),
    "acoustic guitar": Instrument(24),
    "bagpipes": Instrument(109, ("mid",)),
    "banjo": Instrument(105),
    "bass guitar": Instrument(33, ("low",), -12),
    "bassoon": Instrument(70, ("low", "mid")),
    "brass section": Instrument(61, ("low", "mid")),
    "cello": Instrument(42),
    "choir": Instrument(52),
    "church organ": Instrument(19),
    "clarinet": Instrument(71),
    "clean electric guitar": Instrument(27),
    "distorted electric guitar": Instrument(30),
    "electric organ": Instrument(16),
    "electric piano": Instrument(4),
    "flute": Instrument(73),
    "french horn": Instrument(60, ("low", "mid")),
    "glockenspiel": Instrument(9, ("mid", "high")),
    "harmonica": Instrument(22, ("mid", "high")),
    "harp": Instrument(46),
    "harpsichord": Instrument(6),
    "kalimba": Instrument(108),
    "marimba": Instrument(12),
    "music box": Instrument(10),
    "muted trumpet": Instrument(59, ("low", "mid")),
    "oboe": Instrument(68, ("mid", "high")),
    "pan flute": Instrument(75),
    "piano": Instrument(0),
    "recorder": Instrument(74, ("mid", "high")),
    "saxophone": Instrument(65),
    "sitar": Instrument(104, ("low", "mid")),
    "steel guitar": Instrument(25),
    "string ensemble": Instrument(48),
    "synth lead": Instrument(81),
    "synth pad": Instrument(89),
    "trombone": Instrument(57, ("low", "mid")),
    "trumpet": Instrument(56),
    "tuba": Instrument(58, ("low",), -12),
    "vibraphone": Instrument(11),
    "violin": Instrument(40),
    "xylophone": Instrument(13, ("mid", "high")),
}

# Melody instruments of folk dances with weights. Most clips have one of the first fourteen.
FOLK_INSTRUMENTS: dict[str, float] = dict.fromkeys(
    (
        "accordion",
        "acoustic guitar",
        "cello",
        "choir",
        "church organ",
        "clarinet",
        "distorted electric guitar",
        "flute",
        "harpsichord",
        "marimba",
        "music box",
        "piano",
        "trumpet",
        "violin",
    ),
    1.0,
) | dict.fromkeys(
    (
        "bagpipes",
        "banjo",
        "bassoon",
        "clean electric guitar",
        "french horn",
        "harmonica",
        "harp",
        "oboe",
        "pan flute",
        "recorder",
        "saxophone",
        "steel guitar",
        "trombone",
        "tuba",
        "xylophone",
    ),
    0.2,
)


@dataclass(frozen=True)
class Accompaniment:
    """An instrument that plays chords.

    Args:
        program: General MIDI program.
        sustained: Whether the chords are held instead of played in a rhythm.
        lowest_pitch: The notes of a chord are in the octave from this MIDI pitch upwards.
        velocity: MIDI velocity of a chord.
        power: Whether the chords are root, fifth and octave only.
    """

    program: int
    sustained: bool = False
    lowest_pitch: int = 55
    velocity: int = 58
    power: bool = False


CHORDS: dict[str, Accompaniment] = {
    "piano chords": Accompaniment(0),
    "guitar chords": Accompaniment(24, lowest_pitch=52),
    "string chords": Accompaniment(48, sustained=True, velocity=52),
    "electric piano chords": Accompaniment(4),
    "organ chords": Accompaniment(16, sustained=True, velocity=50),
    "steel guitar chords": Accompaniment(25, lowest_pitch=52),
    "electric guitar chords": Accompaniment(27, lowest_pitch=52),
    "distorted guitar chords": Accompaniment(30, lowest_pitch=40, velocity=46, power=True),
    "synth pad": Accompaniment(89, sustained=True, velocity=50),
    "choir chords": Accompaniment(52, sustained=True, velocity=50),
    "brass chords": Accompaniment(61, lowest_pitch=53),
    "harp arpeggios": Accompaniment(46),
    "accordion chords": Accompaniment(21, velocity=50),
}

# Programs of the bass instruments; their notes are in the octave from E1 (MIDI pitch 28) upwards.
BASSES: dict[str, int] = {"bass guitar": 33, "double bass": 32, "synth bass": 38, "tuba bass": 58}

# Programs of the General MIDI percussion channel, by name of the drum kit.
DRUM_KITS: dict[str, int] = {
    "standard": 0,
    "room": 8,
    "power": 16,
    "electronic": 24,
    "808": 25,
    "jazz": 32,
    "brush": 40,
    "orchestra": 48,
}
DRUM_PITCHES: dict[str, int] = {
    "kick": 36,
    "rim": 37,
    "snare": 38,
    "clap": 39,
    "hat": 42,
    "pedal": 44,
    "open": 46,
    "low tom": 45,
    "mid tom": 47,
    "high tom": 50,
    "crash": 49,
    "ride": 51,
    "tambourine": 54,
    "cowbell": 56,
    "conga": 63,
    "low conga": 64,
    "shaker": 70,
    "claves": 75,
}
