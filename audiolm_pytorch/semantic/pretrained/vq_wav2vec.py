"""Semantic tokenizer vq-wav2vec (arXiv:1910.05453), loaded from its published checkpoints."""

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
)
from audiolm_pytorch.semantic.pretrained.vq_wav2vec_network import (
    ACTIVATIONS,
    ConvFeatures,
    GumbelQuantizer,
    KMeansQuantizer,
    VQWav2Vec,
)

__all__ = ["FairseqVQWav2Vec", "vq_wav2vec_from_fairseq"]

# Parts that codes do not depend on: the context network and its projection, the contrastive heads, and the vectors of
# the Gumbel codebook, which only the context network reads.
_UNUSED = ("feature_aggregator.", "project_features.", "wav2vec_predictions.", "vector_quantizer.vars")
# Defaults of all releases of fairseq. A checkpoint must have `log_compression`, whose default differs between releases,
# and the strides, which no shape shows.
_DEFAULTS = {"activation": "relu", "skip_connections_feat": False, "vq_groups": 2}
_NAMES = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight)", r"features.layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(weight|bias)", r"features.layers.\1.norm.\2"),
    # One linear layer, or several: all but the last are in a block with an activation.
    (r"vector_quantizer\.weight_proj\.(weight|bias)", r"quantizer.layers.0.\1"),
    (r"vector_quantizer\.weight_proj\.(\d+)\.(?:0\.)?(weight|bias)", r"quantizer.layers.\1.\2"),
    (r"vector_quantizer\.projection\.0\.(weight)", r"quantizer.projection.\1"),
    (r"vector_quantizer\.projection\.1\.(weight|bias)", r"quantizer.norm.\1"),
    (r"vector_quantizer\.embedding", "quantizer.codebook"),
)


@register
class FairseqVQWav2Vec(SemanticTokenizer):
    """vq-wav2vec tokenizer (arXiv:1910.05453): a convolutional network with two codes every 10 ms.

    The published `vq-wav2vec.pt` (Gumbel softmax) and `vq-wav2vec_kmeans.pt` have two groups of 320 codes, and a frame
    every 160 samples at 16 kHz. Each frame becomes two successive tokens; the token id of code v in group g is
    `g * 320 + v`. No code in the file is run, and fairseq is not needed. The function `save_module` writes the network
    as safetensors.

    Model card. The model was trained on crops of up to 9.4 s of English audiobooks (LibriSpeech); measure how well its
    tokens describe music. The norms of the model use the whole item, so tokens depend slightly on its length. Codes
    were compared with a second implementation of the paper on files with random weights in the published format. THE
    PUBLISHED FILES THEMSELVES WERE NOT AVAILABLE FOR TESTS. Licence: MIT (fairseq, code and models).

    Args:
        checkpoint_path: A fairseq checkpoint, or a `VQWav2Vec` network.
        target_sample_hz: Sample rate of the model; another rate than that in the file raises a ValueError.
        seq_len_multiple_of: Waves are cut to a multiple of this number of samples; None means no cut.
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
                    f"target_sample_hz is {target_sample_hz}, but {network} needs {checkpoint.sample_hz} Hz; pass "
                    f"target_sample_hz={checkpoint.sample_hz}, and input_sample_hz={target_sample_hz} with the waves"
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
        """JSON-able description of the network and of the other constructor arguments."""
        return {
            "network": self.network.config,
            "target_sample_hz": self.target_sample_hz,
            "seq_len_multiple_of": self.seq_len_multiple_of,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FairseqVQWav2Vec":
        """Build a tokenizer with random weights from its `config`, without the published file."""
        return cls(VQWav2Vec.from_config(config["network"]), config["target_sample_hz"], config["seq_len_multiple_of"])

    def fingerprint(self) -> str:
        """Return a hash of everything that the tokens depend on."""
        return fingerprint_of(self)

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of tokens of a wave, which is 194 for one second in the published models."""
        frames = self.network.frames
        num_tokens = self.groups * frames.num_frames(self.cut_samples(num_samples))
        if not num_tokens:
            cut = f" (lengths are cut to multiples of {self.seq_len_multiple_of})" if self.seq_len_multiple_of else ""
            raise ValueError(
                f"audio of {num_samples} samples is too short: a frame needs {frames.reach} samples at "
                f"{self.target_sample_hz} Hz{cut}; pass a longer wave, or add silence"
            )
        return num_tokens

    @torch.no_grad()
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves as in `SemanticTokenizer`; tokens are ordered by frame, then by group."""
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
    """Build the network that computes the codes of a published checkpoint, in eval mode and float32."""
    weights = checkpoint.renamed_weights(_NAMES, _UNUSED)
    if not any(name.startswith("quantizer.") for name in weights):
        raise ValueError(
            f"{checkpoint.source} has no vq-wav2vec: the weights vector_quantizer.* are missing; pass "
            "vq-wav2vec.pt or vq-wav2vec_kmeans.pt"
        )
    settings = _DEFAULTS | {name: value for name, value in checkpoint.model.items() if value is not None}
    try:
        network = build_for(weights, lambda: _build_network(weights, settings))
    except (ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint.source}: {reason}; pass the file as published") from error
    load_weights(network, weights, checkpoint.source)
    return network.eval()


def _build_network(weights: dict[str, Tensor], settings: dict[str, Any]) -> VQWav2Vec:
    """Build the network for the settings; the sizes of the quantizer are read from the shapes of its weights."""

    def setting(name: str, kind: type, allowed: Any = None) -> Any:
        value = settings.get(name)
        if type(value) is not kind or (allowed is not None and value not in allowed):
            raise ValueError(f"the setting {name} in args or cfg has the unsupported value {quoted(value)}")
        return value

    activation = setting("activation", str, ACTIVATIONS)
    features = ConvFeatures(
        layers=conv_layers_of(settings.get("conv_feature_layers")),
        activation=activation,
        log_compression=setting("log_compression", bool),
    )
    setting("skip_connections_feat", bool, (False,))  # no published model has them
    dim, groups = features.dim, setting("vq_groups", int, range(1, features.dim + 1))
    codebook = weights.get("quantizer.codebook")
    if codebook is not None:
        if codebook.ndim != 3 or dim % groups or not codebook.numel():
            raise ValueError(
                f"a codebook of shape {tuple(codebook.shape)} does not fit {dim} channels in {groups} groups"
            )
        is_shared = codebook.shape[1] == 1
        return VQWav2Vec(features, KMeansQuantizer(dim=dim, groups=groups, codes=len(codebook), shared=is_shared))
    depth = sum(re.fullmatch(r"quantizer\.layers\.\d+\.bias", name) is not None for name in weights)
    last = weights.get(f"quantizer.layers.{depth - 1}.bias", torch.empty(0))
    if last.ndim != 1 or not last.numel() or len(last) % groups:
        raise ValueError(f"{last.numel()} logits cannot be divided into {groups} groups of codes")
    codes = len(last) // groups
    return VQWav2Vec(features, GumbelQuantizer(dim=dim, groups=groups, codes=codes, depth=depth, activation=activation))
