"""Time and memory of MuLaN's training step: beside a plain form of the same towers, and with gradient caching.

`python tests/benchmarks/mulan.py [--threads 2] [--json FILE]`, some minutes. The modules are those of the snippet in
DESIGN.md (width 512, 6 blocks, 8 heads of 64, spectra of 128 samples, 20,000 tokens of text). The plain form has the
same weights and gives the same loss and gradients, which is checked; its attention is written with einsum over a matrix
of all pairs of tokens, its position bias is worked out for every pair, norm and gate are left to autograd. Repetitions
alternate between both, and ratios of times are taken pair by pair. Memory is what one step needs at its worst beside
weights, gradients and the batch: the bytes of all tensors alive, counted in a fresh process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.nn.positions import WavePositionBias, rotate  # noqa: E402
from audiolm_pytorch.nn.transformer import Transformer  # noqa: E402
from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer  # noqa: E402
from tests.helpers.alive_tensors import AliveTensors  # noqa: E402

# batch, samples of a clip at 16 kHz, tokens of a text; the first is the snippet to the letter
SIZES = ((2, 1024, 256), (4, 16_000, 256), (4, 32_000, 256))
BATCHES = (64, 256, 1024)
CHUNK = 16
CACHED_SAMPLES, CACHED_TOKENS = 1024, 32


class PlainEncoder(nn.Module):
    """The blocks of a `Transformer` as one would write them down first: einsum, a matrix of all pairs, autograd.

    Args:
        encoder: Gives the weights, which are shared.
    """

    def __init__(self, encoder: Transformer) -> None:
        super().__init__()
        self.encoder, self.depth = encoder, encoder.depth

    def hidden_states(
        self, x: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None, layers: list[int | None]
    ) -> list[Tensor]:
        """What `Transformer.hidden_states` gives, for the whole stack."""
        encoder = self.encoder
        if positions is None:
            positions = torch.arange(x.shape[1])
        positions = positions.view(-1, x.shape[1], positions.shape[-1] if positions.ndim == 3 else 1)
        angles = [angle.unsqueeze(1) for angle in encoder.rotary(positions[..., 0])]
        bias = None if encoder.position_bias is None else pairwise_bias(encoder.position_bias, positions)
        for block in encoder.blocks:
            x = x + plain_attention(block.attention, plain_norm(block.attention_norm, x), mask, angles, bias)
            hidden = plain_norm(block.feed_forward_norm, x)
            value, gate = block.feed_forward.up(hidden).chunk(2, dim=-1)
            x = x + block.feed_forward.down(nn.functional.silu(gate) * value)
        return [plain_norm(encoder.norm, x)]

    def forward(self, x: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        """What `Transformer.forward` gives."""
        return self.hidden_states(x, mask, positions=positions, layers=[None])[0]


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Root mean square normalisation."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight


def pairwise_bias(bias: WavePositionBias, positions: Tensor) -> Tensor:
    """`[b or 1, h, t, t]`: the bias of every pair of tokens."""
    offsets = (positions.unsqueeze(2) - positions.unsqueeze(1)).float()
    if len(offsets) > 1 and bool((positions == positions[:1]).all()):
        offsets = offsets[:1]
    total: Any = 0.0
    for wave in range(bias.frequencies.shape[1]):
        turns = torch.einsum("b i j a, h a -> b h i j", offsets, bias.frequencies[:, wave])
        total = total + bias.amplitudes[:, wave].view(-1, 1, 1) * (turns + bias.phases[:, wave].view(-1, 1, 1)).cos()
    return total


def plain_attention(attention: Any, x: Tensor, mask: Tensor | None, angles: list[Tensor], bias: Any) -> Tensor:
    """Attention with its scores written out."""
    q, k, v = rearrange(attention.to_qkv(x), "b t (three h d) -> three b h t d", three=3, h=attention.heads)
    q, k = rotate(q, *angles), rotate(k, *angles)
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.finfo(scores.dtype).max)
    out = torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)
    return attention.to_out(rearrange(out, "b h t d -> b t (h d)"))


def snippet() -> MuLaN:
    """The MuLaN of the snippet, in training mode, its bias as after some training."""
    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(
        dim=512, depth=6, heads=8, dim_head=64, spec_n_fft=128, spec_win_length=24, spec_aug_stretch_factor=0.8
    )
    nn.init.normal_(audio.encoder.position_bias.amplitudes)
    return MuLaN(audio_transformer=audio, text_transformer=TextTransformer(dim=512, depth=6, heads=8, dim_head=64))


def written_plainly(mulan: MuLaN) -> MuLaN:
    """The same weights in plain form."""
    mulan.audio.encoder = PlainEncoder(mulan.audio.encoder)
    mulan.text.encoder = PlainEncoder(mulan.text.encoder)
    return mulan


def batch(size: int, samples: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Noise and random ids."""
    torch.manual_seed(1)
    return 0.1 * torch.randn(size, samples), torch.randint(0, 20_000, (size, tokens))


def step(mulan: MuLaN, wavs: Tensor, ids: Tensor, chunk_size: int | None = None) -> float:
    """Loss and gradients of one batch, the same noise each time; seconds."""
    for parameter in mulan.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    torch.manual_seed(2)
    start = time.perf_counter()
    mulan(wavs, ids, chunk_size=chunk_size).backward()
    return time.perf_counter() - start


def check_equal() -> float:
    """Largest difference of a gradient between both forms, as a share of the largest gradient."""
    wavs, ids = batch(2, 4000, 64)
    gradients = []
    for mulan in (snippet(), written_plainly(snippet())):
        step(mulan, wavs, ids)
        gradients.append([parameter.grad for parameter in mulan.parameters()])
    largest = max(float(one.abs().max()) for one in gradients[0])
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) / largest
    if difference > 1e-3:
        raise RuntimeError(f"the two forms differ: gradients by {difference:.1e} of the largest")
    return difference


def times(sizes: tuple[int, int, int], repetitions: int) -> dict[str, float]:
    """Median milliseconds of a step of both, and of their ratio."""
    ours, plain = snippet(), written_plainly(snippet())
    data = batch(*sizes)
    pairs = [(step(ours, *data), step(plain, *data)) for _ in range(repetitions + 1)][1:]
    return {
        "ours_ms": 1e3 * statistics.median(pair[0] for pair in pairs),
        "plain_ms": 1e3 * statistics.median(pair[1] for pair in pairs),
        "time_ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
    }


def memory_here(form: str, sizes: tuple[int, int, int], chunk_size: int | None) -> float:
    """MB of tensors that one step needs beside weights, gradients and the batch."""
    mulan = snippet() if form == "ours" else written_plainly(snippet())
    step(mulan, *batch(2, 1024, 8), chunk_size)  # gradients exist
    data = batch(*sizes)
    with AliveTensors([*data, *(tensor for one in mulan.parameters() for tensor in (one, one.grad))]) as alive:
        step(mulan, *data, chunk_size)
    return alive.peak_bytes / 1e6


def memory(form: str, sizes: tuple[int, int, int], threads: int, chunk_size: int | None = None) -> float:
    """`memory_here` in a process of its own."""
    what = json.dumps([form, sizes, chunk_size])
    command = [sys.executable, __file__, "--threads", str(threads), "--only-memory", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repetitions", type=int, default=5, help="of every step, after one that is not counted")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--only-memory", help="measure this process's own memory, and print it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only_memory:
        form, sizes, chunk_size = json.loads(options.only_memory)
        print(memory_here(form, sizes, chunk_size))
        return
    machine = {"threads": options.threads, "torch": torch.__version__, "load_average": os.getloadavg()[0]}
    print(f"{machine}\ngradients of both forms differ by at most {check_equal():.1e} of the largest\n")
    print("| batch, samples, tokens | ours, ms | plain, ms | time | ours, MB | plain, MB | memory |\n|" + "---|" * 7)
    steps = []
    for sizes in SIZES:
        row: dict[str, Any] = {"sizes": sizes, **times(sizes, options.repetitions)}
        row |= {f"{form}_mb": memory(form, sizes, options.threads) for form in ("ours", "plain")}
        row["memory_ratio"] = row["ours_mb"] / row["plain_mb"]
        steps.append(row)
        print(
            f"| {', '.join(map(str, sizes))} | {row['ours_ms']:.0f} | {row['plain_ms']:.0f} | {row['time_ratio']:.0%} "
            f"| {row['ours_mb']:.0f} | {row['plain_mb']:.0f} | {row['memory_ratio']:.0%} |",
            flush=True,
        )
    print(f"\nclips of {CACHED_SAMPLES} samples, texts of {CACHED_TOKENS} tokens\n")
    print(f"| effective batch | at once, MB | {CHUNK} at a time, MB |\n|---|---|---|")
    cached = []
    for size in BATCHES:
        sizes = (size, CACHED_SAMPLES, CACHED_TOKENS)
        whole, chunked = (memory("ours", sizes, options.threads, chunk) for chunk in (None, CHUNK))
        cached.append({"batch": size, "whole_mb": whole, "cached_mb": chunked})
        print(f"| {size} | {whole:.0f} | {chunked:.0f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "steps": steps, "cached": cached}, indent=2) + "\n")


if __name__ == "__main__":
    main()
