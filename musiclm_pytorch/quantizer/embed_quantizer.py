"""Conditioning codes: MuLaN latents, quantized by frozen residual codebooks, and a trainable table per namespace."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning.base import Conditioner
from audiolm_pytorch.conditioning.tensors import ConditionTensor
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.saving.fingerprint import digest_of, part_fingerprint
from audiolm_pytorch.saving.modules import build_module, module_spec, register
from audiolm_pytorch.saving.weights import weights_of
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.quantizer.modality_gap import DEFAULT_RIDGE_CLIPS, align_texts
from musiclm_pytorch.quantizer.residual_kmeans import residual_kmeans

__all__ = ["MuLaNEmbedQuantizer", "Modality"]

logger = logging.getLogger(__name__)

Modality = Literal["audio", "text"]


@register
class MuLaNEmbedQuantizer(Conditioner):
    """Turns audio or text into the same few discrete codes, and those into embeddings for each language model.

    Residual quantization of MuLan's embedding as in MusicLM (arXiv:2301.11325, sec. 4.1). The codebooks are fitted
    once, by `fit`, and are frozen from then on: neither training mode nor use changes them. Until then they are random
    but fixed. What is trained, by the trainer of each language model, is the table of its namespace alone.

    Args:
        mulan: Embeds audio and text: a `MuLaN`, or a pretrained model in its place. It is put and kept in eval mode,
            and no gradient flows into it.
        conditioning_dims: Width of the embeddings of each namespace.
        namespaces: Names, one for each language model.
        rq_num_quantizers: Levels, that is codes per recording.
        codebook_size: Codes a level.

    Raises:
        ValueError: If there are not as many dims as names, names repeat, or a number is out of range.
    """

    codebooks: Tensor
    audio_mean: Tensor
    text_mean: Tensor
    text_map: Tensor
    fitted: Tensor

    @beartype
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
                "need one conditioning dim for each of the namespaces, all of different names, got "
                f"{tuple(conditioning_dims)} and {tuple(namespaces)}"
            )
        if min(*conditioning_dims, rq_num_quantizers, codebook_size) < 1:
            raise ValueError("conditioning_dims, rq_num_quantizers and codebook_size must be positive")
        self.namespaces = tuple(namespaces)
        self.conditioning_dims = tuple(conditioning_dims)
        self.num_quantizers = rq_num_quantizers
        self.codebook_size = codebook_size
        self.mulan = mulan.eval()
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding(rq_num_quantizers * codebook_size, dim)
                for name, dim in zip(namespaces, conditioning_dims)
            }
        )
        for parameter in self.tables.parameters():
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        width = mulan.dim_latent
        # each level halves the residual, roughly what residual k-means does
        scales = 0.5 ** torch.arange(rq_num_quantizers) * width**-0.5
        random = torch.randn(rq_num_quantizers, codebook_size, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("codebooks", random * scales.view(-1, 1, 1))
        self.register_buffer("audio_mean", torch.zeros(width))
        self.register_buffer("text_mean", torch.zeros(width))
        self.register_buffer("text_map", torch.eye(width))
        self.register_buffer("fitted", torch.tensor(False))
        self._warned = False

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able, with the spec of the MuLaN."""
        return {
            "mulan": module_spec(self.mulan),
            "conditioning_dims": list(self.conditioning_dims),
            "namespaces": list(self.namespaces),
            "rq_num_quantizers": self.num_quantizers,
            "codebook_size": self.codebook_size,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MuLaNEmbedQuantizer":
        """Build from `config`, not fitted."""
        return cls(**{**config, "mulan": build_module(config["mulan"])})

    @property
    def sample_hz(self) -> int:
        """Sample rate in Hz at which waves are given."""
        return self.mulan.sample_hz

    def fingerprint(self) -> str:
        """Hash of all that codes depend on: MuLaN, codebooks, means and map of texts; not of the tables.

        It is the same on any device and from any file of these very numbers. Rounded to half precision, a quantizer
        gives other codes and is another: where that would happen, models store it in full (see `save_parts`).
        """
        own = {name: value for name, value in weights_of(self).items() if "." not in name and name != "fitted"}
        return digest_of({"mulan": part_fingerprint(self.mulan)}, own)

    def train(self, mode: bool = True) -> "MuLaNEmbedQuantizer":
        """Set the mode; the MuLaN stays in eval mode, so that the codes of a recording are always the same."""
        super().train(mode)
        self.mulan.eval()
        return self

    def table(self, namespace: str) -> nn.Module:
        """The trainable part of a namespace: one embedding for each code of each level.

        Raises:
            ValueError: If there is no such namespace.
        """
        if namespace not in self.tables:
            raise ValueError(f"there is no namespace {namespace!r} among {self.namespaces}")
        return self.tables[namespace]

    def dim(self, namespace: str) -> int:
        """Width of the embeddings of a namespace; ValueError if there is none of that name."""
        self.table(namespace)
        return self.conditioning_dims[self.namespaces.index(namespace)]

    def check_can_fit(self, num_latents: int) -> None:
        """Raise a ValueError if codebooks cannot be made, or made anew, from that many latents of audio."""
        if bool(self.fitted):
            raise ValueError(
                "this quantizer is fitted already and models may depend on its codes; make a new one to fit"
            )
        if num_latents < self.codebook_size:
            raise ValueError(
                f"{num_latents} latents cannot fill {self.codebook_size} codes a level; give more audio "
                "or make codebook_size smaller"
            )

    @beartype
    @torch.no_grad()
    def fit(
        self,
        audio_latents: Tensor,
        text_latents: Tensor | None = None,
        *,
        clip_index: Tensor | None = None,
        centre: bool = True,
        ridge: float | int | None = DEFAULT_RIDGE_CLIPS,
        seed: int = 0,
    ) -> None:
        """Make the codebooks by k-means, level by level on what the levels before left over; once.

        Args:
            audio_latents: `[n, d]`, with n at least `codebook_size`.
            text_latents: `[k, d]` of texts that describe some of the audio. None = texts are treated as if they were
                audio.
            clip_index: `[k]` int, which row of the audio each text describes. None = k is n, and row i is of audio i.
            centre: Give texts a mean and a scale of their own; see `align_texts`.
            ridge: Learn a linear map from texts to audio; against how many clips' evidence, see `align_texts`.
                None = no map.
            seed: Seed of the k-means.

        Raises:
            ValueError: If it is fitted already, latents are too few or not finite, or shapes do not fit.
        """
        self._check_latents(audio_latents)
        self.check_can_fit(len(audio_latents))
        audio = audio_latents.float().cpu()
        audio_mean = audio.mean(dim=0, dtype=torch.float64)
        text_mean, text_map = audio_mean, torch.eye(audio.shape[1])
        if text_latents is not None:
            self._check_latents(text_latents)
            clip_index = torch.arange(len(audio)) if clip_index is None else clip_index.cpu().long()
            if audio.ndim != 2 or clip_index.shape != text_latents.shape[:-1]:
                raise ValueError(
                    f"texts must pair with audio latents {tuple(audio_latents.shape)}, or have a clip_index each; "
                    f"got {tuple(text_latents.shape)} and clip_index {tuple(clip_index.shape)}"
                )
            text = text_latents.float().cpu()
            audio_mean, text_mean, text_map = align_texts(audio, text, clip_index, centre=centre, ridge=ridge)
        elif clip_index is not None:
            raise ValueError("clip_index say which audio a text describes: give text_latents too")
        codebooks = residual_kmeans((audio - audio_mean).float(), self.num_quantizers, self.codebook_size, seed)
        self.codebooks.copy_(codebooks)
        self.audio_mean.copy_(audio_mean)
        self.text_mean.copy_(text_mean)
        self.text_map.copy_(text_map)
        self.fitted.fill_(True)

    @beartype
    @torch.no_grad()
    def codes_from_latents(self, latents: Tensor, modality: Modality = "audio") -> Tensor:
        """Quantize latents: at each level the nearest code to what the levels before left over.

        Args:
            latents: `[..., d]` of MuLaN, on any device.
            modality: What the latents are of.

        Returns:
            Codes `[..., q]` int64 in [0, codebook_size), on the device of the latents.

        Raises:
            ValueError: If latents are of another width or not finite.
        """
        self._check_latents(latents)
        if not bool(self.fitted) and not self._warned:
            self._warned = True
            logger.warning("the quantizer is not fitted, its codebooks are random: call fit() before training with it")
        device = self.codebooks.device
        with torch.autocast(device_type=device.type, enabled=False):
            residual = self.centred(latents.to(device), modality).reshape(-1, latents.shape[-1])
            codes = []
            for codebook in self.codebooks.float():
                codes.append(nearest_centroid(residual, codebook))
                residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=-1).view(*latents.shape[:-1], self.num_quantizers).to(latents.device)

    @beartype
    @torch.no_grad()
    def codes(
        self,
        *,
        wavs: Tensor | None = None,
        texts: str | Sequence[str] | Tensor | None = None,
        latents: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Codes of audio, or of texts, or of audio latents that were computed before.

        Args:
            wavs: `[b, n]` float at `sample_hz`; audio longer than MuLaN's window is averaged over windows.
            texts: One text, several, or ids.
            latents: `[b, d]` of audio.
            lengths: `[b]` samples of each wave. None = all `n`.

        Returns:
            Codes `[b, q]` int64.

        Raises:
            ValueError: If there is not exactly one of the three.
        """
        if sum(given is not None for given in (wavs, texts, latents)) == 1:
            if texts is not None:
                return self.codes_from_latents(self.mulan.get_text_latents(texts), "text")
            if wavs is not None:
                latents = self.mulan.get_long_audio_latents(wavs.to(self.codebooks.device), lengths)
            if latents is not None:
                return self.codes_from_latents(latents, "audio")
        raise ValueError("give exactly one of wavs, texts and latents")

    @beartype
    def forward(
        self,
        *,
        wavs: Tensor | None = None,
        texts: str | Sequence[str] | Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> Tensor:
        """Embed audio, texts or codes for a language model.

        Args:
            wavs: `[b, n]` float at `sample_hz`.
            texts: One text, several, or ids.
            codes: `[b, q]` int, as given by `codes`.
            lengths: `[b]` samples of each wave. None = all `n`.
            namespace: Whose table.

        Returns:
            `[b, q, dim]`; gradients flow into the table.

        Raises:
            ValueError: If there is not exactly one of wavs, texts and codes, or codes are out of range.
        """
        table = self.table(namespace)
        if codes is None:
            codes = self.codes(wavs=wavs, texts=texts, lengths=lengths)
        elif wavs is not None or texts is not None:
            raise ValueError("give exactly one of wavs, texts and codes")
        if codes.ndim != 2 or codes.shape[1] != self.num_quantizers or codes.is_floating_point():
            raise ValueError(f"codes must be int [b, {self.num_quantizers}], got {codes.dtype} {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes must be in 0..{self.codebook_size - 1}")
        codes = codes.to(self.codebooks.device).long()
        return table(codes + self.codebook_size * torch.arange(self.num_quantizers, device=codes.device))

    @beartype
    def conditioning(
        self,
        *,
        texts: str | Sequence[str] | Tensor | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> ConditionTensor:
        """Embed audio, texts or codes as what a language model is conditioned on.

        Args:
            texts: One text, several, or ids.
            wavs: `[b, n]` float at `sample_hz`.
            codes: `[b, q]` int, as given by `codes`.
            lengths: `[b]` samples of each wave. None = all `n`.
            namespace: Whose table.

        Returns:
            ConditionTensor: embeddings `[b, q, dim]` and a mask `[b, q]` that is all True.
        """
        embeddings = self(wavs=wavs, texts=texts, codes=codes, lengths=lengths, namespace=namespace)
        return ConditionTensor(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device))

    def centred(self, latents: Tensor, modality: Modality = "audio") -> Tensor:
        """Bring latents `[..., d]` on the quantizer's device to where the codebooks are, in float32."""
        if modality == "audio":
            return latents.float() - self.audio_mean.float()
        return (latents.float() - self.text_mean.float()) @ self.text_map.float()

    def _check_latents(self, latents: Tensor) -> None:
        width = self.mulan.dim_latent
        if latents.ndim < 1 or latents.shape[-1] != width or not latents.is_floating_point():
            raise ValueError(f"latents must be float [..., {width}], got {latents.dtype} {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError("latents hold NaN or infinite numbers")
