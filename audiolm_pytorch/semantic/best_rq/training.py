"""Trainer of a semantic tokenizer: BEST-RQ training of an encoder, and k-means on a layer of the encoder."""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data import CropBatch, CropDataset, collate_crops
from audiolm_pytorch.data.crops import check_crop_seconds
from audiolm_pytorch.data.items import items_digest
from audiolm_pytorch.data.manifest import AudioSplit, DataSource, training_items
from audiolm_pytorch.semantic.best_rq.model import BestRQ, BestRQEncoder, MaskedPrediction
from audiolm_pytorch.semantic.kmeans_trainer import KMeansFit, KMeansTrainer
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.distributed import map_over_processes
from audiolm_pytorch.training.samples import Sample
from audiolm_pytorch.training.tracking import progress_bar

if TYPE_CHECKING:
    import accelerate

__all__ = ["BestRQTask", "SemanticTokenizerTrainer"]

# Crops from which the statistics of the front end are estimated; 200 of 5 s have 100,000 mel frames.
_STATISTICS_CROPS = 200
_VALIDATION_SEED = 0


class BestRQTask:
    """Task for `TrainLoop` that trains a `BestRQ` on crops at the encoder's sample rate.

    Every validation uses the same held-out crops and hides the same tokens.
    """

    name = "best_rq"

    @typed
    def __init__(self, *, model: BestRQ, train: CropDataset, valid: CropDataset, valid_batch_size: int = 16) -> None:
        if valid_batch_size < 1:
            raise ValueError(f"valid_batch_size must be at least 1, got {valid_batch_size}")
        self.module = model
        self.phases = (Phase(self.name, (model,), self._loss),)
        self.num_items = len(train)
        self.config = {"data": items_digest([*train.items, *valid.items], waves_only=True)}
        # Guessing has the same loss at visible tokens.
        chance_loss = (1 + model.seen_weight) * math.log(model.codebook_size)
        self.chance = {"loss": chance_loss, "accuracy": 1 / model.codebook_size}
        self._model = model
        self._train, self._valid, self._valid_batch_size = train, valid, valid_batch_size

    def batch(self, indices: list[tuple[int, int]]) -> CropBatch:
        """Load the crops of the pairs (epoch, file index), padded to the length of the longest crop."""
        return collate_crops([self._train.get(epoch, index) for epoch, index in indices])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Compute mean loss, accuracy and majority-class accuracy on the held-out crops, shared among processes."""
        sums = torch.stack(map_over_processes(self._validate_batch, range(0, len(self._valid), self._valid_batch_size)))
        *totals, weight = sums.sum(dim=0).tolist()
        return {name: total / weight for name, total in zip(("loss", "accuracy", "majority"), totals)}

    def _validate_batch(self, first: int) -> Tensor:
        """Return the metrics of a batch times its number of hidden tokens, and this number, `[4]`."""
        indices = range(first, min(first + self._valid_batch_size, len(self._valid)))
        batch = collate_crops([self._valid.get(0, index) for index in indices])
        out = self._predict(batch, torch.Generator().manual_seed(_VALIDATION_SEED + first))
        num_hidden = int(out.hidden.sum())
        return (
            num_hidden * torch.stack((out.loss, out.accuracy, out.majority, torch.ones_like(out.loss))).double().cpu()
        )

    def samples(self, step: int) -> Sequence[Sample]:
        """Return no samples, since an encoder generates no audio."""
        return ()

    def before_training(self) -> None:
        """Fit the statistics of the front end and of the targets on crops that are spread over all training files."""
        front_end = self._model.encoder.front_end
        front_end.fit(self._statistics_waves())
        with torch.no_grad():
            self._model.targets.fit(front_end(wave) for wave in self._statistics_waves())

    def _statistics_waves(self) -> Iterator[Tensor]:
        count = min(_STATISTICS_CROPS, self.num_items)
        with closing(progress_bar("statistics", 0, count, shown=True)) as bar:
            for place in range(count):
                crop = self._train.get(0, place * self.num_items // count)
                yield crop.waves[self._model.encoder.sample_hz].unsqueeze(0).to(self._model.to_logits.weight.device)
                bar.update()

    def _predict(self, batch: CropBatch, generator: torch.Generator | None = None) -> MaskedPrediction:
        rate_hz = self._model.encoder.sample_hz
        device = self._model.to_logits.weight.device
        return self._model(batch.waves[rate_hz].to(device), batch.lengths[rate_hz].to(device), generator)

    def _loss(self, batch: CropBatch, step: int) -> LossOutput:
        out = self._predict(batch)
        return LossOutput(out.loss, {"accuracy": out.accuracy, "majority": out.majority})


@trainer_arguments(LoopSettings)
class SemanticTokenizerTrainer:
    """Trainer of a BEST-RQ encoder on audio, and of a k-means tokenizer on a layer of the encoder.

    Args:
        folder: Folder of audio files, manifest, torch `Dataset` of waves, or a list of them (see `load_items`).
        items: Training and validation items, or one or two torch data sets, instead of `folder`.
        objective: `BestRQ` module whose encoder is `encoder`; None means `BestRQ(encoder)`.
        **loop_settings: Further fields of `LoopSettings`, such as `learning_rate` or `precision`.
    """

    @typed
    def __init__(
        self,
        *,
        encoder: BestRQEncoder,
        folder: DataSource | None = None,
        items: AudioSplit | Dataset | None = None,
        batch_size: int,
        num_train_steps: int,
        seconds: float = 5.0,
        results_folder: str | Path = "./results/semantic",
        objective: BestRQ | None = None,
        accelerator: "accelerate.Accelerator | None" = None,
        **loop_settings: Any,
    ) -> None:
        objective = BestRQ(encoder) if objective is None else objective
        if objective.encoder is not encoder:
            raise ValueError("`objective` was created for another encoder; pass objective=BestRQ(encoder, ...)")
        token_seconds = encoder.downsample_factor / encoder.sample_hz
        check_crop_seconds(seconds, token_seconds)
        train, valid = training_items(folder, items, min_seconds=token_seconds, sample_hz=encoder.sample_hz)
        settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **loop_settings)
        rates_hz = (encoder.sample_hz,)
        self.results_folder = Path(results_folder)
        self._seconds, self._seed, self._accelerator = seconds, settings.seed, accelerator
        self._train = CropDataset(train, seconds, rates_hz, seed=settings.seed)
        self.task = BestRQTask(
            model=objective,
            train=self._train,
            valid=CropDataset(valid, seconds, rates_hz, seed=settings.seed),
            valid_batch_size=batch_size,
        )
        self.loop = TrainLoop(self.task, settings, self.results_folder, accelerator)

    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train the encoder with `TrainLoop.train`, which continues from a checkpoint in the results folder."""
        return self.loop.train(stop_after_steps)

    @typed
    def fit_tokenizer(
        self,
        *,
        layer: int | None = None,
        num_clusters: int = 512,
        max_tokens: int = 200_000,
        results_folder: str | Path | None = None,
    ) -> KMeansFit:
        """Fit k-means to a layer of the trained encoder, and save the tokenizer to `results_folder / "tokenizer"`.

        Another call of `fit_tokenizer` continues an interrupted fit. If training of the encoder is not finished, a
        RuntimeError is raised. The default layer is at three quarters of the depth, because its tokens describe melody
        and words best in experiments with music and spoken digits. `results_folder` defaults to that of the trainer.
        """
        if not self.loop.is_finished:
            raise RuntimeError("training of the encoder is not finished; call train() before fitting the tokenizer")
        self.loop.final_module()
        encoder = self.task.module.encoder
        job = KMeansTrainer(
            encoder=encoder,
            layer=max(1, round(0.75 * encoder.depth)) if layer is None else layer,
            num_clusters=num_clusters,
            items=self._train.items,
            results_folder=self.results_folder if results_folder is None else results_folder,
            seconds=self._seconds,
            max_tokens=max_tokens,
            seed=self._seed,
            accelerator=self._accelerator,
        )
        return job.train()
