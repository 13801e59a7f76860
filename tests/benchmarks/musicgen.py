"""Speed and memory of MusicGen beside transformers, with the same random weights, in one process.

    python tests/benchmarks/musicgen.py                    # the shape of musicgen-small (dim 1024, 24 blocks, 16 heads)
    python tests/benchmarks/musicgen.py --dim 512 --depth 8 --heads 8 --frames 100

Both sample with guidance from a text of `--text-tokens` tokens; text encoder and codec of transformers are tiny. The
tokens per second are those of all levels and items, after a first call; the fastest of `--repeats` calls counts. Peak
memory is that of the process after the calls of this library, and then after those of transformers.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.saving.weights import load_weights
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.musicgen.weights import TRANSFORMERS, lm_weights_of

TEXT_DIM = 768


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "dim": 1024,
        "depth": 24,
        "heads": 16,
        "frames": 100,
        "text-tokens": 12,
        "repeats": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    return parser.parse_args()


def fastest(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_of_ours(model: MusicGenTransformer, options: argparse.Namespace, batch: int) -> Callable[[], object]:
    """Function that generates with this library."""
    conditioning = {"text": ConditionTensor.of(torch.randn(batch, options.text_tokens, TEXT_DIM))}
    sampling = SamplingSettings(top_k=250, guidance_scale=3.0)
    transformers_of_calls: list[CachedTransformer | None] = [None]

    def run() -> None:
        session = DecodeSession(
            model,
            {},
            {"acoustic": options.frames},
            batch_size=batch,
            conditioning=conditioning,
            settings=sampling,
            seeds=list(range(batch)),
            transformer=transformers_of_calls[0],
        )
        session.advance()
        transformers_of_calls[0] = session.transformer

    return run


def run_of_theirs(model: Any, options: argparse.Namespace, batch: int) -> Callable[[], object]:
    """Function that generates with transformers."""
    ids = torch.randint(32, (batch, options.text_tokens))
    return lambda: model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=250,
        guidance_scale=3.0,
        max_new_tokens=options.frames + 3,
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
    seconds: dict[tuple[str, int], float] = {}
    memory = {}
    for batch in options.batches:
        seconds["ours", batch] = fastest(run_of_ours(ours, options, batch), options.repeats)
    memory["ours"] = peak_gb()
    for batch in options.batches:
        seconds["transformers", batch] = fastest(run_of_theirs(theirs, options, batch), options.repeats)
    memory["transformers"] = peak_gb()
    parameters = sum(weight.numel() for weight in ours.parameters()) / 1e6
    print(f"{parameters:.1f} M parameters, {torch.get_num_threads()} threads, {options.frames} frames, guidance 3")
    for (name, batch), duration in seconds.items():
        rate = 4 * options.frames * batch / duration
        print(f"{name:13} batch {batch}: {rate:8.1f} tokens/s, peak memory {memory[name]:.2f} GB")
    for batch in options.batches:
        print(f"batch {batch}: {seconds['transformers', batch] / seconds['ours', batch]:.2f} times as fast")


if __name__ == "__main__":
    main()
