"""Export a codec and the language models of a model as ONNX files."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.lm.decode_step import DecodeStep
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.saving.files import staged_files, write_json
from audiolm_pytorch.saving.ownership import check_folder_owner
from audiolm_pytorch.saving.text import one_line

__all__ = ["ONNX_CARD", "export_onnx"]

ONNX_CARD = "onnx.json"
_MARKS = ("format_version", "onnx_files")
# Lengths of the examples: torch.export makes a length of 1 a constant, so the examples have two items and more rows.
_BATCH, _FRAMES, _ROWS = 2, 30, 6


class MethodCall(nn.Module):
    """Module whose `forward` is a method of another module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self.module, self.method)(x)
        return result


@typed
def export_onnx(out: str | Path, codec: Codec, stages: Mapping[str, TokenTransformer]) -> list[Path]:
    """Write `codec_encoder.onnx`, `codec_decoder.onnx`, a `NAME_step.onnx` for each stage, and `onnx.json`.

    Batch and time are dynamic. The encoder maps waves `[b, c, n]` to codes `[b, f, q]`, the decoder maps codes to
    waves. A step is a `DecodeStep`. `onnx.json` has inputs and outputs of all files, and the layouts of the tokens. A
    module with operators that ONNX does not have raises a ValueError.

    Args:
        out: Folder, which must be new, empty, or of an earlier export; its files are replaced when all are complete.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX files need: pip install "musiclm[onnx]"') from error
    out = Path(out)
    check_folder_owner(out, {ONNX_CARD: _MARKS}, "an ONNX export")
    wave = torch.zeros(_BATCH, codec.channels, codec.downsample_factor * _FRAMES)
    codes = torch.zeros(_BATCH, codec.num_frames(wave.shape[-1]), codec.num_quantizers, dtype=torch.long)
    programs: dict[str, tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]] = {
        "codec_encoder": (MethodCall(codec, "tokenize"), {"x": wave}, ("codes",)),
        "codec_decoder": (MethodCall(codec, "decode_from_codebook_indices"), {"x": codes}, ("wave",)),
    }
    about: dict[str, Any] = {}
    for name, stage in stages.items():
        step = DecodeStep(stage)
        heads = [f"logits_{head.stream}_{head.level}" for head in stage.layout.heads]
        programs[f"{name}_step"] = step, _step_inputs(step), ("new_keys", "new_values", *heads)
        about[f"{name}_step"] = {
            "layout": stage.layout.to_dict(),
            "empty_id": stage.layout.num_ids,
            "first_ids": {head: part.first_id for head, part in zip(heads, stage.layout.heads)},
            "cache_shape": list(step.empty_cache(1).shape),
        }
    out.mkdir(parents=True, exist_ok=True)
    with staged_files(out) as stage_folder:
        card = {}
        for name, (module, inputs, outputs) in programs.items():
            _write(stage_folder / f"{name}.onnx", module.eval(), inputs, outputs)
            card[f"{name}.onnx"] = {"inputs": list(inputs), "outputs": list(outputs), **about.get(name, {})}
        codec_card = {"sample_hz": codec.target_sample_hz, "samples_per_frame": codec.downsample_factor}
        write_json(stage_folder / ONNX_CARD, {"format_version": 1, **codec_card, "onnx_files": card})
    return [out / name for name in (*card, ONNX_CARD)]


def _step_inputs(step: DecodeStep) -> dict[str, Tensor]:
    """Return inputs of a step after some rows."""
    model = step.model
    frames = {
        stream.name: torch.zeros(_BATCH, 1, stream.num_levels, dtype=torch.long) for stream in model.layout.streams
    }
    ids = torch.full((_BATCH, model.layout.pack(frames).ids.shape[2]), model.layout.num_ids)
    cache = step.empty_cache(_BATCH, _ROWS)
    inputs = {"ids": ids, "extra": torch.zeros(_BATCH, model.transformer.dim), "keys": cache, "values": cache.clone()}
    if model.transformer.cross:
        inputs["states"] = torch.zeros(_BATCH, _ROWS, model.transformer.dim)
    return inputs


def _write(path: Path, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> None:
    """Write one ONNX file, in which batch and time are dynamic."""
    dynamic = {"x": (0, 1 if inputs.get("x", torch.empty(0)).dtype == torch.long else 2), "ids": (0,), "extra": (0,)}
    dynamic |= {"keys": (1, 3), "values": (1, 3), "states": (0, 1)}
    # The exporter logs optional packages that are not installed.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple({axis: torch.export.Dim.DYNAMIC for axis in dynamic[name]} for name in inputs),
            )
            if program is not None:  # never with dynamo=True
                program.save(str(path))
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path.stem} cannot be written as ONNX ({one_line(error)})") from error
    finally:
        logger.setLevel(level)
