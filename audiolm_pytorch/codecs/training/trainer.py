"""Trainer of a codec on a folder of audio."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.codecs.training.denoising import NoiseMixer
from audiolm_pytorch.codecs.training.monitoring import MelWarning
from audiolm_pytorch.codecs.training.task import CodecLossWeights, CodecTask, codebooks_are_untrained
from audiolm_pytorch.data.crops import CropDataset, crop_seconds
from audiolm_pytorch.data.manifest import AudioItem, AudioSplit, DataSource, training_items
from audiolm_pytorch.saving.modules import module_spec, save_module
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.training import LoopSettings, TrainLoop, TrainResult
from audiolm_pytorch.training.arguments import trainer_arguments

if TYPE_CHECKING:
    import accelerate

__all__ = ["SoundStreamTrainer"]

_MIN_VALIDATION_SECONDS = 3.0
_MAX_LEAD_STEPS = 200
_NOISE_SNR_DB = (0.0, 15.0)

logger = logger_named(__name__)


@trainer_arguments(LoopSettings)
class SoundStreamTrainer:
    """Trains a SoundStream on a folder of audio; an interrupted run can be resumed.

    To fine-tune, load the codec with `SoundStream.init_and_load_from(folder / "codec")` from the `results_folder` of an
    earlier run. To fine-tune with the trained discriminators, load them with `load_module(folder / "discriminators")`,
    and set `adversarial_start_step=0` and `discriminator_lead_steps=0`. Fine-tuning creates a new optimizer state.

    Args:
        folder: Folder of audio files, manifest, torch `Dataset` of waves, or a list of them (see `load_items`). Files
            that are shorter than a frame, or have other channels than the codec, are left out.
        items: Training items and validation items, or one or two torch data sets, instead of `folder`.
        data_max_length: Length of a crop in samples at the codec's rate, instead of `data_max_length_seconds`.
        data_max_length_seconds: Length of a crop in seconds; 1 if neither length is passed.
        results_folder: Folder for checkpoints, metrics, samples, and, at the end of the run, the trained `codec` and
            `discriminators`.
        loss_weights: Weights of the losses; by default `CodecLossWeights()` with discriminators, and
            `CodecLossWeights().reconstruction_only` without discriminators.
        discriminators: Discriminators to train, such as `soundstream_discriminators(channels=1)`; None uses only
            reconstruction losses. Register own discriminator classes with `audiolm_pytorch.saving.modules.register`.
        adversarial_start_step: First training step of the discriminators; by default after a quarter of the run.
        discriminator_lead_steps: Steps of the discriminators before the codec uses their losses; by default a tenth of
            the steps of the discriminators, at most 200.
        unquantized_steps: Steps before quantization begins; by default a tenth of the run if the codebooks are
            untrained, else 0.
        noise_folder: Folder or manifest of noise recordings, for a codec with a denoising condition.
        noise_items: Training noise and validation noise, instead of `noise_folder`.
        noise_snr_db: Lowest and highest signal-to-noise ratio (dB).
        **settings: Further fields of `LoopSettings`; the phases are "generator" and "discriminator".
    """

    @typed
    def __init__(
        self,
        soundstream: SoundStream,
        *,
        folder: DataSource | None = None,
        items: AudioSplit | Dataset | None = None,
        batch_size: int,
        num_train_steps: int,
        data_max_length: int | None = None,
        data_max_length_seconds: float | None = None,
        results_folder: str | Path = "./results/codec",
        loss_weights: CodecLossWeights | None = None,
        discriminators: nn.Module | None = None,
        adversarial_start_step: int | None = None,
        discriminator_lead_steps: int | None = None,
        unquantized_steps: int | None = None,
        noise_folder: DataSource | None = None,
        noise_items: AudioSplit | Dataset | None = None,
        noise_snr_db: tuple[float, float] = _NOISE_SNR_DB,
        accelerator: "accelerate.Accelerator | None" = None,
        **settings: Any,
    ) -> None:
        rate_hz = soundstream.target_sample_hz
        seconds = crop_seconds(data_max_length, data_max_length_seconds, rate_hz)
        seconds = 1.0 if seconds is None else float(seconds)
        defaults: dict[str, Any] = {"max_grad_norm": 5.0}
        if isinstance(settings.get("optimizer"), dict | None):
            defaults["betas"] = 0.8, 0.99
        loop_settings = LoopSettings(**{**defaults, **settings}, num_train_steps=num_train_steps, batch_size=batch_size)
        needs: dict[str, Any] = dict(channels=soundstream.channels, sample_hz=rate_hz)
        data = training_items(folder, items, min_seconds=soundstream.downsample_factor / rate_hz, **needs)
        crop_settings: dict[str, Any] = dict(rates_hz=[rate_hz], seed=loop_settings.seed, channels=soundstream.channels)
        train, valid = _crops(data, seconds, crop_settings)
        noise = None
        if noise_folder is not None or noise_items is not None:
            noise_data = training_items(noise_folder, noise_items, name="noise_folder", **needs)
            noise_train, noise_valid = _crops(noise_data, seconds, crop_settings)
            mixing: dict[str, Any] = dict(sample_hz=rate_hz, snr_db=noise_snr_db, seed=loop_settings.seed)
            noise = NoiseMixer(train, noise_train, **mixing), NoiseMixer(valid, noise_valid, clean_share=0.0, **mixing)
        if loss_weights is None:
            loss_weights = CodecLossWeights() if discriminators is not None else CodecLossWeights().reconstruction_only
        unused_noise = None if noise_snr_db == _NOISE_SNR_DB else noise_snr_db
        _warn_of_unused(discriminators is None, "discriminators", adversarial_start_step=adversarial_start_step)
        _warn_of_unused(discriminators is None, "discriminators", discriminator_lead_steps=discriminator_lead_steps)
        _warn_of_unused(noise is None, "noise_folder or noise_items", noise_snr_db=unused_noise)
        if discriminators is not None:
            module_spec(discriminators)  # raises now, and not when they are saved at the end
        if unquantized_steps is None:
            unquantized_steps = num_train_steps // 10 if codebooks_are_untrained(soundstream) else 0
        if unquantized_steps >= num_train_steps:
            raise ValueError(
                f"the quantizer would never be trained in {num_train_steps} steps; lower {unquantized_steps=}"
            )
        has_reconstruction_loss = loss_weights.mel > 0 or loss_weights.waveform > 0
        if adversarial_start_step is None:
            adversarial_start_step = num_train_steps // 4 if has_reconstruction_loss else 0
        if discriminator_lead_steps is None:
            remaining = max(0, num_train_steps - adversarial_start_step)
            discriminator_lead_steps = min(_MAX_LEAD_STEPS, remaining // 10) if has_reconstruction_loss else 0
        if discriminators is not None and adversarial_start_step + discriminator_lead_steps >= num_train_steps:
            raise ValueError(
                f"the codec would never use the discriminators in {num_train_steps} steps; lower "
                f"{adversarial_start_step=} or {discriminator_lead_steps=}"
            )
        self.task = CodecTask(
            soundstream,
            train,
            valid,
            weights=loss_weights,
            discriminators=discriminators,
            adversarial_start_step=adversarial_start_step,
            discriminator_lead_steps=discriminator_lead_steps,
            unquantized_steps=unquantized_steps,
            noise=noise,
        )
        self.results_folder = Path(results_folder)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator, MelWarning(num_train_steps))

    @typed
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train from the last checkpoint, if there is one, to the end, or for at most `stop_after_steps` steps.

        At the end of the run the codec has the final weights and is in eval mode.
        """
        return self.loop.train_and_save(self._save, stop_after_steps)

    def _save(self) -> None:
        save_module(self.task.codec, self.results_folder / "codec")
        if self.task.discriminators is not None:
            save_module(self.task.discriminators, self.results_folder / "discriminators")


def _warn_of_unused(is_missing: bool, needed: str, **settings: Any) -> None:
    for name, value in settings.items():
        if is_missing and value is not None:
            logger.warning("%s=%s is not used without %s", name, value, needed)


def _crops(
    data: tuple[Sequence[AudioItem], Sequence[AudioItem]], seconds: float, settings: dict[str, Any]
) -> tuple[CropDataset, CropDataset]:
    """Create crops for training, and longer crops for validation."""
    train, valid = data
    longer = max(seconds, _MIN_VALIDATION_SECONDS)
    return CropDataset(train, seconds, **settings), CropDataset(valid, longer, **settings)
