"""What the training loop needs to train a codec: reconstruction, and discriminators that judge it."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from beartype import beartype
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.codecs.quantizers.distributed import own_share
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
    distance_of_average,
    reconstruct,
    reconstruction_metrics,
    write_pairs,
)
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.training import LossOutput, Phase
from audiolm_pytorch.training.distributed import to_device

__all__ = ["MEL_ONLY", "CodecBatch", "CodecLossWeights", "CodecTask", "codebooks_are_untrained"]

_PAIRS = 3


@beartype
@dataclass(frozen=True)
class CodecLossWeights:
    """Weights of a codec's losses.

    The mel distance leads, much as in arXiv 2306.06546 (15 mel, 2 feature matching, 1 adversarial). EnCodec (arXiv
    2210.13438, 24 kHz) takes `CodecLossWeights(adversarial=3, feature_matching=3)`, which is for long runs with large
    batches: there six sevenths of the gradient come from discriminators, which at first know nothing.

    Where more than one of the losses on the wave has a weight, `LossBalancer` mixes them: a weight is then the share of
    the gradient, whatever the loss's scale. Of one loss alone it is a plain factor. The commitment loss is not a
    function of the wave and is added outside.

    Args:
        mel: Of the multi-scale mel distance.
        waveform: Of the L1 distance of the waves.
        adversarial: Of the generator's hinge loss.
        feature_matching: Of the distance between the discriminators' features.
        commitment: Of the quantizer's commitment loss.
    """

    mel: float | int = 1.0
    waveform: float | int = 0.1
    adversarial: float | int = 0.1
    feature_matching: float | int = 0.2
    commitment: float | int = 1.0

    def __post_init__(self) -> None:
        """Refuse weights with which nothing or something senseless is learnt."""
        if min(asdict(self).values()) < 0 or not self.on_wave:
            raise ValueError(f"weights must be 0 or more, and one of those on the wave above 0, got {self}")
        if self.feature_matching and not self.adversarial:
            raise ValueError("feature_matching needs adversarial > 0: without it the discriminators stay untrained")

    @property
    def reconstruction_only(self) -> "CodecLossWeights":
        """The same without discriminators."""
        return replace(self, adversarial=0.0, feature_matching=0.0)

    @property
    def on_wave(self) -> dict[str, float]:
        """Name to weight of the losses on the wave that have one."""
        return {name: float(value) for name, value in asdict(self).items() if value > 0 and name != "commitment"}


MEL_ONLY = CodecLossWeights(waveform=0.0, adversarial=0.0, feature_matching=0.0)


@dataclass(frozen=True, eq=False)
class CodecBatch:
    """Waves to train on.

    Attributes:
        wave: What goes in, `[b, c, n]`.
        target: What has to come out, `[b, c, n]`; None where that is `wave`.
        denoise: Which items are to be denoised, `[b]` bool; False is none.
    """

    wave: Tensor
    target: Tensor | None = None
    denoise: Tensor | bool = False

    @property
    def wanted(self) -> Tensor:
        """What has to come out."""
        return self.wave if self.target is None else self.target


class CodecTask:
    """Phases "generator" (the codec) and, where there are discriminators, "discriminator".

    The quantizer stays out of the way for the first steps: frames that already carry the sound make a far better
    k-means start for the codebooks than those of an untrained encoder, and no code dies while the encoder still moves
    fast. Codebooks that were trained before, as in fine-tuning, are never started anew.

    Args:
        codec: The codec.
        train: Crops to learn from, at the codec's rate.
        valid: Crops to validate on.
        weights: Of the losses.
        discriminators: Module `wave [b, c, n] -> list of ScaleOutput`; needed where the adversarial weight is above 0.
        adversarial_start_step: Steps before the discriminators begin to learn.
        discriminator_lead_steps: Steps that they learn before the codec heeds them. The balancer gives a judge that
            knows nothing as much of the gradient as one that knows something, and that ruins a trained codec.
        unquantized_steps: Steps before the codes are used, and codebooks that are untrained are initialised.
        frames_per_code: Frames that initialise the codebooks, for each of their codes.
        validation_crops: At most this many crops of `valid` are used.
        noise: For a codec with a denoising condition: mixtures to learn from, over `train`, and to validate on.

    Raises:
        ValueError: If discriminators or noise are missing or have no use, or the first steps would have no loss.
    """

    name = "codec"

    @beartype
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
        frames_per_code: int = 25,
        validation_crops: int = 64,
        noise: tuple[NoiseMixer, NoiseMixer] | None = None,
    ) -> None:
        _check(codec, weights, discriminators, adversarial_start_step, discriminator_lead_steps, noise)
        self.codec, self.train, self.valid, self.noise = codec, train, valid, noise
        self.weights, self.discriminators = weights, discriminators
        self.unquantized_steps, self.frames_per_code = unquantized_steps, frames_per_code
        self.adversarial_start_step = adversarial_start_step
        self.heeded_from_step = adversarial_start_step + discriminator_lead_steps
        self.validation_crops = min(validation_crops, len(valid))
        self.mel_loss = MultiScaleMelLoss(codec.target_sample_hz)
        self.balancer = LossBalancer(weights.on_wave) if len(weights.on_wave) > 1 else None
        self.code_usage = CodeUsage(codec.num_quantizers, codec.codebook_size)
        parts = {
            "codec": codec,
            "discriminators": discriminators,
            "balancer": self.balancer,
            "code_usage": self.code_usage,
        }
        self.module: nn.Module = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        self.phases: tuple[Phase, ...] = (Phase("generator", (codec,), self._generator_loss),)
        if discriminators is not None:
            judging = Phase("discriminator", (discriminators,), self._discriminator_loss, adversarial_start_step)
            self.phases += (judging,)
        # What the generator phase made of the batches of one step, for the discriminator phase of the same step.
        self._made: list[tuple[CodecBatch, Tensor]] = []
        self._made_at = -1
        # A validation follows a training step of the same process; on its own it is one of a finished codec.
        self._quantizes = True
        self._average: float | None = None
        self.num_items = len(train)
        self.chance: dict[str, float] = {}
        self.identity = {
            "loss_weights": asdict(weights),
            "unquantized_steps": unquantized_steps,
            "discriminator_lead_steps": discriminator_lead_steps,
            "crop_seconds": train.seconds,
            "noise_snr_db": None if noise is None else list(noise[0].snr_db),
        }

    def batch(self, indices: list[tuple[int, int]]) -> CodecBatch:
        """Waves of (epoch, index) pairs, the shorter ones padded with zeros."""
        if self.noise is None:
            return CodecBatch(_padded([self._clean(self.train, epoch, index) for epoch, index in indices]))
        mixtures = [self.noise[0].get(epoch, index) for epoch, index in indices]
        return CodecBatch(
            wave=_padded([_with_channel(mixture.wave) for mixture in mixtures]),
            target=_padded([_with_channel(mixture.target) for mixture in mixtures]),
            denoise=torch.tensor([mixture.denoise for mixture in mixtures]),
        )

    def before_training(self) -> None:
        """Nothing: the codebooks are initialised at step `unquantized_steps`, from a trained encoder."""

    def samples(self, folder: Path, step: int) -> None:
        """Write the first validation crops and what the codec makes of them, to be listened to and looked at."""
        waves = self._validation_waves(min(_PAIRS, self.validation_crops))
        decoded = [reconstruct(self.codec, wave, self._quantizes) for wave in waves]
        write_pairs(folder, step, waves, decoded, self.codec.target_sample_hz)

    def validate(self) -> dict[str, float]:
        """Distances and use of the codes on the first crops of the validation set, see `reconstruction_metrics`.

        Beside the mel distance stands that of the average spectrum of these crops, see `distance_of_average`.
        A codec that can denoise is measured on noisy mixtures as well, see `denoising_metrics`. As long as the
        quantizer stays out of the way in training, it does so here.
        """
        self.mel_loss.to(self._device)
        waves = self._validation_waves(self.validation_crops)
        if self._average is None:
            self._average = distance_of_average(waves, self.mel_loss)
        metrics = reconstruction_metrics(self.codec, waves, self.mel_loss, self._quantizes)
        metrics["mel_distance_of_average"] = self._average
        if self.noise is not None:
            mixtures = [self.noise[1].get(0, index) for index in range(self.validation_crops)]
            mixtures = to_device(mixtures, self._device)
            metrics.update(denoising_metrics(self.codec, mixtures, self.mel_loss, self._quantizes))
        return metrics

    def _generator_loss(self, batch: CodecBatch, step: int) -> LossOutput:
        """Reconstruct, and be judged by the discriminators once they have begun."""
        self.mel_loss.to(batch.wave.device)
        self._quantizes = step >= self.unquantized_steps
        # Asked at every step and not remembered: a step that is skipped gives the codebooks back as they were.
        if self._quantizes and codebooks_are_untrained(self.codec):
            self._initialise_codebooks()
        output: CodecOutput = self.codec(batch.wave, quantize=self._quantizes, denoise=batch.denoise)
        wave = output.wave.float()
        losses: dict[str, Tensor] = {}
        if self.weights.mel:
            losses["mel"] = self.mel_loss(wave, batch.wanted)
        if self.weights.waveform:
            losses["waveform"] = (wave - batch.wanted).abs().mean()
        if self.discriminators is not None and step >= self.adversarial_start_step:
            self._hand_over(batch, wave.detach(), step)
            if step >= self.heeded_from_step:
                losses.update(self._judgement(self.discriminators, wave, batch.wanted))
        metrics: dict[str, Tensor | float] = {name: loss.detach() for name, loss in losses.items()}
        if self._quantizes:
            metrics["commitment"] = output.commitment_loss.detach()
            metrics.update(self.code_usage(output.codes))
        return LossOutput(self._mixed(losses, wave) + self.weights.commitment * output.commitment_loss, metrics)

    def _mixed(self, losses: dict[str, Tensor], wave: Tensor) -> Tensor:
        """One loss on the wave."""
        if self.balancer is not None:
            return self.balancer(losses, wave)
        return sum((self.weights.on_wave[name] * loss for name, loss in losses.items()), start=wave.new_zeros(()))

    def _judgement(self, discriminators: nn.Module, wave: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """What the discriminators make of a reconstruction."""
        with _frozen(discriminators):
            fake = discriminators(wave)
            losses = {"adversarial": generator_hinge(fake)}
            if self.weights.feature_matching:
                with torch.no_grad():
                    real = discriminators(wanted)
                losses["feature_matching"] = feature_matching(real, fake)
        return losses

    def _discriminator_loss(self, batch: CodecBatch, step: int) -> LossOutput:
        """Tell the waves of a batch from what the generator phase of this step made of them."""
        if self.discriminators is None:
            raise RuntimeError("this codec is trained without discriminators")
        wave = self._handed_over(batch, step)
        real, fake = self.discriminators(batch.wanted), self.discriminators(wave)
        metrics: dict[str, Tensor | float] = {
            f"{name}_score": torch.stack([scale.logits.detach().float().mean() for scale in scales]).mean()
            for name, scales in (("real", real), ("fake", fake))
        }
        return LossOutput(discriminator_hinge(real, fake), metrics)

    def _hand_over(self, batch: CodecBatch, wave: Tensor, step: int) -> None:
        if step != self._made_at:
            self._made, self._made_at = [], step
        self._made.append((batch, wave))

    def _handed_over(self, batch: CodecBatch, step: int) -> Tensor:
        for place, (made_of, wave) in enumerate(self._made if step == self._made_at else []):
            if made_of is batch:
                del self._made[place]
                return wave
        raise RuntimeError("the discriminator phase must follow the generator phase of the same step and batches")

    @torch.no_grad()
    def _initialise_codebooks(self) -> None:
        """K-means over the frames of a fixed set of crops, so that a resumed run finds the same codebooks.

        Every process brings its share of them.
        """
        rank, num_processes = own_share()
        wanted, frames = self.frames_per_code * self.codec.codebook_size / num_processes, []
        for number in itertools.count(rank, num_processes):
            batch = to_device(self.batch([divmod(number, self.num_items)]), self._device)
            output: CodecOutput = self.codec(batch.wave, quantize=False, denoise=batch.denoise)
            frames.append(output.frames[0].float())
            wanted -= len(frames[-1])
            if wanted <= 0:
                break
        self.codec.quantizer.initialise(torch.cat(frames))

    def _clean(self, crops: CropDataset, epoch: int, index: int) -> Tensor:
        return _with_channel(crops.get(epoch, index).waves[self.codec.target_sample_hz])

    def _validation_waves(self, count: int) -> list[Tensor]:
        return [self._clean(self.valid, 0, index)[None].to(self._device) for index in range(count)]

    @property
    def _device(self) -> torch.device:
        return next(self.codec.parameters()).device


def codebooks_are_untrained(codec: SoundStream) -> bool:
    """Whether a codec has codebooks that were never started from frames; False for quantizers without codebooks.

    Counts of the codes' use are among the buffers of codebooks that training moves. They are all 1 until the codebooks
    are initialised, or loaded from a trained codec, and not afterwards.
    """
    counts = [buffer for name, buffer in codec.quantizer.named_buffers() if name.endswith("cluster_size")]
    return bool(counts) and bool((counts[0] == 1).all())


def _check(
    codec: SoundStream,
    weights: CodecLossWeights,
    discriminators: nn.Module | None,
    adversarial_start_step: int,
    discriminator_lead_steps: int,
    noise: tuple[NoiseMixer, NoiseMixer] | None,
) -> None:
    """Refuse parts that do not fit each other."""
    if (discriminators is not None) != (weights.adversarial > 0):
        given = "no discriminators" if discriminators is None else "discriminators"
        raise ValueError(f"got {given} and an adversarial weight of {weights.adversarial}; give both or neither")
    if min(adversarial_start_step, discriminator_lead_steps) < 0:
        raise ValueError(
            "adversarial_start_step and discriminator_lead_steps must be 0 or more, got "
            f"{adversarial_start_step} and {discriminator_lead_steps}"
        )
    unheeded = adversarial_start_step + discriminator_lead_steps
    if unheeded and not (weights.mel or weights.waveform):
        raise ValueError(
            f"nothing is learnt in the {unheeded} steps before the discriminators are heeded: give mel or waveform a "
            "weight, or adversarial_start_step=0 and discriminator_lead_steps=0"
        )
    if discriminators is not None:
        with torch.no_grad():
            discriminators(next(discriminators.parameters()).new_zeros(1, codec.channels, codec.target_sample_hz // 4))
    if noise is not None and getattr(codec, "denoising", None) is None:
        raise ValueError("noise is given, but the codec has no denoising condition; build it with denoising=FiLM(...)")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module, not into it: nothing is kept or computed for its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _with_channel(wave: Tensor) -> Tensor:
    """`[n]` to `[1, n]`; `[c, n]` as it is."""
    return wave[None] if wave.ndim == 1 else wave


def _padded(waves: list[Tensor]) -> Tensor:
    """Waves `[c, n]` of several lengths to `[b, c, n]`."""
    return pad_sequence([wave.T for wave in waves], batch_first=True).transpose(1, 2).contiguous()
