"""MuLaN: a joint embedding of audio and text, trained with a contrastive loss."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audiolm_pytorch.audio.waves import mono_waves
from audiolm_pytorch.checks.damage import check_finite
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.modules import build_module, module_spec, register
from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.mulan.layers import LayerContrast, LayerHeads
from musiclm_pytorch.mulan.losses import SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.text_tower import TextTower

__all__ = ["MuLaN"]


@register
class MuLaN(JointEmbedding):
    """Joint embedding by an audio tower and a text tower, trained with a contrastive loss (MuLan, arXiv:2208.12415).

    See `JointEmbedding` for `window_seconds` and `window_stride_seconds`.

    Args:
        loss: Module called as `loss(audio_latents, text_latents, captions, clip_index)`, with the latents and rows of
            hard negatives as two more arguments if there are any; None = `SoftmaxContrastiveLearning`.
        layer_contrast: Contrastive losses between inner layers of the towers; None = only the outputs are trained.
    """

    @typed
    def __init__(
        self,
        *,
        audio_transformer: AudioSpectrogramTransformer,
        text_transformer: TextTower,
        dim_latent: int = 128,
        loss: nn.Module | None = None,
        window_seconds: float = 10.0,
        window_stride_seconds: float = 1.0,
        layer_contrast: LayerContrast | None = None,
    ) -> None:
        super().__init__(
            dim_latent=dim_latent,
            sample_hz=audio_transformer.sample_hz,
            window_seconds=window_seconds,
            window_stride_seconds=window_stride_seconds,
        )
        self.audio = audio_transformer
        self.text = text_transformer
        self.audio_to_latent = nn.Linear(audio_transformer.dim, dim_latent)
        self.text_to_latent = nn.Linear(text_transformer.dim, dim_latent)
        self.loss = SoftmaxContrastiveLearning() if loss is None else loss
        self.layer_contrast = layer_contrast
        layers = () if layer_contrast is None else layer_contrast.layers
        if any(pair[0] > audio_transformer.depth or pair[1] > text_transformer.depth for pair in layers):
            depths = f"{audio_transformer.depth} and {text_transformer.depth}"
            raise ValueError(f"layer_contrast must have layers up to {depths}, the depths of the towers, got {layers}")
        dims = (audio_transformer.dim, text_transformer.dim)
        self.layer_heads = LayerHeads(layers, dims, dim_latent, self.loss)

    @property
    def audio_transformer(self) -> AudioSpectrogramTransformer:
        """The audio tower, which has the name `audio` in `state_dict`."""
        return self.audio

    @property
    def text_transformer(self) -> TextTower:
        """The text tower, which has the name `text` in `state_dict`."""
        return self.text

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments, in which a class name and a config describe every submodule."""
        config = {
            "audio_transformer": module_spec(self.audio),
            "text_transformer": module_spec(self.text),
            "dim_latent": self.dim_latent,
            "loss": module_spec(self.loss),
            "window_seconds": self.window_seconds,
            "window_stride_seconds": self.window_stride_seconds,
        }
        return config if self.layer_contrast is None else config | {"layer_contrast": self.layer_contrast.config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MuLaN":
        """Build a model with random weights from `config`."""
        parts: dict[str, Any] = {
            name: build_module(config[name]) for name in ("audio_transformer", "text_transformer", "loss")
        }
        if "layer_contrast" in config:
            parts["layer_contrast"] = LayerContrast.from_config(config["layer_contrast"])
        return cls(**{**config, **parts})

    @typed
    def forward(
        self,
        wavs: Tensor,
        texts: str | Sequence[str] | Tensor,
        lengths: Tensor | None = None,
        *,
        clip_index: Tensor | None = None,
        negatives: str | Sequence[str] | Tensor | None = None,
        negative_index: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Compute the contrastive loss (nats) of clips `[b, n]` at `sample_hz` and the texts that describe them.

        Neither clips with a common text nor the texts of one clip are contrasted with each other.

        Args:
            texts: `k` texts, or ids `[k, t]` with -1 past the end of a text.
            lengths: `[b]` number of samples of each clip, 1..n; None = `n` for every clip.
            clip_index: `[k]` integers, the row in `wavs` of the clip that each text describes, with at least one text
                for every clip; None = one text per clip, in the order of the clips.
            negatives: `m` hard negatives, which are false texts of one clip; texts, or ids `[m, t]`.
            negative_index: `[m]` integers, the row in `wavs` to which each hard negative belongs.
            chunk_size: Number of clips, and of texts, per forward pass of a tower; backward repeats each pass, so that
                only one chunk needs memory at a time (arXiv:2101.06983); None = one chunk with the whole batch.
        """
        wavs = mono_waves(wavs, lengths, name="wavs")
        ids = self.text.tokenize(texts)
        captions = _caption_numbers(ids)
        clips = (wavs,) if lengths is None else (wavs, lengths)
        audio = _in_chunks(self._audio_levels, chunk_size, *clips)
        text = _in_chunks(self._text_levels, chunk_size, ids)
        losses = (self.loss, *self.layer_heads.losses)
        levels: list[tuple[Tensor, ...]] = [(t, captions, clip_index) for t in text.unbind(1)]  # type: ignore[misc]
        if (negatives is None) != (negative_index is None):
            raise ValueError("got only one of negatives and negative_index; pass both or neither")
        if negatives is not None and negative_index is not None:
            false_text = _in_chunks(self._text_levels, chunk_size, self.text.tokenize(negatives))
            levels = [(*level, n, negative_index) for level, n in zip(levels, false_text.unbind(1))]
        outputs, *layers = (loss(a, *level) for loss, a, level in zip(losses, audio.unbind(1), levels))
        return outputs if self.layer_contrast is None else outputs + self.layer_contrast.weight * sum(layers)

    def _audio_levels(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips as unit vectors `[b, 1 + pairs, dim_latent]`: one of the output, and one per pair of layers."""
        states = self.audio.embed_layers(wavs, lengths, layers=[self.audio.depth, *self.layer_heads.audio_layers])
        return _unit_rows(states, [self.audio_to_latent, *self.layer_heads.audio_to_latent])

    def _text_levels(self, ids: Tensor) -> Tensor:
        """Embed k texts as unit vectors `[k, 1 + pairs, dim_latent]`: one of the output, and one per pair of layers."""
        states = self.text.embed_layers(ids, layers=[self.text.depth, *self.layer_heads.text_layers])
        return _unit_rows(states, [self.text_to_latent, *self.layer_heads.text_to_latent])

    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips without windows; see `JointEmbedding`."""
        latents = _unit_rows(self.audio(wavs, lengths).unsqueeze(0), [self.audio_to_latent])[:, 0]
        return check_finite(latents, self, "latents of the audio")

    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts; see `JointEmbedding`."""
        latents = _unit_rows(self.text.embed_layers(texts, layers=(self.text.depth,)), [self.text_to_latent])[:, 0]
        return check_finite(latents, self, "latents of the texts")


def _unit_rows(states: Tensor, heads: Sequence[Any]) -> Tensor:
    """Project `l` states `[l, b, dim]` with one head per state to unit vectors `[b, l, dim_latent]` float32."""
    projected = [head(state.to(head.weight.dtype)).float() for head, state in zip(heads, states)]
    return F.normalize(torch.stack(projected, dim=1), dim=-1)


def _in_chunks(embed: Callable[..., Tensor], chunk_size: int | None, *rows: Tensor) -> Tensor:
    """Call `embed` for chunks of `chunk_size` rows; to save memory, backward computes each output again."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for one chunk; got {chunk_size}")
    if chunk_size is None or chunk_size >= len(rows[0]):
        return embed(*rows)
    chunks = zip(*(part.split(chunk_size) for part in rows), strict=True)
    return torch.cat([checkpoint(embed, *chunk, use_reentrant=False) for chunk in chunks])


def _caption_numbers(ids: Tensor) -> Tensor:
    """Hash the token ids of each text to int64 `[k]`; equal texts have equal hashes on every process."""
    rows = (row[row >= 0] for row in ids.cpu())
    digests = (hashlib.blake2b(row.numpy().astype("<i8").tobytes(), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=ids.device)
