"""vq-wav2vec: discrete codes of speech from its published checkpoints (arXiv:1910.05453), read without fairseq."""

import re
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.audio.units import exact_div
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.semantic.pretrained.fairseq import (
    FairseqCheckpoint,
    build_for,
    conv_layers_of,
    quoted,
    read_fairseq,
    renamed,
)
from audiolm_pytorch.semantic.pretrained.vq_wav2vec_network import (
    ACTIVATIONS,
    ConvFeatures,
    GumbelQuantizer,
    KMeansQuantizer,
    VQWav2Vec,
)

__all__ = ["FairseqVQWav2Vec", "vq_wav2vec_from_fairseq"]

# Parts that make no codes: the context network, what it projects to, the contrastive heads, and the vectors of the
# Gumbel codebook, which only the context network reads.
_UNUSED = ("feature_aggregator.", "project_features.", "wav2vec_predictions.", "vector_quantizer.vars")
_MOST_LINEAR = 64
# What every release of fairseq takes where a checkpoint is silent. It changed its mind about `log_compression`, and no
# shape shows the strides: these two must be said.
_DEFAULTS = {"activation": "relu", "residual_scale": 0.5, "skip_connections_feat": False, "vq_groups": 2}
_NAMES = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight)", r"features.layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(weight|bias)", r"features.layers.\1.norm.\2"),
    # one linear layer; or several, of which all but the last stand in a block with an activation
    (r"vector_quantizer\.weight_proj\.(weight|bias)", r"quantizer.layers.0.\1"),
    (r"vector_quantizer\.weight_proj\.(\d+)\.(?:0\.)?(weight|bias)", r"quantizer.layers.\1.\2"),
    (r"vector_quantizer\.projection\.0\.(weight)", r"quantizer.projection.\1"),
    (r"vector_quantizer\.projection\.1\.(weight|bias)", r"quantizer.norm.\1"),
    (r"vector_quantizer\.embedding", "quantizer.codebook"),
)


@register
class FairseqVQWav2Vec(SemanticTokenizer):
    """Tokens of vq-wav2vec: a few codes every 10 ms from convolutions alone (arXiv:1910.05453).

    Made for the published `vq-wav2vec.pt` (Gumbel softmax) and `vq-wav2vec_kmeans.pt`, which have two groups of 320
    codes and a frame every 160 samples of 16 kHz. The groups of a frame follow each other in time and have ids of their
    own: code v of group g is `g * 320 + v`. So there are 640 tokens, one every 80 samples. The file is read as it is:
    without fairseq, and through an unpickler that admits tensors, plain containers and inert stand-ins only.
    `save_module` writes what is needed as safetensors, from where it loads without any pickle.

    Card. Codes were checked against a second computation, written from the paper and fairseq's sources, on files of the
    published layout that the tests write with random weights. THE PUBLISHED FILES THEMSELVES COULD NOT BE OPENED where
    this was written (no network). The model heard English audiobooks (LibriSpeech) alone, and as its norms hear the
    whole item, tokens depend a little on how long that is (it was trained on crops of up to 9.4 s): it is a model of
    speech, and how much of music its tokens keep has to be measured. Licence: MIT, as fairseq says of its code and
    models.

    Args:
        checkpoint_path: fairseq's checkpoint; or the network, where it is built already.
        target_sample_hz: Rate of the model (Hz), which its file decides: another one is refused.
        seq_len_multiple_of: Samples at `target_sample_hz` that lengths are cut down to a multiple of; None = no cut.

    Raises:
        ValueError: If the file is missing, damaged, hostile or of another model, or a number does not fit.
    """

    @beartype
    def __init__(
        self,
        checkpoint_path: str | Path | VQWav2Vec,
        target_sample_hz: int = 16_000,
        seq_len_multiple_of: int | None = None,
    ) -> None:
        super().__init__()
        if target_sample_hz < 1 or (seq_len_multiple_of is not None and seq_len_multiple_of < 1):
            raise ValueError(
                "target_sample_hz and seq_len_multiple_of must be at least 1, got "
                f"{target_sample_hz} and {seq_len_multiple_of}"
            )
        network = checkpoint_path
        if not isinstance(network, VQWav2Vec):
            checkpoint = read_fairseq(network)
            if checkpoint.sample_hz != target_sample_hz:
                raise ValueError(
                    f"{network} reads {checkpoint.sample_hz} Hz, target_sample_hz is {target_sample_hz}: leave it at "
                    f"{checkpoint.sample_hz} and pass input_sample_hz={target_sample_hz} with the waves, which are "
                    "resampled"
                )
            network = vq_wav2vec_from_fairseq(checkpoint)
        self.network = network.requires_grad_(False)
        self.target_sample_hz = target_sample_hz
        self.seq_len_multiple_of = seq_len_multiple_of
        self.groups = network.quantizer.groups
        self.codebook_size = self.groups * network.quantizer.codes
        self.downsample_factor = exact_div(network.frames.stride, self.groups, "samples a frame over groups")
        self.train(False)

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build this tokenizer, weights apart."""
        return {
            "network": self.network.config,
            "target_sample_hz": self.target_sample_hz,
            "seq_len_multiple_of": self.seq_len_multiple_of,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FairseqVQWav2Vec":
        """Build a tokenizer whose weights are to be loaded: no published file is needed any more."""
        return cls(VQWav2Vec.from_config(config["network"]), config["target_sample_hz"], config["seq_len_multiple_of"])

    def fingerprint(self) -> str:
        """Hash of everything that the tokens depend on."""
        return fingerprint_of(self)

    def num_frames(self, num_samples: int) -> int:
        """Tokens of a wave, exactly: two groups in each of the 97 frames of a second are 194.

        Args:
            num_samples: Length of the wave at `target_sample_hz`.

        Returns:
            `((num_samples - reach) // stride + 1) * groups`, with a reach of 465 samples and a stride of 160 in the
            published models, after the cut to `seq_len_multiple_of`.

        Raises:
            ValueError: If the wave is shorter than one frame.
        """
        frames = self.network.frames
        num_tokens = self.groups * frames.num_frames(self.cut_samples(num_samples))
        if not num_tokens:
            cut = (
                f", and lengths are cut to multiples of {self.seq_len_multiple_of}" if self.seq_len_multiple_of else ""
            )
            raise ValueError(
                f"audio of {num_samples} samples is too short: a frame is made of {frames.reach} samples "
                f"({1000 * frames.reach / self.target_sample_hz:g} ms at {self.target_sample_hz} Hz){cut}; pass a "
                "longer wave, or add silence"
            )
        return num_tokens

    @torch.no_grad()
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves, frame by frame and in each frame group by group; see `SemanticTokenizer`."""
        wave, lengths = self.checked_waves(wave, input_sample_hz, lengths, device_of(self.network))
        wave = wave.to(next(self.network.parameters()).dtype)
        ids = torch.full((len(wave), self.num_frames(wave.shape[1])), -1, dtype=torch.int64, device=wave.device)
        offsets = torch.arange(self.groups, device=wave.device) * self.network.quantizer.codes
        with torch.autocast(wave.device.type, enabled=False):
            for rows, part in items_by_length(wave, lengths):
                num_tokens = self.num_frames(part.shape[1])
                codes = self.network(part[:, : self.cut_samples(part.shape[1])])
                ids[rows, :num_tokens] = rearrange(codes + offsets, "r t g -> r (t g)")
        return ids


@beartype
def vq_wav2vec_from_fairseq(checkpoint: FairseqCheckpoint) -> VQWav2Vec:
    """Build the network of a published checkpoint.

    Args:
        checkpoint: What `read_fairseq` gave.

    Returns:
        The network in eval mode, float32; parts of the checkpoint that make no codes are left out.

    Raises:
        ValueError: If the checkpoint is of another model, lacks a setting, or its weights are missing, unknown or of
            other shapes.
    """
    weights = {
        renamed(name, _NAMES): tensor for name, tensor in checkpoint.weights.items() if not name.startswith(_UNUSED)
    }
    if not any(name.startswith("quantizer.") for name in weights):
        raise ValueError(
            f"{checkpoint.source} holds no vq-wav2vec: it has no weights vector_quantizer.* that make codes; give "
            "vq-wav2vec.pt or vq-wav2vec_kmeans.pt"
        )
    said = _DEFAULTS | {name: value for name, value in checkpoint.model.items() if value is not None}
    try:
        network = build_for(weights, lambda: _network_for(weights, said))
    except (ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint.source}: {reason}; give the file as published") from error
    load_weights(network, weights, checkpoint.source)
    return network.eval()


def _setting(said: dict[str, Any], name: str, kind: type, allowed: Any = None) -> Any:
    """A setting that shows in no weight; ValueError where it is missing or makes no sense."""
    value = said.get(name)
    if type(value) is not kind or (allowed is not None and value not in allowed):
        raise ValueError(f"codes depend on the setting {name}, which is {quoted(value)} in its args or cfg")
    return value


def _network_for(weights: dict[str, Tensor], said: dict[str, Any]) -> VQWav2Vec:
    features = _features_for(weights, said)
    return VQWav2Vec(features, _quantizer_for(weights, said, features.dim))


def _features_for(weights: dict[str, Tensor], said: dict[str, Any]) -> ConvFeatures:
    """Convolutions as the settings have them, once these agree with the weights."""
    layers = conv_layers_of(said.get("conv_feature_layers") or "nothing")
    # before anything is built: settings alone could ask for any amount of memory
    before = 1
    for place, (width, kernel, _) in enumerate(layers):
        tensor = weights.get(f"features.layers.{place}.conv.weight", torch.empty(0))
        if tensor.shape != (width, before, kernel):
            raise ValueError(
                f"convolution {place} is {width} wide behind {before}, with a kernel of {kernel}, in its settings, and "
                f"{tuple(tensor.shape)} in its weights"
            )
        before = width
    return ConvFeatures(
        layers=layers,
        activation=_setting(said, "activation", str, ACTIVATIONS),
        log_compression=_setting(said, "log_compression", bool),
        skip_scale=_setting(said, "residual_scale", float) if _setting(said, "skip_connections_feat", bool) else None,
        affine_norm="features.layers.0.norm.weight" in weights,
    )


def _quantizer_for(weights: dict[str, Tensor], said: dict[str, Any], dim: int) -> GumbelQuantizer | KMeansQuantizer:
    """The quantizer whose sizes the weights show."""
    groups = _setting(said, "vq_groups", int, range(1, dim + 1))
    codebook = weights.get("quantizer.codebook")
    if codebook is not None:
        if codebook.ndim != 3 or dim % groups or not codebook.numel():
            raise ValueError(
                f"a codebook {tuple(codebook.shape)} does not serve {groups} groups of width {dim} together"
            )
        return KMeansQuantizer(dim=dim, groups=groups, codes=len(codebook), shared=codebook.shape[1] == 1)
    biases = [tensor for name, tensor in weights.items() if re.fullmatch(r"quantizer\.layers\.\d+\.bias", name)]
    if len(biases) > _MOST_LINEAR:
        raise ValueError(f"{len(biases)} layers of a quantizer are more than {_MOST_LINEAR}")
    last = weights.get(f"quantizer.layers.{len(biases) - 1}.bias", torch.empty(0))
    if last.ndim != 1 or not last.numel() or len(last) % groups:
        raise ValueError(f"{last.numel()} logits cannot be divided among {groups} groups of codes")
    activation = _setting(said, "activation", str, ACTIVATIONS)
    return GumbelQuantizer(dim=dim, groups=groups, codes=len(last) // groups, depth=len(biases), activation=activation)
