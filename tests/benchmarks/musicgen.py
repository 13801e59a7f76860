"""Speed and memory of MusicGen beside transformers, with the same random weights, in one process.

    python tests/benchmarks/musicgen.py                    # the shape of musicgen-small (dim 1024, 24 blocks, 16 heads)
    python tests/benchmarks/musicgen.py --dim 512 --depth 8 --heads 8 --frames 100

Both sample with guidance from a text; text encoder and codec of transformers are tiny. After a first call of each,
calls of both alternate. The figures are medians of CPU times, which other processes change less than wall times. Tokens
per second are those of all levels and items. `after prompt` is one new frame after a prompt of `--prompt-frames`
frames. The memory is the peak of the first call above the memory before it: cache, copies of weights and temporary
tensors.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.saving.weights import load_weights
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.musicgen.weights import TRANSFORMERS, lm_weights_of

TEXT_DIM = 768


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"dim": 1024, "depth": 24, "heads": 16, "frames": 100, "prompt-frames": 50, "repeats": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[12])
    return parser.parse_args()


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def memory_gb(field: str) -> float:
    """Memory of this process, the field `VmRSS` (now) or `VmHWM` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def added_gb(call: Callable[[], object]) -> float:
    """Peak memory of a call above the memory before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_gb("VmRSS")
    call()
    return memory_gb("VmHWM") - before


def run_of_ours(
    model: MusicGenTransformer, prompt: Tensor, frames: int, text_tokens: int, sessions: list[DecodeSession]
) -> Callable[[], object]:
    """Function that generates with this library; the last session of `sessions` has the prepared weights."""
    batch = len(prompt)
    conditioning = {"text": ConditionTensor.of(torch.randn(batch, text_tokens, TEXT_DIM))}

    def run() -> None:
        session = DecodeSession(
            model,
            {"acoustic": prompt},
            {"acoustic": frames},
            conditioning=conditioning,
            settings=SamplingSettings(top_k=250, guidance_scale=3.0),
            seeds=list(range(batch)),
            transformer=sessions[-1].transformer if sessions else None,
        )
        session.advance()
        sessions[:] = [session]

    return run


def run_of_theirs(model: Any, prompt: Tensor, frames: int, text_tokens: int) -> Callable[[], object]:
    """Function that generates with transformers."""
    ids = torch.randint(32, (len(prompt), text_tokens))
    return lambda: model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        decoder_input_ids=rearrange(prompt, "b f q -> (b q) f") if prompt.shape[1] else None,
        do_sample=True,
        top_k=250,
        guidance_scale=3.0,
        max_new_tokens=frames - prompt.shape[1] + 3,
    )


def published_model(options: argparse.Namespace) -> Any:
    """MusicGen of transformers with a text encoder of one layer and a codec of few channels, whose cost is small."""
    decoder = transformers.MusicgenDecoderConfig(
        hidden_size=options.dim,
        num_hidden_layers=options.depth,
        num_attention_heads=options.heads,
        ffn_dim=4 * options.dim,
    )
    text = transformers.T5Config(vocab_size=32, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    codec = transformers.EncodecConfig(
        target_bandwidths=[2.2],
        sampling_rate=32000,
        num_filters=2,
        hidden_size=8,
        codebook_dim=8,
        codebook_size=2048,
        upsampling_ratios=[8, 5, 4, 4],
        use_causal_conv=False,
        use_conv_shortcut=False,
    )
    sizes = {"text_encoder": text.to_dict(), "audio_encoder": codec.to_dict(), "decoder": decoder.to_dict()}
    model = transformers.MusicgenForConditionalGeneration(transformers.MusicgenConfig(**sizes)).eval()
    model.generation_config.update(pad_token_id=2048, bos_token_id=2048, decoder_start_token_id=2048)
    return model


def compare(ours: MusicGenTransformer, theirs: Any, options: argparse.Namespace, batch: int, text_tokens: int) -> None:
    """Print the figures of a batch size and a length of texts."""
    sessions: list[DecodeSession] = []
    for frames in (0, options.prompt_frames):
        prompt = torch.randint(2048, (batch, frames, 4))
        total = frames + (1 if frames else options.frames)
        calls = {
            "ours": run_of_ours(ours, prompt, total, text_tokens, sessions),
            "transformers": run_of_theirs(theirs, prompt, total, text_tokens),
        }
        memory = {name: added_gb(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.repeats):
            for name, call in calls.items():
                times[name].append(cpu_seconds(call))
        seconds = {name: median(values) for name, values in times.items()}
        kind = f"batch {batch}, {text_tokens} text tokens" + (", after prompt" if frames else "")
        for name, duration in seconds.items():
            speed = f"{duration:.2f} s" if frames else f"{4 * total * batch / duration:.1f} tokens/s"
            print(f"{kind}: {name:13} {speed:>16}, memory {memory[name]:.2f} GB")
        print(f"{kind}: {seconds['transformers'] / seconds['ours']:.2f} times as fast", flush=True)


@torch.inference_mode()
def main() -> None:
    options = parse()
    torch.manual_seed(0)
    theirs = published_model(options)
    ours = MusicGenTransformer(
        dim=options.dim, depth=options.depth, heads=options.heads, dim_head=options.dim // options.heads
    )
    parts = ("decoder.", "enc_to_dec_proj.")
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith(parts)}
    load_weights(ours.eval(), lm_weights_of(ours, weights, TRANSFORMERS, "the weights"))
    parameters = sum(weight.numel() for weight in ours.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters ({parameters * 4 / 2**30:.2f} GB in float32), "
        f"{torch.get_num_threads()} threads, {options.frames} frames, guidance 3"
    )
    for batch in options.batches:
        for text_tokens in options.text_tokens:
            compare(ours, theirs, options, batch, text_tokens)


if __name__ == "__main__":
    main()
