"""How fast the codec is beside transformers' EnCodec, its quantizer beside vector-quantize-pytorch, and its memory.

`python tests/benchmarks/codec.py [--threads 2] [--seconds 10] [--json FILE]`, some minutes; needs transformers. Weights
are random, which no figure here depends on. Repetitions alternate between the two sides and medians are taken, so that
a machine that is busy for a while slows both; ratios are taken pair by pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vector_quantize_pytorch import ResidualVQ

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.codecs import MusicLMSoundStream  # noqa: E402
from audiolm_pytorch.codecs.quantizers import ResidualQuantizer  # noqa: E402
from musiclm_pytorch.recipes.memory import peak_bytes  # noqa: E402

RATE_HZ = 24_000
KBPS = 6.0


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio that the codecs get")
    parser.add_argument(
        "--repetitions", type=int, default=7, help="of every measurement, after one that is not counted"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the file whose memory is measured")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--only-memory", action="store_true", help="measure this process's own memory, and print it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory:
        print(json.dumps(memory_here(options.minutes)))
        return
    figures = {
        "machine": {"threads": options.threads, "torch": torch.__version__, "load_average": os.getloadavg()[0]},
        "codec": codec_figures(options.seconds, options.repetitions),
        "quantizer": quantizer_figures(options.repetitions),
        "memory": memory_in_a_fresh_process(options.minutes, options.threads),
    }
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def codec_figures(seconds: float, repetitions: int) -> dict[str, Any]:
    """Encode and decode of our 24 kHz preset and of EnCodec, both 32 channels wide and at 6 kbps, on the same wave."""
    from transformers import EncodecConfig, EncodecModel

    ours = MusicLMSoundStream(channels=32).eval()
    theirs = EncodecModel(EncodecConfig()).eval()
    wave = 0.1 * torch.randn(1, 1, round(seconds * RATE_HZ))
    codes = ours.tokenize(wave)
    encoded = theirs.encode(wave, bandwidth=KBPS)
    their_codes, scales = encoded.audio_codes, encoded.audio_scales
    work: dict[str, dict[str, Callable[[], Any]]] = {
        "encode": {"ours": lambda: ours.tokenize(wave), "encodec": lambda: theirs.encode(wave, bandwidth=KBPS)},
        "decode": {
            "ours": lambda: ours.decode_from_codebook_indices(codes),
            "encodec": lambda: theirs.decode(their_codes, scales),
        },
    }
    figures: dict[str, Any] = {
        "seconds": seconds,
        "ours": {"codes": list(codes.shape), "parameters": num_parameters(ours)},
        "encodec": {"codes": list(their_codes.shape), "parameters": num_parameters(theirs)},
    }
    for direction, sides in work.items():
        took = alternating(sides, repetitions)
        for side, call in sides.items():
            macs = multiply_adds(ours if side == "ours" else theirs, call) / seconds
            real_time = seconds / statistics.median(took[side])
            figures[side][direction] = {
                "real_time": real_time,
                "real_time_range": [seconds / max(took[side]), seconds / min(took[side])],
                "gmac_per_audio_second": macs / 1e9,
                "gmac_per_second": macs / 1e9 * real_time,
            }
        per_mac = (
            figures["encodec"][direction]["gmac_per_audio_second"] / figures["ours"][direction]["gmac_per_audio_second"]
        )
        ratios = [their / our / per_mac for our, their in zip(took["ours"], took["encodec"])]
        figures[f"{direction}_speed_per_multiply_add"] = statistics.median(ratios)
    return figures


@torch.no_grad()
def quantizer_figures(repetitions: int) -> dict[str, Any]:
    """`encode` against vector-quantize-pytorch's eval path: 8 x 750 frames of width 128, 12 levels of 1024 codes."""
    quantizer = ResidualQuantizer(dim=128, codebook_size=1024, num_quantizers=12)
    frames = torch.randn(8, 750, 128)
    quantizer.initialise(frames.flatten(0, 1), iterations=1)
    quantizer.eval()
    library = ResidualVQ(dim=128, codebook_size=1024, num_quantizers=12).eval()
    library.load_state_dict(quantizer.rvq.state_dict())
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: quantizer.encode(frames), "library": lambda: library(frames)}
    took = alternating(sides, repetitions)
    codebooks = torch.stack([quantizer.codebook(level) for level in range(12)])
    ours, theirs = quantizer.encode(frames), library(frames)[1]
    return {
        "ours_seconds": statistics.median(took["ours"]),
        "library_seconds": statistics.median(took["library"]),
        "speed": statistics.median(their / our for our, their in zip(took["ours"], took["library"])),
        "codes": ours.numel(),
        "codes_that_differ": int((ours != theirs).sum()),
        "frames_that_differ_beyond_rounding": num_differing(frames, ours, theirs, codebooks),
    }


def num_differing(frames: Tensor, ours: Tensor, theirs: Tensor, codebooks: Tensor) -> int:
    """Frames in which the first code that differs is not as near as the other's to one part in a million.

    Of two codes that float32 cannot tell apart either is right, and a few in 100,000 random frames have such.
    """
    count = 0
    for item, frame in (ours != theirs).any(dim=-1).nonzero().tolist():
        level = int((ours[item, frame] != theirs[item, frame]).nonzero()[0])
        before = sum(codebooks[k, ours[item, frame, k]].double() for k in range(level))
        residual = frames[item, frame].double() - before
        pair = codebooks[level, torch.stack([ours[item, frame, level], theirs[item, frame, level]])].double()
        near, other = (residual - pair).norm(dim=-1).tolist()
        count += abs(near - other) > 1e-6 * other
    return count


def memory_in_a_fresh_process(minutes: float, threads: int) -> dict[str, float]:
    """What `memory_here` gives in a process that does nothing else."""
    command = [sys.executable, __file__, "--only-memory", "--minutes", str(minutes), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_here(minutes: float) -> dict[str, float]:
    """Peak memory of this whole process, interpreter and libraries included, after encode and decode of a long wave."""
    codec = MusicLMSoundStream(channels=32).eval()
    wave = torch.empty(1, round(minutes * 60 * RATE_HZ)).uniform_(-0.5, 0.5)
    before = peak_bytes()
    start = time.perf_counter()
    codes = codec.tokenize(wave)
    middle, encode = time.perf_counter(), peak_bytes()
    decoded = codec.decode_from_codebook_indices(codes, num_samples=wave.shape[-1])
    return {
        "minutes": minutes,
        "before_bytes": before,
        "after_encode_bytes": encode,
        "peak_bytes": peak_bytes(),
        "encode_seconds": middle - start,
        "decode_seconds": time.perf_counter() - middle,
        "samples": decoded.shape[-1],
    }


def alternating(sides: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each side, A B A B …, after one of each that is not counted."""
    took: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repetitions + 1):
        for side, call in sides.items():
            start = time.perf_counter()
            call()
            took[side].append(time.perf_counter() - start)
    return {side: seconds[1:] for side, seconds in took.items()}


def multiply_adds(model: nn.Module, call: Callable[[], Any]) -> float:
    """Multiply-adds of the matrix products and convolutions that a call runs, whatever module or function runs them.

    Counted where torch dispatches them. Its LSTM is one kernel there, which the counter passes over: a hook adds it.
    """
    inside = 0.0

    def add(lstm: nn.LSTM, inputs: tuple[Tensor, ...], _: Any) -> None:
        nonlocal inside
        steps = inputs[0].shape[0] * inputs[0].shape[1]
        weights = sum(weight.numel() for name, weight in lstm.named_parameters() if name.startswith("weight"))
        inside += steps * weights

    lstms = [module for module in model.modules() if isinstance(module, nn.LSTM)]
    hooks = [lstm.register_forward_hook(add) for lstm in lstms]
    with FlopCounterMode(display=False) as counter:
        call()
    for hook in hooks:
        hook.remove()
    counted = sum(
        sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name != "Global" and name.rpartition(".")[2] == "lstm"
    )
    if counted:
        raise RuntimeError("this release of torch counts the products of an LSTM itself: take the hook out")
    return counter.get_total_flops() / 2 + inside


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model holds, codebooks included."""
    return sum(value.numel() for value in model.state_dict().values())


def table(figures: dict[str, Any]) -> str:
    """The figures for people, each with what is asked of it."""
    codec, quantizer, memory = figures["codec"], figures["quantizer"], figures["memory"]
    machine = figures["machine"]
    lines = [
        f"torch {machine['torch']}, {machine['threads']} threads, load {machine['load_average']:.1f}; "
        f"{codec['seconds']:g} s at 24 kHz, {KBPS:g} kbps, 32 channels",
        f"{'':26}{'x real time':>12}{'(range)':>16}{'GMAC per s audio':>18}{'GMAC/s':>9}",
    ]
    for direction in ("encode", "decode"):
        for side, name in (("ours", "MusicLMSoundStream"), ("encodec", "EncodecModel")):
            row = codec[side][direction]
            low, high = row["real_time_range"]
            lines.append(
                f"{direction} {name:19}{row['real_time']:12.2f}{f'({low:.2f}-{high:.2f})':>16}"
                f"{row['gmac_per_audio_second']:18.3f}{row['gmac_per_second']:9.1f}"
            )
        lines.append(asked(f"{direction}: speed per multiply-add", codec[f"{direction}_speed_per_multiply_add"], 1.0))
    lines.append(
        f"quantizer, (8, 750, 128) through 12 x 1024: {quantizer['ours_seconds']:.3f} s, vector-quantize-pytorch "
        f"{quantizer['library_seconds']:.3f} s"
    )
    lines.append(asked("quantizer: speed", quantizer["speed"], 2.0))
    beyond = quantizer["frames_that_differ_beyond_rounding"]
    lines.append(
        f"codes that differ: {quantizer['codes_that_differ']} of {quantizer['codes']}; frames that differ where "
        f"float32 can tell the two codes apart: {beyond} (asked: 0) {'NO' if beyond else 'yes'}"
    )
    gigabyte = memory["peak_bytes"] / 1e9
    lines.append(
        f"{memory['minutes']:g} minutes, encode {memory['encode_seconds']:.0f} s and decode "
        f"{memory['decode_seconds']:.0f} s: peak memory of the whole process {gigabyte:.3f} GB "
        f"({memory['before_bytes'] / 1e9:.3f} GB before; asked: below 1) {'yes' if gigabyte < 1 else 'NO'}"
    )
    return "\n".join(lines)


def asked(what: str, ratio: float, least: float) -> str:
    """A line that says what the ratio is and whether it is enough."""
    return f"{what} {ratio:.2f} times the other's (asked: at least {least:g}) {'yes' if ratio >= least else 'NO'}"


if __name__ == "__main__":
    main()
