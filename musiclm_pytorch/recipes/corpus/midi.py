"""Minimal writer of Standard MIDI Files for a synthesizer.

Times of events are in seconds from the start of the file, so that one file can contain excerpts of different tempi.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DRUM_CHANNEL", "TICKS_PER_SECOND", "ControlChange", "Note", "ProgramChange", "midi_bytes"]

# The General MIDI percussion channel (channel 10 when counted from 1).
DRUM_CHANNEL = 9

TICKS_PER_QUARTER = 480
MICROSECONDS_PER_QUARTER = 500_000
TICKS_PER_SECOND = TICKS_PER_QUARTER * 1_000_000 // MICROSECONDS_PER_QUARTER


@dataclass(frozen=True)
class Note:
    """A MIDI note. `pitch` is a note number (60 is middle C, 261.6 Hz), and `velocity` is the loudness in 1..127."""

    start_seconds: float
    duration_seconds: float
    pitch: int
    velocity: int
    channel: int


@dataclass(frozen=True)
class ProgramChange:
    """MIDI event that sets the instrument of a channel (0..15) to the General MIDI program `program` (0..127)."""

    start_seconds: float
    program: int
    channel: int


@dataclass(frozen=True)
class ControlChange:
    """MIDI event that sets a controller (0..127) of a channel to `value` (0..127)."""

    start_seconds: float
    controller: int
    value: int
    channel: int


def _variable_length(value: int) -> bytes:
    """Encode a MIDI variable-length quantity, seven bits per byte, with the high bit set in all but the last byte."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(0x80 | (value & 0x7F))
    return bytes(reversed(digits))


def _tick(seconds: float) -> int:
    return round(seconds * TICKS_PER_SECOND)


def _messages(event: Note | ProgramChange | ControlChange) -> list[tuple[int, int, bytes]]:
    """Convert an event to MIDI messages (tick, order, bytes); `order` puts the ends of notes first in a tick."""
    if not 0 <= event.channel <= 15:
        raise ValueError(f"a MIDI channel must be in 0..15, got {event.channel} in {event}")
    if event.start_seconds < 0:
        raise ValueError(f"a MIDI event must start at 0 s or later, got the event {event}")
    start = _tick(event.start_seconds)
    values = [
        value for name, value in vars(event).items() if name in ("pitch", "velocity", "program", "controller", "value")
    ]
    if any(not 0 <= value <= 127 for value in values):
        raise ValueError(f"the numbers of a MIDI event must be in 0..127, got the event {event}")
    if isinstance(event, ProgramChange):
        return [(start, 1, bytes((0xC0 | event.channel, event.program)))]
    if isinstance(event, ControlChange):
        return [(start, 1, bytes((0xB0 | event.channel, event.controller, event.value)))]
    if event.duration_seconds <= 0 or event.velocity == 0:
        raise ValueError(f"a MIDI note needs a duration and a velocity above 0, got the note {event}")
    end = max(start + 1, _tick(event.start_seconds + event.duration_seconds))
    return [
        (start, 2, bytes((0x90 | event.channel, event.pitch, event.velocity))),
        (end, 0, bytes((0x80 | event.channel, event.pitch, 0))),
    ]


def midi_bytes(events: Sequence[Note | ProgramChange | ControlChange], end_seconds: float = 0.0) -> bytes:
    """Encode events as the bytes of a MIDI file (format 0, one track) that lasts at least `end_seconds`.

    The format is Standard MIDI File 1.0 (MIDI Manufacturers Association, 1988), with the chunks `MThd` and `MTrk`.
    """
    tempo = b"\xff\x51\x03" + MICROSECONDS_PER_QUARTER.to_bytes(3, "big")
    track = bytearray(b"\x00" + tempo)
    position = 0
    for tick, _, message in sorted(message for event in events for message in _messages(event)):
        track += _variable_length(tick - position) + message
        position = tick
    track += _variable_length(max(0, _tick(end_seconds) - position)) + b"\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS_PER_QUARTER)
    return header + b"MTrk" + struct.pack(">I", len(track)) + bytes(track)
