"""Recorded drums and loops of the package sonic-pi-samples (all CC0), mixed under the notes of a clip."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from audiolm_pytorch.audio.files import read_audio
from musiclm_pytorch.recipes.corpus.instruments import DRUM_PITCHES
from musiclm_pytorch.recipes.corpus.midi import Note

__all__ = ["LOOPS_BPM", "RECORDED_KITS", "SAMPLE_FOLDER", "drum_track", "find_samples", "hiss"]

SAMPLE_FOLDER = Path("/usr/share/sonic-pi/samples")

# Recorded drum kits, with one sample for each of the main voices; other voices use the nearest of them.
_VOICE_OF_PITCH = {
    DRUM_PITCHES[name]: voice
    for voice, names in {
        "kick": ("kick", "low conga"),
        "snare": ("snare", "clap", "rim", "conga"),
        "hat": ("hat", "pedal", "shaker", "tambourine", "ride", "claves", "cowbell"),
        "open": ("open",),
        "tom": ("low tom", "mid tom", "high tom"),
        "crash": ("crash",),
    }.items()
    for name in names
}
RECORDED_KITS: dict[str, dict[str, str]] = {
    "recorded acoustic": {
        "kick": "drum_heavy_kick",
        "snare": "drum_snare_hard",
        "hat": "drum_cymbal_closed",
        "open": "drum_cymbal_soft",
        "tom": "drum_tom_lo_hard",
        "crash": "drum_splash_hard",
    },
    "recorded soft": {
        "kick": "drum_bass_soft",
        "snare": "drum_snare_soft",
        "hat": "drum_cymbal_pedal",
        "open": "drum_cymbal_soft",
        "tom": "drum_tom_mid_soft",
        "crash": "drum_splash_soft",
    },
    "recorded house": {
        "kick": "bd_haus",
        "snare": "sn_dub",
        "hat": "drum_cymbal_closed",
        "open": "elec_cymbal",
        "tom": "elec_fuzz_tom",
        "crash": "drum_splash_soft",
    },
    "recorded 808": {
        "kick": "bd_808",
        "snare": "elec_hi_snare",
        "hat": "drum_cymbal_pedal",
        "open": "drum_cymbal_soft",
        "tom": "elec_hollow_kick",
        "crash": "elec_cymbal",
    },
    "recorded techno": {
        "kick": "bd_tek",
        "snare": "elec_snare",
        "hat": "drum_cymbal_closed",
        "open": "drum_cymbal_soft",
        "tom": "elec_soft_kick",
        "crash": "elec_cymbal",
    },
    "recorded dusty": {
        "kick": "bd_fat",
        "snare": "sn_zome",
        "hat": "drum_cymbal_pedal",
        "open": "drum_cymbal_soft",
        "tom": "drum_tom_lo_soft",
        "crash": "drum_splash_soft",
    },
    "recorded snap": {
        "kick": "bd_klub",
        "snare": "perc_snap",
        "hat": "elec_tick",
        "open": "drum_cymbal_soft",
        "tom": "drum_tom_hi_soft",
        "crash": "drum_splash_soft",
    },
    "recorded generic": {
        "kick": "bd_zome",
        "snare": "sn_generic",
        "hat": "drum_cymbal_closed",
        "open": "drum_cymbal_open",
        "tom": "drum_tom_mid_hard",
        "crash": "drum_splash_hard",
    },
}
# Tempo of the recorded drum loops in quarter notes per minute.
LOOPS_BPM: dict[str, float] = {
    "loop_amen": 136.9,
    "loop_amen_full": 140.0,
    "loop_breakbeat": 126.0,
    "loop_mika": 120.0,
    "loop_mehackit1": 97.0,
    "loop_mehackit2": 97.0,
    "loop_perc1": 97.0,
    "loop_compus": 148.0,
}


def find_samples(names: Iterable[str]) -> None:
    """Raise a RuntimeError if the file of a sample is missing."""
    for name in sorted(set(names)):
        if not (SAMPLE_FOLDER / f"{name}.flac").is_file():
            raise RuntimeError(
                f"the sample {name} is missing in {SAMPLE_FOLDER}; install the samples, on Debian or Ubuntu with "
                "apt-get install sonic-pi-samples"
            )


@lru_cache(maxsize=64)
def _sample(name: str, sample_hz: int) -> np.ndarray:
    """Read a sample as a mono wave whose largest absolute value is 1."""
    mono: np.ndarray = read_audio(SAMPLE_FOLDER / f"{name}.flac", sample_hz)[0][0].numpy()
    return mono / max(float(np.abs(mono).max()), 1e-6)


def _stretched(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play a wave `factor` times as long, by linear interpolation."""
    positions = np.arange(int(len(wave) * factor)) / factor
    return np.interp(positions, np.arange(len(wave)), wave).astype(np.float32)


def drum_track(recorded: str, drums: Sequence[Note], bpm: float, seconds: float, sample_hz: int) -> np.ndarray:
    """Mix recorded drums of a clip, with a largest absolute value of 1.

    Args:
        recorded: A loop in `LOOPS_BPM`, which is played at the tempo of the clip, or a drum kit in `RECORDED_KITS`,
            which plays the notes.
        drums: Notes of the drum channel.
        bpm: Tempo of the clip in quarter notes per minute.
        seconds: Length of the clip.
        sample_hz: Sample rate.
    """
    num_samples = round(seconds * sample_hz)
    if recorded in LOOPS_BPM:
        loop = _stretched(_sample(recorded, sample_hz), LOOPS_BPM[recorded] / bpm)
        track = np.tile(loop, -(-num_samples // len(loop)))[:num_samples]
    else:
        track = np.zeros(num_samples, dtype=np.float32)
        for note in drums:
            voice = _VOICE_OF_PITCH[note.pitch]
            wave = _sample(RECORDED_KITS[recorded][voice], sample_hz)
            start = round(note.start_seconds * sample_hz)
            wave = wave[: num_samples - start]
            level = (note.velocity / 100) ** 2 * {"hat": 0.45, "open": 0.4, "crash": 0.5}.get(voice, 1.0)
            track[start : start + len(wave)] += level * wave
    return track / max(float(np.abs(track).max()), 1e-6)


def hiss(num_samples: int, sample_hz: int, offset: float) -> np.ndarray:
    """Return recorded noise of a vinyl record, from the share `offset` of the recording on."""
    wave = _sample("vinyl_hiss", sample_hz)
    return np.resize(np.roll(wave, -round(offset * len(wave))), num_samples)
