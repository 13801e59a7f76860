"""Trainer of a k-means tokenizer, which clusters the hidden states of an encoder layer."""

import json
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data import AudioItem, CropDataset, items_digest
from audiolm_pytorch.data.manifest import DataSource, training_items
from audiolm_pytorch.nn.kmeans import (
    ClusterUsage,
    Normalised,
    cluster_epoch,
    first_centroids,
    mini_batch_size,
    vector_statistics,
)
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.files import differences, write_json
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import load_module, module_spec, save_module
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.semantic.base import FrameEncoder
from audiolm_pytorch.semantic.features import FeatureShards, plan_crops, write_features
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.checkpoint import Checkpoint, CheckpointFolder
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.loop import RUN_FILES
from audiolm_pytorch.training.run_folder import claimed_folder, read_record
from audiolm_pytorch.training.stopping import StopRequest, stop_signals
from audiolm_pytorch.training.tracking import progress_bar

if TYPE_CHECKING:
    import accelerate

__all__ = ["ClusterUsage", "KMeansFit", "KMeansTrainer"]

logger = logger_named(__name__)

_FORMAT_VERSION = 1
# With few vectors, epochs have few batches; more epochs follow until this number of batches is reached.
_MIN_BATCHES = 100
_MAX_EMPTY_SHARE = 0.1
# Clustering time that is lost at most if the process is killed, or one epoch if an epoch is longer.
_SECONDS_BETWEEN_STATES = 5.0


@dataclass(frozen=True)
class KMeansFit:
    """Result of `KMeansTrainer`: the tokenizer (on the CPU) and statistics of the usage of its clusters."""

    tokenizer: KMeansTokenizer
    usage: ClusterUsage


@trainer_arguments()
class KMeansTrainer:
    """Trainer of a tokenizer by k-means on an encoder layer's hidden states (AudioLM, arXiv:2209.03143, section III-B).

    As in AudioLM, each dimension of the hidden states is first normalised to zero mean and unit variance. Memory does
    not grow with the data, because hidden states are written to disk (`features/`, 4 bytes per number). An interrupted
    run can be continued; on the same machine, interruptions do not change any bit of the centroids.

    The results in `results_folder` are `tokenizer/` (a `KMeansTokenizer` whose encoder ends at `layer`) and
    `kmeans.json` (settings and cluster usage). After training, `features/` and `kmeans/` may be deleted.

    Args:
        encoder: Encoder of a registered class; the trainer uses a copy of it.
        folder: Folder of audio files, manifest, torch `Dataset` of waves, or a list of them; only the training files
            are used (see `load_split`).
        items: Training items, or a torch `Dataset` of waves, instead of `folder`.
        results_folder: Folder of the run; a folder that has a run with other settings raises a ValueError.
        seconds: Length of the encoded crops; longer files have several crops.
        num_epochs: Minimum number of passes over the frames; for a small data set there are more passes.
    """

    @typed
    def __init__(
        self,
        *,
        encoder: FrameEncoder,
        layer: int,
        num_clusters: int,
        folder: DataSource | None = None,
        items: Sequence[AudioItem] | Dataset | None = None,
        results_folder: str | Path = "./results/kmeans",
        seconds: float = 10.0,
        max_tokens: int = 1_000_000,
        num_epochs: int = 10,
        seed: int = 0,
        accelerator: "accelerate.Accelerator | None" = None,
    ) -> None:
        encoder.check_layer(layer)
        # seeds of scikit-learn are below 2**32
        if min(num_clusters, max_tokens, num_epochs) < 1 or not 0 <= seed < 2**32 or not 0 < seconds < 2**32:
            raise ValueError(
                f"num_clusters {num_clusters}, max_tokens {max_tokens} and num_epochs {num_epochs} must be at least 1, "
                f"seed {seed} at least 0 and below 2**32, and seconds {seconds} positive and below 2**32"
            )
        self._encoder = encoder.truncated(layer).eval().requires_grad_(False)
        module_spec(self._encoder)  # raises here, before the work, if the tokenizer could not be saved at the end
        self._layer, self._num_clusters, self._num_epochs = layer, num_clusters, num_epochs
        self._seed, self._accelerator = seed, accelerator
        items, _ = training_items(folder, None if items is None else (items, ()), sample_hz=encoder.sample_hz)
        self._dataset = CropDataset(items, seconds, (encoder.sample_hz,), seed, cache_bytes=0)
        self._plan = plan_crops(encoder, self._dataset, max_tokens)
        self.num_tokens = sum(crop.num_frames for crop in self._plan)
        if self.num_tokens < num_clusters:
            raise ValueError(
                f"the audio has {self.num_tokens} tokens, too few for {num_clusters} clusters; "
                "use more audio or fewer clusters"
            )
        self.results_folder = Path(results_folder)
        self.features_folder = self.results_folder / "features"
        self._origin = {
            "encoder": part_fingerprint(self._encoder),
            "layer": layer,
            "data": items_digest(items, waves_only=True),
            "seconds": seconds,
            "max_tokens": max_tokens,
            "seed": seed,
        }

    @property
    def is_finished(self) -> bool:
        """Whether the results folder has a finished run; `train` checks that its settings are those of this trainer."""
        return "usage" in self._record() and (self.results_folder / "tokenizer" / "config.json").is_file()

    def train(self) -> KMeansFit:
        """Train a tokenizer, or continue an interrupted run; if the run is finished, only load its result."""
        accelerator = self._accelerator = self._accelerator or create_accelerator()
        claim = claimed_folder(self.results_folder, RUN_FILES) if accelerator.is_main_process else nullcontext()
        with claim, stop_signals() as request, preserve_rng():
            accelerator.wait_for_everyone()
            self._check_run_folder(accelerator)
            if not self.is_finished:
                self._write_features(accelerator, request)
                if accelerator.is_main_process:
                    self._fit(request)
            accelerator.wait_for_everyone()
        tokenizer: Any = load_module(self.results_folder / "tokenizer", expect=KMeansTokenizer)
        return KMeansFit(tokenizer, ClusterUsage(**self._record()["usage"]))

    @property
    def _identity(self) -> dict[str, Any]:
        return {**self._origin, "num_clusters": self._num_clusters, "num_epochs": self._num_epochs}

    def _record(self) -> dict[str, Any]:
        path = self.results_folder / "kmeans.json"
        return read_record(path, run=dict) if path.is_file() else {}

    def _check_run_folder(self, accelerator: "accelerate.Accelerator") -> None:
        """Write the settings to a new folder; for an existing run, check that it has the settings of this trainer."""
        settings = json.loads(json.dumps({"format_version": _FORMAT_VERSION, "run": self._identity}))
        record = self._record()
        if not record and accelerator.is_main_process:
            write_json(self.results_folder / "kmeans.json", settings, sealed=True)
        record.pop("usage", None)
        if record and (lines := differences(record, settings)):
            raise ValueError(
                f"{self.results_folder} has a k-means run with other settings "
                f"({'; '.join(lines).replace('run.', '')}); use the same settings or another folder"
            )
        accelerator.wait_for_everyone()

    def _write_features(self, accelerator: "accelerate.Accelerator", request: StopRequest) -> None:
        total = -(-len(self._plan) // accelerator.num_processes)
        with closing(progress_bar("features", 0, total, shown=accelerator.is_main_process)) as bar:

            def advance() -> None:
                bar.update()
                request.end_if_requested("while hidden states were computed; complete chunks are kept")

            write_features(
                self.features_folder,
                self._encoder,
                self._dataset,
                self._plan,
                layer=self._layer,
                origin=self._origin,
                advance=advance,
            )
        accelerator.wait_for_everyone()

    def _fit(self, request: StopRequest) -> None:
        """Cluster the hidden states on disk, write the centroids every few seconds, and save the final tokenizer."""
        k, min_rows = self._num_clusters, mini_batch_size(self._num_clusters)
        shards = FeatureShards(self.features_folder, self._origin, self.num_tokens, self._encoder.dim, min_rows)
        checkpoints = CheckpointFolder(self.results_folder / "kmeans")
        if checkpoint := checkpoints.recovered():
            state = {name: weight.numpy() for name, weight in checkpoint.tensors.get("state", {}).items()}
            if state.keys() != {"centroids", "mean", "std"}:
                raise ValueError(f"{checkpoints.path} has no state of k-means; remove {self.results_folder / 'kmeans'}")
            first_epoch = checkpoint.step
        else:
            mean, std, start = vector_statistics(shards, k, self._seed)
            centroids = first_centroids((start - mean) / std, k, self._seed)
            state, first_epoch = {"centroids": centroids, "mean": mean, "std": std}, 0
        vectors = Normalised(shards, state["mean"], state["std"])
        num_epochs = max(self._num_epochs, -(-_MIN_BATCHES * min_rows // max(self.num_tokens, min_rows)))
        written = time.monotonic()
        with closing(progress_bar("k-means", first_epoch, num_epochs, shown=True)) as bar:
            for epoch in range(first_epoch, num_epochs):
                state["centroids"] = cluster_epoch(vectors, state["centroids"], (self._seed, 1, epoch))
                bar.update()
                if request.number or time.monotonic() - written >= _SECONDS_BETWEEN_STATES:
                    weights = {name: torch.from_numpy(part) for name, part in state.items()}
                    checkpoints.write(Checkpoint(epoch + 1, {"state": weights}, {}))
                    written = time.monotonic()
                request.end_if_requested(f"after epoch {epoch + 1} of {num_epochs} of k-means")
        self._save(state, ClusterUsage.of(vectors, state["centroids"]))

    def _save(self, state: dict[str, np.ndarray], usage: ClusterUsage) -> None:
        """Write the tokenizer, and then the cluster usage, whose presence marks a run as finished."""
        logger.info("k-means of layer %d: %s", self._layer, usage)
        if usage.used < (1 - _MAX_EMPTY_SHARE) * usage.num_clusters:
            logger.warning(
                "%d of %d clusters are empty, since there is too little audio or it is too similar; use fewer clusters",
                usage.num_clusters - usage.used,
                usage.num_clusters,
            )
        tensors: dict[str, Any] = {name: torch.from_numpy(part) for name, part in state.items()}
        tokenizer = KMeansTokenizer(encoder=self._encoder.cpu(), layer=self._layer, **tensors)
        save_module(tokenizer, self.results_folder / "tokenizer", extra={"usage": asdict(usage), "fit": self._identity})
        write_json(self.results_folder / "kmeans.json", {**self._record(), "usage": asdict(usage)}, sealed=True)
