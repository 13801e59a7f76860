"""Conversion of the published TensorFlow weights of musicnn, with which the included weights were made."""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from musiclm_pytorch.evaluation.musicnn import MusicNN


def converted_musicnn(arrays: Mapping[str, Tensor], tags: Sequence[str]) -> MusicNN:
    """Build the network from the arrays of the published checkpoint, with their names and layouts."""
    network = MusicNN(tags=tags)
    convolutions = [*network.front, *network.middle]
    norms = [network.input_norm, *(part.norm for part in convolutions), network.pooled_norm, network.dense_norm]
    state = {}
    for number, norm in enumerate(norms):
        prefix = _numbered("batch_normalization", number)
        names = ("gamma", "weight"), ("beta", "bias"), ("moving_mean", "running_mean")
        for theirs, ours in (*names, ("moving_variance", "running_var")):
            state[norm, ours] = arrays[f"{prefix}/{theirs}"]
    for number, part in enumerate(convolutions):
        kernel = rearrange(arrays[f"{_numbered('conv2d', number)}/kernel"], "h w i o -> o i h w")
        is_middle = part.conv.weight.ndim == 3
        state[part.conv, "weight"] = rearrange(kernel, "o 1 f c -> o c f") if is_middle else kernel
        state[part.conv, "bias"] = arrays[f"{_numbered('conv2d', number)}/bias"]
    for number, dense in enumerate((network.dense, network.output)):
        state[dense, "weight"] = arrays[f"{_numbered('dense', number)}/kernel"].T
        state[dense, "bias"] = arrays[f"{_numbered('dense', number)}/bias"]
    with torch.no_grad():
        for (module, name), value in state.items():
            getattr(module, name).copy_(value)
    return network.eval().requires_grad_(False)


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"
