"""Training of a melody embedder on renderings of the same melody."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.items import AudioItem, items_digest
from audiolm_pytorch.data.manifest import AudioSplit, DataSource, training_items
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.distributed import map_over_processes, to_device
from audiolm_pytorch.training.samples import Sample
from musiclm_pytorch.melody.embedder import MelodyEmbedder
from musiclm_pytorch.melody.notes import LABEL, PitchNote, excerpt_of, notes_of, pitch_classes_at
from musiclm_pytorch.melody.triplets import semi_hard_triplet_loss
from musiclm_pytorch.melody.voices import draw_voice, render_melody

if TYPE_CHECKING:
    import accelerate

__all__ = ["MelodyTask", "MelodyTrainer", "melody_wave"]

_WINDOWS_PER_MELODY = 6
_SPAN_SECONDS = 2.0  # the windows of a melody lie within this time
_MAX_SPEED = 1.15
# Two windows are negatives of each other if they have different pitch classes for at least this share of the time.
_MIN_DIFFERENCE = 0.5
_TIMES_PER_WINDOW = 8
_MAX_NOISE = 0.02
_MAX_VALID_MELODIES = 64
_MAX_FITTED_WINDOWS = 12_000
_FIRST_FITTED_EPOCH = 2**20  # after the epochs of training, for other renderings
# Share of the renderings of a melody that are the recording of its file.
_RECORDED_SHARE = 1 / 3


class MelodyTask:
    """Task of a `TrainLoop` that trains a `MelodyEmbedder` with a semi-hard triplet loss.

    An item of a batch has two renderings of a part of a melody, of which one may be the recording itself. The others
    are synthetic voices of random timbre, register, tempo and tuning (`draw_voice`). Windows at the same place of both
    renderings are positives of each other.

    Args:
        train_items: Files with the label `pitch_class`; other files are left out.
        valid_items: Held-out files.
    """

    name = "melody embedder"

    def __init__(
        self, embedder: MelodyEmbedder, train_items: Sequence[AudioItem], valid_items: Sequence[AudioItem], seed: int
    ) -> None:
        self.module = self.embedder = embedder
        self.items = [(item, melody) for item in train_items if (melody := notes_of(item)) is not None]
        self.held_out = [(item, melody) for item in valid_items if (melody := notes_of(item)) is not None]
        if not self.items:
            raise ValueError(
                f"none of {len(train_items)} files has notes in the label {LABEL}; write a manifest with "
                f'"{LABEL}": [[start_seconds, end_seconds, name], ...], as musiclm_pytorch.recipes.corpus does'
            )
        self.seed, self.num_items = seed, len(self.items)
        self.phases = (Phase("melody", (embedder,), self.loss),)
        self.chance: dict[str, float] = {}
        self.config: dict[str, Any] = {"data": items_digest([item for item, _ in (*self.items, *self.held_out)])}

    def batch(self, indices: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return windows `[b, 2, w, n]` of two renderings, and their pitch classes `[b, 2, w, times]`."""
        return self._batch(self.items, indices)

    def _batch(
        self, items: list[tuple[AudioItem, list[PitchNote]]], indices: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        pairs = [
            self._renderings(*items[index], np.random.default_rng([self.seed, epoch, index]))
            for epoch, index in indices
        ]
        windows, classes = zip(*pairs)
        return {"windows": torch.stack(windows), "classes": torch.stack(classes)}

    def _renderings(self, item: AudioItem, melody: list[PitchNote], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Render a random part of a melody twice; return windows `[2, w, n]` and pitch classes `[2, w, times]`."""
        window_seconds, sample_hz = self.embedder.window_seconds, self.embedder.sample_hz
        length = melody[-1].end_seconds
        span = min(_SPAN_SECONDS, length)
        # A window is centred on a time at which the melody sounds.
        start = melody[0].start_seconds + rng.uniform(0, max(0.0, length - melody[0].start_seconds - span))
        centres = np.sort(rng.uniform(start, start + span, _WINDOWS_PER_MELODY))
        first, seconds = start - window_seconds, span + 2 * window_seconds
        windows, classes = [], []
        recorded = int(rng.integers(2)) if rng.random() < 2 * _RECORDED_SHARE else None
        for number in range(2):
            speed = 1.0
            if number == recorded:
                wave = _recording(item, first, seconds, sample_hz)
                part = excerpt_of(melody, first, seconds)
            else:
                speed = _MAX_SPEED ** rng.uniform(-1, 1)
                part = excerpt_of(melody, first, seconds, speed)
                wave = render_melody(part, seconds / speed, sample_hz, draw_voice(rng), rng)
            wave = wave + rng.uniform(0, _MAX_NOISE) ** 2 * rng.standard_normal(len(wave)).astype(np.float32)
            starts = (centres - first) / speed - window_seconds / 2
            index = np.round(starts * sample_hz).astype(int)[:, None] + np.arange(self.embedder.window_samples)
            windows.append(wave[index.clip(0, len(wave) - 1)])
            times = (np.arange(_TIMES_PER_WINDOW) + 0.5) * window_seconds / _TIMES_PER_WINDOW
            classes.append(pitch_classes_at(part, starts[:, None] + times))
        return torch.from_numpy(np.stack(windows)).float(), torch.from_numpy(np.stack(classes))

    def loss(self, batch: dict[str, Tensor], step: int) -> LossOutput:
        """Compute the triplet loss of all windows of a batch."""
        latents = self.embedder(batch["windows"].flatten(0, 2))
        classes = batch["classes"].flatten(0, 2)
        numbers = torch.arange(len(latents), device=latents.device).view(batch["windows"].shape[:3])
        positives = numbers.flip(1).flatten()
        differs = _difference(classes, classes) >= _MIN_DIFFERENCE
        return LossOutput(semi_hard_triplet_loss(latents, positives, differs))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Measure how similar the melody of a held-out window and of the nearest window of other renderings are.

        `recall_at_1` is the share of windows whose nearest window is at the same place of the same melody.
        `same_pitch_classes` is the share of the time in which both windows have equal pitch classes.
        """
        if not self.held_out:
            return {}
        count = min(_MAX_VALID_MELODIES, len(self.held_out))
        latents, classes = zip(*map_over_processes(self._embed, range(count)))
        first, second = (torch.cat([windows[side] for windows in latents]) for side in range(2))
        nearest = (first @ second.T).argmax(dim=1)
        numbers = torch.arange(len(nearest))
        same = 1 - _difference(*(torch.cat([windows[side] for windows in classes]) for side in range(2)))
        return {
            "recall_at_1": float((nearest == numbers).float().mean()),
            "same_pitch_classes": float(same[numbers, nearest].mean()),
            "same_by_chance": float(same.mean()),
        }

    def _embed(self, index: int) -> tuple[Tensor, Tensor]:
        """Return latents `[2, w, d]` and pitch classes `[2, w, times]` of the windows of a held-out melody."""
        batch = self._batch(self.held_out, [(0, index)])
        windows = to_device(batch["windows"], self.embedder.codebooks.device).flatten(0, 2)
        return self.embedder(windows).unflatten(0, (2, -1)).cpu(), batch["classes"][0]

    def samples(self, step: int) -> Sequence[Sample]:
        """Return no samples, since an embedder generates no audio."""
        return ()

    def before_training(self) -> None:
        """Do nothing, since the codebooks are fitted after training."""

    @torch.no_grad()
    def fit_codebooks(self, batch_size: int) -> None:
        """Fit the codebooks of the trained embedder to windows of training melodies."""
        per_item = 2 * _WINDOWS_PER_MELODY
        count = max(min(self.num_items, _MAX_FITTED_WINDOWS // per_item), -(-self.embedder.codebook_size // per_item))
        latents = []
        for start in range(0, count, batch_size):
            pairs = [divmod(number, self.num_items) for number in range(start, min(start + batch_size, count))]
            batch = self.batch([(_FIRST_FITTED_EPOCH + epoch, index) for epoch, index in pairs])
            batch = to_device(batch, self.embedder.codebooks.device)
            latents.append(self.embedder(batch["windows"].flatten(0, 2)))
        self.embedder.fit(torch.cat(latents), seed=self.seed)


@trainer_arguments(LoopSettings)
class MelodyTrainer:
    """Trains a melody embedder on files with notes, and fits its codebooks; training can be interrupted and resumed.

    Args:
        embedder: Embedder to train, without codebooks.
        folder: Folder or manifest whose lines have the label `pitch_class` (see `notes_of`).
        items: Training and held-out items, instead of `folder`.
        batch_size: Melodies per step and process.
        results_folder: Folder of checkpoints and metrics, and finally of the embedder (`results_folder/melody`).
        **settings: Further fields of `LoopSettings`.
    """

    @typed
    def __init__(
        self,
        *,
        embedder: MelodyEmbedder,
        folder: DataSource | None = None,
        items: AudioSplit | Dataset | None = None,
        batch_size: int,
        num_train_steps: int,
        results_folder: str | Path = "./results/melody",
        accelerator: "accelerate.Accelerator | None" = None,
        **settings: Any,
    ) -> None:
        loop_settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **settings)
        train_items, valid_items = training_items(folder, items, sample_hz=embedder.sample_hz)
        self.task = MelodyTask(embedder, train_items, valid_items, loop_settings.seed)
        self.results_folder = Path(results_folder)
        self._batch_size = batch_size
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator)

    @typed
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train from the last checkpoint to the end, or for at most `stop_after_steps` steps.

        After the last step, `embedder` has the final weights and codebooks and is in eval mode.
        """
        return self.loop.train_and_save(self._save, stop_after_steps)

    def _save(self) -> None:
        if not bool(self.task.embedder.fitted):
            self.task.fit_codebooks(self._batch_size)
        save_module(self.task.embedder, self.results_folder / "melody")


def melody_wave(item: AudioItem, sample_hz: int, seed: int | Sequence[int]) -> Tensor:
    """Return a wave `[1, n]` with the melody of a file, as the condition of the stages in training.

    Of files with notes, two thirds are rendered by a random voice, as a hummed melody; the others, and files without
    notes, are the recordings themselves.
    """
    rng, melody = np.random.default_rng(seed), notes_of(item)
    if melody is None or rng.random() < _RECORDED_SHARE:
        return item.read(sample_hz)
    seconds = item.num_samples / item.sample_hz
    return torch.from_numpy(render_melody(melody, seconds, sample_hz, draw_voice(rng), rng)).unsqueeze(0)


def _recording(item: AudioItem, start_seconds: float, seconds: float, sample_hz: int) -> np.ndarray:
    """Read a part of a recording as `[n]`, with silence before its start and after its end."""
    wave = np.zeros(round(seconds * sample_hz), dtype=np.float32)
    missing = round(max(0.0, -start_seconds) * sample_hz)
    part = item.read(sample_hz, 1, max(0.0, start_seconds), seconds - max(0.0, -start_seconds))[0].numpy()
    part = part[: len(wave) - missing]
    wave[missing : missing + len(part)] = part
    return wave


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """Share of the time `[n, k]` in which windows with pitch classes `[n, times]` and `[k, times]` differ."""
    return (first.unsqueeze(1) != second.unsqueeze(0)).float().mean(dim=-1)
