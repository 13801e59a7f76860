"""Rendering of MIDI events with FluidSynth and the FluidR3 General MIDI soundfont.

One run of the synthesizer renders many clips from one MIDI file, because loading the soundfont (148 MB) takes longer
than rendering a clip. Silence after each clip lets its reverb decay before the next clip.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from beartype import beartype

from musiclm_pytorch.recipes.corpus.midi import ControlChange, Note, ProgramChange, midi_bytes

__all__ = ["SOUNDFONT", "find_synthesizer", "render_performances"]

Event = Note | ProgramChange | ControlChange

SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")

# Silence after every clip. A clip of 5 s then takes 7 s, a whole number of FluidSynth's blocks of 64 samples at 24 kHz,
# so that every clip starts at the beginning of a block.
GAP_SECONDS = 2.0
# Master gain of FluidSynth, at which a chord with drums does not clip.
GAIN = 0.3
# Fade at the end of a clip, which avoids a click.
FADE_SECONDS = 0.02


@beartype
def find_synthesizer(soundfont: Path = SOUNDFONT) -> str:
    """Find the path of the `fluidsynth` command; raise a RuntimeError if the command or the soundfont is missing."""
    command = shutil.which("fluidsynth")
    if command is None:
        raise RuntimeError(
            "the command `fluidsynth` is missing; install FluidSynth, on Debian or Ubuntu with apt-get install "
            "fluidsynth fluid-soundfont-gm"
        )
    if not soundfont.is_file():
        raise RuntimeError(
            f"the soundfont {soundfont} is missing; install the soundfont, on Debian or Ubuntu with apt-get install "
            "fluid-soundfont-gm"
        )
    return command


def _synthesize(events: Sequence[Event], seconds: float, sample_hz: int, soundfont: Path, folder: Path) -> Path:
    """Render MIDI events to a stereo WAV file that lasts at least `seconds`, and return the path of the file."""
    command = find_synthesizer(soundfont)
    score, sound = folder / "score.mid", folder / "sound.wav"
    score.write_bytes(midi_bytes(events, end_seconds=seconds))
    arguments = [command, "-n", "-i", "-q", "-r", str(sample_hz), "-g", str(GAIN), "-T", "wav", "-O", "float"]
    arguments += ["-o", "synth.cpu-cores=1", "-F", str(sound), str(soundfont), str(score)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not sound.is_file():
        raise RuntimeError(f"fluidsynth failed with exit status {result.returncode}: {result.stderr.strip()[-500:]}")
    return sound


def _finish(wave: np.ndarray, peak: float, sample_hz: int) -> np.ndarray:
    """Convert a stereo wave to mono, fade out its end, and scale its largest absolute sample to `peak`."""
    mono = wave.mean(axis=1)
    fade = round(FADE_SECONDS * sample_hz)
    mono[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    return mono * (peak / max(float(np.abs(mono).max()), 1e-6))


@beartype
def render_performances(
    performances: Sequence[Sequence[Event]],
    peaks: Sequence[float],
    seconds: float = 5.0,
    sample_hz: int = 24_000,
    soundfont: Path = SOUNDFONT,
) -> list[np.ndarray]:
    """Render several clips in one run of the synthesizer.

    Args:
        performances: MIDI events of each clip; every clip starts at 0 s.
        peaks: Requested largest absolute sample value of each clip, in 0..1.
        seconds: Length of every clip in seconds.
        sample_hz: Sample rate of the rendered clips.
        soundfont: General MIDI soundfont (.sf2).

    Returns:
        One mono wave per clip, as a float32 array `[n]`.
    """
    import soundfile

    slot_seconds = seconds + GAP_SECONDS
    num_samples, slot_samples = round(seconds * sample_hz), round(slot_seconds * sample_hz)
    events = [
        replace(event, start_seconds=event.start_seconds + slot * slot_seconds)
        for slot, performance in enumerate(performances)
        for event in performance
    ]
    waves = []
    with tempfile.TemporaryDirectory(prefix="musiclm-render-") as folder:
        sound = _synthesize(events, slot_seconds * len(performances), sample_hz, soundfont, Path(folder))
        with soundfile.SoundFile(sound) as file:
            for slot, peak in enumerate(peaks):
                file.seek(slot * slot_samples)
                stereo = file.read(num_samples, dtype="float32", always_2d=True, fill_value=0.0)
                waves.append(_finish(stereo, peak, sample_hz))
    return waves
