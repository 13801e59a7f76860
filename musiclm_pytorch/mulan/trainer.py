"""Training of MuLaN, or of any joint embedding that gives a contrastive loss."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem, captions_of, load_split
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult
from musiclm_pytorch.mulan.captions import CaptionSampler, aspects_of, texts_of
from musiclm_pytorch.mulan.chance_watch import ChanceWatch, TextUse, chance_loss
from musiclm_pytorch.mulan.held_out import HeldOutClips
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.mulan.mulan import MuLaN
from musiclm_pytorch.mulan.seen_words import words_of
from musiclm_pytorch.mulan.text_tower import TextTransformer

if TYPE_CHECKING:
    import accelerate

__all__ = ["MuLaNTask", "MuLaNTrainer"]

logger = logging.getLogger(__name__)

# Enough to tell how often a text describes several clips.
_CLIPS_COUNTED = 10_000


class MuLaNTask:
    """What `TrainLoop` needs to train a MuLaN: random crops of captioned files, and measures on held-out ones.

    Each clip of a batch has one text or several, drawn anew in every epoch. Held-out files are searched by their first
    caption, and by the words for their labels.

    Args:
        mulan: The model: gives its loss when called like `MuLaN`, and has a text tower `text` with `tokenize`.
        train_items: Files to learn from; those without a caption are left out.
        valid_items: Files to measure on; may be empty.
        seconds: Length of a crop.
        batch_size: Clips a step and process; what a clip is contrasted with.
        captions: Draws the texts of a clip; None = one caption of the clip, another one in every epoch.
        chunk_size: Clips and texts embedded at a time, so that memory does not grow with `batch_size` (gradient
            caching, arXiv:2101.06983); None = all at once.
        labels: Labels of the held-out files to test zero-shot tagging by; None = those that look like tags.
        seed: Seed of the crops, and of the texts where `captions` is None.
        cache_bytes: Memory for decoded audio.

    Raises:
        ValueError: If no file to learn from has a caption, `chunk_size` is not positive, the model cannot be trained
            by contrast, or a label is none of the held-out files'.
    """

    name = "mulan"

    @beartype
    def __init__(
        self,
        *,
        mulan: JointEmbedding,
        train_items: Sequence[AudioItem],
        valid_items: Sequence[AudioItem],
        seconds: float | int,
        batch_size: int,
        captions: CaptionSampler | None = None,
        chunk_size: int | None = None,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        cache_bytes: int = 2**30,
    ) -> None:
        self._tokenize = _tokenizer_of(mulan)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be 1 or more, or None for all clips at once")
        captioned = [item for item in train_items if texts_of(item)]
        if not captioned:
            raise ValueError(
                f"none of {len(train_items)} files has a caption or aspects; give a train.jsonl with 'audio' and "
                "'caption', or put a .txt beside each file"
            )
        num_left_out = len(train_items) - len(captioned)
        if num_left_out:
            logger.warning("%d of %d files have no words to them and are left out", num_left_out, len(train_items))
        self.module: nn.Module = mulan
        self.mulan = mulan
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.captions = CaptionSampler(seed=seed) if captions is None else captions
        self.dataset = CropDataset(captioned, seconds, (mulan.sample_hz,), seed, cache_bytes)
        self.num_items = len(captioned)
        self.phases = (Phase("mulan", (mulan,), self.loss),)
        # Values that a resumed run must not change; defaults are left out.
        self.config: dict[str, Any] = {} if chunk_size is None else {"chunk_size": chunk_size}
        if self.captions != CaptionSampler(seed=seed):
            self.config["captions"] = asdict(self.captions)
        counted = range(0, self.num_items, -(-self.num_items // _CLIPS_COUNTED))
        self._text_use = TextUse.of([self.captions.sample(captioned[index], 0, index) for index in counted])
        held_out = [item for item in valid_items if texts_of(item)]
        self.held_out: HeldOutClips | None = None
        if labels and not held_out:
            raise ValueError(f"labels {list(labels)} are to be tested, but no held-out file has a caption or aspects")
        if held_out:
            crops = CropDataset(held_out, seconds, (mulan.sample_hz,), seed, cache_bytes // 4)
            self.held_out = HeldOutClips(crops, labels=labels, max_batch=min(batch_size, chunk_size or batch_size))

    @property
    def chance(self) -> dict[str, float]:
        """Loss, and figures of held-out clips, of a model that guesses."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        loss = chance_loss(getattr(self.mulan, "loss", None), self.batch_size * processes, self._text_use)
        if isinstance(self.mulan, MuLaN) and self.mulan.layer_contrast is not None:
            loss *= 1 + self.mulan.layer_contrast.weight * len(self.mulan.layer_contrast.layers)
        return {"loss": loss, **({} if self.held_out is None else self.held_out.chance)}

    def batch(self, indices: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Cut the clips of (epoch, index) pairs and draw their texts.

        Args:
            indices: Which clips.

        Returns:
            `wavs [b, n]`, their `lengths [b]` in samples, `ids [k, t]` of all texts and `clip_index [k]`: the clip
            that a text describes.
        """
        crops = collate_crops([self.dataset.get(epoch, index) for epoch, index in indices])
        texts = [self.captions.sample(self.dataset.items[index], epoch, index) for epoch, index in indices]
        clip_index = [row for row, own in enumerate(texts) for _ in own]
        hz = self.mulan.sample_hz
        return {
            "wavs": crops.waves[hz],
            "lengths": crops.lengths[hz],
            "ids": self._tokenize([text for own in texts for text in own]),
            "clip_index": torch.tensor(clip_index),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> LossOutput:
        """Contrastive loss of a batch, with the temperature it stands at."""
        loss = self.mulan(
            batch["wavs"], batch["ids"], batch["lengths"], clip_index=batch["clip_index"], chunk_size=self.chunk_size
        )
        temperature = getattr(getattr(self.mulan, "loss", None), "temperature", None)
        return LossOutput(loss, {} if temperature is None else {"temperature": temperature})

    def validate(self) -> dict[str, float]:
        """Retrieval in both directions among all held-out clips, and zero-shot tagging by their labels."""
        return {} if self.held_out is None else self.held_out.measure(self.mulan)

    def samples(self, folder: Path, step: int) -> None:
        """Write nothing: latents are nothing to listen to."""

    def before_training(self) -> None:
        """Do nothing: no part of MuLaN is made from data before training."""


class MuLaNTrainer:
    """Trains a MuLaN on captioned audio files, resumably.

    Warns in the log when the loss does not get below that of guessing (see `ChanceWatch`).

    Args:
        mulan: The model; its tokenizer should have been trained on the captions (`TextTokenizer.train`). Any joint
            embedding that gives its loss when called like `MuLaN` can be trained.
        folder: Folder with `train.jsonl` (`audio`, `caption`, perhaps a list `captions` of further ones), and
            `valid.jsonl` if there is one; or a `.jsonl` file; or a folder of audio files with a text file beside each.
            None when `items` is given.
        items: Items to learn from and held-out items, instead of `folder`.
        batch_size: Clips a step and process.
        num_train_steps: Optimizer steps of the whole run.
        seconds: Length of the crops; shorter files are used whole.
        captions: Draws the texts of a clip (several at a time, aspects, shortened captions); None = one caption of the
            clip, another one in every epoch.
        chunk_size: Clips and texts embedded at a time, so that memory does not grow with `batch_size` (gradient
            caching, arXiv:2101.06983); None = all at once.
        labels: Labels of the held-out files to test zero-shot tagging by; None = those that look like tags.
        valid_fraction: Share of held-out files where the folder does not say.
        results_folder: Where checkpoints and metrics go, and at the end the model (`results_folder/mulan`).
        accelerator: Shared by all trainings of a program; None makes one.
        cache_bytes: Memory for decoded audio.
        **settings: Further fields of `LoopSettings`.

    Raises:
        ValueError: If there is not exactly one of `folder` and `items`, no file has a caption, or a number or label is
            none that can be used.
    """

    @beartype
    def __init__(
        self,
        *,
        mulan: JointEmbedding,
        folder: str | Path | None = None,
        items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None = None,
        batch_size: int,
        num_train_steps: int,
        seconds: float | int = 10.0,
        captions: CaptionSampler | None = None,
        chunk_size: int | None = None,
        labels: Sequence[str] | None = None,
        valid_fraction: float = 0.05,
        results_folder: str | Path = "./results/mulan",
        accelerator: "accelerate.Accelerator | None" = None,
        cache_bytes: int = 2**30,
        **settings: Any,
    ) -> None:
        if (folder is None) == (items is None):
            raise ValueError("give either a folder (or manifest) or items, not both")
        loop_settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **settings)
        train_items, valid_items = load_split(folder, valid_fraction) if folder is not None else items or ((), ())
        self.task = MuLaNTask(
            mulan=mulan,
            train_items=train_items,
            valid_items=valid_items,
            seconds=seconds,
            batch_size=batch_size,
            captions=captions,
            chunk_size=chunk_size,
            labels=labels,
            seed=loop_settings.seed,
            cache_bytes=cache_bytes,
        )
        self.results_folder = Path(results_folder)
        self.watch = ChanceWatch(loop_settings.warmup_steps, phase=self.task.phases[0].name)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator, self.watch)
        _note_words(mulan, train_items)

    @beartype
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train to the end, or for some steps, from wherever the folder's checkpoint stands.

        Args:
            stop_after_steps: Steps to do in this call at most; None runs to the end.

        Returns:
            Where the run stands now. At its end `mulan` holds the final weights, in eval mode.
        """
        return self.loop.train_and_save(
            lambda: save_module(self.task.mulan, self.results_folder / "mulan"), stop_after_steps
        )


def _tokenizer_of(mulan: JointEmbedding) -> Callable[[list[str]], Tensor]:
    """What turns texts into ids for a model, or ValueError if it cannot be trained here."""
    tokenize = getattr(getattr(mulan, "text", None), "tokenize", None)
    known = inspect.signature(mulan.forward).parameters
    if tokenize is None or not {"clip_index", "chunk_size"} <= set(known):
        raise ValueError(
            f"{type(mulan).__name__} cannot be trained by contrast: that takes `text.tokenize(texts)` and a loss from "
            "`forward(wavs, ids, lengths, clip_index=..., chunk_size=...)`, as MuLaN has them"
        )
    if not any(parameter.requires_grad for parameter in mulan.parameters()):
        raise ValueError(f"all of {type(mulan).__name__} is frozen; set requires_grad_() on what is to be trained")
    return tokenize


def _note_words(mulan: JointEmbedding, items: Sequence[AudioItem]) -> None:
    """Tell a text tower that knows no other words than those it is trained on which these are."""
    text = getattr(mulan, "text", None)
    if isinstance(text, TextTransformer):
        new = words_of(text for item in items for text in (*captions_of(item), *aspects_of(item)))
        text.known_words = sorted({*new, *(text.known_words or ())})
