"""What the semantic check listens to: rendered clips whose melody is known note by note, and spoken digits."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.semantic.base import FrameEncoder
from musiclm_pytorch.recipes.corpus.corpus import CLIP_SECONDS, ClipPlan, plan_clip
from musiclm_pytorch.recipes.corpus.midi import Note
from musiclm_pytorch.recipes.corpus.performance import perform

__all__ = [
    "FrameGrid",
    "ProbeClip",
    "ProbeSet",
    "is_held_out",
    "load_music",
    "load_speech",
    "melody_notes",
    "onset_labels",
    "pitch_class_labels",
]

MELODY_CHANNEL = 0
FIRST_TRAINING_TAKE = 10
_LONGEST_FIRST_FRAME_SAMPLES = 2**22
# Fields of a manifest that the sound of a clip depends on.
_HEARD_FIELDS = ("audio", "instrument", "tempo", "dance", "mode", "chords", "drums", "register", "bpm", "tune")


@dataclass(frozen=True)
class ProbeClip:
    """A sound with what is known of it.

    Attributes:
        wave: `[n]`.
        labels: What holds for all of it, by the name of the probe: instrument, or digit and speaker.
        notes: Its melody; empty for speech.
    """

    wave: Tensor
    labels: dict[str, str]
    notes: tuple[Note, ...] = field(default=())


@dataclass(frozen=True)
class ProbeSet:
    """Clips that probes are fitted to, and clips that they are tried on; both in random order."""

    train: list[ProbeClip]
    test: list[ProbeClip]


@dataclass(frozen=True)
class FrameGrid:
    """Where the frames of an encoder lie.

    Frame i looks at `shortest_samples` samples from `i * hop_samples` on, since the shortest wave that gives a frame is
    what one frame needs; its centre is the middle of these. An encoder whose frames tile the wave looks at
    `[i * hop, (i + 1) * hop)`; HuBERT (400 samples every 320) has its centres at `320 i + 200`.

    Attributes:
        sample_hz: Rate of the waves (Hz).
        hop_samples: Samples between frames.
        shortest_samples: Length of the shortest wave that gives a frame.
    """

    sample_hz: int
    hop_samples: int
    shortest_samples: int

    @classmethod
    def of(cls, encoder: FrameEncoder) -> "FrameGrid":
        """The grid of an encoder, from its frame arithmetic alone."""
        return cls(encoder.sample_hz, encoder.downsample_factor, _shortest_samples(encoder.num_frames))

    @property
    def hop_seconds(self) -> float:
        """Seconds between frames."""
        return self.hop_samples / self.sample_hz

    def centres_seconds(self, num_frames: int) -> Tensor:
        """Times `[t]` float64 of the middles of the frames."""
        middles = torch.arange(num_frames, dtype=torch.float64) * self.hop_samples + self.shortest_samples / 2
        return middles / self.sample_hz


def _shortest_samples(num_frames: Callable[[int], int]) -> int:
    """Samples of the shortest wave that gives a frame; frame counts never fall with the length."""

    def gives_a_frame(num_samples: int) -> bool:
        try:
            return num_frames(num_samples) >= 1
        except ValueError:
            return False

    high = 1
    while not gives_a_frame(high):
        high *= 2
        if high > _LONGEST_FIRST_FRAME_SAMPLES:
            raise ValueError(f"the encoder gives no frame for {high // 2} samples; its num_frames is broken")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gives_a_frame(middle) else (middle, high)
    return high


@beartype
def pitch_class_labels(notes: Sequence[Note], grid: FrameGrid, num_frames: int) -> Tensor:
    """Pitch class (0 = C) of the note that sounds at the centre of each frame.

    Args:
        notes: A melody; of notes that sound together the one struck last counts.
        grid: The frames.
        num_frames: How many, t.

    Returns:
        `[t]` int64, -1 where nothing sounds.
    """
    labels = torch.full((num_frames,), -1)
    centres = grid.centres_seconds(num_frames)
    for note in sorted(notes, key=lambda note: note.start_seconds):
        sounding = (centres >= note.start_seconds) & (centres < note.start_seconds + note.duration_seconds)
        labels[sounding] = note.pitch % 12
    return labels


@beartype
def onset_labels(notes: Sequence[Note], grid: FrameGrid, num_frames: int) -> Tensor:
    """Whether a note starts within half a hop of the centre of each frame.

    Args:
        notes: A melody.
        grid: The frames.
        num_frames: How many, t.

    Returns:
        `[t]` int64, 0 or 1. A start before the first of these spans counts for frame 0, which looks back to it.
    """
    labels = torch.zeros(num_frames, dtype=torch.int64)
    first_edge = float(grid.centres_seconds(1)[0]) - grid.hop_seconds / 2
    for note in notes:
        # A start that falls on an edge up to rounding belongs to the later frame.
        frame = max(0, int((note.start_seconds - first_edge) / grid.hop_seconds + 1e-6))
        if frame < num_frames:
            labels[frame] = 1
    return labels


@beartype
def melody_notes(plan: ClipPlan) -> tuple[Note, ...]:
    """The melody of a clip of the corpus, as it was rendered."""
    events = perform(plan.tune, plan.labels, plan.start_bar, CLIP_SECONDS, Random(plan.touch_seed))
    return tuple(event for event in events if isinstance(event, Note) and event.channel == MELODY_CHANNEL)


@beartype
def load_music(corpus: Path, sample_hz: int, most_clips: int, seed: int = 0) -> ProbeSet:
    """Read clips of a corpus and play their scores again.

    Args:
        corpus: Folder that `python -m musiclm_pytorch.recipes.corpus` wrote.
        sample_hz: Rate wanted (Hz).
        most_clips: Of each split at most so many, drawn at random.
        seed: Of the draw.

    Returns:
        Training clips, and the held-out (valid) ones to try probes on; label `instrument`, and the melody.

    Raises:
        ValueError: If the folder holds no corpus, or one whose scores this release composes differently.
    """
    recipe_path = corpus / "recipe.json"
    if not recipe_path.is_file():
        raise ValueError(f"{corpus}: no recipe.json; make a corpus: python -m musiclm_pytorch.recipes.corpus")
    recipe = read_json(recipe_path)
    if not isinstance(recipe, dict) or not all(
        type(recipe.get(key)) is int for key in ("num_train", "num_valid", "seed")
    ):
        raise ValueError(f"{recipe_path} needs the numbers num_train, num_valid and seed; make the corpus anew")

    def clips(split: str, count: int) -> list[ProbeClip]:
        lines = _lines(corpus / f"{split}.jsonl", count)
        chosen = _drawn(range(count), most_clips, f"{split} {seed}")
        return [
            _music_clip(corpus, lines[index], plan_clip(split, index, recipe["seed"]), sample_hz) for index in chosen
        ]

    return ProbeSet(clips("train", recipe["num_train"]), clips("valid", recipe["num_valid"]))


def _lines(manifest: Path, count: int) -> list[str]:
    """The lines of a manifest that must have so many."""
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest; complete the corpus")
    lines = [line for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != count:
        raise ValueError(f"{manifest} has {len(lines)} lines, its recipe.json says {count}; make the corpus anew")
    return lines


def _music_clip(corpus: Path, line: str, plan: ClipPlan, sample_hz: int) -> ProbeClip:
    """One clip; refused if the manifest describes another one than the plan, whose notes would then be wrong."""
    row = json.loads(line)
    other = [name for name in _HEARD_FIELDS if row.get(name) != plan.row[name]]
    if other:
        raise ValueError(
            f"{corpus}: {plan.row['audio']} was composed differently ({other[0]}: {row.get(other[0])!r}, now "
            f"{plan.row[other[0]]!r}), so its notes are not known; make the corpus anew with this release"
        )
    wave = read_audio(corpus / plan.row["audio"], sample_hz)[0][0]
    return ProbeClip(wave, {"instrument": plan.row["instrument"]}, melody_notes(plan))


def _drawn(population: Sequence, most: int, seed: str) -> list:
    """Some of a population in random order; a smaller number of them is a prefix of a larger one."""
    shuffled = list(population)
    Random(seed).shuffle(shuffled)
    return shuffled[:most]


@beartype
def is_held_out(item: AudioItem) -> bool:
    """Tell whether a recording of spoken digits is kept from training: takes 0 to 9 of each digit and speaker.

    The files at hand begin with take 5, so takes 5 to 9 are held out; 0 to 4 are the test set of the full collection.

    Args:
        item: A recording whose file is called `digit_speaker_take`.

    Returns:
        True for takes below 10.

    Raises:
        ValueError: If the name is another one.
    """
    found = re.fullmatch(r"\d_[^_]+_(\d+)", item.path.stem)
    if found is None:
        raise ValueError(f"{item.path}: recordings of digits are called like 7_jackson_12.wav (digit, speaker, take)")
    return int(found[1]) < FIRST_TRAINING_TAKE


@beartype
def load_speech(digits: Path, sample_hz: int, most_clips: int, seed: int = 0) -> ProbeSet:
    """Read spoken digits.

    Args:
        digits: Folder with a manifest `train.jsonl` whose lines have `digit` and `speaker`.
        sample_hz: Rate wanted (Hz).
        most_clips: Of each side at most so many, drawn at random.
        seed: Of the draw.

    Returns:
        Training clips, and those that `is_held_out` to try probes on; labels `digit` and `speaker`.

    Raises:
        ValueError: If the folder holds no such recordings, or none on one of the sides.
    """
    items = load_items(digits).items
    lacking = [item for item in items if not {"digit", "speaker"} <= item.labels.keys()]
    if lacking:
        raise ValueError(f"{digits}: {lacking[0].path.name} has no digit or no speaker; name a folder of spoken digits")
    sides: dict[bool, list[AudioItem]] = {False: [], True: []}
    for item in items:
        sides[is_held_out(item)].append(item)
    if not all(sides.values()):
        raise ValueError(
            f"{digits}: {len(sides[False])} recordings to train on and {len(sides[True])} held out (takes below "
            f"{FIRST_TRAINING_TAKE}); both are needed"
        )

    def clips(held_out: bool) -> list[ProbeClip]:
        chosen: list[AudioItem] = _drawn(sides[held_out], most_clips, f"held out {held_out} {seed}")
        return [
            ProbeClip(
                read_audio(item.path, sample_hz)[0][0], {name: str(item.labels[name]) for name in ("digit", "speaker")}
            )
            for item in chosen
        ]

    return ProbeSet(clips(False), clips(True))
