"""`musiclm doctor`: compare the results of a device with the CPU in float64."""

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from audiolm_pytorch.saving.text import one_line, printable
from musiclm_pytorch.cli.checks import ModelOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from audiolm_pytorch.checks.kernels import KernelCheck
    from audiolm_pytorch.lm.stage_transformer import StageTransformer
    from audiolm_pytorch.tokens.streams import PackedTokens
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["Doctor"]

_Run = Callable[[Any, Any], Any]  # of a part and its input

_NUM_PREFILLED, _SECONDS = 5, 0.5
_TOLERANCE = 0.01
# Share of codes that may differ, since rounding changes a code between two nearly equal ones.
_MAX_WRONG_CODES = 0.05


@dataclass(frozen=True)
class Doctor(ModelOptions):
    """Check that this device computes what the CPU computes in float64.

    The kernels are compared with numpy; codec, tokenizer, MuLaN, quantizer, language model and decoding of a model with
    the same model on the CPU in float64. The exit status is 2 if a result is wrong, and the part is named.
    """

    device: str = "auto"
    """Device: cpu, cuda, mps, ... or auto, which selects a GPU if there is one."""
    model: str = "tiny"
    """MusicLM to check: the name of a bundled one, a folder, or a hub id."""
    json: bool = False
    """Print JSON."""

    def execute(self) -> int:
        """Print a line for each check."""
        import torch

        from audiolm_pytorch.checks.kernels import check_kernels
        from audiolm_pytorch.checks.types import usable_device
        from musiclm_pytorch.musiclm import MusicLM

        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = usable_device((gpu or "cpu") if self.device == "auto" else self.device)
        checks = check_kernels(device)
        for check in checks:
            self._report(check)
        with torch.no_grad():
            for check in _check_parts(MusicLM.from_pretrained(**self.source_of(self.model)), device):
                self._report(check)
                checks.append(check)
        wrong = [check for check in checks if not check.is_right]
        if self.json:
            facts = {"device": str(device), "torch": torch.__version__, "is_right": not wrong}
            print(json.dumps({**facts, "checks": [asdict(check) for check in checks]}))
        if wrong:
            names = ", ".join(check.name for check in wrong)
            advice = "update torch" if device.type == "cpu" else "use --device cpu, or update torch and the driver"
            raise ValueError(f"the device {device} computes wrong results ({names}); {advice}")
        if not self.json:
            print(f"{device}: all {len(checks)} results are right")
        return 0

    def _report(self, check: "KernelCheck") -> None:
        if not self.json:
            line = f"{check.name:40}  {'right' if check.is_right else 'WRONG'}  error {check.error:.1e}  {check.detail}"
            print(printable(line).rstrip(), flush=True)


def _check_parts(model: "MusicLM", device: "torch.device") -> Iterator["KernelCheck"]:
    """Compare the parts of a model on a device with those on the CPU in float64, each with the same inputs."""
    import torch

    reference, checked = deepcopy(model).double().eval(), model.to(device).float().eval()
    generator = torch.Generator().manual_seed(0)
    codec, quantizer = reference.audio_lm.codec, reference.mulan_embed_quantizer
    num_samples = round(_SECONDS * model.sample_hz)
    times = torch.arange(num_samples, dtype=torch.float64) / model.sample_hz
    wave = 0.3 * (2764.6 * times).sin() + 0.05 * torch.randn(num_samples, generator=generator, dtype=torch.float64)
    wave, waves = wave.view(1, -1), wave.expand(1, codec.channels, -1)
    codes = codec.tokenize(waves)
    texts = ["a fast jig played on the flute", "slow"]
    latents = quantizer.mulan.get_text_latents(texts)
    # Name -> the part of a model, what it computes, and the input.
    parts: dict[str, tuple[Callable[[Any], Any], _Run, Any]] = {
        "codec encoder": (_codec, lambda part, x: part.tokenize(x), waves),
        "codec decoder": (_codec, lambda part, x: part.decode_from_codebook_indices(x), codes),
        "semantic tokenizer": (
            lambda model: model.audio_lm.wav2vec,
            lambda part, x: part(x, input_sample_hz=model.sample_hz),
            wave,
        ),
        "MuLaN of audio": (_mulan, lambda part, x: part.get_audio_latents(x), wave),
        "MuLaN of text": (_mulan, lambda part, x: part.get_text_latents(texts), latents),
        "MuLaN quantizer": (_quantizer, lambda part, x: part.codes_from_latents(x, "text"), latents),
    }
    for name, stage in reference.audio_lm.stages.items():
        ids = _token_ids(stage, generator)
        parts[f"{name} stage"] = partial(_stage, name=name), _hidden, ids
        parts[f"decoding of the {name} stage"] = partial(_stage, name=name), _decoded, ids
    for name, (part_of, run, x) in parts.items():
        yield _compared(name, run, part_of(reference), part_of(checked), x)


def _codec(model: "MusicLM") -> Any:
    return model.audio_lm.codec


def _quantizer(model: "MusicLM") -> Any:
    return model.mulan_embed_quantizer


def _mulan(model: "MusicLM") -> Any:
    return model.mulan_embed_quantizer.mulan


def _stage(model: "MusicLM", name: str) -> Any:
    return model.audio_lm.stages[name]


def _token_ids(stage: "StageTransformer", generator: "torch.Generator") -> "PackedTokens":
    """Return random tokens of all streams, in rows of ids."""
    import torch

    streams = {}
    for stream in stage.layout.streams:
        shape = (1, math.ceil(_SECONDS * float(stream.rate_hz or 1)), stream.num_levels)
        streams[stream.name] = torch.randint(stream.vocab_size, shape, generator=generator)
    return stage.layout.pack(streams)


def _hidden(stage: "StageTransformer", packed: "PackedTokens") -> "Tensor":
    """Return the final states of all rows, computed together."""
    return stage.hidden(packed.ids, packed.input_mask, stage.fuse(None, 1))


def _decoded(stage: "StageTransformer", packed: "PackedTokens") -> "Tensor":
    """Return the final states, on the device row by row with cached keys and values."""
    import torch

    from audiolm_pytorch.nn.cached_transformer import CachedTransformer

    if stage.embedding.weight.dtype == torch.float64:
        return _hidden(stage, packed)
    fused = stage.fuse(None, 1)
    x, num_first = stage.embed(packed.ids, packed.input_mask), min(_NUM_PREFILLED, packed.ids.shape[1])
    cached = CachedTransformer(stage.transformer, 1)
    first = cached.prefill(x[:, :num_first], fused, [num_first], fused.num_rows + x.shape[1]).clone()
    rows = [cached.step(x[:, row], [row]).clone() for row in range(num_first, x.shape[1])]
    before = stage.hidden(packed.ids[:, : num_first - 1], packed.input_mask[:, : num_first - 1], fused)
    return torch.cat((before, torch.stack([first, *rows], dim=1)), dim=1)


def _compared(name: str, run: "_Run", reference: "nn.Module", checked: "nn.Module", x: Any) -> "KernelCheck":
    """Run a part on the CPU in float64 and on the device, and name the first submodule whose output is wrong."""
    from audiolm_pytorch.checks.kernels import KernelCheck, relative_error
    from audiolm_pytorch.nn.module_state import device_of

    device = device_of(checked)
    moved = x.to(device) if hasattr(x, "ids") or not x.is_floating_point() else x.float().to(device)
    try:
        expected, found = run(reference, x), run(checked, moved).cpu()
        is_code = not expected.is_floating_point()
        error = float((found != expected).double().mean()) if is_code else relative_error(found, expected)
        if error <= (_MAX_WRONG_CODES if is_code else _TOLERANCE):
            return KernelCheck(name, error, True)
        calls = zip(_calls(reference, lambda: run(reference, x)), _calls(checked, lambda: run(checked, moved)))
        for (place, expected_in, expected_out), (_, found_in, found_out) in calls:
            if relative_error(found_in, expected_in) < _TOLERANCE <= relative_error(found_out, expected_out):
                return KernelCheck(name, error, False, f"first wrong in {place}")
        return KernelCheck(name, error, False)
    except (RuntimeError, NotImplementedError) as missing:  # the device has no such operator
        return KernelCheck(name, float("inf"), False, one_line(missing))


def _calls(part: "nn.Module", run: Callable[[], Any]) -> "list[tuple[str, Tensor, Tensor]]":
    """Return the calls of submodules while a part runs: their name and class, the first input, and the output."""
    import torch

    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str, module: "nn.Module", inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
            calls.append((f"{name or 'the whole'} ({type(module).__name__})", inputs[0].cpu(), output.cpu()))

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in part.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
