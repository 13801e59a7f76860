"""A stereo MusicGen with the weights of a mono MusicGen, as the start of its training."""

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.channelwise import ChannelwiseCodec
from audiolm_pytorch.saving.weights import load_weights
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer

__all__ = ["stereo_from_mono"]


@typed
def stereo_from_mono(mono: MusicGen) -> MusicGen:
    """Build a model of two channels that predicts, for two equal channels, what `mono` predicts for one.

    Both channels have the output heads of `mono`, and half of its embeddings, because the embeddings of both are added
    (audiocraft's guide copies the embeddings whole).
    """
    old = mono.transformer
    stream = old.layout.predicted[0]
    if stream.num_groups != 1 or mono.codec.channels != 1:
        raise ValueError(f"need a mono model, got {mono.codec.channels} channels; train it as it is")
    config = {name: value for name, value in old.config.items() if name != "token_fingerprints"}
    new = MusicGenTransformer(**{**config, "num_codebooks": 2 * stream.num_levels, "num_groups": 2})
    weights: dict[str, Tensor] = dict(old.state_dict())
    table = weights["embedding.weight"]
    # The id of the start token comes first, the empty cell comes last.
    levels = table[1:-1].unflatten(0, (stream.num_levels, -1)).repeat_interleave(2, dim=0)
    weights["embedding.weight"] = torch.cat((table[:1], levels.flatten(0, 1) / 2, table[-1:]))
    for level in range(2 * stream.num_levels):
        weights[f"heads.{level}.weight"] = old.state_dict()[f"heads.{level // 2}.weight"]
    load_weights(new, weights)
    return type(mono)(transformer=new, codec=ChannelwiseCodec(mono.codec), text_conditioner=mono.text_conditioner)
