"""Validation of a codec in training: distances, codebook usage, audio files, and a warning if nothing improves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.distances import si_sdr_db
from audiolm_pytorch.codecs.quantizers.base import code_usage, usage_of_counts
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.codecs.training.denoising import Mixture
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.training.distributed import map_over_processes

__all__ = ["CodeUsage", "MelWarning", "denoising_metrics", "reconstruct", "reconstruction_metrics"]

_WINDOW_DECAY = 0.98
_STILL_USED = 0.1  # a code that was used once counts for log(0.1) / log(0.98) = 114 batches

logger = logger_named(__name__)


class CodeUsage(nn.Module):
    """Codebook usage over about the last hundred training batches; checkpoints store the counts as a buffer."""

    counts: Tensor

    @typed
    def __init__(self, num_quantizers: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_quantizers, codebook_size))

    @torch.no_grad()
    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """Count the codes `[b, f, q]` of a batch, where -1 is not counted, and return the codebook usage by level.

        The metrics of a level k are the number of used codes, `usage_level_k`, and the perplexity,
        `perplexity_level_k`, both divided by the codebook size.
        """
        num_quantizers, size = self.counts.shape[0], self.counts.shape[1] + 1
        levels = rearrange(codes, "b f q -> (b f) q")
        # one bin more, in front, for codes of -1; then one bincount for all levels
        offsets = torch.arange(num_quantizers, device=codes.device) * size + 1
        bins = torch.bincount((levels + offsets).reshape(-1), minlength=num_quantizers * size)
        new = rearrange(bins, "(q v) -> q v", q=num_quantizers)[:, 1:].float()
        # a level that was left out keeps its counts
        self.counts.mul_(torch.where(new.sum(dim=-1, keepdim=True) > 0, _WINDOW_DECAY, 1.0)).add_(new)
        return _by_level(usage_of_counts(self.counts, used_above=_STILL_USED))


def _by_level(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split each tensor `name [q]` into one scalar `name_level_k` for each level k."""
    return {f"{name}_level_{k}": value for name, levels in values.items() for k, value in enumerate(levels, start=1)}


def reconstruct(codec: SoundStream, wave: Tensor, quantize: bool = True, denoise: bool = False) -> Tensor:
    """Reconstruct waves `[b, c, n]` with a codec, with or without quantization."""
    if not quantize:
        return codec(wave, return_recons_only=True, quantize=False, denoise=denoise)
    return codec.decode_from_codebook_indices(codec.tokenize(wave, denoise=denoise), num_samples=wave.shape[-1])


@torch.no_grad()
def reconstruction_metrics(
    codec: SoundStream, read: Callable[[int], Tensor], count: int, mel_loss: MultiScaleMelLoss, quantize: bool = True
) -> dict[str, float]:
    """Compute distances between waves `[1, c, n]` and their reconstructions, and the codebook usage.

    The function `read` returns the waves 0 to `count - 1`, of which every process evaluates a share. `si_sdr_db` is the
    mean SI-SDR of the waves that are not silent. `mel_distance_half_levels` is the mel distance of waves that are
    decoded from the first half of the levels.
    """

    def evaluate(number: int) -> tuple[dict[str, float], Tensor]:
        wave, row, codes = read(number), {}, torch.empty(0)
        if quantize:
            codes = codec.tokenize(wave)
            decoded = codec.decode_from_codebook_indices(codes, num_samples=wave.shape[-1])
            if (half := codec.num_quantizers // 2) > 0:
                coarse = codec.decode_from_codebook_indices(codes[..., :half], num_samples=wave.shape[-1])
                row["mel_distance_half_levels"] = mel_loss(coarse, wave).item()
        else:
            decoded = reconstruct(codec, wave, quantize=False)
        row["mel_distance"] = mel_loss(decoded, wave).item()
        if wave.any():
            row["si_sdr_db"] = _si_sdr_db(decoded, wave)
        return row, codes.cpu()

    rows, codes = zip(*map_over_processes(evaluate, range(count)))
    metrics = _means(rows)
    if quantize:
        usage = code_usage(torch.cat([rearrange(item, "b f q -> (b f) q") for item in codes]), codec.codebook_size)
        metrics.update({name: value.item() for name, value in _by_level(usage).items()})
    return metrics


@torch.no_grad()
def denoising_metrics(
    codec: SoundStream, read: Callable[[int], Mixture], count: int, mel_loss: MultiScaleMelLoss, quantize: bool = True
) -> dict[str, float]:
    """Compute distances from the clean wave to the mixture and to its reconstructions with and without `denoise`.

    The function `read` returns the mixtures 0 to `count - 1`, of which every process evaluates a share. Mixtures with a
    silent clean wave are not evaluated.
    """

    def evaluate(number: int) -> dict[str, float]:
        mixture = read(number)
        row: dict[str, float] = {}
        noisy, clean = torch.atleast_2d(mixture.wave)[None], torch.atleast_2d(mixture.clean)[None]
        if not clean.any():
            return row
        kinds = {
            "noisy": noisy,
            "denoise_off": reconstruct(codec, noisy, quantize, denoise=False),
            "denoise_on": reconstruct(codec, noisy, quantize, denoise=True),
        }
        for kind, wave in kinds.items():
            row[f"si_sdr_db_{kind}"] = _si_sdr_db(wave, clean)
            row[f"mel_distance_{kind}"] = mel_loss(wave, clean).item()
        return row

    return _means(map_over_processes(evaluate, range(count)))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _si_sdr_db(estimate: Tensor, target: Tensor) -> float:
    """Return the SI-SDR (dB) of waves `[1, c, n]`; all channels are concatenated into one signal."""
    return float(si_sdr_db(rearrange(estimate, "1 c n -> (c n)"), rearrange(target, "1 c n -> (c n)")))


class MelWarning:
    """Logs one warning if the mel distance in validation has not decreased after a quarter of the training run.

    The mel distance is compared with its value in the first validation. After quantization begins, the mel distance is
    compared with the first validation with quantization, because quantization increases the distance.
    """

    def __init__(self, num_train_steps: int) -> None:
        self.num_train_steps = num_train_steps
        self.is_logged = False
        self._first: dict[bool, float] = {}

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Log the warning if the mel distance in `row` shows no progress; later calls do not repeat the warning."""
        distance = row.get("mel_distance")
        if row["phase"] != "valid" or distance is None:
            return
        uses_codes = "usage_level_1" in row
        if uses_codes not in self._first:
            self._first[uses_codes] = distance
            return
        first, step = self._first[uses_codes], row["step"]
        if step >= max(100, self.num_train_steps // 4) and not distance < first and not self.is_logged:
            self.is_logged = True
            logger.warning(
                f"codec training, step {step} of {self.num_train_steps}: the mel distance in validation is "
                f"{distance:.3f} and has not fallen since the first validation ({first:.3f}). Listen to samples/, "
                "check that the codec is not frozen, or try a learning rate 3 to 10 times lower"
            )
