"""Plans of clips: labels, captions, music, instruments and sounds, drawn from a seed, a split and a clip number."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.recipes.corpus.captions import caption_variants, hard_negatives
from musiclm_pytorch.recipes.corpus.composition import Tune, compose_song, compose_tune
from musiclm_pytorch.recipes.corpus.instruments import FOLK_INSTRUMENTS, INSTRUMENTS
from musiclm_pytorch.recipes.corpus.midi import ControlChange, Note, ProgramChange
from musiclm_pytorch.recipes.corpus.moods import MOODS, Mood
from musiclm_pytorch.recipes.corpus.performance import (
    MELODY_CHANNEL,
    TEMPI_BPM,
    TEMPO_JITTER,
    ClipLabels,
    perform,
)
from musiclm_pytorch.recipes.corpus.repertoire import STYLES
from musiclm_pytorch.recipes.corpus.samples import LOOPS_BPM, RECORDED_KITS
from musiclm_pytorch.recipes.corpus.styles import Style

__all__ = ["CLIP_SECONDS", "FOLK_FRACTION", "HELD_OUT_PAIRS", "SAMPLE_HZ", "ClipPlan", "perform_plan", "plan_clip"]

CLIP_SECONDS = 5.0
SAMPLE_HZ = 24_000
CLIPS_PER_TUNE = 2
CAPTIONS_PER_CLIP = 6
NEGATIVES_PER_CLIP = 4

Pair = tuple[tuple[str, str], tuple[str, str]]
_Weights = dict[Any, float]

# Pairs of label values that never occur together in training clips; each value occurs with all others. One valid clip
# in five has such a pair (field `held_out_pair`), to measure new combinations of known attributes.
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    (("instrument", "harpsichord"), ("tempo", "slow")),
    (("instrument", "accordion"), ("register", "low")),
    (("instrument", "marimba"), ("chords", "string chords")),
    (("instrument", "clarinet"), ("dance", "waltz")),
    (("instrument", "saxophone"), ("style", "bossa nova")),
    (("instrument", "vibraphone"), ("mood", "calm")),
    (("instrument", "marimba"), ("style", "techno")),
)
_HELD_OUT_VALID_FRACTION = 0.2

FOLK_FRACTION = 0.4
# Relative frequency of each value in folk dances.
_FOLK_WEIGHTS: dict[str, _Weights] = {
    "instrument": FOLK_INSTRUMENTS,
    "tempo": dict.fromkeys(TEMPI_BPM, 1.0),
    "chords": {None: 0.4, "piano chords": 0.2, "guitar chords": 0.2, "string chords": 0.2},
    "drums": {False: 0.72, True: 0.28},
}
_FOLK_MOODS = ("happy", "sad", "calm", "energetic", "playful", "dark")
_FOLK_MOOD_FRACTION = 0.35
_STYLE_MOOD_FRACTION = 0.75
_REGISTER_WEIGHTS = {"low": 0.25, "mid": 0.5, "high": 0.25}
_DANCE_WEIGHTS = {
    "reel": 0.28,
    "jig": 0.24,
    "hornpipe": 0.10,
    "waltz": 0.11,
    "folk tune": 0.09,
    "morris dance": 0.06,
    "country dance": 0.05,
    "slip jig": 0.035,
    "christmas carol": 0.035,
}
_MINOR_FRACTION = 0.2
_PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
# Range of the largest absolute sample of a clip, for a variety of levels.
_PEAKS = (0.5, 0.9)
# Weights of soundfonts. The folk tunes on which models are tested have the sounds of the first.
_SOUNDFONT_WEIGHTS = {"FluidR3 GM": 0.65, "MuseScore General": 0.35}
# A recorded drum loop is at most this factor faster or slower than in the recording.
_LOOP_STRETCH = 1.16
_LOOP_FRACTION = 0.35


@dataclass(frozen=True)
class ClipPlan:
    """Plan of a clip that is not rendered yet.

    Args:
        row: Row of the manifest.
        tune: Composed tune.
        labels: Labels that determine the performance.
        start_bar: First bar of the excerpt.
        peak: Largest absolute sample.
        touch_seed: Seed of the performance.
        soundfont: A key of `render.SOUNDFONTS`.
        recorded: Recorded drum kit or loop (module `samples`) that replaces the drums of the soundfont, or None.
    """

    row: dict[str, Any]
    tune: Tune
    labels: ClipLabels
    start_bar: int
    peak: float
    touch_seed: str
    soundfont: str
    recorded: str | None

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return float(self.row["duration"])

    @property
    def samples(self) -> list[str]:
        """Names of the recorded samples that the clip can contain."""
        drums = [] if self.recorded is None else list(RECORDED_KITS.get(self.recorded, {0: self.recorded}).values())
        return [*drums, "vinyl_hiss"] if self.row["effect"] == "vinyl" else drums


@dataclass(frozen=True)
class _Song:
    """A composed tune with the labels that all its clips share; `style` is None for folk dances."""

    name: str
    tune: Tune
    style: Style | None
    mood: str | None
    dance: str | None

    def shared_labels(self) -> dict[str, Any]:
        return {
            "style": self.style.name if self.style else "folk dance",
            "dance": self.dance,
            "mode": self.tune.mode,
            "mood": self.mood,
        }


def _pick(rng: Random, weighted: Mapping[Any, float]) -> Any:
    return rng.choices(list(weighted), weights=list(weighted.values()))[0]


def _draw_mood(rng: Random, moods: tuple[str, ...], fraction: float) -> str | None:
    return rng.choice(moods) if rng.random() < fraction else None


@lru_cache(maxsize=4)
def _compose(split: str, number: int, seed: int, folk_fraction: float) -> _Song:
    """Compose tune `number` of a split."""
    name = f"recipe-{split}-{number:05d}"
    rng = Random(f"tune {seed} {name}")
    if rng.random() < folk_fraction:
        dance = _pick(rng, _DANCE_WEIGHTS)
        mood_name = _draw_mood(rng, _FOLK_MOODS, _FOLK_MOOD_FRACTION)
        mood = MOODS[mood_name] if mood_name else Mood()
        mode = "minor" if rng.random() < _MINOR_FRACTION else "major"
        if mode not in mood.modes:
            mode = mood.modes[0]
        return _Song(name, compose_tune(dance, mode, rng, mood.density), None, mood_name, dance)
    style = rng.choice(list(STYLES.values()))
    mood_name = _draw_mood(rng, style.moods, _STYLE_MOOD_FRACTION)
    mood = MOODS[mood_name] if mood_name else Mood()
    progressions = [progression for progression in style.progressions if progression.mode in mood.modes]
    preferred = [progression for progression in progressions if progression.scale in mood.scales]
    tune = compose_song(style, rng.choice(preferred or progressions), rng, mood.density)
    return _Song(name, tune, style, mood_name, "waltz" if style.name == "waltz" else None)


def _options(song: _Song) -> dict[str, _Weights]:
    """Weights of all values of the labels that the clips of a tune do not share."""
    mood = MOODS[song.mood] if song.mood else Mood()
    style = song.style
    if style is None:
        options = dict(_FOLK_WEIGHTS) | {"pad": {None: 1.0}, "bass": {None: 1.0}, "effect": {None: 1.0}}
    else:
        options = {
            "instrument": style.melody,
            "tempo": dict.fromkeys(style.tempi, 1.0),
            "chords": style.chords,
            "drums": {False: 1.0 - style.drums, True: style.drums},
            "pad": style.pads,
            "bass": style.basses,
            "effect": style.effects,
        }
    instruments, tempi = options["instrument"].items(), options["tempo"].items()
    return options | {
        "tempo": {tempo: weight for tempo, weight in tempi if tempo in mood.tempi},
        "instrument": {
            name: weight for name, weight in instruments if set(INSTRUMENTS[name].registers) & set(mood.registers)
        },
    }


def _draw_once(rng: Random, options: dict[str, _Weights], mood: Mood) -> dict[str, Any]:
    labels = {name: _pick(rng, weights) for name, weights in options.items()}
    registers = set(INSTRUMENTS[labels["instrument"]].registers) & set(mood.registers)
    labels["register"] = _pick(rng, {name: weight for name, weight in _REGISTER_WEIGHTS.items() if name in registers})
    if labels["pad"] == labels["chords"] or labels["chords"] is None:
        labels["pad"] = None
    return labels


def _holds(labels: Mapping[str, Any], pair: Pair) -> bool:
    return all(labels[name] == value for name, value in pair)


def _draw_labels(rng: Random, song: _Song, split: str) -> dict[str, Any]:
    """Draw the labels of a clip. Only validation clips can have a pair of labels in `HELD_OUT_PAIRS`."""
    mood = MOODS[song.mood] if song.mood else Mood()
    options, shared = _options(song), song.shared_labels()
    possible = {name: set(weights) for name, weights in options.items()} | {"register": set(mood.registers)}
    possible |= {name: {value} for name, value in shared.items()}
    pairs = [pair for pair in HELD_OUT_PAIRS if all(value in possible[name] for name, value in pair)]
    held_out = bool(pairs) and split == "valid" and rng.random() < _HELD_OUT_VALID_FRACTION
    pair = rng.choice(pairs) if held_out else None
    while True:
        labels = _draw_once(rng, options, mood) | shared
        if pair is not None:
            labels |= dict(pair)
        if pair is not None or not any(_holds(labels, other) for other in HELD_OUT_PAIRS):
            return labels | {"held_out_pair": pair is not None}


def _captions(labels: dict[str, Any], split: str, rng: Random) -> dict[str, Any]:
    """Generate the caption fields of a manifest row; validation clips have phrases that training captions lack."""
    seen = caption_variants(labels, rng, CAPTIONS_PER_CLIP)
    if split == "train":
        # A separate generator: the hard negatives do not change the music.
        negatives = hard_negatives(labels, Random(" ".join(seen)), NEGATIVES_PER_CLIP)
        return {"caption": seen[0], "captions": seen, "hard_negatives": negatives}
    unseen = caption_variants(labels, rng, CAPTIONS_PER_CLIP // 2, held_out=True)
    return {"caption": unseen[0], "caption_seen": seen[0], "captions": unseen}


def _draw_recorded_drums(rng: Random, style: Style | None, bpm: float) -> str | None:
    """Draw a recorded drum kit or loop; None = drums of the soundfont."""
    kit, loop_number, shares = rng.choice(list(RECORDED_KITS)), rng.random(), (rng.random(), rng.random())
    if style is None or shares[0] >= style.recorded:
        return None
    stretch = {name: max(bpm / loop, loop / bpm) for name, loop in LOOPS_BPM.items()}
    loops = [name for name, factor in stretch.items() if factor <= _LOOP_STRETCH]
    straight = style.swing < 0.6 and style.name in ("pop", "lo-fi", "techno", "funk")
    return loops[int(loop_number * len(loops))] if loops and straight and shares[1] < _LOOP_FRACTION else kit


@typed
def plan_clip(
    split: str,
    index: int,
    seed: int,
    seconds: float = CLIP_SECONDS,
    soundfont: str | None = None,
    folk_fraction: float = FOLK_FRACTION,
) -> ClipPlan:
    """Draw the labels, captions and music of clip number `index` of a split, "train" or "valid".

    Args:
        split: Name of the split.
        index: Number of the clip in the split.
        seed: Seed of the corpus.
        seconds: Length of the clip.
        soundfont: Soundfont of all sounds, a key of `render.SOUNDFONTS`; None = a random soundfont, and recorded drums
            in some clips. The tune, the labels and the captions do not depend on it.
        folk_fraction: Share of folk dances among all tunes.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', got {split!r}")
    song = _compose(split, index // CLIPS_PER_TUNE, seed, folk_fraction)
    rng = Random(f"clip {seed} {split} {index}")
    drawn = _draw_labels(rng, song, split)
    if song.style is None:
        bpm = TEMPI_BPM[drawn["tempo"]] * rng.uniform(1 - TEMPO_JITTER, 1 + TEMPO_JITTER)
    else:
        bpm = rng.uniform(*song.style.tempi[drawn["tempo"]])
    bpm = round(bpm, 1)
    order = (
        "instrument",
        "tempo",
        "style",
        "dance",
        "mode",
        "mood",
        "chords",
        "pad",
        "bass",
        "drums",
        "register",
        "effect",
    )
    labels_of_row = {label: drawn[label] for label in order}
    captions = _captions(labels_of_row, split, rng)
    start_bar, peak = rng.randrange(song.tune.num_bars), rng.uniform(*_PEAKS)
    sounds = Random(f"sounds {seed} {split} {index}")
    drawn_soundfont, recorded = _pick(sounds, _SOUNDFONT_WEIGHTS), _draw_recorded_drums(sounds, song.style, bpm)
    if soundfont is not None or not drawn["drums"]:
        recorded = None
    font = soundfont or drawn_soundfont
    samples = [f"sonic-pi-samples ({recorded})"] if recorded else []
    if drawn["effect"] == "vinyl":
        samples.append("sonic-pi-samples (vinyl_hiss)")
    row = {"audio": f"clips/{split}-{index:05d}.ogg"} | captions | labels_of_row
    row |= {
        "bpm": bpm,
        "tune": song.name,
        "held_out_pair": drawn["held_out_pair"],
        "soundfont": font,
        "sources": [font, *samples],
        "duration": seconds,
        "sample_rate": SAMPLE_HZ,
    }
    performed = ("instrument", "tempo", "chords", "drums", "register", "style", "mood", "pad", "bass")
    labels = ClipLabels(**{name: drawn[name] for name in performed}, bpm=bpm)
    plan = ClipPlan(row, song.tune, labels, start_bar, peak, f"touch {seed} {split} {index}", font, recorded)
    row["pitch_class"] = _melody_events(plan)
    return plan


def perform_plan(plan: ClipPlan) -> list[Note | ProgramChange | ControlChange]:
    """Create the MIDI events of a clip."""
    return perform(plan.tune, plan.labels, plan.start_bar, plan.seconds, Random(plan.touch_seed))


def _melody_events(plan: ClipPlan) -> list[list[Any]]:
    """Return a list `[start_seconds, end_seconds, pitch class]` for each melody note of a clip."""
    events = []
    for note in perform_plan(plan):
        if isinstance(note, Note) and note.channel == MELODY_CHANNEL:
            end_seconds = note.start_seconds + note.duration_seconds
            events.append([round(note.start_seconds, 4), round(end_seconds, 4), _PITCH_CLASSES[note.pitch % 12]])
    return events
