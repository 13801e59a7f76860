"""The job that turns a trained encoder into a tokenizer: k-means over the hidden states of one layer."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from beartype import beartype

from audiolm_pytorch.data import AudioItem, load_split
from audiolm_pytorch.nn.kmeans import (
    ClusterUsage,
    Normalised,
    cluster_epoch,
    first_centroids,
    mini_batch_size,
    vector_statistics,
)
from audiolm_pytorch.saving.files import read_json, read_weights, write_json, write_weights
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import load_module, module_spec, read_config, save_module
from audiolm_pytorch.semantic.base import FrameEncoder
from audiolm_pytorch.semantic.features import FeatureShards, plan_crops, write_features
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer
from audiolm_pytorch.training.checkpoint import differences
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.tracking import progress_bar

if TYPE_CHECKING:
    import accelerate

__all__ = ["ClusterUsage", "KMeansFit", "KMeansTrainer"]

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
# Small data has few batches in an epoch: it is seen more often, until there were so many.
_LEAST_BATCHES = 100
_MOST_EMPTY = 0.1
# Work of the clustering that is lost when the process is killed, at most; or one epoch, where that takes longer.
_SECONDS_BETWEEN_STATES = 5.0


@dataclass(frozen=True)
class KMeansFit:
    """Result of a `KMeansTrainer`: the tokenizer, on the CPU, and how its clusters are used."""

    tokenizer: KMeansTokenizer
    usage: ClusterUsage


class KMeansTrainer:
    """Clusters the hidden states of one layer into semantic tokens (AudioLM, arXiv:2209.03143, sec. III-B).

    Each dimension is brought to zero mean and unit variance first, as there. Memory does not grow with the data: hidden
    states are written to disk once (`features/`, 4 bytes a number) and read in portions. A run that was killed goes on
    where it stood and ends at the same centroids bit for bit (same machine). In `results_folder` are at the end
    `tokenizer/`, a `KMeansTokenizer` whose encoder ends at `layer`, and `kmeans.json`, what the run was and how its
    clusters are used; `features/` and `kmeans.safetensors` may then be removed.

    Args:
        encoder: A `FrameEncoder` module of a registered class; works on the device it is on, and is left as it is.
        layer: Layer whose hidden states are clustered.
        num_clusters: Centroids, k.
        folder: Folder or manifest of audio; its training part is used, as `load_split` finds it.
        items: The files instead of a folder.
        results_folder: Of the run; belongs to these settings.
        features_folder: Of the hidden states; None = `results_folder / "features"`. Runs that differ in `num_clusters`
            and `num_epochs` only may share one.
        seconds: Length of the crops that the encoder sees; longer files give several.
        max_tokens: Vectors to fit on at most.
        num_epochs: Passes over the vectors; more where they are few.
        seed: Of the crops, the first centroids and the order.
        accelerator: Its processes share the encoding; None = one of the trainer's own.

    Raises:
        TypeError: If the encoder is no `FrameEncoder`, or could not be saved.
        ValueError: If a number is out of range, there is no such layer, no audio, or less than a token a cluster.
    """

    @beartype
    def __init__(
        self,
        *,
        encoder: FrameEncoder,
        layer: int,
        num_clusters: int,
        folder: str | Path | None = None,
        items: Sequence[AudioItem] | None = None,
        results_folder: str | Path = "./results/kmeans",
        features_folder: str | Path | None = None,
        seconds: float | int = 10.0,
        max_tokens: int = 1_000_000,
        num_epochs: int = 10,
        seed: int = 0,
        accelerator: "accelerate.Accelerator | None" = None,
    ) -> None:
        encoder.check_layer(layer)
        if min(num_clusters, max_tokens, num_epochs) < 1 or seed < 0 or not 0 < seconds < float("inf"):
            raise ValueError(
                "need num_clusters, max_tokens and num_epochs of 1 or more, seed of 0 or more and seconds above 0, got "
                f"{num_clusters}, {max_tokens}, {num_epochs}, {seed} and {seconds}"
            )
        if (folder is None) == (items is None):
            raise ValueError("give either a folder (or manifest) of audio or a list of items")
        own_encoder = encoder.truncated(layer)
        module_spec(own_encoder)  # a class that is not registered cannot be saved: better known now than at the end
        self._encoder = own_encoder.eval().requires_grad_(False)
        self._layer, self._num_clusters, self._num_epochs = layer, num_clusters, num_epochs
        self._seconds, self._seed = seconds, seed
        self._items = list(items) if items is not None else load_split(folder or "")[0]
        self._plan = plan_crops(encoder, self._items, seconds, max_tokens, seed)
        self.num_tokens = sum(self._plan.frames)
        if self.num_tokens < num_clusters:
            raise ValueError(
                f"{self.num_tokens} tokens cannot fill {num_clusters} clusters; give more audio or ask for fewer"
            )
        self.results_folder = Path(results_folder)
        self.features_folder = self.results_folder / "features" if features_folder is None else Path(features_folder)
        self._accelerator = accelerator
        self._origin = {
            "encoder": part_fingerprint(own_encoder),
            "layer": layer,
            "data": _digest_of(self._items),
            "seconds": seconds,
            "max_tokens": max_tokens,
            "seed": seed,
        }

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the result of a run (of these settings or of others: `train` tells)."""
        return "usage" in self._record() and (self.results_folder / "tokenizer" / "config.json").is_file()

    def train(self) -> KMeansFit:
        """Run the job from wherever its folder stands.

        Returns:
            The fit; where the run is finished already, as it was saved.

        Raises:
            ValueError: If the folder holds a run of other settings (the message shows the difference), or features
                are not finite.
        """
        accelerator = self._accelerator = self._accelerator or create_accelerator()
        self._claim(accelerator)
        if not self.is_finished:
            self._write_features(accelerator)
            if accelerator.is_main_process:
                self._fit()
            accelerator.wait_for_everyone()
        tokenizer = load_module(self.results_folder / "tokenizer", expect=KMeansTokenizer)
        if not isinstance(tokenizer, KMeansTokenizer):
            raise TypeError(f"{self.results_folder / 'tokenizer'} holds a {type(tokenizer).__name__}")
        return KMeansFit(tokenizer, ClusterUsage(**read_config(self.results_folder / "tokenizer")["usage"]))

    @property
    def _identity(self) -> dict[str, Any]:
        """What must be the same when a run is continued."""
        return {**self._origin, "num_clusters": self._num_clusters, "num_epochs": self._num_epochs}

    def _record(self) -> dict[str, Any]:
        """What `kmeans.json` says, nothing if there is none."""
        path = self.results_folder / "kmeans.json"
        return dict(read_json(path)) if path.is_file() else {}

    def _claim(self, accelerator: "accelerate.Accelerator") -> None:
        """Write down what the folder is a run of, or refuse a folder of another run."""
        mine = json.loads(json.dumps({"format_version": _FORMAT_VERSION, "run": self._identity}))
        record = self._record()
        if not record and accelerator.is_main_process:
            write_json(self.results_folder / "kmeans.json", mine)
        record.pop("usage", None)
        if record and (lines := differences(record, mine)):
            raise ValueError(
                f"{self.results_folder} holds another k-means ({'; '.join(lines).replace('run.', '')}); "
                "give it the same settings, or take another folder"
            )
        accelerator.wait_for_everyone()

    def _write_features(self, accelerator: "accelerate.Accelerator") -> None:
        """Have every process write its share of the hidden states."""
        total = -(-len(self._plan.crops) // accelerator.num_processes)
        with closing(progress_bar("features", 0, total, shown=accelerator.is_main_process)) as bar:
            write_features(
                self.features_folder,
                self._encoder,
                self._items,
                self._plan,
                layer=self._layer,
                seconds=self._seconds,
                seed=self._seed,
                origin=self._origin,
                advance=bar.update,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        accelerator.wait_for_everyone()

    def _fit(self) -> None:
        """Cluster the hidden states that are on disk and save the tokenizer."""
        encoder = self._encoder
        k, least_rows = self._num_clusters, mini_batch_size(self._num_clusters)
        shards = FeatureShards(self.features_folder, self._origin, self.num_tokens, encoder.dim, least_rows)
        path = self.results_folder / "kmeans.safetensors"
        if path.is_file():
            state = _State.read(path)
        else:
            mean, std, start = vector_statistics(shards, k, self._seed)
            state = _State(0, first_centroids((start - mean) / std, k, self._seed), mean, std)
        vectors = Normalised(shards, state.mean, state.std)
        enough_epochs = -(-_LEAST_BATCHES * least_rows // max(self.num_tokens, least_rows))
        num_epochs = max(self._num_epochs, enough_epochs)
        written = time.monotonic()
        with closing(progress_bar("k-means", state.epoch, num_epochs, shown=True)) as bar:
            for epoch in range(state.epoch, num_epochs):
                centroids = cluster_epoch(vectors, state.centroids, (self._seed, 1, epoch))
                state = replace(state, epoch=epoch + 1, centroids=centroids)
                bar.update()
                if time.monotonic() - written >= _SECONDS_BETWEEN_STATES:
                    state.write(path)
                    written = time.monotonic()
        self._save(state, ClusterUsage.of(vectors, state.centroids))

    def _save(self, state: "_State", usage: ClusterUsage) -> None:
        """Write the tokenizer, and then that the run is finished."""
        logger.info("k-means of layer %d: %s", self._layer, usage)
        if usage.used < (1 - _MOST_EMPTY) * usage.num_clusters:
            logger.warning(
                "%d of %d clusters are empty: the sounds are too few or too alike for so many; ask for fewer",
                usage.num_clusters - usage.used,
                usage.num_clusters,
            )
        tokenizer = KMeansTokenizer(
            encoder=self._encoder.cpu(),
            layer=self._layer,
            centroids=torch.from_numpy(state.centroids),
            mean=torch.from_numpy(state.mean),
            std=torch.from_numpy(state.std),
        )
        save_module(tokenizer, self.results_folder / "tokenizer", extra={"usage": asdict(usage), "fit": self._identity})
        write_json(self.results_folder / "kmeans.json", {**self._record(), "usage": asdict(usage)})


@dataclass(frozen=True)
class _State:
    """Where the clustering stands: epochs done, centroids `[k, d]`, and mean and standard deviation `[d]`."""

    epoch: int
    centroids: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def write(self, path: Path) -> None:
        """Write it so that a reader sees this state or the one before."""
        parts = {"centroids": self.centroids, "mean": self.mean, "std": self.std}
        write_weights(path, {name: torch.from_numpy(part) for name, part in parts.items()}, {"epoch": str(self.epoch)})

    @classmethod
    def read(cls, path: Path) -> "_State":
        """What `write` wrote."""
        tensors, metadata = read_weights(path)
        return cls(int(metadata["epoch"]), **{name: tensor.numpy() for name, tensor in tensors.items()})


def _digest_of(items: Sequence[AudioItem]) -> str:
    """Identify data by names, rates and lengths of the files: they may lie elsewhere the next time."""
    facts = [(item.path.name, item.sample_hz, item.num_samples) for item in items]
    return f"{len(facts)} files, {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
