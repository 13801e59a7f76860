"""Every exported function and class, valid arguments for it, and wrong values for each argument."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import audiolm_pytorch
import musiclm_pytorch
from audiolm_pytorch.codecs.discriminators import soundstream_discriminators
from audiolm_pytorch.data import AudioItem
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.wrappers import SemanticTransformerWrapper
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from tests.helpers import small_models as small
from tests.helpers.public_data_doors import DATA_ROWS

__all__ = ["ALLOWED", "BASE", "exports", "is_interface", "resolve", "typed_callables", "wrong_values"]

PACKAGES = (audiolm_pytorch, musiclm_pytorch)
MODEL = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}


def _names_of(value: Any) -> tuple[str, str]:
    return getattr(value, "__module__", "") or "", getattr(value, "__qualname__", "")


@cache
def exports(modules: bool) -> dict[str, Any]:
    """Functions and classes in `__all__` of the packages and rooms by name; with `modules` also of every module."""
    found = {}
    for package in PACKAGES:
        below = [
            module.name
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
            if (modules or module.ispkg) and not re.search(r"\.(recipes|cli|web|__main__)\b", module.name)
        ]
        for name in [package.__name__, *below]:
            module = importlib.import_module(name)
            for export in getattr(module, "__all__", ()):
                value = getattr(module, export)
                if callable(value) and _names_of(value)[0].partition(".")[0] in ("audiolm_pytorch", "musiclm_pytorch"):
                    found[".".join(_names_of(value)) if modules else _names_of(value)[1]] = value
    return found


def is_typed(value: Any) -> bool:
    """Whether a function, or the constructor of a class, is decorated with `typed`."""
    while value is not None:
        if getattr(value, "__code__", None) is not None and value.__qualname__ and "__beartype_wrapper" in dir(value):
            return True
        value = getattr(value, "__wrapped__", None)
    return False


def is_interface(value: Any) -> bool:
    """Whether a class is abstract, a protocol, an error, or a record of results without checks."""
    return inspect.isclass(value) and (
        inspect.isabstract(value)
        or issubclass(value, tuple | Exception)
        or getattr(value, "_is_protocol", False)
        or "__init__" not in vars(value)
        or (hasattr(value, "__dataclass_fields__") and not is_typed(value.__init__))
    )


def typed_callables() -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Name, function and whether it has `self`, of every exported function and public method that checks types."""
    for name, value in exports(modules=True).items():
        if not inspect.isclass(value):
            if is_typed(value):
                yield name, value, False
            continue
        for method_name, method in vars(value).items():
            if (method_name == "__init__" or method_name[0] != "_") and inspect.isfunction(method) and is_typed(method):
                yield f"{name}.{method_name}", method, True


@cache
def _musiclm() -> Any:
    torch.manual_seed(0)
    return small.small_musiclm()


def _wave(*shape: int) -> Tensor:
    return torch.rand(*(shape or (1, 8000)), generator=torch.Generator().manual_seed(0)) - 0.5


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0))


def _unit(*shape: int) -> Tensor:
    return nn.functional.normalize(_wave(*shape), dim=-1)


@cache
def _musicgen() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(dim=16, depth=1, heads=2, max_seconds=1.0, melody=True)
    return musiclm_pytorch.MusicGen(codec=small.small_soundstream(), **sizes)


def _unfitted() -> Any:
    sizes: dict[str, Any] = dict(conditioning_dims=(8,), namespaces=("coarse",), rq_num_quantizers=2, codebook_size=4)
    return MuLaNEmbedQuantizer(mulan=small.small_mulan(), **sizes)


def _semantic_stage() -> Any:
    return small.small_stages(audio_text_condition=False)["semantic_transformer"]


SOUNDSTREAM = {"codebook_dim": 16, "channels": 4, "codebook_size": 16}
STAGE = {"num_semantic_tokens": 12, **MODEL}
# Valid arguments of each exported function or class, or of a method. A value that is expensive is made by the call.
BASE: dict[str, Callable[[], dict[str, Any]]] = {
    "peak_safe": lambda: {"wave": _wave(), "ceiling": 0.5},
    "resample": lambda: {"wave": _wave(), "from_hz": 8000, "to_hz": 16000},
    "MelSpectrogram": lambda: {
        **{"sample_hz": 8000, "n_fft": 256, "hop_length": 40, "num_mels": 8, "win_length": 128, "f_min_hz": 0.0},
        **{"f_max_hz": 4000.0, "power": 1.0},
    },
    "average_latents": lambda: {"latents": _unit(2, 3, 8)},
    "code_usage": lambda: {"codes": _ids(1, 5, 2), "codebook_size": 4},
    "deduplicate": lambda: {"ids": _ids(1, 9)},
    "melody_similarity": lambda: {"queries": _wave(2, 12, 9), "references": _wave(3, 12, 9), "max_shift_frames": 2},
    "nearest_similarity": lambda: {"queries": _unit(2, 8), "references": _unit(3, 8)},
    "words_of": lambda: {"captions": ["a calm piano"], "limit": 100},
    "split_items": lambda: {
        "items": [AudioItem(Path(name), None, {}, 8000, 8000) for name in "abcd"],
        "valid_fraction": 0.5,
        "seed": 0,
    },
    "inverse_square_root": lambda: {"optimizer": torch.optim.SGD([_wave(2)], lr=0.1), "warmup_steps": 10},
    "stereo_from_mono": lambda: {"mono": _musicgen()},
    "TextAugmentation": lambda: {
        **{"word_dropout": 0.3, "merge_prob": 0.25, "drop_caption_prob": 0.5, "drop_tag_prob": 0.5},
        **{"tags": ("genre", "bpm")},
    },
    "Mixing": lambda: {"probability": 0.5, "snr_db": (-5.0, 5.0), "min_overlap": 0.5},
    "TextTowerEncoder": lambda: {"tower": musiclm_pytorch.TextTransformer(**MODEL), "frozen": True},
    "encodec_discriminators": lambda: {"channels": 1, "width": 4},
    "soundstream_discriminators": lambda: {"channels": 1, "width": 8},
    "ComplexSTFTDiscriminator": lambda: {"channels": 1, "width": 8, "window_samples": 128, "hop_samples": 16},
    "MultiScaleSTFTDiscriminator": lambda: {"channels": 1, "width": 4, "windows_samples": (64, 32)},
    "MultiScaleWaveDiscriminator": lambda: {"channels": 1, "width": 4, "scales": 2},
    "Discriminators": lambda: {"parts": [soundstream_discriminators(1, 8)]},
    "MultiScaleMelLoss": lambda: {"sample_hz": 8000},
    "ResidualFiniteScalarQuantizer": lambda: {"dim": 8, "codebook_size": 16, "num_quantizers": 2, "level_dropout": 0.5},
    "ResidualLookupFreeQuantizer": lambda: {
        **{"dim": 8, "codebook_size": 16, "num_quantizers": 2, "level_dropout": 0.5},
        **{"entropy_weight": 0.1, "temperature": 1.0},
    },
    "ResidualQuantizer": lambda: {
        **{"dim": 8, "codebook_size": 16, "num_quantizers": 2, "codebook_dim": 4, "decay": 0.9},
        **{"dead_below_share": 0.1, "level_dropout": 0.5, "expected_frames": 100},
    },
    "make_quantizer": lambda: {"dim": 8, "codebook_size": 16, "num_quantizers": 2, "groups": 2},
    "ConditionSpec": lambda: {"dim": 8, "drop_prob": 0.1},
    "ConditionTensor": lambda: {"embeddings": _wave(1, 3, 8), "mask": torch.ones(1, 3, dtype=torch.bool)},
    "FiLM": lambda: {"dim": 8},
    "GenerationRequest": lambda: {"batch_size": 1, "seconds": 1.0},
    "Mixture": lambda: {"parts": [("calm", 0.5), ("loud", 0.5)]},
    "CaptionSampler": lambda: {"captions_per_clip": 1, "aspect_prob": 0.5, "caption_dropout": 0.1, "seed": 0},
    "LayerContrast": lambda: {"layers": ((1, 1),), "weight": 1.0},
    "SigmoidContrastiveLearning": lambda: {"init_temperature": 0.1, "min_temperature": 0.01, "init_bias": -10.0},
    "SoftmaxContrastiveLearning": lambda: {"init_temperature": 0.1, "min_temperature": 0.01},
    "SemanticTransformer": lambda: {**STAGE, "rate_hz": 25},
    "CoarseTransformer": lambda: {**STAGE, "codebook_size": 16, "num_coarse_quantizers": 2, "rate_hz": 50},
    "FineTransformer": lambda: {**MODEL, "codebook_size": 16, "num_coarse_quantizers": 2, "num_fine_quantizers": 2},
    "EntropyTransformer": lambda: {**MODEL, "codebook_size": 16, "num_quantizers": 2, "num_groups": 1, "rate_hz": 50},
    "AudioSpectrogramTransformer": lambda: {
        **{**MODEL, "num_mels": 16, "spec_n_fft": 512, "patch_size": 8, "sample_hz": 8000, "dropout": 0.1},
        **{"spec_aug_stretch_factor": 1.0, "spec_aug_freq_mask": 0.1, "spec_aug_time_mask": 0.1, "patch_dropout": 0.1},
    },
    "TextTransformer": lambda: {**MODEL, "num_tokens": 256, "max_seq_len": 16, "ff_mult": 2, "dropout": 0.1},
    "BestRQEncoder": lambda: {**MODEL, "num_mels": 8, "n_fft": 256, "hop_length": 80, "ff_mult": 2, "dropout": 0.1},
    "BestRQ": lambda: {
        "encoder": small.small_tokenizer().encoder,
        "codebook_size": 8,
        "codebook_dim": 4,
        "num_directions": 8,
    },
    "SoundStream": lambda: {
        **{**SOUNDSTREAM, "strides": (2, 4), "rq_num_quantizers": 2, "target_sample_hz": 8000, "rq_groups": 1},
        **{"attn_window_size": 8, "attn_depth": 1, "audio_channels": 1},
    },
    "AudioLMSoundStream": lambda: SOUNDSTREAM,
    "MusicLMSoundStream": lambda: SOUNDSTREAM,
    "SpectralSoundStream": lambda: {
        **{"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "hop_samples": 40, "code_dim": 4},
        **{"target_sample_hz": 8000, "codebook_size": 16, "rq_num_quantizers": 2, "audio_channels": 1},
    },
    "MusicGen": lambda: {
        **{"codec": small.small_soundstream(), "dim": 16, "depth": 1, "heads": 2, "max_seconds": 1.0, "melody": True}
    },
    "MusicGen.generate": lambda: {
        **{"self": _musicgen(), "seconds": 0.1, "num_samples": 1, "seeds": [0], "temperature": 1.0, "top_k": 5},
        **{"top_p": 0.9, "guidance_scale": 2.0, "fade_out_seconds": 0.05},
    },
    "MusicGen.stream": lambda: {"self": _musicgen(), "seconds": 0.1, "chunk_seconds": 0.1, "seeds": [0]},
    "MusicGenTransformer": lambda: {
        **{**MODEL, "dropout": 0.1, "codebook_size": 16, "num_codebooks": 2, "num_groups": 1},
        **{"rate_hz": 50, "text_dim": 8, "melody_frames": 4, "melody_drop_prob": 0.5, "cond_drop_prob": 0.3},
        **{"text_drop_prob": 0.1, "max_seconds": 1.0},
    },
    "TokenTransformer": lambda: {
        **{**MODEL, "layout": _semantic_stage().layout, "dropout": 0.1, "cond_dim": 8},
        **{"cond_drop_prob": 0.1, "null_tokens": 2, "max_seconds": 1.0, "text_dim": 8, "text_as": "prefix"},
    },
    "StageTransformer": lambda: {
        **{**MODEL, "sources": _semantic_stage().sources, "streams": _semantic_stage().layout.streams, "config": {}},
        **{"pattern": "flat", "cond_dim": 8},
    },
    "AudioLM": lambda: {
        **{"wav2vec": small.small_tokenizer(), "codec": small.small_soundstream()},
        **small.small_stages(audio_text_condition=False),
    },
    "ChannelwiseCodec": lambda: {"codec": small.small_soundstream(), "channels": 2},
    "KMeansTokenizer": lambda: {"encoder": small.small_tokenizer().encoder, "layer": 1, "num_clusters": 4},
    "MuLaN": lambda: {
        **{"audio_transformer": small.small_mulan().audio, "text_transformer": small.small_mulan().text},
        **{"dim_latent": 8, "window_seconds": 1.0, "window_stride_seconds": 0.5},
    },
    "MelodyEmbedder": lambda: {
        **{"audio_transformer": small.small_mulan().audio, "dim_latent": 4, "window_seconds": 0.2},
        **{"hop_seconds": 0.1, "rq_num_quantizers": 2, "codebook_size": 8},
    },
    "MuLaNEmbedQuantizer": lambda: {
        **{"mulan": small.small_mulan(), "conditioning_dims": (8,), "namespaces": ("coarse",)},
        **{"rq_num_quantizers": 2, "codebook_size": 4},
    },
    "MusicLM": lambda: {
        **{"audio_lm": _musiclm().audio_lm, "mulan_embed_quantizer": _musiclm().mulan_embed_quantizer, "num_levels": 2}
    },
    "MusicLM.scores": lambda: {
        **{"self": _musiclm(), "prompts": ["calm piano"], "waves": _wave(1, 2, 8000), "max_batch": 2}
    },
    "MusicLM.forward": lambda: {
        **{"self": _musiclm(), "text": "calm piano", "num_samples": 1, "seconds": 0.1, "seed": 0, "num_levels": 2},
        "max_batch": 1,
    },
    "AudioLM.generate": lambda: {"self": _musiclm().audio_lm, "request": GenerationRequest(seconds=0.1, text=["a"])},
    "SoundStream.forward": lambda: {"self": small.small_soundstream(), "audio": _wave()},
    "SoundStream.tokenize": lambda: {"self": small.small_soundstream(), "wave": _wave()},
    "SoundStream.decode_from_codebook_indices": lambda: {
        **{"self": small.small_soundstream(), "codes": _ids(1, 5, 3), "num_samples": 200}
    },
    "KMeansTokenizer.forward": lambda: {
        "self": small.small_tokenizer(),
        "wave": _wave(),
        "input_sample_hz": 8000,
        "lengths": torch.tensor([8000]),
    },
    "MuLaN.forward": lambda: {"self": small.small_mulan(), "wavs": _wave(2, 8000), "texts": ["calm", "loud"]},
    "MuLaN.get_audio_latents": lambda: {"self": small.small_mulan(), "wavs": _wave(), "lengths": torch.tensor([8000])},
    "MuLaN.get_text_latents": lambda: {"self": small.small_mulan(), "texts": ["calm"]},
    "SoftmaxContrastiveLearning.forward": lambda: {
        "self": small.small_mulan().loss,
        "audio_latents": _unit(2, 8),
        "text_latents": _unit(2, 8),
    },
    "MuLaNEmbedQuantizer.forward": lambda: {
        "self": _musiclm().mulan_embed_quantizer,
        "wavs": _wave(),
        "namespace": "coarse",
    },
    "MuLaNEmbedQuantizer.fit": lambda: {"self": _unfitted(), "audio_latents": _unit(32, 8), "seed": 0},
    "SemanticTransformerWrapper.generate": lambda: {
        "self": SemanticTransformerWrapper(
            transformer=small.small_stages(audio_text_condition=False)["semantic_transformer"]
        ),
        "num_frames": 3,
        "batch_size": 1,
    },
    "MelSpectrogram.forward": lambda: {
        "self": audiolm_pytorch.audio.MelSpectrogram(sample_hz=8000, n_fft=256, hop_length=40, num_mels=8),
        "wave": _wave(),
    },
    "MultiScaleMelLoss.forward": lambda: {
        "self": audiolm_pytorch.codecs.training.MultiScaleMelLoss(8000),
        "reconstruction": _wave(1, 1, 8000),
        "target": _wave(1, 1, 8000),
    },
    "ResidualQuantizer.encode": lambda: {"self": small.small_soundstream().quantizer, "frames": _wave(1, 5, 16)},
    **DATA_ROWS,
}
# Wrong values with a documented result: empty batches, depths of 0, seeds below 0, and tensors whose values are not
# checked in training, because that would stop the GPU at every step (the training loop reports losses that are NaN).
ALLOWED = {
    "AudioLM.fine_transformer": {"None"},
    "MusicGen.generate.seeds": {"number", "negative"},
    "MusicGen.stream.seeds": {"number", "negative"},
    "MusicLM.scores.waves": {"NaN", "infinite"},
    "peak_safe.wave": {"scalar", "more axes", "NaN", "infinite"},
    "resample.wave": {"more axes"},
    "average_latents.latents": {"more axes", "NaN", "infinite"},
    "code_usage.codes": {"more axes", "negative"},
    "split_items.seed": {"negative"},
    "load_split.seed": {"negative"},
    "read_audio.duration_seconds": {"infinite", "huge"},
    "CaptionSampler.seed": {"negative"},
    "ConditionTensor.embeddings": {"NaN", "infinite"},
    "MusicLM.forward.seed": {"negative"},
    "SoftmaxContrastiveLearning.forward.audio_latents": {"NaN", "infinite"},
    "SoftmaxContrastiveLearning.forward.text_latents": {"NaN", "infinite"},
    "MelSpectrogram.forward.wave": {"more axes", "NaN", "infinite"},
    "MultiScaleMelLoss.forward.reconstruction": {"NaN", "infinite"},
    "MultiScaleMelLoss.forward.target": {"NaN", "infinite"},
    "ResidualQuantizer.encode.frames": {"NaN", "infinite"},
    "SigmoidContrastiveLearning.init_bias": {"negative"},
}


def resolve(name: str) -> Callable[..., Any]:
    """Return the function, class or method of a row of `BASE`."""
    owner, _, method = name.partition(".")
    value = exports(modules=False)[owner]
    return getattr(value, method) if method else value


def wrong_values(value: Any) -> dict[str, Any]:
    """Wrong values by name for an argument with this valid value."""
    if isinstance(value, Tensor):
        return _wrong_tensors(value)
    numbers = {"zero": 0, "negative": -1, "NaN": float("nan"), "infinite": float("inf"), "huge": 10**30}
    if isinstance(value, bool):
        return {"string": "x"}
    if isinstance(value, int | float):
        return {**numbers, "string": "x", "array": np.zeros(3), "list": [1], "tensor": torch.ones(2)}
    if isinstance(value, str):
        return {"number": 3, "bytes": b"x", "empty": "", "list of None": [None]}
    if isinstance(value, list | tuple):
        first = value[0] if value else None
        items = {"empty": type(value)(), "number": 3, "array": np.zeros(3), "None": [None]}
        if isinstance(first, int):
            items |= {name: type(value)([number] * len(value)) for name, number in numbers.items()}
        return items
    return (
        {"number": 3, "string": "x", "class": type(value), "array": np.zeros(3), "None": None}
        if isinstance(value, nn.Module)
        else {}
    )


def _wrong_tensors(tensor: Tensor) -> dict[str, Any]:
    real = tensor.is_floating_point()
    wrong = {
        "number": 3.0,
        "string": "x",
        "list": tensor.tolist(),
        "array": tensor.numpy(),
        "scalar": tensor.flatten()[0],
        "more axes": tensor[None, None, None],
        "no items": tensor[:0],
        "empty": tensor[..., :0],
        "complex": tensor.to(torch.complex64),
    }
    if real:
        wrong |= {
            "NaN": torch.full_like(tensor, float("nan")),
            "infinite": torch.full_like(tensor, float("inf")),
            "whole": (tensor * 100).to(torch.int16),
            "bool": tensor > 0,
        }
    elif tensor.dtype != torch.bool:
        wrong |= {"real": tensor + 0.5, "negative": tensor - 10**6}
    return wrong
