"""Read weights and settings of fairseq checkpoints without fairseq, and build HuBERT models of transformers."""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.hub import require_transformers
from audiolm_pytorch.saving.restricted_pickle import RefusedFileError, StandIn, one_line_errors
from audiolm_pytorch.saving.torch_checkpoint import TorchCheckpoint
from audiolm_pytorch.saving.weights import load_weights

__all__ = ["FairseqCheckpoint", "build_for", "conv_layers_of", "hubert_from_fairseq", "quoted", "read_fairseq"]

_MAX_NESTED = 32
_MAX_LAYERS = 64
_MAX_NAME_LENGTH = 256
_SIZES = range(1, 2**20)
_CONV_LAYERS = r"\[((?:\(\d{1,6},\d{1,6},\d{1,6}\),?)+)\](?:\*(\d{1,2}))?"
# fairseq's default, for settings without an entry.
_HUBERT_CONVOLUTIONS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
# Weights that only pretraining uses: targets, and the projection to them.
_HUBERT_UNUSED = ("final_proj.", "label_embs_concat", "target_glu.")
_HUBERT_NAMES = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"feature_extractor.conv_layers.\1.conv.\2"),
    # Group norm is entry 2; layer norm is 2.1, between two transpositions.
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?(\w+)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"layer_norm\.(weight|bias)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"feature_projection.projection.\1"),
    (r"mask_emb", r"masked_spec_embed"),
    (r"encoder\.pos_conv\.0\.(.+)", r"encoder.pos_conv_embed.conv.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.(weight|bias)", r"encoder.layers.\1.attention.\2_proj.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)", r"encoder.layers.\1.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)", r"encoder.layers.\1.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)", r"encoder.layers.\1.feed_forward.output_dense.\2"),
)
# Names of weight norm in older and later releases of torch.
_WEIGHT_NORM = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))


@dataclass(frozen=True, eq=False)
class FairseqCheckpoint:
    """Weights (by their names in fairseq) and settings of a fairseq checkpoint; `source` is the file name for errors.

    In older files, settings of model and task are not separate, so that `model` and `task` contain all settings.
    """

    weights: dict[str, Tensor]
    model: dict[str, Any]
    task: dict[str, Any]
    source: str = "the checkpoint"

    def renamed_weights(self, patterns: tuple[tuple[str, str], ...], unused: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the weights, renamed by `patterns`, except weights whose names start with a prefix in `unused`."""
        used = {name: tensor for name, tensor in self.weights.items() if not name.startswith(unused)}
        return {_renamed(name, patterns): tensor for name, tensor in used.items()}

    def setting(self, name: str, kind: type, allowed: Container[Any], default: Any = None) -> Any:
        """Return a setting of the model; raise a ValueError for a value of another type, or not in `allowed`."""
        value = self.model.get(name)
        value = default if value is None else value
        if type(value) is not kind or value not in allowed:
            raise ValueError(f"the setting {name} in args or cfg has the unsupported value {quoted(value)}")
        return value

    @property
    def normalise_wave(self) -> bool:
        """Whether the model was trained on waves of zero mean and unit variance."""
        return self.task.get("normalize") is True

    @property
    def sample_hz(self) -> int:
        """Sample rate of the waves that the model was trained on, in Hz."""
        rate_hz = self.task.get("sample_rate")
        return rate_hz if isinstance(rate_hz, int) and rate_hz in _SIZES else 16_000


@typed
def read_fairseq(path: str | Path) -> FairseqCheckpoint:
    """Read a checkpoint of the fairseq trainer, such as `hubert_base_ls960.pt`; no code in the file is run.

    Settings are read from the entry `cfg` (a dictionary, or omegaconf containers) or from the entry `args`.
    """
    checkpoint = TorchCheckpoint(path)
    content, advice = checkpoint.content, "give a file as published, e.g. hubert_base_ls960.pt"
    weights = content.get("model")
    with one_line_errors(path, advice):
        if type(weights) is not dict or not weights:
            keys = ", ".join(quoted(key) for key in list(content)[:8])
            raise RefusedFileError(
                f"the file is not a checkpoint of fairseq; it has no 'model' with weights, only {keys}"
            )
        for name in weights:
            if not isinstance(name, str) or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
                raise RefusedFileError(f"in the file, the key {quoted(name)} in 'model' is not the name of a tensor")
    tensors = {name: checkpoint.tensor(value) for name, value in weights.items()}
    storage_bytes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    with one_line_errors(path, advice):
        # Twice the bytes are accepted, since a weight may have two names.
        if sum(tensor.nbytes for tensor in tensors.values()) > 2 * sum(storage_bytes.values()):
            raise RefusedFileError("the file is refused: many of its weights share the same bytes")
        settings = _plain(content.get("cfg")) or _plain(content.get("args"))
    settings = settings if isinstance(settings, dict) else {}
    model, task = settings.get("model"), settings.get("task")
    if not isinstance(model, dict):  # `args` is flat, and its `task` is a name
        model = task = settings
    return FairseqCheckpoint(tensors, model, task if isinstance(task, dict) else {}, str(path))


def quoted(value: Any) -> str:
    """Format a value for a message: short text and numbers in quotes, any other value by its type."""
    if isinstance(value, str):
        return repr(value[:60])
    is_short = value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(str(value)) if is_short else f"a {type(value).__name__}"


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """Rename a weight by the first matching pattern in `patterns`; a name without a match is returned unchanged."""
    for pattern, replacement in patterns:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def build_for(checkpoint: FairseqCheckpoint, build: Callable[[], nn.Module]) -> Any:
    """Build a module for the weights of a checkpoint; the global random generator does not change.

    A ValueError is raised if the settings or shapes in the file are not valid, or if the module has more than twice as
    many parameters as the checkpoint. Parameters are counted before memory is allocated.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                needed = sum(parameter.numel() for parameter in build().parameters())
            available = sum(tensor.numel() for tensor in checkpoint.weights.values())
            if needed > 2 * available:
                raise ValueError(f"the settings need a model of {needed} parameters, the file has {available} numbers")
            return build()
    except (TypeError, ValueError, RuntimeError, OverflowError, ZeroDivisionError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint.source} has no valid settings: {reason}; pass the file as published") from error


def conv_layers_of(setting: Any) -> list[list[int]]:
    """Parse a fairseq setting like "[(512,10,5)] + [(512,3,2)] * 4" to [width, kernel, stride] of each convolution."""
    text = "".join(setting.split()) if isinstance(setting, str) and len(setting) <= 1000 else ""
    layers: list[list[int]] = []
    if re.fullmatch(rf"{_CONV_LAYERS}(?:\+{_CONV_LAYERS})*", text):
        for group, times in re.findall(_CONV_LAYERS, text):
            layers += [[*map(int, layer)] for layer in re.findall(r"(\d+),(\d+),(\d+)", group)] * int(times or 1)
    if not 1 <= len(layers) <= _MAX_LAYERS or not all(min(layer) > 0 for layer in layers):
        raise ValueError(
            f"conv_feature_layers {quoted(setting)} cannot be parsed; width, kernel and stride of each convolution "
            "are needed, like '[(512,10,5)] + [(512,3,2)] * 4'"
        )
    return layers


@typed
def hubert_from_fairseq(checkpoint: FairseqCheckpoint) -> Any:
    """Build a `transformers.HubertModel` (arXiv:2106.07447) in eval mode and float32 from a fairseq checkpoint.

    Base and large models are supported. The masking of training is switched off.
    """
    transformers = require_transformers()
    _check_hubert(checkpoint)
    weights = checkpoint.renamed_weights(_HUBERT_NAMES, _HUBERT_UNUSED)
    model: nn.Module = build_for(
        checkpoint, lambda: transformers.HubertModel(transformers.HubertConfig(**_hubert_config(checkpoint)))
    )
    conv = "encoder.pos_conv_embed.conv."
    for old, new in _WEIGHT_NORM:
        if conv + new in model.state_dict() and conv + old in weights:
            weights[conv + new] = weights.pop(conv + old)
    load_weights(model, weights, checkpoint.source)
    return model.eval()


def _check_hubert(checkpoint: FairseqCheckpoint) -> None:
    name = checkpoint.model.get("_name") or checkpoint.model.get("arch")
    advice = "give a pretrained HuBERT, e.g. hubert_base_ls960.pt"
    if any(weight.startswith("w2v_encoder.") for weight in checkpoint.weights):
        raise ValueError(f"{checkpoint.source} is a fine-tuned model, which is not supported; {advice}")
    if not any(weight.startswith("encoder.layers.") for weight in checkpoint.weights):
        raise ValueError(f"{checkpoint.source} has no HuBERT: the weights encoder.layers.* are missing; {advice}")
    if isinstance(name, str) and not name.startswith("hubert"):
        raise ValueError(f"{checkpoint.source} has a model {quoted(name)}, not a HuBERT; {advice}")
    if not checkpoint.model:
        raise ValueError(f"{checkpoint.source} has no settings: the entries cfg and args are missing; {advice}")


def _hubert_config(checkpoint: FairseqCheckpoint) -> dict[str, Any]:
    """Return the config of transformers' HuBERT: sizes from the weights, other values from the fairseq settings."""
    weights, setting = checkpoint.weights, checkpoint.setting

    def shape(name: str, num_axes: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != num_axes:
            raise ValueError(f"the weight {_renamed(name, _HUBERT_NAMES)} is missing or of another shape")
        return tuple(weights[name].shape)

    num_layers = len({*re.findall(r"^encoder\.layers\.(\d+)\.", "\n".join(weights), re.MULTILINE)})
    expected_layers = setting("encoder_layers", int, _SIZES, default=num_layers)
    if expected_layers != num_layers or num_layers > _MAX_LAYERS:
        raise ValueError(
            f"the setting encoder_layers is {expected_layers}, but the file has weights of {num_layers} layers "
            f"(at most {_MAX_LAYERS} are supported)"
        )
    conv_layers = conv_layers_of(checkpoint.model.get("conv_feature_layers") or _HUBERT_CONVOLUTIONS)
    is_layer_norm = "feature_extractor.conv_layers.0.2.1.weight" in weights
    modes = ("layer_norm", "default") if is_layer_norm else ("default", "layer_norm")
    mode = setting("extractor_mode", str, modes, default=modes[0])
    (width,) = shape("encoder.layer_norm.weight", 1)
    _, group_width, num_positions = shape("encoder.pos_conv.0.weight_v", 3)
    return dict(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=setting("encoder_attention_heads", int, _SIZES, default=12),
        intermediate_size=shape("encoder.layers.0.fc1.weight", 2)[0],
        hidden_act=setting("activation_fn", str, ("gelu", "relu"), default="gelu"),
        conv_dim=[width for width, _, _ in conv_layers],
        conv_kernel=[kernel for _, kernel, _ in conv_layers],
        conv_stride=[stride for _, _, stride in conv_layers],
        conv_bias="feature_extractor.conv_layers.0.0.bias" in weights,
        feat_extract_norm="layer" if mode == "layer_norm" else "group",
        do_stable_layer_norm=setting("layer_norm_first", bool, (False, True), default=False),
        num_conv_pos_embeddings=num_positions,
        num_conv_pos_embedding_groups=width // group_width,
        apply_spec_augment=False,
        # The embedding of masked frames stays in the model where the checkpoint has it.
        mask_time_prob=0.05 if "mask_emb" in weights else 0.0,
        mask_feature_prob=0.0,
    )


def _plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """Convert omegaconf containers, Namespaces and enum members in settings to dictionaries, lists and values.

    Missing values ("???"), references ("${...}") and other objects become None. Each object is converted once, because
    a small file can describe a tree with more leaves than fit into memory.
    """
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str):
        return None if isinstance(value, str) and (value == "???" or value.startswith("${")) else value
    if depth > _MAX_NESTED:
        raise RefusedFileError("the file is refused: its settings are nested too deeply")
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = None
    plain: Any = None
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        if value.name.startswith("omegaconf."):
            plain = _plain(state.get("_content", state.get("_val")), seen, depth + 1)
        elif value.name == "argparse.Namespace":
            plain = _plain(state, seen, depth + 1)
        elif len(value.arguments) == 1:
            plain = _plain(value.arguments[0], seen, depth + 1)
    elif isinstance(value, dict):
        plain = {name: _plain(item, seen, depth + 1) for name, item in value.items() if isinstance(name, str)}
    elif isinstance(value, list | tuple):
        plain = [_plain(item, seen, depth + 1) for item in value]
    seen[id(value)] = plain
    return plain
