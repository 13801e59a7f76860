"""The parts of a MusicGen, and how they are built from published weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.channelwise import ChannelwiseCodec
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.conditioning.published_text import TextConditioner
from audiolm_pytorch.saving.construction import build_within
from audiolm_pytorch.saving.hub import LoadedModel, model_of
from audiolm_pytorch.saving.weights import load_weights
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.musicgen.weights import WeightNames, codec_weights_of, lm_weights_of

__all__ = [
    "MusicGenParts",
    "build_codec",
    "build_published",
    "build_transformer",
    "published_codec",
    "published_text_encoder",
]

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class MusicGenParts:
    """Arguments of the constructor of `MusicGen`."""

    transformer: MusicGenTransformer
    codec: Codec
    text_conditioner: TextEncoder | None


def build_transformer(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], names: WeightNames, where: str
) -> MusicGenTransformer:
    """Build a language model with published weights; `config` contains the arguments of its constructor."""
    transformer = _built(lambda: MusicGenTransformer(**config), weights, where)
    load_weights(transformer, lm_weights_of(transformer, weights, names, where), where)
    return transformer.eval()


def build_published(
    settings: Mapping[str, Any], model_classes: Mapping[str, str], weights: Mapping[str, Tensor], where: str
) -> nn.Module:
    """Build a model of transformers for `weights`, which the caller loads into it; see `model_of`."""
    return _built(lambda: model_of(settings, model_classes), weights, where)


def _built(build: Callable[[], Module], weights: Mapping[str, Tensor], where: str) -> Module:
    """Build a module whose sizes must be possible for `weights`; a ValueError names the weights."""
    try:
        with build_within({name: tuple(tensor.shape) for name, tensor in weights.items()}):
            return build()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def build_codec(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    num_codebooks: int,
    channels: int,
    origin: Mapping[str, Any],
    where: str,
) -> Codec:
    """Build an EnCodec with published weights; `settings` are those of an `EncodecConfig` of transformers."""
    model = build_published(settings, {"encodec": "EncodecModel"}, weights, where)
    load_weights(model, codec_weights_of(model, weights), where)
    return checked_codec(EncodecWrapper(LoadedModel(model, **origin)), num_codebooks, channels, where)


def checked_codec(codec: EncodecWrapper, num_codebooks: int, channels: int, where: str) -> Codec:
    """Check the number of codes per frame, and apply a mono codec to several channels."""
    found = channels * codec.num_quantizers
    if found != num_codebooks:
        raise ValueError(f"{where} have {found} codebooks, the language model has {num_codebooks}; use its own codec")
    return codec if channels == 1 else ChannelwiseCodec(codec, channels)


def published_codec(codec: Codec) -> EncodecWrapper:
    """Return the EnCodec of a codec for the published formats, which have no other codec."""
    inner = codec.codec if isinstance(codec, ChannelwiseCodec) else codec
    if not isinstance(inner, EncodecWrapper):
        raise ValueError(f"the published formats contain an EnCodec, not a {type(inner).__name__}; call save instead")
    return inner


def published_text_encoder(text_conditioner: TextEncoder | None) -> TextConditioner:
    """Return the T5 of a model for the published formats, which have no other text encoder."""
    if not isinstance(text_conditioner, TextConditioner) or text_conditioner.model_type != "t5":
        name = getattr(text_conditioner, "model_type", type(text_conditioner).__name__)
        raise ValueError(f"the published formats contain a T5, not a {name}; call save instead")
    return text_conditioner
