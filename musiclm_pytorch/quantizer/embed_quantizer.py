"""Conditioning codes: MuLaN latents quantized by frozen codebooks, and trainable embeddings of the codes."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import described, typed
from audiolm_pytorch.conditioning.base import Conditioner, ConditionTensor
from audiolm_pytorch.nn.module_state import module_dict
from audiolm_pytorch.saving.fingerprint import digest_of, part_fingerprint
from audiolm_pytorch.saving.modules import module_spec, register
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.saving.weights import weights_of
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.quantizer.modality_gap import align_texts
from musiclm_pytorch.quantizer.residual_kmeans import residual_codes, residual_kmeans

__all__ = ["MuLaNEmbedQuantizer", "Modality"]

logger = logger_named(__name__)

Modality = Literal["audio", "text"]


@register
class MuLaNEmbedQuantizer(Conditioner):
    """Quantizes the MuLaN embedding of audio or text to codes, and embeds the codes for each language model.

    The residual quantization is that of MusicLM (arXiv:2301.11325, sec. 4.1). The codebooks are random until `fit` is
    called, and training never changes the codebooks. Each language model trains only its table of code embeddings.

    Args:
        mulan: Joint embedding, which stays in eval mode and receives no gradients.
        rq_num_quantizers: Number of quantizer levels, which is the number of codes per recording.
    """

    codebooks: Tensor
    audio_mean: Tensor
    text_mean: Tensor
    text_map: Tensor
    fitted: Tensor

    @typed
    def __init__(
        self,
        *,
        mulan: JointEmbedding,
        conditioning_dims: Sequence[int],
        namespaces: Sequence[str],
        rq_num_quantizers: int = 8,
        codebook_size: int = 1024,
    ) -> None:
        super().__init__()
        if len(conditioning_dims) != len(namespaces) or len(set(namespaces)) != len(namespaces) or not namespaces:
            raise ValueError(
                "need different namespaces and one conditioning dim for each, got namespaces "
                f"{tuple(namespaces)} and conditioning_dims {tuple(conditioning_dims)}"
            )
        if min(*conditioning_dims, rq_num_quantizers, codebook_size) < 1:
            raise ValueError(
                "conditioning_dims, rq_num_quantizers and codebook_size must be positive, got "
                f"{tuple(conditioning_dims)}, {rq_num_quantizers} and {codebook_size}"
            )
        self.namespaces, self.conditioning_dims = tuple(namespaces), tuple(conditioning_dims)
        self.num_quantizers = self.rq_num_quantizers = rq_num_quantizers
        self.codebook_size = codebook_size
        self.mulan = mulan.eval()
        num_codes = rq_num_quantizers * codebook_size
        tables = {name: nn.Embedding(num_codes, dim) for name, dim in zip(namespaces, conditioning_dims)}
        self.tables = module_dict(tables, "namespaces")
        for parameter in self.tables.parameters():
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        width = mulan.dim_latent
        # Like residual k-means, each level about halves the residual.
        scales = 0.5 ** torch.arange(rq_num_quantizers) * width**-0.5
        random = torch.randn(rq_num_quantizers, codebook_size, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("codebooks", random * scales.view(-1, 1, 1))
        self.register_buffer("audio_mean", torch.zeros(width))
        self.register_buffer("text_mean", torch.zeros(width))
        self.register_buffer("text_map", torch.eye(width))
        self.register_buffer("fitted", torch.tensor(False))
        self._has_warned = False

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments, in which a class name and a config describe the MuLaN."""
        return {
            "mulan": module_spec(self.mulan),
            "conditioning_dims": list(self.conditioning_dims),
            "namespaces": list(self.namespaces),
            "rq_num_quantizers": self.num_quantizers,
            "codebook_size": self.codebook_size,
        }

    @property
    def sample_hz(self) -> int:
        """Sample rate in Hz that input waves must have."""
        return self.mulan.sample_hz

    def fingerprint(self) -> str:
        """Hash of everything that the codes depend on: MuLaN, codebooks and the alignment of texts.

        If rounding to half precision would change the codes, `save_parts` stores the quantizer in full precision.
        """
        buffers = {name: value for name, value in weights_of(self).items() if "." not in name and name != "fitted"}
        return digest_of({"mulan": part_fingerprint(self.mulan)}, buffers)

    def train(self, mode: bool = True) -> "MuLaNEmbedQuantizer":
        """Set training or eval mode, except for the MuLaN, so that the codes of a recording never change."""
        super().train(mode)
        self.mulan.eval()
        return self

    def table(self, namespace: str) -> nn.Module:
        """Return the trainable embeddings of the codes of all levels for the language model `namespace`."""
        if namespace not in self.tables:
            raise ValueError(f"there is no namespace {namespace!r}; choose one of {self.namespaces}")
        return self.tables[namespace]

    def dim(self, namespace: str) -> int:
        """Return the width of the code embeddings for the language model `namespace`."""
        self.table(namespace)
        return self.conditioning_dims[self.namespaces.index(namespace)]

    def check_can_fit(self, num_latents: int) -> None:
        """Check that the quantizer is not fitted yet, and that `num_latents` audio latents are enough for `fit`."""
        if bool(self.fitted):
            raise ValueError("this quantizer is fitted already and models may depend on its codes; fit a new quantizer")
        if num_latents < self.codebook_size:
            raise ValueError(
                f"{num_latents} audio_latents are too few for {self.codebook_size} codes per level; use more audio "
                "or a smaller codebook_size"
            )

    @typed
    @torch.no_grad()
    def fit(
        self,
        audio_latents: Tensor,
        text_latents: Tensor | None = None,
        *,
        clip_index: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Fit the codebooks, once only, by k-means of the audio latents `[n, d]` and of the residuals of each level.

        The alignment of texts is learned from latents `[k, d]` of texts that describe some of the audio (see
        `align_texts`). `clip_index [k]` is the row in `audio_latents` that each text describes; None = text i describes
        row i.
        """
        if not 0 <= seed < 2**32:  # of scikit-learn
            raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
        if audio_latents.ndim != 2:
            raise ValueError(f"audio_latents must be [n, {self.mulan.dim_latent}], got {described(audio_latents)}")
        self._check_latents(audio_latents, "audio_latents")
        self.check_can_fit(len(audio_latents))
        audio = audio_latents.float().cpu()
        audio_mean = audio.mean(dim=0, dtype=torch.float64)
        text_mean, text_map = audio_mean, torch.eye(audio.shape[1])
        if text_latents is not None:
            self._check_latents(text_latents, "text_latents")
            clip_index = torch.arange(len(audio)) if clip_index is None else clip_index.cpu().long()
            if clip_index.shape != text_latents.shape[:-1]:
                raise ValueError(
                    "need audio_latents [n, d], text_latents [k, d] and clip_index [k] (k = n without clip_index), got "
                    f"{tuple(audio_latents.shape)}, {tuple(text_latents.shape)} and {tuple(clip_index.shape)}"
                )
            audio_mean, text_mean, text_map = align_texts(audio, text_latents.float().cpu(), clip_index)
        elif clip_index is not None:
            raise ValueError("got clip_index (the audio row of each text) without text_latents; pass both or neither")
        codebooks = residual_kmeans((audio - audio_mean).float(), self.num_quantizers, self.codebook_size, seed)
        self.codebooks.copy_(codebooks)
        self.audio_mean.copy_(audio_mean)
        self.text_mean.copy_(text_mean)
        self.text_map.copy_(text_map)
        self.fitted.fill_(True)

    @typed
    @torch.no_grad()
    def codes_from_latents(self, latents: Tensor, modality: Modality = "audio") -> Tensor:
        """Quantize MuLaN latents `[..., d]` of audio or text to codes `[..., q]` int64 in [0, codebook_size).

        At each level, the code is the index of the centroid that is nearest to the residual of the previous levels.
        """
        self._check_latents(latents)
        if not bool(self.fitted) and not self._has_warned:
            self._has_warned = True
            logger.warning("the quantizer is not fitted and has random codebooks; call fit() before training")
        device = self.codebooks.device
        return self.codes_from_centred(self.centred(latents.to(device), modality)).to(latents.device)

    def codes_from_centred(self, centred: Tensor) -> Tensor:
        """Quantize vectors `[..., d]` that `centred` returned, or mixtures of them, to codes `[..., q]` int64."""
        return residual_codes(centred, self.codebooks)

    @typed
    @torch.no_grad()
    def codes(
        self,
        *,
        wavs: Tensor | None = None,
        texts: str | Sequence[str] | Tensor | None = None,
        latents: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Compute codes `[b, q]` int64 of waves `[b, n]`, of texts (or ids), or of audio latents `[b, d]`.

        The latents of waves longer than MuLaN's window are averaged over windows. `lengths [b]` are the numbers of
        samples of the waves (None = all have `n` samples).
        """
        if sum(source is not None for source in (wavs, texts, latents)) == 1:
            if texts is not None:
                return self.codes_from_latents(self.mulan.get_text_latents(texts), "text")
            if wavs is not None:
                latents = self.mulan.get_long_audio_latents(wavs.to(self.codebooks.device), lengths)
            if latents is not None:
                return self.codes_from_latents(latents, "audio")
        raise ValueError("pass exactly one of wavs, texts and latents")

    @typed
    def forward(
        self,
        *,
        wavs: Tensor | None = None,
        texts: str | Sequence[str] | Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> Tensor:
        """Embed waves, texts or codes `[b, q]` (exactly one of these) as `[b, q, dim]`; see the method `codes`.

        Gradients flow into the code embeddings of the language model `namespace`.
        """
        table = self.table(namespace)
        if codes is None:
            codes = self.codes(wavs=wavs, texts=texts, lengths=lengths)
        elif wavs is not None or texts is not None:
            raise ValueError("pass exactly one of wavs, texts and codes")
        if codes.ndim != 2 or codes.shape[1] != self.num_quantizers or codes.is_floating_point():
            raise ValueError(f"codes must be int [b, {self.num_quantizers}], got {codes.dtype} {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes must be in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        codes = codes.to(self.codebooks.device).long()
        return table(codes + self.codebook_size * torch.arange(self.num_quantizers, device=codes.device))

    @typed
    def conditioning(
        self,
        *,
        texts: str | Sequence[str] | Tensor | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> ConditionTensor:
        """Return the embeddings of `forward` as a condition of a language model, in which no position is masked."""
        return ConditionTensor.of(self(wavs=wavs, texts=texts, codes=codes, lengths=lengths, namespace=namespace))

    def centred(self, latents: Tensor, modality: Modality = "audio") -> Tensor:
        """Subtract the mean of the modality from latents `[..., d]`, map text latents to audio, and return float32."""
        if modality == "audio":
            return latents.float() - self.audio_mean.float()
        with torch.autocast(device_type=latents.device.type, enabled=False):
            return (latents.float() - self.text_mean.float()) @ self.text_map.float()

    def _check_latents(self, latents: Tensor, name: str = "latents") -> None:
        width = self.mulan.dim_latent
        if latents.ndim < 1 or latents.shape[-1] != width or not latents.is_floating_point():
            raise ValueError(f"{name} must be float [..., {width}], got {latents.dtype} {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
