"""Training of MuLaN, or of another joint embedding with a contrastive loss."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.items import AudioItem, items_digest
from audiolm_pytorch.data.manifest import AudioSplit, DataSource, captions_of, training_items
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.samples import Sample
from musiclm_pytorch.mulan.captions import CaptionSampler, aspects_of, hard_negatives_of, texts_of
from musiclm_pytorch.mulan.chance_watch import ChanceWatch
from musiclm_pytorch.mulan.held_out import HeldOutClips
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.mulan.losses import ContrastiveLoss, SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.mulan import MuLaN
from musiclm_pytorch.mulan.text_tower import TextTransformer, words_of

if TYPE_CHECKING:
    import accelerate

__all__ = ["MuLaNTask", "MuLaNTrainer"]

logger = logger_named(__name__)

# Clips from which the number of texts per clip is estimated.
_CLIPS_COUNTED = 10_000


class MuLaNTask:
    """Training task of MuLaN for `TrainLoop`, with random crops of captioned files and metrics on held-out files.

    Each clip of a batch has one or several texts, drawn again in every epoch. See `MuLaNTrainer` for the arguments.
    """

    name = "mulan"

    @typed
    def __init__(
        self,
        mulan: JointEmbedding,
        train_items: Sequence[AudioItem],
        valid_items: Sequence[AudioItem],
        *,
        seconds: float,
        batch_size: int,
        captions: CaptionSampler,
        chunk_size: int | None,
        labels: Sequence[str] | None,
        seed: int,
        cache_bytes: int,
    ) -> None:
        self._tokenize = _tokenizer_of(mulan)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None for one chunk; got {chunk_size}")
        captioned = [item for item in train_items if texts_of(item)]
        if not captioned:
            raise ValueError(
                f"none of {len(train_items)} files has a caption or aspects; provide a train.jsonl with 'audio' and "
                "'caption', or put a .txt file beside each audio file"
            )
        num_left_out = len(train_items) - len(captioned)
        if num_left_out:
            logger.warning("%d of %d files have no caption or aspects and are left out", num_left_out, len(train_items))
        self.module = self.mulan = mulan
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.captions = captions
        self.dataset = CropDataset(captioned, seconds, (mulan.sample_hz,), seed, cache_bytes)
        self.num_items = len(captioned)
        self.phases = (Phase("mulan", (mulan,), self.loss),)
        # Values that a resumed run must not change; defaults are left out.
        self.config: dict[str, Any] = {"data": items_digest([*captioned, *valid_items])}
        if chunk_size is not None:
            self.config["chunk_size"] = chunk_size
        if self.captions != CaptionSampler(seed=seed):
            self.config["captions"] = asdict(self.captions)
        counted = captioned[:_CLIPS_COUNTED]
        num_texts = sum(len(self.captions.sample(item, 0, index)) for index, item in enumerate(counted))
        self._texts_per_clip = num_texts / len(counted)
        # Every process needs hard negatives in every batch, since the processes gather them.
        self._negatives = [hard_negatives_of(item) for item in captioned]
        self._has_negatives = all(self._negatives)
        self._check_contrast()
        if self._has_negatives:
            self.config["hard_negatives"] = True
        elif any(self._negatives):
            missing = len(self._negatives) - sum(map(bool, self._negatives))
            logger.warning("hard_negatives are not used, since %d of %d files have none", missing, len(captioned))
        held_out = [item for item in valid_items if texts_of(item)]
        self.held_out: HeldOutClips | None = None
        if labels and not held_out:
            raise ValueError(f"labels {list(labels)} need held-out files with captions or aspects, got no such file")
        if held_out:
            crops = CropDataset(held_out, seconds, (mulan.sample_hz,), seed, cache_bytes // 4)
            self.held_out = HeldOutClips(crops, labels=labels, max_batch=min(batch_size, chunk_size or batch_size))

    @property
    def chance(self) -> dict[str, float]:
        """Expected loss and held-out metrics of a model that guesses."""
        chance: dict[str, float] = {} if self.held_out is None else self.held_out.chance
        loss = getattr(self.mulan, "loss", None)
        if not isinstance(loss, ContrastiveLoss):
            loss = SoftmaxContrastiveLearning()
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        value = loss.chance(self.batch_size * processes, self._texts_per_clip, float(self._has_negatives))
        if isinstance(self.mulan, MuLaN) and self.mulan.layer_contrast is not None:
            value *= 1 + self.mulan.layer_contrast.weight * len(self.mulan.layer_contrast.layers)
        return {"loss": value, **chance}

    def _check_contrast(self) -> None:
        """Check that the batch of all processes has several clips, and warn if all clips have the same text."""
        if self._has_negatives:
            return
        if self.batch_size * int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise ValueError("got batch_size=1, with which no text is contrasted with another; use 2 or more")
        texts = {text for item in self.dataset.items for text in (*texts_of(item), *aspects_of(item))}
        if len(texts) == 1:
            logger.warning(
                "all %d files have the text %.200r, so that the loss is 0; use different captions",
                *(self.num_items, texts.pop()),
            )

    def batch(self, indices: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Load the crops and texts of clips; `indices` contains a pair (epoch, index of the clip) for each clip."""
        crops = collate_crops([self.dataset.get(epoch, index) for epoch, index in indices])
        texts = [self.captions.sample(self.dataset.items[index], epoch, index) for epoch, index in indices]
        rate_hz = self.mulan.sample_hz
        batch = {
            "wavs": crops.waves[rate_hz],
            "texts": self._tokenize([text for of_clip in texts for text in of_clip]),
            "lengths": crops.lengths[rate_hz],
            "clip_index": torch.tensor([row for row, of_clip in enumerate(texts) for _ in of_clip]),
        }
        if self._has_negatives:
            choices = [(self._negatives[index], epoch) for epoch, index in indices]
            batch["negatives"] = self._tokenize([texts[epoch % len(texts)] for texts, epoch in choices])
            batch["negative_index"] = torch.arange(len(indices))
        return batch

    def loss(self, batch: dict[str, Tensor], step: int) -> LossOutput:
        """Compute the contrastive loss of a batch, with the current temperature as a metric."""
        keywords = {name: part for name, part in batch.items() if name not in ("wavs", "texts", "lengths")}
        loss = self.mulan(batch["wavs"], batch["texts"], batch["lengths"], **keywords, chunk_size=self.chunk_size)
        temperature = getattr(getattr(self.mulan, "loss", None), "temperature", None)
        return LossOutput(loss, {} if temperature is None else {"temperature": temperature})

    def validate(self) -> dict[str, float]:
        """Compute the metrics of the held-out clips."""
        return {} if self.held_out is None else self.held_out.measure(self.mulan)

    def samples(self, step: int) -> list[Sample]:
        """Return the held-out clips that are nearest to captions of held-out clips."""
        return [] if self.held_out is None else self.held_out.nearest_clips()

    def before_training(self) -> None:
        """Do nothing, since no module of a MuLaN is fitted before training."""


@trainer_arguments(LoopSettings)
class MuLaNTrainer:
    """Trains a MuLaN on captioned audio files; training can be interrupted and resumed.

    A warning is logged if the loss does not fall below the chance loss (see `ChanceWatch`).

    Args:
        mulan: A MuLaN whose tokenizer was trained on the captions (`TextTokenizer.train`), or any joint embedding with
            a `forward` and a text tower like those of `MuLaN`.
        folder: Folder with `train.jsonl` (`audio`, `caption`, optionally lists `captions` and `hard_negatives`), and
            optionally `valid.jsonl`; or a `.jsonl` file; or a folder of audio files with a text file beside each;
            or a torch `Dataset` of waves and captions; or a list of such sources (see `load_items`).
        items: Training and held-out items, or one or two torch data sets, instead of `folder`; items without captions
            and aspects are left out.
        batch_size: Clips per step and process; the loss contrasts the clips of all processes with each other.
        seconds: Length of the crops; files that are shorter are used whole.
        chunk_size: Number of clips, and of texts, that are embedded at a time; see `MuLaN.forward`.
        labels: Labels of the held-out files for zero-shot tagging; None = all labels that can be used for tagging.
        results_folder: Folder of checkpoints and metrics, and finally of the model (`results_folder/mulan`).
        **settings: Further fields of `LoopSettings`.
    """

    @typed
    def __init__(
        self,
        *,
        mulan: JointEmbedding,
        folder: DataSource | None = None,
        items: AudioSplit | Dataset | None = None,
        batch_size: int,
        num_train_steps: int,
        seconds: float = 10.0,
        captions: CaptionSampler | None = None,
        chunk_size: int | None = None,
        labels: Sequence[str] | None = None,
        valid_fraction: float = 0.05,
        results_folder: str | Path = "./results/mulan",
        accelerator: "accelerate.Accelerator | None" = None,
        cache_bytes: int = 2**30,
        **settings: Any,
    ) -> None:
        loop_settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **settings)
        train_items, valid_items = training_items(
            folder, items, sample_hz=mulan.sample_hz, valid_fraction=valid_fraction, reuse_for_validation=False
        )
        self.task = MuLaNTask(
            mulan,
            train_items,
            valid_items,
            seconds=seconds,
            batch_size=batch_size,
            captions=CaptionSampler(seed=loop_settings.seed) if captions is None else captions,
            chunk_size=chunk_size,
            labels=labels,
            seed=loop_settings.seed,
            cache_bytes=cache_bytes,
        )
        self.results_folder = Path(results_folder)
        self.watch = ChanceWatch(loop_settings.warmup_steps, phase=self.task.phases[0].name)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator, self.watch)
        _add_known_words(mulan, train_items)

    @typed
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train from the last checkpoint to the end, or for at most `stop_after_steps` steps.

        After the last step, `mulan` has the final weights and is in eval mode.
        """
        return self.loop.train_and_save(
            lambda: save_module(self.task.mulan, self.results_folder / "mulan"), stop_after_steps
        )


def _tokenizer_of(mulan: JointEmbedding) -> Callable[[list[str]], Tensor]:
    """Return the tokenize function of a model, or raise a ValueError if the model cannot be trained."""
    tokenize = getattr(getattr(mulan, "text", None), "tokenize", None)
    known = inspect.signature(mulan.forward).parameters
    if tokenize is None or not {"clip_index", "chunk_size"} <= set(known):
        raise ValueError(
            f"{type(mulan).__name__} cannot be trained; add the methods `text.tokenize(texts)` and "
            "`forward(wavs, ids, lengths, clip_index=..., chunk_size=...)` of MuLaN"
        )
    if not any(parameter.requires_grad for parameter in mulan.parameters()):
        raise ValueError(f"all parameters of {type(mulan).__name__} are frozen; call requires_grad_() to train some")
    return tokenize


def _add_known_words(mulan: JointEmbedding, items: Sequence[AudioItem]) -> None:
    """Add the words of the training captions to the known words of a text tower that is trained from scratch."""
    tower = getattr(mulan, "text", None)
    if isinstance(tower, TextTransformer):
        words = words_of(text for item in items for text in (*captions_of(item), *aspects_of(item)))
        tower.known_words = sorted({*words, *(tower.known_words or ())})
