"""HuBERT with k-means from two published files, the usual semantic tokenizer of open AudioLM implementations."""

from pathlib import Path
from typing import Any

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.modules import build_module, register
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
from audiolm_pytorch.semantic.pretrained.encoder import open_published
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer

__all__ = ["HubertWithKmeans"]


@register
class HubertWithKmeans(KMeansTokenizer):
    """HuBERT tokenizer (arXiv:2106.07447): a token is the k-means centroid nearest to the hidden state of a layer.

    The published `hubert_base_ls960.pt` and `hubert_base_ls960_L9_km500.bin` use layer 9, and have 500 token ids and 49
    tokens in a wave of one second. No code in the files is run, and neither fairseq nor joblib is needed.

    Model card. HuBERT base was trained on English audiobooks (LibriSpeech); measure how well its tokens describe music
    with `musiclm evaluate semantic`. Waves are not normalised, as in the training of HuBERT base. The code that reads
    the files was compared with transformers and scikit-learn on files with random weights in the published format. THE
    PUBLISHED FILES THEMSELVES WERE NOT AVAILABLE FOR TESTS. Licence: MIT (fairseq, code and models).

    Waves longer than 30 s are encoded in windows (see `TransformersEncoder`). In tests with random weights, windows
    changed one quarter to one third of the tokens.

    Args:
        checkpoint_path: A fairseq checkpoint, or a folder or hub id of a model that `TransformersEncoder` can read.
        kmeans_path: A file for `read_centroids`: a k-means of scikit-learn saved by joblib, or safetensors.
        target_sample_hz: Sample rate of the model; another rate than that in the files raises a ValueError.
        output_layer: Number (1-based) of the layer that the centroids were fitted to; later layers are dropped.
        normalise_wave: Whether to normalise items to mean 0 and variance 1; None means as in the training of the model.
    """

    @typed
    def __init__(
        self,
        checkpoint_path: str | Path,
        kmeans_path: str | Path,
        target_sample_hz: int = 16_000,
        output_layer: int = 9,
        seq_len_multiple_of: int | None = None,
        *,
        normalise_wave: bool | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        tensors: dict[str, Any] = dict(read_centroids(kmeans_path))
        hub: dict[str, Any] = dict(
            offline=offline, revision=revision, cache_dir=cache_dir, allow_noncommercial=allow_noncommercial
        )
        encoder = open_published(checkpoint_path, layer_count=output_layer, normalise_wave=normalise_wave, **hub)
        if encoder.sample_hz != target_sample_hz:
            raise ValueError(
                f"target_sample_hz is {target_sample_hz}, but {checkpoint_path} needs {encoder.sample_hz} Hz; pass "
                f"target_sample_hz={encoder.sample_hz}, and input_sample_hz={target_sample_hz} with the waves"
            )
        width = tensors["centroids"].shape[1]
        if width != encoder.dim:
            raise ValueError(
                f"centroids of {kmeans_path} have width {width}, but features of {checkpoint_path} have width "
                f"{encoder.dim}; pass the k-means file that was fitted to this model"
            )
        super().__init__(encoder=encoder, layer=output_layer, seq_len_multiple_of=seq_len_multiple_of, **tensors)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HubertWithKmeans":
        """Build a tokenizer with random weights from its `config`, without the published files."""
        tokenizer = cls.__new__(cls)
        KMeansTokenizer.__init__(tokenizer, **{**config, "encoder": build_module(config["encoder"])})
        return tokenizer
