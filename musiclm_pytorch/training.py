"""Training of MuLaN, and the job that fits the conditioning quantizer to a trained MuLaN."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem, load_split
from audiolm_pytorch.io import save_module
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.evaluation.retrieval import relevance_of, retrieval
from musiclm_pytorch.mulan.mulan import MuLaN

__all__ = ["MuLaNTask", "MuLaNTrainer", "captions_of", "fit_quantizer"]

logger = logging.getLogger(__name__)

_RECALL_AT = (1, 5, 10)


def captions_of(item: AudioItem) -> list[str]:
    """Every caption of an item: its `caption`, and those of the label `captions` if it is a list of texts."""
    further = item.labels.get("captions")
    texts = [item.caption, *(further if isinstance(further, list) else ())]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))


class MuLaNTask:
    """What `TrainLoop` needs to train a MuLaN: random crops of captioned files, and retrieval on held-out ones.

    A file with several captions shows another one in every epoch; held-out files are searched by their first.

    Args:
        mulan: The model.
        train_items: Files to learn from; those without a caption are left out.
        valid_items: Files to measure retrieval on; may be empty.
        seconds: Length of a crop.
        batch_size: Clips a step and process; what a clip is contrasted with.
        seed: Seed of the crops.
        cache_bytes: Memory for decoded audio.

    Raises:
        ValueError: If no file to learn from has a caption.
    """

    name = "mulan"

    @beartype
    def __init__(
        self,
        *,
        mulan: MuLaN,
        train_items: Sequence[AudioItem],
        valid_items: Sequence[AudioItem],
        seconds: float | int,
        batch_size: int,
        seed: int = 0,
        cache_bytes: int = 2**30,
    ) -> None:
        captioned = [item for item in train_items if captions_of(item)]
        if not captioned:
            raise ValueError(
                f"none of {len(train_items)} files has a caption; give a train.jsonl with 'audio' and 'caption'"
            )
        num_left_out = len(train_items) - len(captioned)
        if num_left_out:
            logger.warning("%d of %d files have no caption and are left out", num_left_out, len(train_items))
        self.module: nn.Module = mulan
        self.mulan = mulan
        self.batch_size = batch_size
        self.dataset = CropDataset(captioned, seconds, (mulan.sample_hz,), seed, cache_bytes)
        self.num_items = len(captioned)
        self.phases = (Phase("mulan", (mulan,), self.loss),)
        held_out = [item for item in valid_items if captions_of(item)]
        self._valid = CropDataset(held_out, seconds, (mulan.sample_hz,), seed, cache_bytes // 4) if held_out else None
        self._valid_captions = [captions_of(item)[0] for item in held_out]

    @property
    def chance(self) -> dict[str, float]:
        """Loss and recalls of a model that guesses."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        chance = {"loss": math.log(self.batch_size * processes)}
        if self._valid is not None:
            relevant = relevance_of(self._valid_captions)
            random = retrieval(torch.zeros(relevant.shape), relevant)
            chance |= {f"recall_at_{k}": random.chance_recall(k) for k in _RECALL_AT}
        return chance

    def batch(self, indices: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Cut the clips of (epoch, index) pairs: `wavs [b, n]`, `lengths [b]` in samples and caption `ids [b, t]`."""
        return self._batch(self.dataset, indices)

    def loss(self, batch: dict[str, Tensor], step: int) -> LossOutput:
        """Contrastive loss of a batch, with the temperature it stands at."""
        loss = self.mulan(batch["wavs"], batch["ids"], batch["lengths"])
        temperature = getattr(self.mulan.loss, "temperature", None)
        return LossOutput(loss, {} if temperature is None else {"temperature": temperature})

    def validate(self) -> dict[str, float]:
        """Text-to-audio retrieval among all held-out clips; every clip of the same caption is a right answer."""
        if self._valid is None:
            return {}
        device = next(self.mulan.parameters()).device
        audio, text = [], []
        for start in range(0, len(self._valid), self.batch_size):
            indices = [(0, index) for index in range(start, min(start + self.batch_size, len(self._valid)))]
            batch = {name: tensor.to(device) for name, tensor in self._batch(self._valid, indices).items()}
            audio.append(self.mulan.get_audio_latents(batch["wavs"], batch["lengths"]))
            text.append(self.mulan.get_text_latents(batch["ids"]))
        found = retrieval(torch.cat(text) @ torch.cat(audio).T, relevance_of(self._valid_captions).to(device))
        return {f"recall_at_{k}": float((found.ranks <= k).mean()) for k in _RECALL_AT}

    def samples(self, folder: Path, step: int) -> None:
        """Write nothing: latents are nothing to listen to."""

    def before_training(self) -> None:
        """Do nothing: no part of MuLaN is made from data before training."""

    def _batch(self, dataset: CropDataset, indices: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Cut and collate clips of a data set."""
        crops = collate_crops([dataset.get(epoch, index) for epoch, index in indices])
        hz = self.mulan.sample_hz
        # a clip with several captions shows another one in every epoch, beginning with the first
        wordings = [captions_of(dataset.items[index]) for _, index in indices]
        ids = self.mulan.text.tokenize([own[epoch % len(own)] for own, (epoch, _) in zip(wordings, indices)])
        return {"wavs": crops.waves[hz], "lengths": crops.lengths[hz], "ids": ids}


class MuLaNTrainer:
    """Trains a MuLaN on captioned audio files, resumably.

    Args:
        mulan: The model; its tokenizer should have been trained on the captions (`TextTokenizer.train`).
        folder: Folder with `train.jsonl` (`audio`, `caption`, perhaps a list `captions` of further ones), and
            `valid.jsonl` if there is one; or a `.jsonl` file. None when `items` is given.
        items: Items to learn from and held-out items, instead of `folder`.
        batch_size: Clips a step and process.
        num_train_steps: Optimizer steps of the whole run.
        seconds: Length of the crops; shorter files are used whole.
        valid_fraction: Share of held-out files where the folder does not say.
        results_folder: Where checkpoints and metrics go, and at the end the model (`results_folder/mulan`).
        accelerator: Shared by all trainings of a program; None makes one.
        cache_bytes: Memory for decoded audio.
        **settings: Further fields of `LoopSettings`.

    Raises:
        ValueError: If there is not exactly one of `folder` and `items`, or no file has a caption.
    """

    @beartype
    def __init__(
        self,
        *,
        mulan: MuLaN,
        folder: str | Path | None = None,
        items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None = None,
        batch_size: int,
        num_train_steps: int,
        seconds: float | int = 10.0,
        valid_fraction: float = 0.05,
        results_folder: str | Path = "./results/mulan",
        accelerator: Accelerator | None = None,
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
            seed=loop_settings.seed,
            cache_bytes=cache_bytes,
        )
        self.results_folder = Path(results_folder)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator)

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


@beartype
def fit_quantizer(
    quantizer: MuLaNEmbedQuantizer,
    items: Sequence[AudioItem],
    *,
    ridge: float | None = None,
    seed: int = 0,
    max_windows: int = 200_000,
) -> list[float]:
    """Fit a quantizer's codebooks once to every window of some files.

    Args:
        quantizer: Not fitted yet; its MuLaN is trained.
        items: Files; captions, where all files have some, bring texts to where audio is (see
            `MuLaNEmbedQuantizer.fit`).
        ridge: Strength of the learned map from text to audio, see there. None = centre and scale only.
        seed: Seed of the k-means, and of the choice of windows.
        max_windows: More windows than this are thinned at random.

    Returns:
        Per level, the fraction of windows whose audio and caption get the same code; empty without captions.

    Raises:
        ValueError: If there are fewer windows than codes a level, or the quantizer is fitted already.
    """
    mulan = quantizer.mulan
    device = next(mulan.parameters()).device
    dataset = CropDataset(items, None, (mulan.sample_hz,), seed, cache_bytes=0)
    captions = [captions_of(item) for item in items]
    paired = all(captions)
    audio, text = [], []
    with torch.no_grad():
        for index, own in enumerate(captions):
            audio.append(mulan.window_latents(dataset.get(0, index).waves[mulan.sample_hz].to(device)))
            if paired:
                text.append(mulan.get_text_latents(own[index % len(own)]).expand(len(audio[-1]), -1))
    audio_latents = torch.cat(audio)
    text_latents = torch.cat(text) if paired else None
    if len(audio_latents) > max_windows:
        order = torch.randperm(len(audio_latents), generator=torch.Generator().manual_seed(seed))[:max_windows]
        audio_latents = audio_latents[order.to(device)]
        text_latents = None if text_latents is None else text_latents[order.to(device)]
    quantizer.fit(audio_latents, text_latents, ridge=ridge, seed=seed)
    if text_latents is None:
        return []
    agreement = quantizer.code_agreement(audio_latents, text_latents)
    logger.info("audio and caption agree on %s of the codes, level by level", [f"{value:.1%}" for value in agreement])
    return agreement
