"""Training and fine-tuning of MusicGen on the training loop of the language models."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioSplit, DataSource
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.generation.stage_samples import StageSampler
from audiolm_pytorch.lm.trainers import StageTrainer
from audiolm_pytorch.lm.training_data import WaveBatch
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.musicgen import MusicGen

__all__ = ["MusicGenTrainer"]


class MusicGenTrainer(StageTrainer):
    """Trainer of the language model of a MusicGen with a frozen codec. Runs can be resumed.

    The loss is the mean cross-entropy of all codes. Captions of a manifest are the texts, and the chroma of the crop is
    the melody. After training, the whole model is in the folder `musicgen` of `results_folder`, for `from_pretrained`.

    Args:
        musicgen: The model; trained in place.
        folder: Folder of audio files, manifest, torch `Dataset` of waves, or a list of them (see `load_items`).
        items: Training and validation items, or one or two torch data sets, instead of `folder`.
        shards: Token shards (see `StageTrainer`), instead of `folder` and `items`; a model with a melody needs the
            field `melody` with the chroma vectors `[melody_frames, 12]` of every record.
        data_max_length_seconds: Length of a crop; None = the `max_seconds` of the model.
        results_folder: Folder for checkpoints, metrics and the trained model.
        **settings: Further arguments of `StageTrainer`, such as `lora_rank`, and fields of `LoopSettings`. Parameters
            of the text encoder that require gradients are trained with the model, but not with a `lora_rank`.
    """

    @typed
    def __init__(
        self,
        musicgen: MusicGen,
        *,
        folder: DataSource | None = None,
        items: AudioSplit | Dataset | None = None,
        shards: TokenShards | tuple[TokenShards, TokenShards] | None = None,
        batch_size: int,
        num_train_steps: int,
        data_max_length_seconds: float | None = None,
        results_folder: str | Path = "./results/musicgen",
        **settings: Any,
    ) -> None:
        if own := settings.keys() & {"transformer", "codec", "text_conditioner", "wav2vec", "conditioners", "sampler"}:
            names = ", ".join(map(repr, sorted(own)))
            raise TypeError(f"MusicGenTrainer has no argument {names}, because it trains the parts of `musicgen`")
        chroma, transformer = musicgen.chroma, musicgen.transformer
        seconds = transformer.max_seconds if data_max_length_seconds is None else data_max_length_seconds
        self.musicgen = musicgen
        super().__init__(
            transformer,
            codec=musicgen.codec,
            text_conditioner=musicgen.text_conditioner,
            folder=folder,
            items=items,
            shards=shards,
            batch_size=batch_size,
            num_train_steps=num_train_steps,
            data_max_length_seconds=seconds,
            results_folder=results_folder,
            sampler=StageSampler(musicgen.codec),
            conditioners=None if chroma is None or shards is not None else {"melody": _ChromaOfCrops(chroma)},
            **settings,
        )

    def _save(self) -> None:
        self._set_fingerprints()
        self.musicgen.save_pretrained(self.results_folder / self.transformer.namespace)


class _ChromaOfCrops:
    """Computes the melody condition of the crops of a training batch."""

    def __init__(self, chroma: ChromaConditioner) -> None:
        self._chroma, self.sample_hz = chroma, chroma.sample_hz

    def __call__(self, batch: WaveBatch) -> Tensor:
        waves = batch.crops.waves[self.sample_hz]
        return self._chroma(waves if waves.ndim == 2 else waves.mean(dim=1), batch.crops.lengths[self.sample_hz])
