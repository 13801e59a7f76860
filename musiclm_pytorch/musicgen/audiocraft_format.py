"""Read and write a MusicGen in the format of audiocraft: two files of `torch.save`, read without running code.

`state_dict.bin` contains the language model, `compression_state_dict.bin` the codec. Each file has the weights
(`best_state`) and the settings (`xp.cfg`, a YAML text). The text encoder is not in the files.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import exact_div
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.conditioning.published_text import TextConditioner
from audiolm_pytorch.saving.files import staged_files
from audiolm_pytorch.saving.modules import converted
from audiolm_pytorch.saving.ownership import check_overwrite
from audiolm_pytorch.saving.torch_checkpoint import TorchCheckpoint
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.parts import (
    MusicGenParts,
    build_codec,
    build_transformer,
    checked_codec,
    published_codec,
    published_text_encoder,
)
from musiclm_pytorch.musicgen.transformers_format import check_text_encoder_overwrite, write_text_encoder
from musiclm_pytorch.musicgen.weights import AUDIOCRAFT, codec_weights, lm_weights

__all__ = ["AUDIOCRAFT_FILES", "read_audiocraft", "write_audiocraft"]

AUDIOCRAFT_FILES = ("state_dict.bin", "compression_state_dict.bin")
# Folder beside the files with the text encoder; this library writes it, audiocraft does not.
_TEXT_FOLDER = "text_encoder"
_MAX_SETTINGS_CHARACTERS = 2**20
_WINDOW = "condition_provider.conditioners.self_wav.chroma.spec.window"  # a Hann window
# Settings that this library supports only with these values; a missing setting has the value.
_FIXED_LM: dict[str, Any] = {
    **{"norm_first": True, "bias_proj": False, "bias_ff": False, "bias_attn": False, "activation": "gelu"},
    **{"norm": "layer_norm", "positional_embedding": "sin", "max_period": 10000, "positional_scale": 1.0},
    **{"qk_layer_norm": False, "qk_layer_norm_cross": False, "layer_scale": None, "kv_repeat": 1, "xpos": False},
    **{"causal": True, "past_context": None},
}
_FIXED_CODEC: dict[str, Any] = {"activation": "ELU", "norm": "weight_norm", "disable_norm_outer_blocks": 0}


def read_audiocraft(
    folder: Path, origin: Mapping[str, Any], text_conditioner: TextEncoder | None, **hub: Any
) -> MusicGenParts:
    """Read a model of audiocraft. Hub arguments are for text encoders and codecs that the files only name."""
    path = folder / AUDIOCRAFT_FILES[0]
    settings, weights = _read(path)
    lm, where = settings.get("transformer_lm", {}), f"the weights in {path}"
    _check_fixed(path, lm, _FIXED_LM)
    stereo = settings.get("interleave_stereo_codebooks", {})
    channels = 2 if stereo.get("use") else 1
    if stereo.get("per_timestep"):
        raise ValueError(f"{path}: interleave_stereo_codebooks.per_timestep is not supported")
    _check_pattern(path, settings.get("codebooks_pattern", {}), int(lm["n_q"]), channels)
    conditioners, fuser = settings.get("conditioners", {}), settings.get("fuser", {})
    has_melody = "self_wav" in conditioners
    _check_conditions(path, conditioners, fuser)
    codec = _read_codec(folder / AUDIOCRAFT_FILES[1], int(lm["n_q"]), channels, origin, **hub)
    seconds = settings.get("dataset", {}).get("segment_duration", 30)
    chroma = conditioners.get("self_wav", {}).get("chroma_stem", {})
    hop_samples = 2 ** int(chroma.get("radix2_exp", 14)) // 4
    weights = {name: tensor for name, tensor in weights.items() if name != _WINDOW}
    if text_conditioner is None and "description" in conditioners:
        text_conditioner = _text_encoder(folder, str(conditioners["description"]["t5"]["name"]), **hub)
    transformer = build_transformer(
        {
            "dim": lm["dim"],
            "depth": lm["num_layers"],
            "heads": lm["num_heads"],
            "dim_head": exact_div(lm["dim"], lm["num_heads"], "dim"),
            "ff_mult": lm.get("hidden_scale", 4),
            "codebook_size": lm["card"],
            "num_codebooks": lm["n_q"],
            "num_groups": channels,
            "rate_hz": f"{codec.target_sample_hz}/{codec.downsample_factor}",
            "text_dim": None if text_conditioner is None else text_conditioner.dim,
            "melody_frames": 1 + int(seconds * chroma.get("sample_rate", 32000)) // hop_samples if has_melody else None,
            "max_seconds": seconds,
        },
        {name: tensor.float() for name, tensor in weights.items()},
        AUDIOCRAFT,
        where,
    )
    return MusicGenParts(transformer, codec, text_conditioner)


def write_audiocraft(folder: Path, parts: MusicGenParts, dtype: torch.dtype | None = None) -> None:
    """Write a model that audiocraft can load, and its text encoder in the folder `text_encoder`."""
    main, other = (folder / name for name in AUDIOCRAFT_FILES)
    check_overwrite(main, ("format_version",), [other])
    check_text_encoder_overwrite(folder / _TEXT_FOLDER)
    transformer, codec = parts.transformer, published_codec(parts.codec)
    text_conditioner = published_text_encoder(parts.text_conditioner)
    stream, has_melody = transformer.layout.predicted[0], transformer.melody_frames is not None
    stack, config, sample_hz = transformer.transformer, codec.model.config, codec.target_sample_hz
    t5 = {"name": _t5_name(text_conditioner), "finetune": False, "normalize_text": False, "word_dropout": 0.0}
    conditioners: dict[str, Any] = {"description": {"model": "t5", "t5": t5}}
    fuser: dict[str, Any] = {"cross": ["description"], "prepend": [], "sum": [], "input_interpolate": []}
    weights = lm_weights(transformer, AUDIOCRAFT)
    if has_melody:
        fuser |= {"cross": [], "prepend": ["self_wav", "description"]}
        chroma = {"sample_rate": 32000, "n_chroma": ChromaConditioner.num_classes, "radix2_exp": 14, "argmax": True}
        conditioners["self_wav"] = {"model": "chroma_stem", "chroma_stem": chroma}
        weights[_WINDOW] = torch.hann_window(2**14)
    settings: dict[str, Any] = {
        "sample_rate": sample_hz,
        "channels": parts.codec.channels,
        "dataset": {"segment_duration": transformer.max_seconds},
        "transformer_lm": {
            **{name: value for name, value in _FIXED_LM.items() if name in ("norm_first", "activation", "norm")},
            **{"bias_proj": False, "bias_ff": False, "bias_attn": False, "positional_embedding": "sin"},
            **{"dim": stack.dim, "num_heads": stack.heads, "num_layers": stack.depth, "causal": True},
            "hidden_scale": transformer.config["ff_mult"],
            **{"n_q": stream.num_levels, "card": stream.vocab_size, "dropout": transformer.config["dropout"]},
        },
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {"delays": _delays(stream.num_levels, stream.num_groups), "flatten_first": 0, "empty_initial": 0},
        },
        "fuser": fuser,
        "conditioners": conditioners,
        "classifier_free_guidance": {"training_dropout": transformer.cond_drop_prob, "inference_coef": 3.0},
        "interleave_stereo_codebooks": {"use": stream.num_groups == 2, "per_timestep": False},
        "compression_model_n_q": stream.num_levels,
    }
    causal, rvq = config.use_causal_conv, {"n_q": codec.num_quantizers, "bins": codec.codebook_size}
    codec_settings = {
        **{"sample_rate": sample_hz, "channels": codec.channels, "compression_model": "encodec"},
        "encodec": {
            **{"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": sample_hz, "channels": codec.channels},
            **{"causal": causal, "renormalize": config.normalize},
        },
        "seanet": {
            **{ours: getattr(config, theirs) for ours, theirs in _SEANET.items()},
            **{"causal": causal, "channels": codec.channels, "true_skip": not config.use_conv_shortcut},
            **{"activation": "ELU", "decoder": {"trim_right_ratio": config.trim_right_ratio}},
        },
        "rvq": rvq,
    }
    write_text_encoder(folder / _TEXT_FOLDER, text_conditioner)
    with staged_files(folder) as stage:
        _write(stage / AUDIOCRAFT_FILES[1], codec_weights(codec.model), codec_settings, None)
        _write(stage / AUDIOCRAFT_FILES[0], weights, settings, dtype)


# Settings of SEANet in audiocraft, and in the `EncodecConfig` of transformers.
_SEANET = {
    **{"dimension": "hidden_size", "n_filters": "num_filters", "n_residual_layers": "num_residual_layers"},
    **{"ratios": "upsampling_ratios", "norm": "norm_type", "kernel_size": "kernel_size", "pad_mode": "pad_mode"},
    **{
        "last_kernel_size": "last_kernel_size",
        "residual_kernel_size": "residual_kernel_size",
        "lstm": "num_lstm_layers",
    },
    **{"dilation_base": "dilation_growth_rate", "compress": "compress"},
}


def _read_codec(path: Path, num_codebooks: int, channels: int, origin: Mapping[str, Any], **hub: Any) -> Codec:
    content = TorchCheckpoint(path)
    named = content.content.get("pretrained")
    if named is not None:
        if not isinstance(named, str):
            raise ValueError(f"{path} must name a pretrained codec, got {named!r:.80}")
        return checked_codec(EncodecWrapper(named, **hub), num_codebooks, channels, f"the codecs {named}")
    settings, weights = _read(path)
    seanet, rvq, encodec = (settings.get(name, {}) for name in ("seanet", "rvq", "encodec"))
    _check_fixed(path, seanet, _FIXED_CODEC)
    sample_hz, ratios = int(encodec["sample_rate"]), list(seanet["ratios"])
    rate_hz = sample_hz / torch.tensor(ratios).prod().item()
    config = {
        "model_type": "encodec",
        **{theirs: seanet[ours] for ours, theirs in _SEANET.items()},
        "upsampling_ratios": ratios,
        "target_bandwidths": [int(rvq["n_q"]) * log2(int(rvq["bins"])) * rate_hz / 1000],
        **{"sampling_rate": sample_hz, "audio_channels": encodec["channels"], "normalize": encodec["renormalize"]},
        **{"chunk_length_s": None, "overlap": None, "codebook_size": rvq["bins"], "codebook_dim": seanet["dimension"]},
        **{"use_causal_conv": seanet["causal"], "use_conv_shortcut": not seanet["true_skip"]},
        "trim_right_ratio": seanet.get("decoder", {}).get("trim_right_ratio", 1.0),
    }
    return build_codec(config, weights, num_codebooks, channels, origin, f"the weights in {path}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the settings and the weights of a file."""
    checkpoint = TorchCheckpoint(path)
    content = checkpoint.content
    state, text = content.get("best_state"), content.get("xp.cfg")
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a checkpoint of a training run
    if not isinstance(state, dict) or not isinstance(text, str) or len(text) > _MAX_SETTINGS_CHARACTERS:
        raise ValueError(f"{path} is not a model of audiocraft: it needs the entries best_state and xp.cfg")
    try:
        yaml = import_module("yaml")
    except ImportError as error:
        raise ImportError('models of audiocraft need PyYAML: pip install "musiclm[pretrained]"') from error
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: xp.cfg is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: xp.cfg must be a mapping of settings, got {type(settings).__name__}")
    # Without its own attention, audiocraft names the weights of torch's attention.
    tensors = {str(name).replace(".mha.", "."): checkpoint.tensor(value) for name, value in state.items()}
    return _resolved(settings, settings), tensors


def _resolved(value: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """Replace references such as `${encodec.causal}` by the values; a reference to nothing stays as it is."""
    if depth > 20:
        raise ValueError("xp.cfg has references or lists that are nested too deeply")
    if isinstance(value, dict):
        return {key: _resolved(entry, root, depth + 1) for key, entry in value.items()}
    if isinstance(value, list):
        return [_resolved(entry, root, depth + 1) for entry in value]
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    target: Any = root
    for key in reference[1].split("."):
        target = target.get(key, value) if isinstance(target, dict) else value
    return value if target == value else _resolved(target, root, depth + 1)


def _write(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    weights = {name: converted(name, tensor, dtype) for name, tensor in weights.items()}
    text = import_module("yaml").safe_dump(dict(settings), sort_keys=False)
    # audiocraft ignores the first entry, which marks files that this library wrote.
    mark = {"format_version": 1}
    torch.save({**mark, "best_state": weights, "xp.cfg": text, "version": "1.3.0", "exported": True}, path)


def _check_fixed(path: Path, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    wrong = {name: settings[name] for name, value in fixed.items() if name in settings and settings[name] != value}
    if wrong:
        needed = {name: fixed[name] for name in wrong}
        raise ValueError(f"{path} has the settings {wrong}, this library supports only {needed}")


def _delays(num_levels: int, num_groups: int) -> list[int]:
    return [level // num_groups for level in range(num_levels)]


def _check_pattern(path: Path, pattern: Mapping[str, Any], num_levels: int, channels: int) -> None:
    delay, delays = pattern.get("delay", {}), _delays(num_levels, channels)
    found = pattern.get("modeling", "delay"), list(delay.get("delays", delays))
    if found != ("delay", delays) or delay.get("flatten_first") or delay.get("empty_initial"):
        raise ValueError(f"{path} has the codebooks_pattern {dict(pattern)}, need delays {delays}")


def _check_conditions(path: Path, conditioners: Mapping[str, Any], fuser: Mapping[str, Any]) -> None:
    """Check that texts enter by cross-attention, or melodies and texts as a prefix."""
    ways = {way: list(fuser.get(way) or []) for way in ("cross", "prepend", "sum", "input_interpolate")}
    has_melody = "self_wav" in conditioners
    ordered = [name for name in ("self_wav", "description") if name in conditioners]
    expected = {"cross": [] if has_melody else ordered, "prepend": ordered if has_melody else []}
    is_known = set(conditioners) <= {"description", "self_wav", "args"}
    kinds = {name: conditioners[name].get("model") for name in ordered}
    needed = {"description": "t5", "self_wav": "chroma_stem"}
    if not is_known or any(kinds[name] != needed[name] for name in ordered):
        raise ValueError(f"{path} has the conditioners {sorted(conditioners)} of models {kinds}; need {needed}")
    if ways != {"cross": [], "prepend": [], "sum": [], "input_interpolate": []} | expected:
        raise ValueError(f"{path} has the fuser {ways}, need {expected}")


def _text_encoder(folder: Path, name: str, **hub: Any) -> TextConditioner:
    """Load the text encoder that a model names from the folder beside the files, or from the hub."""
    if (folder / _TEXT_FOLDER).is_dir():
        return TextConditioner(folder / _TEXT_FOLDER)
    return TextConditioner(name if "/" in name else f"google-t5/{name}", **hub)


def _t5_name(text_conditioner: TextConditioner) -> str:
    """Name of a T5 without its owner, as in audiocraft."""
    return str(text_conditioner.origin["source"]).rstrip("/").rpartition("/")[2]
