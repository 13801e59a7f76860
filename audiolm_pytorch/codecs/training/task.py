"""Task that trains codecs in the training loop, with reconstruction losses and discriminators."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.quantizers.distributed import rank_and_count
from audiolm_pytorch.codecs.soundstream import CodecOutput, SoundStream
from audiolm_pytorch.codecs.training.balancer import LossBalancer
from audiolm_pytorch.codecs.training.denoising import NoiseMixer
from audiolm_pytorch.codecs.training.losses import (
    MultiScaleMelLoss,
    discriminator_hinge,
    feature_matching,
    generator_hinge,
)
from audiolm_pytorch.codecs.training.monitoring import (
    CodeUsage,
    denoising_metrics,
    reconstruct,
    reconstruction_metrics,
)
from audiolm_pytorch.data.batches import padded_waves
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.items import items_digest
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.training import LossOutput, Phase
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.distributed import to_device
from audiolm_pytorch.training.samples import Sample
from audiolm_pytorch.training.tracking import progress_bar

__all__ = ["MEL_ONLY", "CodecBatch", "CodecLossWeights", "CodecTask", "codebooks_are_untrained"]

_NUM_PAIRS = 3
_MAX_VALIDATION_CROPS = 64
_FRAMES_PER_CODE = 25  # frames that initialise the codebooks, for each of their codes
_CROPS_PER_BATCH = 16


@trainer_arguments()
@typed
@dataclass(frozen=True)
class CodecLossWeights:
    """Weights of the losses that train a codec.

    If several losses on the wave have weights above 0, `LossBalancer` combines them. With `LossBalancer`, the weight of
    a loss is its share of the gradient, independent of the scale of the loss. If only one loss on the wave has a weight
    above 0, the loss is multiplied by its weight. The commitment loss is added without balancing.

    The mel distance has the largest default weight, as in arXiv 2306.06546 (15 mel, 2 feature matching, 1 adversarial).
    EnCodec (arXiv 2210.13438, 24 kHz) uses `CodecLossWeights(adversarial=3, feature_matching=3)` in long runs with
    large batches. With the EnCodec weights, even untrained discriminators contribute six sevenths of the gradient.
    """

    mel: float = 1.0
    waveform: float = 0.1
    adversarial: float = 0.1
    feature_matching: float = 0.2
    commitment: float = 1.0

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0 or not self.on_wave:
            raise ValueError(f"weights must be 0 or more, and mel, waveform or adversarial above 0, got {self}")
        if self.feature_matching and not self.adversarial:
            raise ValueError("feature_matching needs adversarial > 0; set feature_matching=0 without discriminators")

    @property
    def reconstruction_only(self) -> "CodecLossWeights":
        """Copy of these loss weights in which the weights of the discriminator losses are 0."""
        return replace(self, adversarial=0.0, feature_matching=0.0)

    @property
    def on_wave(self) -> dict[str, float]:
        """Weights above 0 of the losses that depend on the decoded wave, by name of the loss."""
        return {name: float(value) for name, value in asdict(self).items() if value > 0 and name != "commitment"}


MEL_ONLY = CodecLossWeights(waveform=0.0, adversarial=0.0, feature_matching=0.0)


@dataclass(eq=False)
class CodecBatch:
    """Training batch of a codec, with input and target waves `[b, c, n]` and bool flags `denoise [b]`.

    The generator phase stores its reconstruction in `decoded` for the discriminator phase of the same step.
    """

    wave: Tensor
    target: Tensor
    denoise: Tensor | bool = False
    decoded: Tensor | None = None


class CodecTask:
    """Trains a codec in the phase "generator", and its discriminators, if any, in the phase "discriminator".

    In the first `unquantized_steps` steps the codec trains without quantization. After `unquantized_steps` steps,
    k-means on encoded frames initialises the codebooks, which works far better with a trained encoder than with an
    untrained one. Codebooks that are already trained, as in fine-tuning, are not initialised again.

    The discriminators train for `discriminator_lead_steps` steps before the codec uses their losses. Untrained
    discriminators would damage a trained codec, because the balancer uses equal weights for untrained and trained
    discriminators. The argument `noise` contains the noise mixers for training and for validation. `SoundStreamTrainer`
    documents the other arguments of `CodecTask`.
    """

    name = "codec"

    @typed
    def __init__(
        self,
        codec: SoundStream,
        train: CropDataset,
        valid: CropDataset,
        *,
        weights: CodecLossWeights = MEL_ONLY,
        discriminators: nn.Module | None = None,
        adversarial_start_step: int = 0,
        discriminator_lead_steps: int = 0,
        unquantized_steps: int = 300,
        noise: tuple[NoiseMixer, NoiseMixer] | None = None,
    ) -> None:
        self.codec, self.train, self.valid, self.noise = codec, train, valid, noise
        self.weights, self.discriminators = weights, discriminators
        self.unquantized_steps = unquantized_steps
        self.adversarial_start_step = adversarial_start_step
        self.adversarial_loss_start_step = adversarial_start_step + discriminator_lead_steps
        self._check(discriminator_lead_steps)
        self.num_validation_crops = min(_MAX_VALIDATION_CROPS, len(valid))
        self.mel_loss = MultiScaleMelLoss(codec.target_sample_hz)
        self.balancer = LossBalancer(weights.on_wave) if len(weights.on_wave) > 1 else None
        self.code_usage = CodeUsage(codec.num_quantizers, codec.codebook_size)
        parts = nn.ModuleDict({"codec": codec})
        self.phases: tuple[Phase, ...] = (Phase("generator", (codec,), self._generator_loss),)
        if discriminators is not None:
            parts["discriminators"] = discriminators
            phase = Phase("discriminator", (discriminators,), self._discriminator_loss, adversarial_start_step)
            self.phases += (phase,)
        if self.balancer is not None:
            parts["balancer"] = self.balancer
        parts["code_usage"] = self.code_usage
        self.module: nn.Module = parts
        # Validation quantizes as the last training step did; without one it is that of a finished codec.
        self._quantizes = True
        self.num_items = len(train)
        self.chance: dict[str, float] = {}
        self.config = {
            "loss_weights": asdict(weights),
            "unquantized_steps": unquantized_steps,
            "discriminator_lead_steps": discriminator_lead_steps,
            "crop_seconds": train.seconds,
            "noise_snr_db": None if noise is None else list(noise[0].snr_db),
        }
        noises = () if noise is None else (noise[0].noise, noise[1].noise)
        self.config["data"] = items_digest(
            [item for crops in (train, valid, *noises) for item in crops.items], waves_only=True
        )

    def batch(self, indices: list[tuple[int, int]]) -> CodecBatch:
        """Load the training examples of (epoch, index) pairs; shorter waves are padded with zeros."""
        if self.noise is None:
            crops = [self.train.get(epoch, index) for epoch, index in indices]
            wave = padded_waves([torch.atleast_2d(crop.waves[self.codec.target_sample_hz]) for crop in crops])
            return CodecBatch(wave, wave)
        mixtures = [self.noise[0].get(epoch, index) for epoch, index in indices]
        return CodecBatch(
            wave=padded_waves([torch.atleast_2d(mixture.wave) for mixture in mixtures]),
            target=padded_waves([torch.atleast_2d(mixture.target) for mixture in mixtures]),
            denoise=torch.tensor([mixture.denoise for mixture in mixtures]),
        )

    def before_training(self) -> None:
        """Do nothing; the codebooks are initialised at step `unquantized_steps`, after some training of the encoder."""

    def samples(self, step: int) -> list[Sample]:
        """Return the first validation crops and their reconstructions."""
        samples, rate_hz = [], self.codec.target_sample_hz
        for number in range(min(_NUM_PAIRS, self.num_validation_crops)):
            wave, name = self._validation_wave(number), str(number + 1)
            codes = self.codec.tokenize(wave)[0] if self._quantizes else None
            samples.append(Sample(f"{name}_original", wave[0], rate_hz, is_reference=True))
            samples.append(Sample(name, reconstruct(self.codec, wave, self._quantizes)[0], rate_hz, codes=codes))
        return samples

    def validate(self) -> dict[str, float]:
        """Compute `reconstruction_metrics` and, with noise, `denoising_metrics` on the first validation crops."""
        self.mel_loss.to(device_of(self.codec))
        device, how = device_of(self.codec), (self.num_validation_crops, self.mel_loss, self._quantizes)
        metrics = reconstruction_metrics(self.codec, self._validation_wave, *how)
        if self.noise is not None:
            mixer = self.noise[1]
            metrics |= denoising_metrics(self.codec, lambda number: to_device(mixer.get(0, number), device), *how)
        return metrics

    def _generator_loss(self, batch: CodecBatch, step: int) -> LossOutput:
        self.mel_loss.to(batch.wave.device)
        self._quantizes = step >= self.unquantized_steps
        # computed at every step and not stored: a skipped step restores the untrained codebooks
        if self._quantizes and codebooks_are_untrained(self.codec):
            self._initialise_codebooks()
        output: CodecOutput = self.codec(batch.wave, quantize=self._quantizes, denoise=batch.denoise)
        wave = output.wave.float()
        losses: dict[str, Tensor] = {}
        if self.weights.mel:
            losses["mel"] = self.mel_loss(wave, batch.target)
        if self.weights.waveform:
            losses["waveform"] = (wave - batch.target).abs().mean()
        if self.discriminators is not None and step >= self.adversarial_start_step:
            batch.decoded = wave.detach()
            if step >= self.adversarial_loss_start_step:
                losses.update(self._adversarial_losses(self.discriminators, wave, batch.target))
        metrics: dict[str, Tensor | float] = {name: loss.detach() for name, loss in losses.items()}
        if self._quantizes:
            metrics["commitment"] = output.commitment_loss.detach()
            metrics.update(self.code_usage(output.codes))
        if self.balancer is not None:
            loss = self.balancer(losses, wave)
        else:
            loss = sum((self.weights.on_wave[name] * loss for name, loss in losses.items()), start=wave.new_zeros(()))
        loss = loss + self.weights.commitment * output.commitment_loss
        return LossOutput(loss, metrics)

    def _adversarial_losses(self, discriminators: nn.Module, wave: Tensor, target: Tensor) -> dict[str, Tensor]:
        with _frozen(discriminators):
            fake = discriminators(wave)
            losses = {"adversarial": generator_hinge(fake)}
            if self.weights.feature_matching:
                with torch.no_grad():
                    real = discriminators(target)
                losses["feature_matching"] = feature_matching(real, fake)
        return losses

    def _discriminator_loss(self, batch: CodecBatch, step: int) -> LossOutput:
        if self.discriminators is None or batch.decoded is None:
            raise RuntimeError("the discriminator phase must follow the generator phase of the same step and batches")
        real, fake = self.discriminators(batch.target), self.discriminators(batch.decoded)
        batch.decoded = None
        metrics: dict[str, Tensor | float] = {
            f"{name}_score": torch.stack([scale.logits.detach().float().mean() for scale in scales]).mean()
            for name, scales in (("real", real), ("fake", fake))
        }
        return LossOutput(discriminator_hinge(real, fake), metrics)

    @torch.no_grad()
    def _check(self, discriminator_lead_steps: int) -> None:
        """Check that the codec, the losses, the discriminators and the noise can be used together."""
        codec, weights, discriminators = self.codec, self.weights, self.discriminators
        if (discriminators is not None) != (weights.adversarial > 0):
            passed = "no discriminators" if discriminators is None else "discriminators"
            raise ValueError(f"got {passed} and an adversarial weight of {weights.adversarial}; pass both or neither")
        if min(self.adversarial_start_step, discriminator_lead_steps, self.unquantized_steps) < 0:
            raise ValueError(
                "adversarial_start_step, discriminator_lead_steps and unquantized_steps must be 0 or more, got "
                f"{self.adversarial_start_step}, {discriminator_lead_steps} and {self.unquantized_steps}"
            )
        steps_before = self.adversarial_loss_start_step
        if steps_before and not (weights.mel or weights.waveform):
            raise ValueError(
                f"the codec has no loss in the {steps_before} steps before the adversarial losses begin; set a mel or "
                "waveform weight, or adversarial_start_step=0 and discriminator_lead_steps=0"
            )
        if discriminators is not None:
            wave = next(discriminators.parameters()).new_zeros(1, codec.channels, codec.target_sample_hz // 4)
            discriminators(wave)
        if self.noise is not None and codec.denoising is None:
            raise ValueError("noise needs a codec with denoising=FiLM(...), got one with no denoising condition")

    @torch.no_grad()
    def _initialise_codebooks(self) -> None:
        """Initialise the codebooks by k-means on fixed crops, so that resuming a run does not change the codebooks.

        Every process encodes an equal share of the crops, in at most two passes over the data.
        """
        rank, num_processes = rank_and_count()
        num_missing, frames = round(_FRAMES_PER_CODE * self.codec.codebook_size / num_processes), []
        numbers = range(rank, max(2 * self.num_items, num_processes), num_processes)
        with closing(progress_bar("codebooks", 0, num_missing, shown=rank == 0)) as bar:
            for first in range(0, len(numbers), _CROPS_PER_BATCH):
                indices = [divmod(number, self.num_items) for number in numbers[first : first + _CROPS_PER_BATCH]]
                batch = to_device(self.batch(indices), device_of(self.codec))
                encoded = self.codec.encode_frames(batch.wave, batch.denoise).float()
                frames += [rows[: self._num_frames(index)] for rows, (_, index) in zip(encoded, indices, strict=True)]
                num_new = sum(map(len, frames[-len(indices) :]))
                num_missing -= num_new
                bar.update(num_new)
                if num_missing <= 0:
                    break
        self.codec.quantizer.initialise(torch.cat(frames))

    def _num_frames(self, index: int) -> int:
        """Return the number of frames in a training crop of a file, without padding."""
        item, hz = self.train.items[index], self.codec.target_sample_hz
        num_samples = -(-item.num_samples * hz // item.sample_hz)
        if self.train.seconds is not None:
            num_samples = min(num_samples, round(self.train.seconds * hz))
        return self.codec.num_frames(num_samples)

    def _validation_wave(self, number: int) -> Tensor:
        """Load a validation crop as a wave `[1, c, n]`."""
        wave = self.valid.get(0, number).waves[self.codec.target_sample_hz]
        return torch.atleast_2d(wave)[None].to(device_of(self.codec))


def codebooks_are_untrained(codec: SoundStream) -> bool:
    """Return whether a codec has codebooks that were never initialised; False for quantizers without codebooks.

    The use counts of all codes are 1 until the codebooks are initialised or loaded from a trained codec.
    """
    counts = [buffer for name, buffer in codec.quantizer.named_buffers() if name.endswith("cluster_size")]
    return bool(counts) and bool((counts[0] == 1).all())


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Context manager in which gradients pass through a module, but its parameters receive no gradients."""
    parameters = nn.ParameterList(parameter for parameter in module.parameters() if parameter.requires_grad)
    parameters.requires_grad_(False)
    try:
        yield
    finally:
        parameters.requires_grad_(True)
