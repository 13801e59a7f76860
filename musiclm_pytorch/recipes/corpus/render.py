"""Rendering of MIDI events with FluidSynth and General MIDI soundfonts.

One run of the synthesizer renders many clips from one MIDI file, because loading a soundfont takes longer than
rendering a clip. Silence after each clip lets its reverb decay before the next clip.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.recipes.corpus.midi import ControlChange, Note, ProgramChange, midi_bytes

__all__ = ["SOUNDFONTS", "Soundfont", "find_synthesizer", "fit_peak", "render_performances"]

Event = Note | ProgramChange | ControlChange


class Soundfont(NamedTuple):
    """File of a General MIDI soundfont, and the Debian package that contains it."""

    path: Path
    package: str


_FOLDER = Path("/usr/share/sounds")
# Every value of the label `soundfont`. The last soundfont is only for clips with timbres that models never met.
SOUNDFONTS: dict[str, Soundfont] = {
    "FluidR3 GM": Soundfont(_FOLDER / "sf2/FluidR3_GM.sf2", "fluid-soundfont-gm"),
    "MuseScore General": Soundfont(_FOLDER / "sf3/MuseScore_General.sf3", "musescore-general-soundfont"),
    "Csound GM": Soundfont(_FOLDER / "sf2/sf_GMbank.sf2", "csound-soundfont"),
}

# Silence after every clip. A clip of 5 s then takes 7 s, a whole number of FluidSynth's blocks of 64 samples at 24 kHz,
# so that every clip starts at the beginning of a block.
GAP_SECONDS = 2.0
# Master gain of FluidSynth, at which a chord with drums does not clip.
GAIN = 0.3
# Fade at the end of a clip, which avoids a click.
FADE_SECONDS = 0.02


@typed
def find_synthesizer(soundfont: str = "FluidR3 GM") -> str:
    """Find the path of the `fluidsynth` command; raise a RuntimeError if the command or the soundfont is missing."""
    path, package = SOUNDFONTS[soundfont]
    command = shutil.which("fluidsynth")
    if command is None:
        raise RuntimeError(
            "the command `fluidsynth` is missing; install FluidSynth, on Debian or Ubuntu with apt-get install "
            f"fluidsynth {package}"
        )
    if not path.is_file():
        raise RuntimeError(
            f"the soundfont {path} is missing; install the soundfont, on Debian or Ubuntu with apt-get install "
            f"{package}"
        )
    return command


def _synthesize(events: Sequence[Event], seconds: float, sample_hz: int, soundfont: str, folder: Path) -> Path:
    """Render MIDI events to a stereo WAV file that lasts at least `seconds`, and return the path of the file."""
    command = find_synthesizer(soundfont)
    score, sound = folder / "score.mid", folder / "sound.wav"
    score.write_bytes(midi_bytes(events, end_seconds=seconds))
    arguments = [command, "-n", "-i", "-q", "-r", str(sample_hz), "-g", str(GAIN), "-T", "wav", "-O", "float"]
    arguments += ["-o", "synth.cpu-cores=1", "-F", str(sound), str(SOUNDFONTS[soundfont].path), str(score)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not sound.is_file():
        raise RuntimeError(f"fluidsynth failed with exit status {result.returncode}: {result.stderr.strip()[-500:]}")
    return sound


def fit_peak(mono: np.ndarray, peak: float, sample_hz: int) -> np.ndarray:
    """Fade out the end of a mono wave, and scale its largest absolute sample to `peak`."""
    fade = round(FADE_SECONDS * sample_hz)
    mono = mono.copy()
    mono[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    return mono * (peak / max(float(np.abs(mono).max()), 1e-6))


@typed
def render_performances(
    performances: Sequence[Sequence[Event]],
    peaks: Sequence[float],
    seconds: float = 5.0,
    sample_hz: int = 24_000,
    soundfont: str = "FluidR3 GM",
) -> list[np.ndarray]:
    """Render several clips in one run of the synthesizer.

    Args:
        performances: MIDI events of each clip; every clip starts at 0 s.
        peaks: Requested largest absolute sample value of each clip, in 0..1.
        seconds: Length of every clip in seconds.
        sample_hz: Sample rate of the rendered clips.
        soundfont: Name of a soundfont, a key of `SOUNDFONTS`.

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
                waves.append(fit_peak(stereo.mean(axis=1), peak, sample_hz))
    return waves
