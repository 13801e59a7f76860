"""Small random MusicGen models in the files of transformers, written by transformers itself, and of audiocraft."""

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn

from tests.helpers.published_texts import write_t5_tokenizer

__all__ = ["VOCAB", "oracle", "write_audiocraft_files", "write_musicgen"]

VOCAB = 64
ENCODEC: dict[str, Any] = dict(
    target_bandwidths=[1.2],
    sampling_rate=32000,
    audio_channels=1,
    normalize=False,
    hidden_size=8,
    num_filters=2,
    num_residual_layers=1,
    upsampling_ratios=[8, 5, 4, 4],
    kernel_size=7,
    last_kernel_size=7,
    residual_kernel_size=3,
    dilation_growth_rate=2,
    use_causal_conv=False,
    pad_mode="reflect",
    compress=2,
    num_lstm_layers=2,
    codebook_size=VOCAB,
    codebook_dim=8,
    use_conv_shortcut=False,
)


def randomised(model: nn.Module) -> nn.Module:
    """Random norms, biases and codebooks; attention is far from uniform, and codes depend on the wave."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith("audio_encoder"):
                if name.startswith("audio_encoder.encoder"):  # otherwise, all waves have the same codes
                    tensor.mul_(2.0 if name.endswith("original0") else 0.0 if name.endswith("bias") else 1.0)
                continue
            noise = torch.randn(tensor.shape)
            tensor.copy_(tensor + 0.3 * noise if tensor.ndim == 1 else noise * tensor.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.copy_(torch.randn(buffer.shape))
    return model.eval()


def write_musicgen(
    folder: Path,
    *,
    melody: bool = False,
    channels: int = 1,
    audiogen: bool = False,
    causal: bool = False,
    seed: int = 0,
    **save: Any,
) -> Path:
    """Write a model with 3 heads, which is not the default; `audiogen` has 16 kHz and a wider T5.

    The EnCodec has no look-ahead if it is `causal`.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    num_tokens = write_t5_tokenizer(folder)
    t5 = transformers.T5Config(
        vocab_size=num_tokens, d_model=48 if audiogen else 16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    encodec = ENCODEC | {"use_causal_conv": causal}
    encodec |= {"sampling_rate": 16000, "upsampling_ratios": [8, 5, 4, 2]} if audiogen else {}
    name = "MusicgenMelody" if melody else "Musicgen"
    decoder = getattr(transformers, f"{name}DecoderConfig")(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_dim=96,
        num_codebooks=4 * channels,
        audio_channels=channels,
        pad_token_id=VOCAB,
        bos_token_id=VOCAB,
    )
    config = getattr(transformers, f"{name}Config")(
        text_encoder=t5.to_dict(),
        audio_encoder=transformers.EncodecConfig(**encodec).to_dict(),
        decoder=decoder.to_dict(),
        **({"chroma_length": 9} if melody else {}),
    )
    model = randomised(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    model.generation_config.update(
        decoder_start_token_id=VOCAB, pad_token_id=VOCAB, bos_token_id=VOCAB, do_sample=False, guidance_scale=3.0
    )
    model.save_pretrained(folder, **save)
    return folder


def oracle(folder: Path, melody: bool = False) -> Any:
    """Load a folder with transformers; eager attention adds finite numbers for masked keys."""
    name = "MusicgenMelodyForConditionalGeneration" if melody else "MusicgenForConditionalGeneration"
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def write_audiocraft_files(folder: Path, model: Any, *, nested: bool = False, old_names: bool = False) -> Path:
    """Write a model of transformers as audiocraft's two files; the names are written by hand, from its sources.

    Args:
        folder: The folder.
        model: A `MusicgenForConditionalGeneration` or `MusicgenMelodyForConditionalGeneration`.
        nested: Weights below `best_state.model`, as in a checkpoint of a training run.
        old_names: Names of attention with `mha`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, config = model.state_dict(), model.config
    melody, decoder, codec = hasattr(config, "chroma_length"), config.decoder, config.audio_encoder
    own: dict[str, Tensor] = {}

    def copy(target: str, *sources: str) -> None:
        own[target] = torch.cat([state[source] for source in sources]).half().float()

    for k in range(decoder.num_codebooks):
        copy(f"emb.{k}.weight", f"decoder.model.decoder.embed_tokens.{k}.weight")
        copy(f"linears.{k}.weight", f"decoder.lm_heads.{k}.weight")
    for leaf in ("weight", "bias"):
        copy(f"out_norm.{leaf}", f"decoder.model.decoder.layer_norm.{leaf}")
        copy(f"condition_provider.conditioners.description.output_proj.{leaf}", f"enc_to_dec_proj.{leaf}")
        if melody:
            copy(f"condition_provider.conditioners.self_wav.output_proj.{leaf}", f"audio_enc_to_dec_proj.{leaf}")
    if melody:
        own["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.hann_window(2**14)
    mha = "mha." if old_names else ""
    for i in range(decoder.num_hidden_layers):
        theirs, ours = f"decoder.model.decoder.layers.{i}.", f"transformer.layers.{i}."
        attentions = {"self_attn": "self_attn"} | ({} if melody else {"cross_attention": "encoder_attn"})
        for name, source in attentions.items():
            copy(f"{ours}{name}.{mha}in_proj_weight", *(f"{theirs}{source}.{part}_proj.weight" for part in "qkv"))
            copy(f"{ours}{name}.{mha}out_proj.weight", f"{theirs}{source}.out_proj.weight")
        norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
        norms |= {} if melody else {"norm_cross": "encoder_attn_layer_norm"}
        for name, source in norms.items():
            for leaf in ("weight", "bias"):
                copy(f"{ours}{name}.{leaf}", f"{theirs}{source}.{leaf}")
        copy(f"{ours}linear1.weight", f"{theirs}fc1.weight")
        copy(f"{ours}linear2.weight", f"{theirs}fc2.weight")
    channels = decoder.audio_channels
    settings: dict[str, Any] = {
        "transformer_lm": {
            "dim": decoder.hidden_size,
            "num_heads": decoder.num_attention_heads,
            "num_layers": decoder.num_hidden_layers,
            "hidden_scale": 4,
            "n_q": decoder.num_codebooks,
            "card": decoder.vocab_size,
            "norm_first": True,
            "bias_proj": False,
            "activation": "gelu",
            "positional_embedding": "sin",
            "dropout": 0.0,
        },
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {"delays": [k // channels for k in range(decoder.num_codebooks)]},
        },
        "fuser": {"cross": [] if melody else ["description"], "prepend": ["self_wav", "description"] if melody else []},
        "conditioners": {"description": {"model": "t5", "t5": {"name": "t5-base", "normalize_text": False}}},
        "dataset": {"segment_duration": 1.1 if melody else 30},
        "sample_rate": codec.sampling_rate,
        "interleave_stereo_codebooks": {"use": channels == 2, "per_timestep": False},
    }
    if melody:
        stem = {"sample_rate": "${sample_rate}", "n_chroma": 12, "radix2_exp": 14, "argmax": True}
        settings["conditioners"]["self_wav"] = {"model": "chroma_stem", "chroma_stem": stem}
    _save(folder / "state_dict.bin", {"model": own} if nested else own, settings)
    _save(folder / "compression_state_dict.bin", _codec_state(state), _codec_settings(codec))
    return folder


def _codec_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an EnCodec with four ratios, by the names of SEANet's list."""
    own = {}
    transposed = {3, 6, 9, 12}  # in the decoder
    for name, tensor in state.items():
        if not name.startswith("audio_encoder."):
            continue
        part, kind, *rest = name.removeprefix("audio_encoder.").split(".")
        leaf = rest[-1].replace("original0", "weight_g").replace("original1", "weight_v")
        if part == "quantizer":
            own[f"quantizer.vq.layers.{rest[0]}._codebook.{leaf}"] = tensor
        elif "lstm" in rest:
            own[f"{part}.model.{rest[0]}.lstm.{leaf}"] = tensor
        elif "block" in rest:
            own[f"{part}.model.{rest[0]}.block.{rest[2]}.conv.conv.{leaf}"] = tensor
        elif part == "decoder" and int(rest[0]) in transposed:
            own[f"{part}.model.{rest[0]}.convtr.convtr.{leaf}"] = tensor
        else:
            own[f"{part}.model.{rest[0]}.conv.conv.{leaf}"] = tensor
    return own


def _codec_settings(codec: Any) -> dict[str, Any]:
    return {
        "sample_rate": codec.sampling_rate,
        "channels": 1,
        "encodec": {
            "sample_rate": "${sample_rate}",
            "channels": "${channels}",
            "causal": False,
            "renormalize": False,
        },
        "seanet": {
            "dimension": codec.hidden_size,
            "channels": "${channels}",
            "causal": "${encodec.causal}",
            "n_filters": codec.num_filters,
            "n_residual_layers": 1,
            "ratios": list(codec.upsampling_ratios),
            "activation": "ELU",
            "norm": "weight_norm",
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 7,
            "dilation_base": 2,
            "pad_mode": codec.pad_mode,
            "true_skip": True,
            "compress": 2,
            "lstm": 2,
            "disable_norm_outer_blocks": 0,
        },
        "rvq": {"n_q": 4, "bins": codec.codebook_size, "q_dropout": False},
    }


def _save(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    content = {"best_state": state, "xp.cfg": yaml.safe_dump(settings), "version": "1.2.0a2", "exported": True}
    torch.save(content, path)
