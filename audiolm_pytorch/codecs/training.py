"""Training a codec: reconstruction with a multi-scale mel loss, on the one training loop."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.losses import MultiScaleMelLoss
from audiolm_pytorch.codecs.quantizer import code_usage
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import CropDataset, crop_seconds
from audiolm_pytorch.data.manifest import AudioItem, training_items
from audiolm_pytorch.io import save_module
from audiolm_pytorch.training import LoopSettings, LossOutput, Phase, TrainLoop, TrainResult

__all__ = ["CodecTask", "SoundStreamTrainer"]


class CodecTask:
    """What the loop needs to train a codec.

    The quantizer stays out of the way for the first steps: frames that already carry the sound make a far better
    k-means start for the codebooks than those of an untrained encoder, and no code dies while the encoder still moves
    fast.

    Args:
        codec: The codec.
        train: Crops to learn from, at the codec's rate.
        valid: Crops to validate on.
        unquantized_steps: Steps before the codebooks are initialised and used.
        frames_per_code: Frames that initialise the codebooks, for each of their codes.
        validation_crops: At most this many crops of `valid` are used.
    """

    name = "codec"

    @beartype
    def __init__(
        self,
        codec: SoundStream,
        train: CropDataset,
        valid: CropDataset,
        *,
        unquantized_steps: int = 300,
        frames_per_code: int = 25,
        validation_crops: int = 64,
    ) -> None:
        self.module: nn.Module = codec
        self.codec, self.train, self.valid = codec, train, valid
        self.unquantized_steps, self.frames_per_code = unquantized_steps, frames_per_code
        # within one step only, for its accumulated batches: a resumed run stands before or after that step
        self._has_codebooks = False
        self.validation_crops = min(validation_crops, len(valid))
        self.mel_loss = MultiScaleMelLoss(codec.target_sample_hz)
        self.phases = (Phase("reconstruction", (codec,), self._loss),)
        self.num_items = len(train)
        self.chance: dict[str, float] = {}

    def batch(self, indices: list[tuple[int, int]]) -> Tensor:
        """Waves `[b, n]` of (epoch, index) pairs."""
        crops = collate_crops([self.train.get(epoch, index) for epoch, index in indices])
        return crops.waves[self.codec.target_sample_hz]

    def before_training(self) -> None:
        """Nothing: the codebooks are initialised at step `unquantized_steps`, from a trained encoder."""

    def samples(self, folder: Path, step: int) -> None:
        """Nothing yet to look at."""

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mel distance through the codes, and code usage of every level, on the first crops of the validation set."""
        self.mel_loss.to(next(self.codec.parameters()).device)
        distances, codes = [], []
        for index in range(self.validation_crops):
            wave = self._on_device(self.valid.get(0, index).waves[self.codec.target_sample_hz][None])
            codes.append(self.codec.tokenize(wave))
            decoded = self.codec.decode_from_codebook_indices(codes[-1], num_samples=wave.shape[-1])
            distances.append(self.mel_loss(decoded, rearrange(wave, "b n -> b 1 n")).item())
        usage = code_usage(torch.cat([rearrange(c, "b f q -> (b f) q") for c in codes]), self.codec.codebook_size)
        return {
            "mel_distance": sum(distances) / len(distances),
            **{
                f"{name}_level_{level}": value
                for name, values in usage.items()
                for level, value in enumerate(values.tolist(), start=1)
            },
        }

    def _loss(self, wave: Tensor, step: int) -> LossOutput:
        self.mel_loss.to(wave.device)
        if step == self.unquantized_steps and not self._has_codebooks:
            self._initialise_codebooks()
        output = self.codec(wave, quantize=step >= self.unquantized_steps)
        mel = self.mel_loss(output.wave, rearrange(wave, "b n -> b 1 n"))
        return LossOutput(
            mel + output.commitment_loss, {"mel": mel.detach(), "commitment": output.commitment_loss.detach()}
        )

    @torch.no_grad()
    def _initialise_codebooks(self) -> None:
        """K-means over the frames of a fixed set of crops, so that a resumed run finds the same codebooks."""
        wanted, frames = self.frames_per_code * self.codec.codebook_size, []
        for number in itertools.count():
            crop = self.train.get(number // self.num_items, number % self.num_items)
            wave = self._on_device(crop.waves[self.codec.target_sample_hz][None])
            frames.append(self.codec(wave, quantize=False).frames[0].float())
            wanted -= len(frames[-1])
            if wanted <= 0:
                break
        self.codec.quantizer.initialise(torch.cat(frames))
        self._has_codebooks = True

    def _on_device(self, wave: Tensor) -> Tensor:
        return wave.to(next(self.codec.parameters()).device)


class SoundStreamTrainer:
    """Trains a SoundStream on a folder of audio, resumably.

    Args:
        soundstream: The codec, `SoundStream` or `SpectralSoundStream`; trained in place.
        folder: Folder of audio files or JSONL manifest; None when `items` is given.
        items: Items to learn from and held-out items, instead of `folder`.
        batch_size: Crops a step and process.
        num_train_steps: Optimizer steps of the whole run.
        data_max_length: Samples of a crop at the codec's rate; exclusive with `data_max_length_seconds`.
        data_max_length_seconds: Seconds of a crop; 1 if neither is given.
        results_folder: Where checkpoints and metrics go, and at the end the codec (`results_folder/codec`).
        unquantized_steps: Steps before the codebooks are initialised; a tenth of the run if not given.
        accelerator: Shared by all trainings of a program; None makes one.
        **settings: Further fields of `LoopSettings`, e.g. `learning_rate`.

    Raises:
        ValueError: If there is not exactly one of `folder` and `items`, no readable audio, or two crop lengths.
    """

    @beartype
    def __init__(
        self,
        soundstream: SoundStream,
        *,
        folder: str | Path | None = None,
        items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None = None,
        batch_size: int,
        num_train_steps: int,
        data_max_length: int | None = None,
        data_max_length_seconds: float | int | None = None,
        results_folder: str | Path = "./results/codec",
        unquantized_steps: int | None = None,
        accelerator: Accelerator | None = None,
        **settings: Any,
    ) -> None:
        rate_hz = soundstream.target_sample_hz
        given_seconds = crop_seconds(data_max_length, data_max_length_seconds, rate_hz)
        seconds = 1.0 if given_seconds is None else float(given_seconds)
        defaults = {"learning_rate": 1e-3, "betas": (0.8, 0.99), "max_grad_norm": 5.0}
        loop_settings = LoopSettings(**{**defaults, **settings}, num_train_steps=num_train_steps, batch_size=batch_size)
        train, valid = training_items(folder, items, min_seconds=soundstream.downsample_factor / rate_hz)
        self.task = CodecTask(
            soundstream,
            CropDataset(train, seconds, [rate_hz], seed=loop_settings.seed),
            CropDataset(valid, max(seconds, 3.0), [rate_hz], seed=loop_settings.seed),
            unquantized_steps=num_train_steps // 10 if unquantized_steps is None else unquantized_steps,
        )
        self.results_folder = Path(results_folder)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator)

    @beartype
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train to the end, or for some steps, from wherever the folder's checkpoint stands.

        Args:
            stop_after_steps: Steps to do in this call at most; None runs to the end.

        Returns:
            Where the run stands now. At its end the codec holds the final weights, in eval mode.
        """
        return self.loop.train_and_save(
            lambda: save_module(self.task.codec, self.results_folder / "codec"), stop_after_steps
        )
