"""Read and write a MusicGen in the format of transformers: `config.json` and safetensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import exact_div
from audiolm_pytorch.conditioning.published_text import TextConditioner
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.saving.files import read_json, read_weights, save_tensors, staged_files, write_json
from audiolm_pytorch.saving.hub import LoadedModel, load_tokenizer, model_settings, require_transformers
from audiolm_pytorch.saving.modules import converted
from audiolm_pytorch.saving.ownership import check_overwrite
from audiolm_pytorch.saving.weights import load_weights, weights_of
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.parts import (
    MusicGenParts,
    build_codec,
    build_published,
    build_transformer,
    published_codec,
    published_text_encoder,
)
from musiclm_pytorch.musicgen.weights import TRANSFORMERS, lm_weights

__all__ = [
    "MODEL_TYPES",
    "check_text_encoder_overwrite",
    "read_transformers",
    "write_text_encoder",
    "write_transformers",
]

MODEL_TYPES = {"musicgen": "MusicgenConfig", "musicgen_melody": "MusicgenMelodyConfig"}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# transformers ignores the entry "format_version" of config.json; it marks files that this library wrote.
_FORMAT_VERSION = 1
_DEFAULT_MAX_SECONDS = 30
# Settings of the decoder that this library supports only with these values.
_FIXED: dict[str, Any] = {"activation_function": "gelu", "scale_embedding": False, "cross_attention_hidden_size": None}
_T5_EXCEPTIONS = ("encoder.embed_tokens.weight",)  # another name of `shared.weight`


def read_transformers(folder: Path, origin: Mapping[str, Any]) -> MusicGenParts:
    """Read a model that transformers or `write_transformers` wrote; raise a ValueError if it is not supported."""
    raw = read_json(folder / "config.json")
    try:
        config = getattr(require_transformers(), MODEL_TYPES[raw["model_type"]]).from_dict(dict(raw))
    except Exception as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a MusicGen: {error}") from error
    decoder, where = config.decoder, f"the weights in {folder}"
    wrong = {name: getattr(decoder, name, value) for name, value in _FIXED.items()}
    wrong = {name: value for name, value in wrong.items() if value != _FIXED[name]}
    if wrong:
        raise ValueError(f"{folder} has the settings {wrong}, this library supports only {_FIXED}")
    weights = _split(_read_all(folder))
    codec = build_codec(
        config.audio_encoder.to_dict(),
        weights["audio_encoder"],
        decoder.num_codebooks,
        decoder.audio_channels,
        origin,
        f"the weights of audio_encoder in {folder}",
    )
    transformer = build_transformer(
        {
            "dim": decoder.hidden_size,
            "depth": decoder.num_hidden_layers,
            "heads": decoder.num_attention_heads,
            "dim_head": exact_div(decoder.hidden_size, decoder.num_attention_heads, "hidden_size"),
            "ff_mult": decoder.ffn_dim / decoder.hidden_size,
            "codebook_size": decoder.vocab_size,
            "num_codebooks": decoder.num_codebooks,
            "num_groups": decoder.audio_channels,
            "rate_hz": f"{codec.target_sample_hz}/{codec.downsample_factor}",
            "text_dim": config.text_encoder.hidden_size,
            "melody_frames": config.chroma_length if config.model_type == "musicgen_melody" else None,
            "max_seconds": raw.get("max_seconds", _DEFAULT_MAX_SECONDS),
        },
        weights["decoder"],
        TRANSFORMERS,
        where,
    )
    settings, where = config.text_encoder.to_dict(), f"the weights of text_encoder in {folder}"
    text_model = build_published(settings, {"t5": "T5EncoderModel"}, weights["text_encoder"], where)
    states = {name: tensor for name, tensor in weights["text_encoder"].items() if name not in _T5_EXCEPTIONS}
    load_weights(text_model, states, where)
    tokenizer = TextTokenizer(load_tokenizer(folder), special_tokens=True)
    return MusicGenParts(transformer, codec, TextConditioner(LoadedModel(text_model, **origin), tokenizer=tokenizer))


def write_transformers(folder: Path, parts: MusicGenParts, dtype: torch.dtype | None = None) -> None:
    """Write a model that transformers can load. The model must have a T5 and an EnCodec."""
    _check_overwrite(folder, ("generation_config.json", "preprocessor_config.json"))
    transformer, codec = parts.transformer, published_codec(parts.codec)
    text_conditioner = published_text_encoder(parts.text_conditioner)
    stream, has_melody = transformer.layout.predicted[0], transformer.melody_frames is not None
    kind = "musicgen_melody" if has_melody else "musicgen"
    stack, special = transformer.transformer, stream.vocab_size
    name = "MusicgenMelody" if has_melody else "Musicgen"
    tokens = {"pad_token_id": special, "bos_token_id": special}
    config: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "model_type": kind,
        "architectures": [f"{name}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "text_encoder": model_settings(text_conditioner.model),
        "audio_encoder": model_settings(codec.model),
        "decoder": {
            "model_type": f"{kind}_decoder",
            "vocab_size": stream.vocab_size,
            "hidden_size": stack.dim,
            "num_hidden_layers": stack.depth,
            "num_attention_heads": stack.heads,
            "ffn_dim": round(stack.dim * transformer.config["ff_mult"]),
            "num_codebooks": stream.num_levels,
            "audio_channels": parts.codec.channels,
            "activation_function": "gelu",
            "dropout": transformer.config["dropout"],
            "tie_word_embeddings": False,
            **tokens,
        },
        "max_seconds": transformer.max_seconds,
    }
    if has_melody:
        config |= {"num_chroma": ChromaConditioner.num_classes, "chroma_length": transformer.melody_frames}
    if transformer.window_frames is not None:
        delay = (stream.num_levels - 1) // stream.num_groups
        tokens["max_length"] = 1 + transformer.window_frames + delay
    generation = {**tokens, "decoder_start_token_id": special, "do_sample": True, "guidance_scale": 3.0}
    extractor: dict[str, Any] = {"feature_extractor_type": "MusicgenMelodyFeatureExtractor", "padding_side": "right"}
    if not has_melody:
        extractor = {"feature_extractor_type": "EncodecFeatureExtractor", "padding_side": "left"}
        extractor |= {"feature_size": parts.codec.channels, "padding_value": 0.0, "return_attention_mask": True}
    weights = lm_weights(transformer, TRANSFORMERS)
    weights |= {f"audio_encoder.{name}": tensor for name, tensor in weights_of(codec.model).items()}
    weights |= {f"text_encoder.{name}": tensor for name, tensor in weights_of(text_conditioner.model).items()}
    weights = {name: converted(name, tensor, dtype) for name, tensor in weights.items()}
    with staged_files(folder) as stage:
        save_tensors(stage / _WEIGHTS, weights, {"format": "pt"})
        write_json(stage / "generation_config.json", generation)
        processor = {"processor_class": f"{name}Processor", "sampling_rate": codec.target_sample_hz}
        write_json(stage / "preprocessor_config.json", {**extractor, **processor})
        _write_tokenizer(stage, text_conditioner)
        write_json(stage / "config.json", config)


def write_text_encoder(folder: Path, text_conditioner: TextConditioner) -> None:
    """Write a T5 with its tokenizer as a model of transformers, which `TextConditioner` loads."""
    check_text_encoder_overwrite(folder)
    with staged_files(folder) as stage:
        save_tensors(stage / _WEIGHTS, weights_of(text_conditioner.model), {"format": "pt"})
        _write_tokenizer(stage, text_conditioner)
        settings = model_settings(text_conditioner.model)
        write_json(stage / "config.json", {"format_version": _FORMAT_VERSION, **settings})


def check_text_encoder_overwrite(folder: Path) -> None:
    """Raise a ValueError if a folder contains files that `write_text_encoder` would replace and has not written."""
    _check_overwrite(folder, ())


def _check_overwrite(folder: Path, others: Sequence[str]) -> None:
    names = (_WEIGHTS, "tokenizer.json", "tokenizer_config.json", *others)
    check_overwrite(folder / "config.json", ("format_version", "model_type"), [folder / name for name in names])


def _write_tokenizer(folder: Path, text_conditioner: TextConditioner) -> None:
    (folder / "tokenizer.json").write_text(text_conditioner.config["tokenizer"], encoding="utf-8")
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def _read_all(folder: Path) -> dict[str, Tensor]:
    """Read the weights of one file, or of all files that the index names."""
    if not (folder / _INDEX).is_file():
        return read_weights(folder / _WEIGHTS)[0]
    index = read_json(folder / _INDEX)
    names = sorted(set(index["weight_map"].values()))
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{folder / _INDEX} must name files of its folder, got {names!r:.200}")
    return {key: tensor for name in names for key, tensor in read_weights(folder / name)[0].items()}


def _split(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split weights into those of text encoder, codec and language model; only the last keep their full names."""
    parts: dict[str, dict[str, Tensor]] = {"text_encoder": {}, "audio_encoder": {}, "decoder": {}}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part in ("text_encoder", "audio_encoder"):
            parts[part][rest] = tensor
        else:
            parts["decoder"][name] = tensor
    return parts
