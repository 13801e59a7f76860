"""Checkpoints of fairseq, read without fairseq: weights and settings, and the HuBERT that they are of."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.saving.hub import require_transformers
from audiolm_pytorch.saving.restricted_pickle import StandIn
from audiolm_pytorch.saving.torch_checkpoint import read_torch_checkpoint
from audiolm_pytorch.saving.weights import load_weights

__all__ = ["FairseqCheckpoint", "built_for", "conv_layers_of", "hubert_from_fairseq", "read_fairseq", "shown"]

_MOST_NESTED = 32
_MOST_LAYERS = 64
_MOST_LETTERS = 1000
_MOST_SIZE = 2**20
_LONGEST_NAME = 256
_HIGHEST_HZ = 2**20
_CONV_TERM = r"\[((?:\(\d{1,6},\d{1,6},\d{1,6}\),?)+)\](?:\*(\d{1,2}))?"
# What fairseq takes where a checkpoint's settings are silent and no shape shows it.
_HUBERT_DEFAULTS: dict[str, Any] = {
    "activation_fn": "gelu",
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
}
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}
# Parts of pretraining: targets and the projection to them.
_HUBERT_UNUSED = ("final_proj.", "label_embs_concat", "target_glu.")
_POSITIONS = "encoder.pos_conv_embed.conv."
_HUBERT_NAMES = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"feature_extractor.conv_layers.\1.conv.\2"),
    # the group norm, and the layer norm between two transpositions
    (
        r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?(weight|bias)",
        r"feature_extractor.conv_layers.\1.layer_norm.\2",
    ),
    (r"layer_norm\.(weight|bias)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"feature_projection.projection.\1"),
    (r"mask_emb", r"masked_spec_embed"),
    (r"encoder\.pos_conv\.0\.(.+)", rf"{_POSITIONS}\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.(weight|bias)", r"encoder.layers.\1.attention.\2_proj.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)", r"encoder.layers.\1.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)", r"encoder.layers.\1.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)", r"encoder.layers.\1.feed_forward.output_dense.\2"),
    (r"(encoder\.layers\.\d+\.final_layer_norm\.(?:weight|bias))", r"\1"),
    (r"(encoder\.layer_norm\.(?:weight|bias))", r"\1"),
)
# Weight norm under its two names: releases of torch and of transformers differ.
_WEIGHT_NORM = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))


@dataclass(frozen=True, eq=False)
class FairseqCheckpoint:
    """What a checkpoint of fairseq says of one model.

    Attributes:
        weights: Name to tensor, fairseq's names.
        model: Settings of the model; of older files, all settings.
        task: Settings of the task, such as the sample rate; of older files, all settings.
        source: How error messages call the file.
    """

    weights: dict[str, Tensor]
    model: dict[str, Any]
    task: dict[str, Any]
    source: str = "the checkpoint"

    @property
    def normalise_wave(self) -> bool:
        """Whether the model was trained on waves of zero mean and unit variance."""
        return self.task.get("normalize") is True

    @property
    def sample_hz(self) -> int:
        """Rate of the waves that the model was trained on (Hz)."""
        rate_hz = self.task.get("sample_rate")
        return rate_hz if isinstance(rate_hz, int) and 0 < rate_hz <= _HIGHEST_HZ else 16_000


@beartype
def read_fairseq(path: str | Path) -> FairseqCheckpoint:
    """Read a checkpoint that fairseq's trainer wrote; fairseq is not needed and nothing in the file is run.

    Args:
        path: The file, e.g. `hubert_base_ls960.pt`.

    Returns:
        Its weights on the CPU, and its settings: from `cfg` (a dictionary, or omegaconf's containers) or from `args`.

    Raises:
        ValueError: If it is missing, damaged, names anything but data, or is no checkpoint of fairseq.
    """
    found = read_torch_checkpoint(path)
    weights = found.get("model") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or not weights:
        keys = f"it is a {type(found).__name__}"
        if isinstance(found, dict):
            keys = f"it has {[key[:40] for key in sorted(key for key in found if isinstance(key, str))[:8]]}"
        raise ValueError(
            f"{path} is no checkpoint of fairseq: there is no 'model' with weights in it ({keys:.200}); give a file as "
            "published, e.g. hubert_base_ls960.pt"
        )
    strange = [name for name, value in weights.items() if not (_is_name(name) and isinstance(value, Tensor))]
    if strange:
        names = ", ".join(map(shown, strange[:4]))
        raise ValueError(f"{path} is no checkpoint of fairseq: {names} in its 'model' are no names of tensors")
    _check_overlaps(weights.values(), path)
    said = _plain(found.get("cfg")) or _plain(found.get("args"))
    settings: dict[str, Any] = said if isinstance(said, dict) else {}
    model, task = settings.get("model"), settings.get("task")
    if not isinstance(model, dict):  # an `args` is flat; where it has a `task`, that is a name
        model = task = settings
    return FairseqCheckpoint(weights, model, task if isinstance(task, dict) else {}, str(path))


def _is_name(name: Any) -> bool:
    """Whether a weight may be called so: such names are printed."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME and name.isprintable()


def _check_overlaps(tensors: Collection[Tensor], path: str | Path) -> None:
    """Refuse weights that lie upon each other: a model that was filled from them could be larger than the memory."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    there = sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in storages.values())
    if sum(tensor.numel() for tensor in tensors) > 2 * there:  # a weight may have two names
        raise ValueError(f"{path} is refused: many of its weights share the same bytes; give the file as published")


@beartype
def shown(value: Any) -> str:
    """A value out of a checkpoint as messages print it.

    Args:
        value: Anything.

    Returns:
        Text and numbers, shortened and in quotes; the type of anything else, which may be larger than the memory when
        it is written out.
    """
    if isinstance(value, str):
        return repr(value[:60])
    is_short = value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(str(value)) if is_short else f"a {type(value).__name__}"


@beartype
def built_for(weights: dict[str, Tensor], build: Callable[[], nn.Module]) -> Any:
    """Build a module that weights are to be loaded into, unless it needs far more memory than these.

    Args:
        weights: Name to tensor.
        build: Builds it. Its random weights are to be replaced: the caller's random numbers go on as if nothing had
            happened.

    Returns:
        The module.

    Raises:
        ValueError: If it has more than twice the numbers; what else differs shows when the weights are loaded.
    """
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in build().parameters())
        there = sum(tensor.numel() for tensor in weights.values())
        if wanted > 2 * there:
            raise ValueError(f"the settings ask for a model of {wanted} numbers, the weights have {there}")
        return build()


@beartype
def conv_layers_of(setting: Any) -> list[list[int]]:
    """Read fairseq's description of convolutions, which is a Python expression there.

    Args:
        setting: Like "[(512,10,5)] + [(512,3,2)] * 4": width, kernel and stride; or the list or tuple itself.

    Returns:
        `[width, kernel, stride]` of every convolution.

    Raises:
        ValueError: If it is anything else.
    """
    layers: list[Any] = []
    if isinstance(setting, str) and len(setting) <= _MOST_LETTERS:
        text = "".join(setting.split())
        if re.fullmatch(rf"{_CONV_TERM}(?:\+{_CONV_TERM})*", text):
            for term, times in re.findall(_CONV_TERM, text):
                layers += [list(map(int, layer.split(","))) for layer in re.findall(r"\(([\d,]+)\)", term)] * int(
                    times or 1
                )
    elif isinstance(setting, list | tuple) and len(setting) <= _MOST_LAYERS:
        layers = [list(layer) for layer in setting if isinstance(layer, list | tuple) and len(layer) == 3]
        layers = layers if len(layers) == len(setting) else []
    fits = (all(type(n) is int and 0 < n < _MOST_SIZE for n in layer) for layer in layers)
    if not 1 <= len(layers) <= _MOST_LAYERS or not all(fits):
        raise ValueError(
            f"conv_feature_layers {shown(setting)} is not understood; it must be like "
            "'[(512,10,5)] + [(512,3,2)] * 4': width, kernel and stride of each convolution"
        )
    return layers


@beartype
def hubert_from_fairseq(checkpoint: FairseqCheckpoint) -> Any:
    """Build the HuBERT (arXiv:2106.07447) that a checkpoint holds, as a model of transformers.

    Layer norms in the extractor, biases in the convolutions and norms before the blocks are as the checkpoint has them
    (the large models have all three); whether waves must be normalised is `checkpoint.normalise_wave`.

    Args:
        checkpoint: What `read_fairseq` gave.

    Returns:
        A `transformers.HubertModel` in eval mode, float32, its masking off.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the checkpoint is of another model, or its weights are missing, unknown or of other shapes.
    """
    transformers = require_transformers()
    _check_hubert(checkpoint)
    weights = {
        _transformers_name(name): tensor
        for name, tensor in checkpoint.weights.items()
        if not name.startswith(_HUBERT_UNUSED)
    }
    try:
        config = transformers.HubertConfig(**_hubert_config(checkpoint))
        model: nn.Module = built_for(checkpoint.weights, lambda: transformers.HubertModel(config))
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint.source} has settings or shapes that no HuBERT has: {reason}") from error
    own = model.state_dict()
    for pair in _WEIGHT_NORM:
        here = next((f"{_POSITIONS}{name}" for name in pair if f"{_POSITIONS}{name}" in own), None)
        there = next((f"{_POSITIONS}{name}" for name in pair if f"{_POSITIONS}{name}" in weights), None)
        if here and there:
            weights[here] = weights.pop(there)
    load_weights(model, weights, checkpoint.source)
    return model.eval()


def _check_hubert(checkpoint: FairseqCheckpoint) -> None:
    """Say what a checkpoint is where it is no HuBERT as it was pretrained."""
    name = checkpoint.model.get("_name") or checkpoint.model.get("arch")
    mend = "give a pretrained HuBERT, e.g. hubert_base_ls960.pt"
    if any(weight.startswith("w2v_encoder.") for weight in checkpoint.weights):
        raise ValueError(f"{checkpoint.source} is a fine-tuned model, whose encoder is another; {mend}")
    if not any(weight.startswith("encoder.layers.") for weight in checkpoint.weights):
        raise ValueError(f"{checkpoint.source} holds no HuBERT: it has no weights encoder.layers.*; {mend}")
    if isinstance(name, str) and not name.startswith("hubert"):
        raise ValueError(f"{checkpoint.source} holds a {shown(name)}, not a HuBERT; {mend}")
    if not checkpoint.model:
        raise ValueError(f"{checkpoint.source} has neither cfg nor args, so its settings are not known; {mend}")


def _transformers_name(name: str) -> str:
    """The name in transformers; unknown names stay, and are refused when the weights are loaded."""
    for pattern, theirs in _HUBERT_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, theirs, name)
    return name


def _hubert_config(checkpoint: FairseqCheckpoint) -> dict[str, Any]:
    """Settings of transformers' HuBERT: what is said, else what shapes show, else what fairseq takes."""
    weights = checkpoint.weights
    said = {name: value for name, value in checkpoint.model.items() if value is not None}

    def setting(name: str, kind: type, otherwise: Any) -> Any:
        value: Any = said.get(name, otherwise)
        is_out_of_range = kind is int and isinstance(value, int) and not 1 <= value < _MOST_SIZE
        if type(value) is not kind or is_out_of_range:
            raise ValueError(f"{name} is {shown(value)}")
        return value

    def size(name: str, axis: int) -> int | None:
        tensor = weights.get(name)
        return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None

    num_layers = len({*re.findall(r"^encoder\.layers\.(\d+)\.", "\n".join(weights), re.MULTILINE)})
    said_layers = setting("encoder_layers", int, num_layers)
    if said_layers != num_layers or num_layers > _MOST_LAYERS:
        raise ValueError(f"encoder_layers is {said_layers}, the weights are of {num_layers} (at most {_MOST_LAYERS})")
    convolutions = conv_layers_of(said.get("conv_feature_layers", _HUBERT_DEFAULTS["conv_feature_layers"]))
    is_layered = "feature_extractor.conv_layers.0.2.1.weight" in weights
    mode = setting("extractor_mode", str, "layer_norm" if is_layered else "default")
    activation = setting("activation_fn", str, _HUBERT_DEFAULTS["activation_fn"])
    if mode not in ("default", "layer_norm") or activation not in _ACTIVATIONS:
        raise ValueError(f"extractor_mode {mode[:40]!r} with activation_fn {activation[:40]!r}")
    width = size("encoder.layer_norm.weight", 0)
    positions = next((f"encoder.pos_conv.0.{n}" for n in _WEIGHT_NORM[1] if f"encoder.pos_conv.0.{n}" in weights), "")
    fan_in = size(positions, 1)
    # embeddings that masked frames had stay in the model, but nothing is masked
    mask = dict(apply_spec_augment=False, mask_time_prob=0.05 if "mask_emb" in weights else 0.0, mask_feature_prob=0.0)
    return dict(
        hidden_size=setting("encoder_embed_dim", int, width),
        num_hidden_layers=num_layers,
        num_attention_heads=setting("encoder_attention_heads", int, _HUBERT_DEFAULTS["encoder_attention_heads"]),
        intermediate_size=setting("encoder_ffn_embed_dim", int, size("encoder.layers.0.fc1.weight", 0)),
        hidden_act=_ACTIVATIONS[activation],
        conv_dim=[layer[0] for layer in convolutions],
        conv_kernel=[layer[1] for layer in convolutions],
        conv_stride=[layer[2] for layer in convolutions],
        conv_bias=setting("conv_bias", bool, "feature_extractor.conv_layers.0.0.bias" in weights),
        feat_extract_norm="layer" if mode == "layer_norm" else "group",
        do_stable_layer_norm=setting("layer_norm_first", bool, _HUBERT_DEFAULTS["layer_norm_first"]),
        num_conv_pos_embeddings=setting("conv_pos", int, size(positions, 2)),
        num_conv_pos_embedding_groups=setting("conv_pos_groups", int, width and fan_in and width // fan_in),
        **mask,
    )


def _plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """Settings as plain values: omegaconf's containers and nodes, a Namespace and members of enums unwrapped.

    What is missing, refers elsewhere or is no setting becomes None. Each object is looked at once, since a small file
    can hold a tree with more leaves than there is memory.
    """
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str):
        return None if isinstance(value, str) and (value == "???" or value.startswith("${")) else value
    if depth > _MOST_NESTED:
        raise ValueError("the settings of the checkpoint are nested too deeply; give the file as published")
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = None
    if isinstance(value, StandIn):
        # not `fields`, which is made anew each time: what is known by its id must stay where it is
        fields = value.state if isinstance(value.state, dict) else {}
        if value.name.startswith("omegaconf."):
            made = _plain(fields.get("_content", fields.get("_val")), seen, depth + 1)
        elif value.name == "argparse.Namespace":
            made = _plain(fields, seen, depth + 1)
        else:
            made = _plain(value.arguments[0], seen, depth + 1) if len(value.arguments) == 1 else None
    elif isinstance(value, dict):
        made = {name: _plain(item, seen, depth + 1) for name, item in value.items() if isinstance(name, str)}
    elif isinstance(value, list | tuple):
        made = [_plain(item, seen, depth + 1) for item in value]
    else:
        made = None
    seen[id(value)] = made
    return made
