"""A minimal writer of Standard MIDI Files, enough to send a score to a synthesizer.

Times are seconds from the start of the file, on a fixed grid of `TICKS_PER_SECOND`, so that excerpts of different tempi
can stand one behind another in one file without tempo changes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DRUM_CHANNEL", "TICKS_PER_SECOND", "ControlChange", "Note", "ProgramChange", "midi_bytes", "write_midi"]

# The General MIDI percussion channel (channel 10 when counted from 1).
DRUM_CHANNEL = 9

TICKS_PER_QUARTER = 480
MICROSECONDS_PER_QUARTER = 500_000
TICKS_PER_SECOND = TICKS_PER_QUARTER * 1_000_000 // MICROSECONDS_PER_QUARTER


@dataclass(frozen=True)
class Note:
    """One sounding note.

    Args:
        start_seconds: When it is struck, seconds from the start of the file.
        duration_seconds: How long it is held, > 0.
        pitch: MIDI note number, 0..127 (60 is middle C, 261.6 Hz).
        velocity: How hard it is struck, 1..127.
        channel: MIDI channel, 0..15.
    """

    start_seconds: float
    duration_seconds: float
    pitch: int
    velocity: int
    channel: int


@dataclass(frozen=True)
class ProgramChange:
    """From `start_seconds` on, `channel` sounds as General MIDI program `program` (0..127)."""

    start_seconds: float
    program: int
    channel: int


@dataclass(frozen=True)
class ControlChange:
    """At `start_seconds`, controller `controller` (0..127) of `channel` takes `value` (0..127)."""

    start_seconds: float
    controller: int
    value: int
    channel: int


def _variable_length(value: int) -> bytes:
    """A number as a MIDI variable-length quantity: seven bits a byte, the high bit says that more follow."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(0x80 | (value & 0x7F))
    return bytes(reversed(digits))


def _tick(seconds: float) -> int:
    return round(seconds * TICKS_PER_SECOND)


def _messages(event: Note | ProgramChange | ControlChange) -> list[tuple[int, int, bytes]]:
    """(tick, rank, bytes) of one event; at one tick note-offs go first, then settings, then note-ons."""
    if not 0 <= event.channel <= 15:
        raise ValueError(f"a MIDI channel is 0..15, got {event.channel} in {event}.")
    if event.start_seconds < 0:
        raise ValueError(f"an event must not start before 0 s: {event}.")
    start = _tick(event.start_seconds)
    values = [
        value for name, value in vars(event).items() if name in ("pitch", "velocity", "program", "controller", "value")
    ]
    if any(not 0 <= value <= 127 for value in values):
        raise ValueError(f"MIDI numbers are 0..127, got {event}.")
    if isinstance(event, ProgramChange):
        return [(start, 1, bytes((0xC0 | event.channel, event.program)))]
    if isinstance(event, ControlChange):
        return [(start, 1, bytes((0xB0 | event.channel, event.controller, event.value)))]
    if event.duration_seconds <= 0 or event.velocity == 0:
        raise ValueError(f"a note needs a duration and a velocity above 0, got {event}.")
    end = max(start + 1, _tick(event.start_seconds + event.duration_seconds))
    return [
        (start, 2, bytes((0x90 | event.channel, event.pitch, event.velocity))),
        (end, 0, bytes((0x80 | event.channel, event.pitch, 0))),
    ]


def midi_bytes(events: Sequence[Note | ProgramChange | ControlChange], end_seconds: float = 0.0) -> bytes:
    """A complete MIDI file (format 0, one track).

    Standard MIDI File 1.0 (MIDI Manufacturers Association, 1988), chunks `MThd` and `MTrk`.

    Args:
        events: Notes, program and control changes, in any order.
        end_seconds: The track lasts at least this long, seconds.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: If a number is outside what MIDI can carry, or a note has no duration.
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


def write_midi(path: Path, events: Sequence[Note | ProgramChange | ControlChange], end_seconds: float = 0.0) -> None:
    """Write `midi_bytes` of the events to `path`."""
    path.write_bytes(midi_bytes(events, end_seconds))
