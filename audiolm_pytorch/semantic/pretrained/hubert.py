"""HuBERT with k-means from the two published files, the usual semantic tokenizer of open AudioLM implementations."""

from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.saving.modules import build_module, register
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
from audiolm_pytorch.semantic.pretrained.encoder import open_published
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer

__all__ = ["HubertWithKmeans"]


@register
class HubertWithKmeans(KMeansTokenizer):
    """HuBERT tokenizer (arXiv:2106.07447): a token is the k-means centroid nearest to the hidden state of a layer.

    The published `hubert_base_ls960.pt` and `hubert_base_ls960_L9_km500.bin` have 500 token ids, 49 tokens in a wave of
    one second, and use layer 9. fairseq, joblib and scikit-learn are not needed, and no code in the files is run.
    `save_module` writes encoder and centroids as safetensors.

    Model card. HuBERT base was trained on English audiobooks (LibriSpeech); measure how well its tokens describe music
    with `musiclm evaluate semantic`. Waves are not normalised, as in the training of the model. The code that reads the
    files was compared with transformers' HubertModel and scikit-learn's predict on files of the published layout with
    random weights; THE PUBLISHED FILES THEMSELVES WERE NOT AT HAND. Licence: MIT (fairseq, code and models).

    Waves longer than 30 s are encoded in windows (see `TransformersEncoder`). With random weights, two thirds to three
    quarters of these tokens equal those without windows.

    Args:
        checkpoint_path: A fairseq checkpoint, a folder in transformers' format (any model that `TransformersEncoder`
            can read), or a hub id.
        kmeans_path: A file for `read_centroids`: a k-means of scikit-learn saved by joblib, or safetensors.
        target_sample_hz: Sample rate of the model; if it differs from the rate in the files, a ValueError is raised.
        output_layer: Layer (1-based) that the centroids were fitted to; later blocks are dropped.
        seq_len_multiple_of: Waves are cut to a multiple of this number of samples. None = no cut.
        normalise_wave: Whether items are normalised to zero mean and unit variance; None = as in training of the model.
        offline: Use only local files and the local cache of the hub.
    """

    @beartype
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
    ) -> None:
        tensors: dict[str, Any] = dict(read_centroids(kmeans_path))
        hub: dict[str, Any] = dict(offline=offline, revision=revision, cache_dir=cache_dir)
        encoder = open_published(checkpoint_path, layer_count=output_layer, normalise_wave=normalise_wave, **hub)
        if encoder.sample_hz != target_sample_hz:
            raise ValueError(
                f"{checkpoint_path} reads {encoder.sample_hz} Hz, target_sample_hz is {target_sample_hz}: leave it at "
                f"{encoder.sample_hz} and pass input_sample_hz={target_sample_hz} with the waves, which are resampled"
            )
        width = tensors["centroids"].shape[1]
        if width != encoder.dim:
            raise ValueError(
                f"centroids of {kmeans_path} are {width} wide, features of {checkpoint_path} {encoder.dim}: they were "
                "fitted to another model; pass the k-means file of this model"
            )
        super().__init__(encoder=encoder, layer=output_layer, seq_len_multiple_of=seq_len_multiple_of, **tensors)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HubertWithKmeans":
        """Build a tokenizer with random weights, without the published files."""
        tokenizer = cls.__new__(cls)
        KMeansTokenizer.__init__(tokenizer, **{**config, "encoder": build_module(config["encoder"])})
        return tokenizer
