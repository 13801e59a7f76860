"""Training and fine-tuning of MusicGen on the training loop of the language models."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioSplit, DataSource
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.trainers import StageTrainer
from audiolm_pytorch.lm.training_data import WaveBatch
from audiolm_pytorch.nn.low_rank import add_low_rank, merge_low_rank, merged_weights
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.training import TrainResult
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer

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
        lora_rank: Rank of the updates of all linear layers, which are trained instead of all weights (LoRA,
            arXiv:2106.09685) and merged after training; None = train all weights, and those parameters of the text
            encoder that require gradients.
        lora_scale: Factor of the updates.
        data_max_length_seconds: Length of a crop; None = the `max_seconds` of the model.
        results_folder: Folder for checkpoints, metrics and the trained model.
        **settings: Further arguments of `StageTrainer` and fields of `LoopSettings`, such as `learning_rate`.
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
        lora_rank: int | None = None,
        lora_scale: float = 1.0,
        data_max_length_seconds: float | None = None,
        results_folder: str | Path = "./results/musicgen",
        **settings: Any,
    ) -> None:
        if own := settings.keys() & {"transformer", "codec", "text_conditioner", "wav2vec", "conditioners"}:
            raise TypeError(f"MusicGenTrainer has no argument {min(own)!r}, because it trains the parts of `musicgen`")
        if lora_rank is None and lora_scale != 1:
            raise ValueError(f"lora_scale={lora_scale} needs a lora_rank; pass one, or leave it out")
        chroma, transformer = musicgen.chroma, musicgen.transformer
        seconds = transformer.max_seconds if data_max_length_seconds is None else data_max_length_seconds
        self.musicgen, self.lora_rank, self.lora_scale = musicgen, lora_rank, lora_scale
        self._frozen: list[Parameter] = []
        if lora_rank is not None:
            if lora_rank < 1 or lora_scale <= 0:
                raise ValueError(
                    f"lora_rank must be at least 1, and lora_scale above 0, got {lora_rank} and {lora_scale}"
                )
            add_low_rank(transformer, lora_rank, lora_scale)
            text = musicgen.text_conditioner
            self._frozen = [] if text is None else [weight for weight in text.parameters() if weight.requires_grad]
            self._require_gradients(False)
        try:
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
                conditioners=None if chroma is None or shards is not None else {"melody": _ChromaOfCrops(chroma)},
                **settings,
            )
        except BaseException:
            self._merge_updates()  # an error leaves the model as it was
            raise
        self.task.config["lora"] = None if lora_rank is None else [lora_rank, lora_scale]
        self._result: TrainResult | None = None

    @typed
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train to the end of the run, or for at most `stop_after_steps` steps; see `StageTrainer.train`.

        At the end of a run with `lora_rank`, the updates are merged into the weights of the model.
        """
        if self._result is not None:
            return self._result
        result = super().train(stop_after_steps)
        if self.loop.is_finished:
            self._result = result
            self._merge_updates()
        return result

    def _merge_updates(self) -> None:
        """Add the low-rank updates, if there are any, to the weights of the model, and make all weights trainable."""
        if self.lora_rank is not None:
            merge_low_rank(self.musicgen.transformer)
            self._require_gradients(True)

    def _require_gradients(self, required: bool) -> None:
        """Freeze the trainable parameters of the text encoder while low-rank updates are trained, or undo it."""
        for weight in self._frozen:
            weight.requires_grad_(required)

    def _save(self) -> None:
        self._set_fingerprints()
        transformer = self.musicgen.transformer
        if self.lora_rank is not None:
            transformer = MusicGenTransformer(**transformer.config)
            load_weights(transformer, merged_weights(self.transformer))
        musicgen = self.musicgen
        model = type(musicgen)(
            transformer=transformer, codec=musicgen.codec, text_conditioner=musicgen.text_conditioner
        )
        model.save_pretrained(self.results_folder / transformer.namespace)


class _ChromaOfCrops:
    """Computes the melody condition of the crops of a training batch."""

    def __init__(self, chroma: ChromaConditioner) -> None:
        self._chroma, self.sample_hz = chroma, chroma.sample_hz

    def __call__(self, batch: WaveBatch) -> Tensor:
        waves = batch.crops.waves[self.sample_hz]
        return self._chroma(waves if waves.ndim == 2 else waves.mean(dim=1), batch.crops.lengths[self.sample_hz])
