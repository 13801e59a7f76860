"""Names of the weights of MusicGen in the formats of audiocraft and of transformers, and their conversion."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer

__all__ = [
    "AUDIOCRAFT",
    "TRANSFORMERS",
    "WeightNames",
    "codec_weights",
    "codec_weights_of",
    "lm_weights",
    "lm_weights_of",
]

_LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class WeightNames:
    """Names of the weights of the language model in a published format; `{}` is the number of a block or of a level.

    Several names mean that their weights together, in this order, are one weight of this library. `cross` is the
    reverse: keys and values, which are one weight of this library, belong to the weight of the queries.
    """

    embedding: str
    head: str
    norm: str
    text: str
    melody: str
    block: str
    norms: tuple[str, str, str]  # of self-attention, cross-attention and feed-forward layer
    self_attention: tuple[str, ...]
    self_output: str
    cross_attention: tuple[str, ...]
    cross_output: str
    feed_forward: tuple[str, str]


AUDIOCRAFT = WeightNames(
    embedding="emb.{}.weight",
    head="linears.{}.weight",
    norm="out_norm",
    text="condition_provider.conditioners.description.output_proj",
    melody="condition_provider.conditioners.self_wav.output_proj",
    block="transformer.layers.{}.",
    norms=("norm1", "norm_cross", "norm2"),
    self_attention=("self_attn.in_proj_weight",),
    self_output="self_attn.out_proj.weight",
    cross_attention=("cross_attention.in_proj_weight",),
    cross_output="cross_attention.out_proj.weight",
    feed_forward=("linear1.weight", "linear2.weight"),
)
_PARTS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
TRANSFORMERS = WeightNames(
    embedding="decoder.model.decoder.embed_tokens.{}.weight",
    head="decoder.lm_heads.{}.weight",
    norm="decoder.model.decoder.layer_norm",
    text="enc_to_dec_proj",
    melody="audio_enc_to_dec_proj",
    block="decoder.model.decoder.layers.{}.",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    self_attention=tuple(f"self_attn.{part}" for part in _PARTS),
    self_output="self_attn.out_proj.weight",
    cross_attention=tuple(f"encoder_attn.{part}" for part in _PARTS),
    cross_output="encoder_attn.out_proj.weight",
    feed_forward=("fc1.weight", "fc2.weight"),
)

# Of the codec: audiocraft's names -> transformers' names.
_CODEC_NAMES = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv|convtr)\.\1\.", r".conv."),
    (r"^quantizer\.vq\.layers\.", r"quantizer.layers."),
    (r"\._codebook\.", r".codebook."),
)
# Weight norms: the two weights of a layer in old and in new versions of torch.
_NORM_NAMES = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))


def _groups(transformer: MusicGenTransformer, names: WeightNames) -> Iterator[tuple[list[str], list[str]]]:
    """Yield names of this library and names of the format, whose weights are equal after concatenation."""
    specs = transformer.fuser.specs
    if transformer.melody_way != "prepend":
        raise ValueError(
            f"the published formats have melodies as a prefix, not melody_way={transformer.melody_way!r}; "
            "call save instead"
        )
    levels = range(transformer.layout.predicted[0].num_levels)
    yield ["embedding.weight"], [names.embedding.format(level) for level in levels]
    for level in levels:
        yield [f"heads.{level}.weight"], [names.head.format(level)]
    pairs = {"transformer.norm": names.norm}
    pairs |= {f"fuser.entries.{name}.projection": getattr(names, name) for name in ("text", "melody") if name in specs}
    has_cross = transformer.transformer.blocks[0].cross is not None
    for index in range(transformer.transformer.depth):
        own, block = f"transformer.blocks.{index}.", names.block.format(index)
        norms = dict(zip(("attention_norm", "cross_norm", "feed_forward_norm"), names.norms))
        pairs |= {own + part: block + norm for part, norm in norms.items() if has_cross or part != "cross_norm"}
        yield [f"{own}attention.to_qkv.weight"], [block + name for name in names.self_attention]
        yield [f"{own}attention.to_out.weight"], [block + names.self_output]
        if has_cross:
            yield (
                [f"{own}cross.to_q.weight", f"{own}cross.to_kv.weight"],
                [block + name for name in names.cross_attention],
            )
            yield [f"{own}cross.to_out.weight"], [block + names.cross_output]
        for part, name in zip(("up", "down"), names.feed_forward):
            yield [f"{own}feed_forward.{part}.weight"], [block + name]
    for part, name in pairs.items():
        for leaf in _LEAVES:
            yield [f"{part}.{leaf}"], [f"{name}.{leaf}"]


@typed
def lm_weights_of(
    transformer: MusicGenTransformer, weights: Mapping[str, Tensor], names: WeightNames, where: str
) -> dict[str, Tensor]:
    """Convert the published weights of a language model to the weights of this library, for `load_weights`.

    `transformer` can be on the meta device. A ValueError that starts with `where` lists missing and unknown weights.
    """
    own = transformer.state_dict()
    groups = list(_groups(transformer, names))
    needed = {name for _, published in groups for name in published}
    missing, unknown = sorted(needed - weights.keys()), sorted(weights.keys() - needed)
    if missing or unknown:
        raise ValueError(
            f"{where} are not the weights of this MusicGen: {len(missing)} are missing {missing[:4]}, "
            f"{len(unknown)} are unknown {unknown[:4]}"
        )
    converted: dict[str, Tensor] = {}
    for ours, published in groups:
        value = torch.cat([weights[name] for name in published]) if len(published) > 1 else weights[published[0]]
        if ours == ["embedding.weight"]:
            # The id of the start token, which is never used, comes first; the empty cell comes last.
            value = torch.cat((value.new_zeros(1, value.shape[1]), value, value.new_zeros(1, value.shape[1])))
        sizes = [own[name].shape[0] for name in ours]
        if sum(sizes) != len(value):
            raise ValueError(f"{where}: {published[0]} has the shape {tuple(value.shape)}, need {sum(sizes)} rows")
        converted |= dict(zip(ours, value.split(sizes)))
    return converted


@typed
def lm_weights(transformer: MusicGenTransformer, names: WeightNames) -> dict[str, Tensor]:
    """Convert the weights of a language model to the names and shapes of a published format."""
    own, converted = transformer.state_dict(), dict[str, Tensor]()
    for ours, published in _groups(transformer, names):
        value = torch.cat([own[name] for name in ours])
        value = value[1:-1] if ours == ["embedding.weight"] else value
        parts = value.chunk(len(published))
        converted |= {name: part.detach().clone() for name, part in zip(published, parts)}
    return converted


@typed
def codec_weights_of(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an EnCodec in either format for an `EncodecModel` of transformers.

    The names of normalised weights depend on the version of torch that wrote the file.
    """
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, replacement in _CODEC_NAMES:
            name = re.sub(pattern, replacement, name)
        for pair in _NORM_NAMES:
            layer = name.removesuffix(pair[0]).removesuffix(pair[1])
            if layer != name:
                name = next(layer + leaf for leaf in pair if layer + leaf in own or leaf == pair[1])
        renamed[name] = tensor
    return renamed


@typed
def codec_weights(model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of an `EncodecModel` of transformers for audiocraft."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for old, new in _NORM_NAMES:
            name = name.replace(new, old)
        if ".conv." in name:
            layer = model.get_submodule(name[: name.rindex(".conv.")] + ".conv")
            kind = "convtr" if isinstance(layer, nn.ConvTranspose1d) else "conv"
            name = name.replace(".conv.", f".{kind}.{kind}.")
        name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
        name = re.sub(r"^quantizer\.layers\.", r"quantizer.vq.layers.", name)
        renamed[name.replace(".codebook.", "._codebook.")] = tensor.detach().clone()
    return renamed
