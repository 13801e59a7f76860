"""Training of the semantic tokenizer: BEST-RQ on the one loop, then k-means over a layer of what came out."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.data import AudioItem, CropBatch, CropDataset, collate_crops
from audiolm_pytorch.data.manifest import training_items
from audiolm_pytorch.semantic.best_rq.model import BestRQ, BestRQEncoder, MaskedPrediction
from audiolm_pytorch.semantic.kmeans_trainer import KMeansFit, KMeansTrainer
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult

if TYPE_CHECKING:
    import accelerate

__all__ = ["BestRQTask", "SemanticTokenizerTrainer"]

# Crops that the statistics of the front end are estimated on: 200 of 5 s hold 100,000 mel frames.
_STATISTICS_CROPS = 200
_VALIDATION_SEED = 0


class BestRQTask:
    """What the loop needs to train a `BestRQ`: batches of crops, one phase, masked accuracy on held-out crops.

    Args:
        model: Encoder and masked prediction.
        train: Training crops, at the encoder's rate.
        valid: Held-out crops; always the same ones, hidden at the same places.
        valid_batch_size: Crops in one forward pass of validation.
    """

    name = "best_rq"

    @beartype
    def __init__(self, *, model: BestRQ, train: CropDataset, valid: CropDataset, valid_batch_size: int = 16) -> None:
        self.module = model
        self.phases = (Phase(self.name, (model,), self._loss),)
        self.num_items = len(train)
        # Guessing costs as much at tokens that were seen.
        chance_loss = (1 + model.seen_weight) * math.log(model.codebook_size)
        self.chance = {"loss": chance_loss, "accuracy": 1 / model.codebook_size}
        self._model = model
        self._train = train
        self._valid = valid
        self._valid_batch_size = valid_batch_size

    def batch(self, indices: list[tuple[int, int]]) -> CropBatch:
        """Crops of (epoch, index) pairs, padded to the longest."""
        return collate_crops([self._train.get(epoch, index) for epoch, index in indices])

    def validate(self) -> dict[str, float]:
        """Mean loss, accuracy and majority-class accuracy over the held-out crops."""
        generator = torch.Generator().manual_seed(_VALIDATION_SEED)
        sums = torch.zeros(3, dtype=torch.float64)
        weight = 0
        for first in range(0, len(self._valid), self._valid_batch_size):
            last = min(first + self._valid_batch_size, len(self._valid))
            batch = collate_crops([self._valid.get(0, index) for index in range(first, last)])
            with torch.no_grad():
                out = self._predict(batch, generator)
            num_hidden = int(out.hidden.sum())
            sums += num_hidden * torch.stack((out.loss, out.accuracy, out.majority)).double().cpu()
            weight += num_hidden
        return dict(zip(("loss", "accuracy", "majority"), (sums / weight).tolist()))

    def samples(self, folder: Path, step: int) -> None:
        """Nothing to show: hidden targets are no sound."""

    def before_training(self) -> None:
        """Estimate the statistics of front end and targets, evenly over the training files; fixed from then on."""
        front_end = self._model.encoder.front_end
        front_end.fit(self._statistics_waves())
        with torch.no_grad():
            self._model.targets.fit(front_end(wave) for wave in self._statistics_waves())

    def _statistics_waves(self) -> Iterator[Tensor]:
        """Waves `[1, n]` on the model's device."""
        count = min(_STATISTICS_CROPS, self.num_items)
        for place in range(count):
            crop = self._train.get(0, place * self.num_items // count)
            yield crop.waves[self._model.encoder.sample_hz].unsqueeze(0).to(self._model.to_logits.weight.device)

    def _predict(self, batch: CropBatch, generator: torch.Generator | None = None) -> MaskedPrediction:
        rate_hz = self._model.encoder.sample_hz
        device = self._model.to_logits.weight.device
        return self._model(batch.waves[rate_hz].to(device), batch.lengths[rate_hz].to(device), generator)

    def _loss(self, batch: CropBatch, step: int) -> LossOutput:
        out = self._predict(batch)
        return LossOutput(out.loss, {"accuracy": out.accuracy, "majority": out.majority})


class SemanticTokenizerTrainer:
    """Trains a BEST-RQ encoder on a folder of audio and cuts one of its layers into semantic tokens.

    Args:
        encoder: The encoder to train, in place.
        folder: Folder or manifest of audio (`load_split`); needed unless `items` are given.
        items: Training and held-out items instead of a folder.
        batch_size: Crops a step and process.
        num_train_steps: Optimizer steps.
        seconds: Length of a crop (s).
        results_folder: Where checkpoints, metrics and the tokenizer are written; a run found there is continued.
        objective: Masked prediction around this same encoder; None = `BestRQ(encoder)` with its defaults.
        accelerator: The Accelerator of the run; None = one of the loop's own.
        **loop_settings: Further fields of `LoopSettings`, such as `learning_rate` or `precision`.

    Raises:
        ValueError: If neither or both of folder and items are given, the objective is around another encoder, or the
            folder holds no usable audio.
    """

    @beartype
    def __init__(
        self,
        *,
        encoder: BestRQEncoder,
        folder: str | Path | None = None,
        items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None = None,
        batch_size: int,
        num_train_steps: int,
        seconds: float | int = 5.0,
        results_folder: str | Path = "./results/semantic",
        objective: BestRQ | None = None,
        accelerator: "accelerate.Accelerator | None" = None,
        **loop_settings: Any,
    ) -> None:
        objective = BestRQ(encoder) if objective is None else objective
        if objective.encoder is not encoder:
            raise ValueError("objective must wrap the encoder that is trained: BestRQ(encoder, ...)")
        train, valid = training_items(folder, items, min_seconds=encoder.downsample_factor / encoder.sample_hz)
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
        """Train from wherever the results folder stands; see `TrainLoop.train`."""
        return self.loop.train(stop_after_steps)

    @beartype
    def fit_tokenizer(
        self,
        *,
        layer: int | None = None,
        num_clusters: int = 512,
        max_tokens: int = 200_000,
        results_folder: str | Path | None = None,
    ) -> KMeansFit:
        """Fit k-means to a layer of the trained encoder and save the tokenizer in `results_folder / "tokenizer"`.

        A job of its own, which continues what was interrupted; see `KMeansTrainer`.

        Args:
            layer: Layer to cut; None = three quarters of the depth, where melody and words were kept best on music and
                spoken digits.
            num_clusters: Size of the token vocabulary.
            max_tokens: Tokens of training audio to fit on, fewer when the files give no more.
            results_folder: Of the job, which belongs to these settings; None = that of the training.

        Returns:
            The fit; its tokenizer is on the CPU.

        Raises:
            RuntimeError: If training is not finished.
            ValueError: If the files hold fewer tokens than clusters, or the folder a fit of other settings.
        """
        if not self.loop.is_finished:
            raise RuntimeError("train the encoder to its end before fitting the tokenizer: call train()")
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
