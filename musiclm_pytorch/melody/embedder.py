"""Melody embedder: embeds short windows of a wave, so that equal melodies have equal embeddings in all timbres."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.units import samples_in
from audiolm_pytorch.audio.waves import mono_waves, with_channels
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.fingerprint import digest_of
from audiolm_pytorch.saving.modules import SavedModule, module_spec, register
from audiolm_pytorch.saving.weights import weights_of
from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_pytorch.quantizer.residual_kmeans import residual_codes, residual_kmeans

__all__ = ["CONDITION", "MelodyEmbedder", "per_frame"]

CONDITION = "melody"  # name of the condition of the stages
# Windows more than 34 dB below the loudest window of a wave contain no melody.
_SILENCE = 0.02
_PEAK = 0.5  # of the waves in training
_WINDOWS_PER_BATCH = 256


@register
class MelodyEmbedder(SavedModule):
    """Embeds a melody as a sequence of vectors, one for each window (MusicLM, arXiv:2301.11325, sec. 4.2).

    As in MusicLM, a ViT over mel frames is trained with a triplet loss over renderings of the same melody
    (`MelodyTrainer`), and residual quantization turns the embeddings into codes. Unlike in MusicLM, whose windows last
    4 s every 3 s, windows are short, so that the stages receive the melody aligned in time with their tokens.

    Args:
        audio_transformer: Transformer over the spectrogram of a window.
        dim_latent: Width of the embeddings, which have unit norm.
        window_seconds: Length of a window.
        hop_seconds: Time from one window to the next. Window i is centred on the time from `i * hop_seconds` to
            `(i + 1) * hop_seconds`.
        rq_num_quantizers: Number of codes per window.
    """

    codebooks: Tensor
    fitted: Tensor
    pipeline_tag = "feature-extraction"
    subfolders = ("", "melody", "model/melody", "melody/model")

    @typed
    def __init__(
        self,
        *,
        audio_transformer: AudioSpectrogramTransformer,
        dim_latent: int = 64,
        window_seconds: float = 0.64,
        hop_seconds: float = 0.16,
        rq_num_quantizers: int = 8,
        codebook_size: int = 256,
    ) -> None:
        super().__init__()
        check_positive(dim_latent=dim_latent, rq_num_quantizers=rq_num_quantizers, codebook_size=codebook_size)
        if not 0 < hop_seconds <= window_seconds < float("inf"):
            raise ValueError(
                f"need 0 < hop_seconds <= window_seconds, got hop_seconds {hop_seconds} and window_seconds "
                f"{window_seconds}"
            )
        self.audio, self.sample_hz = audio_transformer, audio_transformer.sample_hz
        self.window_seconds, self.hop_seconds = window_seconds, hop_seconds
        self.window_samples = samples_in(window_seconds, self.sample_hz)
        self.hop_samples = samples_in(hop_seconds, self.sample_hz)
        self.dim_latent, self.rq_num_quantizers, self.codebook_size = dim_latent, rq_num_quantizers, codebook_size
        self.to_latent = nn.Linear(audio_transformer.dim, dim_latent)
        self.register_buffer("codebooks", torch.zeros(rq_num_quantizers, codebook_size, dim_latent))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def audio_transformer(self) -> AudioSpectrogramTransformer:
        """The audio tower, which has the name `audio` in `state_dict`."""
        return self.audio

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments, in which a class name and a config describe the transformer."""
        names = ("dim_latent", "window_seconds", "hop_seconds", "rq_num_quantizers", "codebook_size")
        return {"audio_transformer": module_spec(self.audio), **{name: getattr(self, name) for name in names}}

    @property
    def rate_hz(self) -> Fraction:
        """Number of windows per second."""
        return Fraction(self.sample_hz, self.hop_samples)

    def fingerprint(self) -> str:
        """Hash of everything that the vectors depend on."""
        return digest_of({"class": type(self).__name__, "config": self.config}, weights_of(self))

    def forward(self, windows: Tensor) -> Tensor:
        """Embed windows `[w, window_samples]` as unit vectors `[w, dim_latent]` float32."""
        embedded = self.audio(windows).to(self.to_latent.weight.dtype)
        return F.normalize(self.to_latent(embedded).float(), dim=-1)

    @typed
    @torch.no_grad()
    def latents(self, wavs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed the m windows of waves `[b, n]` at `sample_hz` with `lengths [b]` samples.

        Returns:
            Unit vectors `[b, m, dim_latent]`, and a mask `[b, m]` of the windows that are not silent.
        """
        wavs = mono_waves(wavs, lengths, name="wavs")
        if lengths is not None:
            inside = torch.arange(wavs.shape[1], device=wavs.device) < checked_lengths(lengths, wavs).unsqueeze(1)
            wavs = wavs.masked_fill(~inside, 0.0)
        # The level of a recording is not part of its melody.
        wavs = wavs.float() * (_PEAK / wavs.abs().amax(dim=1, keepdim=True).clamp(min=1e-6))
        count = ceil(wavs.shape[1] / self.hop_samples)
        before = (self.window_samples - self.hop_samples) // 2
        after = (count - 1) * self.hop_samples + self.window_samples - before - wavs.shape[1]
        windows = F.pad(wavs, (before, after)).unfold(1, self.window_samples, self.hop_samples)
        levels = windows.square().mean(dim=-1).sqrt()
        sounds = levels > _SILENCE * levels.amax(dim=1, keepdim=True)
        rows = rearrange(windows, "b m n -> (b m) n").to(self.codebooks.device)
        embedded = torch.cat([self(part) for part in rows.split(_WINDOWS_PER_BATCH)])
        return rearrange(embedded, "(b m) d -> b m d", b=len(wavs)), sounds.to(embedded.device)

    @typed
    @torch.no_grad()
    def codes(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the codes `[b, m, q]` int64 of the m windows of waves `[b, n]`; silent windows have the codes -1."""
        if not bool(self.fitted):
            raise ValueError("the melody embedder has no codebooks yet; call fit() or train it with MelodyTrainer")
        latents, sounds = self.latents(wavs, lengths)
        return residual_codes(latents, self.codebooks).masked_fill(~sounds.unsqueeze(-1), -1)

    @typed
    def vectors(self, codes: Tensor) -> Tensor:
        """Return the quantized embeddings `[..., dim_latent]` of codes `[..., q]`; zeros for silent windows."""
        if not codes.numel():
            return self.codebooks.new_zeros(*codes.shape[:-1], self.dim_latent)
        is_in_range = -1 <= int(codes.min()) <= int(codes.max()) < self.codebook_size
        if codes.shape[-1] != self.rq_num_quantizers or not is_in_range:
            raise ValueError(
                f"codes must be [..., {self.rq_num_quantizers}] in -1..{self.codebook_size - 1}, got shape "
                f"{list(codes.shape)}"
            )
        codes = codes.to(self.codebooks.device)
        levels = torch.arange(self.rq_num_quantizers, device=codes.device)
        parts = self.codebooks.float()[levels, codes.clamp(min=0)]
        return parts.masked_fill((codes < 0).unsqueeze(-1), 0.0).sum(dim=-2)

    @typed
    @torch.no_grad()
    def fit(self, latents: Tensor, seed: int = 0) -> None:
        """Fit the codebooks, once only, by k-means of latents `[n, d]` and of the residuals of each level."""
        if bool(self.fitted):
            raise ValueError("this melody embedder is fitted already, and stages may depend on its codes")
        if latents.ndim != 2 or latents.shape[1] != self.dim_latent or len(latents) < self.codebook_size:
            raise ValueError(
                f"need latents [n, {self.dim_latent}] with n of at least {self.codebook_size} (codebook_size), got "
                f"{list(latents.shape)}"
            )
        self.codebooks.copy_(residual_kmeans(latents.float().cpu(), self.rq_num_quantizers, self.codebook_size, seed))
        self.fitted.fill_(True)

    def check_compatible(self, stages: Mapping[str, StageTransformer]) -> None:
        """Check that the stages with a melody were trained with this embedder."""
        for name, stage in stages.items():
            spec, known = stage.fuser.specs.get(CONDITION), stage.token_fingerprints.get(CONDITION)
            if spec is not None and (spec.dim != self.dim_latent or known not in (None, self.fingerprint())):
                raise ValueError(
                    f"the {name} transformer was trained with another melody embedder (width {spec.dim}, fingerprint "
                    f"{known}; the passed one has width {self.dim_latent}, fingerprint {self.fingerprint()})"
                )

    def conditions(
        self, melodies: Sequence[tuple[Tensor, int]], stages: Mapping[str, StageTransformer]
    ) -> dict[str, dict[str, ConditionTensor]]:
        """Return the condition of each stage with a melody, for waves `[c, n]` with their sample rates in Hz."""
        vectors = []
        for number, (wave, wave_hz) in enumerate(melodies):
            if not wave.any():
                raise ValueError(f"melody {number} is empty or silent; pass a recording with a melody, or no melody")
            mono = resample(with_channels(wave, 1, "the melody"), wave_hz, self.sample_hz)
            vectors.append(self.vectors(self.codes(mono)[0]))
        frame_hz = {
            name: stage.layout.predicted[0].exact_hz for name, stage in stages.items() if CONDITION in stage.fuser.specs
        }
        if not frame_hz:
            raise ValueError("no stage of the model is conditioned on a melody; train stages with one, or pass none")
        return {
            name: {CONDITION: ConditionTensor.padded([per_frame(item, self.rate_hz, hz) for item in vectors])}
            for name, hz in frame_hz.items()
        }


def per_frame(vectors: Tensor, rate_hz: Fraction, frame_hz: Fraction) -> Tensor:
    """Repeat vectors `[m, d]` of `rate_hz` per second, so that every frame has the vector of its time."""
    ratio = rate_hz / frame_hz
    index = torch.arange(ceil(len(vectors) / ratio)) * ratio.numerator // ratio.denominator
    return vectors[index.to(vectors.device)]
