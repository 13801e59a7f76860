"""What a codec's training shows of itself: distances, use of the codes, and pairs to listen to and look at."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.files import peak_safe, write_audio
from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.codecs.distances import si_sdr_db
from audiolm_pytorch.codecs.quantizers import code_usage
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.codecs.training.denoising import Mixture
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.saving.files import staged_files

__all__ = [
    "CodeUsage",
    "denoising_metrics",
    "distance_of_average",
    "draw_mels",
    "has_matplotlib",
    "reconstruct",
    "reconstruction_metrics",
    "write_pairs",
]

_SOUNDS_PER_SECOND = 5  # neighbouring frames are alike and share their codes; notes and phones last this long
_WINDOW_DECAY = 0.98
_STILL_USED = 0.1  # a code that was used once counts for log(0.1) / log(0.98) = 114 batches

logger = logging.getLogger(__name__)


class CodeUsage(nn.Module):
    """Use of the codes over about the last hundred training batches, kept in a buffer so that a resumed run agrees.

    Args:
        num_quantizers: Levels.
        codebook_size: Codes per level.
    """

    counts: Tensor

    @beartype
    def __init__(self, num_quantizers: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.register_buffer("counts", torch.zeros(num_quantizers, codebook_size))

    @torch.no_grad()
    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """Count the codes `[b, f, q]` of a batch (-1 where a level was left out).

        Returns:
            Scalars: `usage_level_1, …`, the share of the codes in use, and `perplexity_level_1, …`, as a share of the
            codebook.
        """
        num_quantizers = len(self.counts)
        levels = rearrange(codes, "b f q -> (b f) q")
        # one bin more, in front, for codes of -1; then one count for all levels at once
        size = self.codebook_size + 1
        offsets = torch.arange(num_quantizers, device=codes.device) * size + 1
        bins = torch.bincount((levels + offsets).reshape(-1), minlength=num_quantizers * size)
        new = rearrange(bins, "(q v) -> q v", q=num_quantizers)[:, 1:].float()
        # a level that was left out has learnt nothing of its use
        self.counts.mul_(torch.where(new.sum(dim=-1, keepdim=True) > 0, _WINDOW_DECAY, 1.0)).add_(new)
        share = self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=-1)
        usage = (self.counts > _STILL_USED).float().mean(dim=-1)
        return _by_level({"usage": usage, "perplexity": entropy.exp() / self.codebook_size})


def _by_level(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`name [q]` to scalars `name_level_1, …`."""
    return {f"{name}_level_{level}": one for name, all_ in values.items() for level, one in enumerate(all_, start=1)}


def reconstruct(codec: SoundStream, wave: Tensor, quantize: bool = True, denoise: bool = False) -> Tensor:
    """What becomes of waves `[b, c, n]`: through the codes, as a user will have it, or without quantization."""
    if not quantize:
        output: Tensor = codec(wave, return_recons_only=True, quantize=False, denoise=denoise)
        return output
    return codec.decode_from_codebook_indices(codec.tokenize(wave, denoise=denoise), num_samples=wave.shape[-1])


@torch.no_grad()
def reconstruction_metrics(
    codec: SoundStream, waves: Sequence[Tensor], mel_loss: MultiScaleMelLoss, quantize: bool = True
) -> dict[str, float]:
    """Distances between waves and what the codec makes of them, and the use of its codes.

    Args:
        codec: In eval mode.
        waves: `[1, c, n]` each, on the codec's device.
        mel_loss: At the codec's rate.
        quantize: False as long as the codebooks are not in use; then nothing is said about codes.

    Returns:
        `mel_distance`; `si_sdr_db`, over the waves that are not silent; with codes also `mel_distance_half_levels` (the
        first half of the levels decoded), `usage_level_<k>` and `perplexity_level_<k>`, and `usage_expected`: the share
        of the codes that would be in use if every fifth of a second, a new sound, drew one of them at random.
    """
    rows: dict[str, list[float]] = {}
    codes: list[Tensor] = []
    for wave in waves:
        if quantize:
            codes.append(codec.tokenize(wave))
            decoded = codec.decode_from_codebook_indices(codes[-1], num_samples=wave.shape[-1])
            if (half := codec.num_quantizers // 2) > 0:
                coarse = codec.decode_from_codebook_indices(codes[-1][..., :half], num_samples=wave.shape[-1])
                rows.setdefault("mel_distance_half_levels", []).append(mel_loss(coarse, wave).item())
        else:
            decoded = reconstruct(codec, wave, quantize=False)
        rows.setdefault("mel_distance", []).append(mel_loss(decoded, wave).item())
        if wave.any():
            rows.setdefault("si_sdr_db", []).append(_si_sdr_db(decoded, wave))
    metrics = {name: sum(values) / len(values) for name, values in rows.items()}
    if codes:
        frames = torch.cat([rearrange(one, "b f q -> (b f) q") for one in codes])
        num_sounds = _SOUNDS_PER_SECOND * sum(wave.shape[-1] for wave in waves) / codec.target_sample_hz
        metrics["usage_expected"] = 1.0 - (1.0 - 1.0 / codec.codebook_size) ** num_sounds
        usage = _by_level(code_usage(frames, codec.codebook_size))
        metrics.update({name: value.item() for name, value in usage.items()})
    return metrics


@torch.no_grad()
def distance_of_average(waves: Sequence[Tensor], mel_loss: MultiScaleMelLoss) -> float:
    """Mel distance between waves and their own average spectrum: what a codec reaches that has learnt nothing else.

    Args:
        waves: `[1, c, n]` each.
        mel_loss: At their rate.

    Returns:
        Mean over the scales of the absolute deviation of log-mel values from the median of their band, in nepers.
    """
    deviations = []
    for scale in range(len(mel_loss.scales)):
        log_mels = torch.cat([mel_loss.log_mel(wave, scale) for wave in waves], dim=-1)
        deviations.append((log_mels - log_mels.median(dim=-1, keepdim=True).values).abs().mean())
    return float(torch.stack(deviations).mean())


@torch.no_grad()
def denoising_metrics(
    codec: SoundStream, mixtures: Sequence[Mixture], mel_loss: MultiScaleMelLoss, quantize: bool = True
) -> dict[str, float]:
    """How near noisy waves come to the clean ones, by themselves and through the codec with its flag off and on.

    Args:
        codec: In eval mode, with a denoising condition.
        mixtures: On the codec's device.
        mel_loss: At the codec's rate.
        quantize: As for `reconstruction_metrics`.

    Returns:
        `si_sdr_db_<kind>` and `mel_distance_<kind>` for the kinds `noisy`, `denoise_off` and `denoise_on`, all against
        the clean wave; silent ones are left out.
    """
    rows: dict[str, list[float]] = {}
    for mixture in mixtures:
        noisy, clean = _batched(mixture.wave), _batched(mixture.clean)
        if not clean.any():
            continue
        kinds = {"noisy": noisy} | {
            f"denoise_{name}": reconstruct(codec, noisy, quantize, flag)
            for name, flag in (("off", False), ("on", True))
        }
        for kind, wave in kinds.items():
            rows.setdefault(f"si_sdr_db_{kind}", []).append(_si_sdr_db(wave, clean))
            rows.setdefault(f"mel_distance_{kind}", []).append(mel_loss(wave, clean).item())
    return {name: sum(values) / len(values) for name, values in rows.items()}


def _si_sdr_db(estimate: Tensor, target: Tensor) -> float:
    """Of waves `[1, c, n]`, all channels as one signal."""
    return float(si_sdr_db(rearrange(estimate, "1 c n -> (c n)"), rearrange(target, "1 c n -> (c n)")))


def _batched(wave: Tensor) -> Tensor:
    """`[n]` or `[c, n]` to `[1, c, n]`."""
    return wave[None, None] if wave.ndim == 1 else wave[None]


@torch.no_grad()
def write_pairs(
    folder: Path, step: int, originals: Sequence[Tensor], reconstructions: Sequence[Tensor], sample_hz: int
) -> None:
    """Write waves and their reconstructions as WAV, and the mel spectrograms of each pair as PNG.

    Without matplotlib there are no pictures, which is logged once.

    Args:
        folder: Where; files of the same names are replaced.
        step: In the names of the reconstructions.
        originals: `[1, c, n]` each.
        reconstructions: Of the same shapes.
        sample_hz: Their rate (Hz).
    """
    for number, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True), start=1):
        write_audio(folder / f"{number}_original.wav", peak_safe(original[0]), sample_hz)
        name = f"{number}_step_{step:07d}"
        # a codec that has gone wrong may give anything; its picture shows where
        heard = torch.nan_to_num(reconstruction[0].float(), posinf=0.0, neginf=0.0)
        write_audio(folder / f"{name}.wav", peak_safe(heard), sample_hz)
        if has_matplotlib():
            waves = {"original": original[0], f"reconstruction, step {step}": heard}
            draw_mels(waves, sample_hz, folder / f"{name}.png")


@lru_cache(maxsize=1)
def has_matplotlib() -> bool:
    """Whether pictures can be drawn; says once if not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        logger.info('no pictures are drawn: pip install "musiclm-pytorch[plot]" (matplotlib)')
        return False
    return True


@beartype
def draw_mels(waves: dict[str, Tensor], sample_hz: int, path: str | Path) -> None:
    """Draw the mel spectrograms of waves one above the other, on one scale.

    Args:
        waves: Title to wave `[c, n]`; its channels are averaged.
        sample_hz: Their rate (Hz).
        path: Picture to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mel = MelSpectrogram(sample_hz=sample_hz, n_fft=1024, hop_length=256, num_mels=80)
    images = [20 * mel(wave.detach().cpu().mean(dim=0)).clamp(min=1e-5).log10() for wave in waves.values()]
    loudest = max(float(image.max()) for image in images)
    figure = Figure(figsize=(9, 3 * len(images)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), 1, squeeze=False)[:, 0]
    for axis, (title, wave), image in zip(axes, waves.items(), images):
        extent: Any = (0, wave.shape[-1] / sample_hz, 0, len(image))
        axis.imshow(image, origin="lower", aspect="auto", extent=extent, vmin=loudest - 80, vmax=loudest, cmap="magma")
        axis.set(title=title, xlabel="seconds", ylabel="mel band")
    path = Path(path)
    with staged_files(path.parent) as stage:
        figure.savefig(stage / path.name, dpi=80)
