"""HuBERT with k-means, from the two published files: the semantic tokens of most open replicas of AudioLM."""

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
    """Tokens of HuBERT (arXiv:2106.07447): the nearest k-means centroid of the hidden states of one layer.

    The published `hubert_base_ls960.pt` and `hubert_base_ls960_L9_km500.bin` have 500 tokens and 49 tokens in a second,
    from layer 9. Neither fairseq nor joblib nor scikit-learn is needed, and no code in the files is run. `save_module`
    writes encoder and centroids as safetensors.

    Model card. HuBERT base was trained on English audiobooks (LibriSpeech), so how much of music its tokens keep must
    be measured (`musiclm evaluate semantic`). Waves are not normalised, since the model was trained so. The reader was
    compared with transformers' HubertModel and scikit-learn's predict on files of the published layout with random
    weights; THE PUBLISHED FILES THEMSELVES WERE NOT AT HAND. Licence: MIT (fairseq, code and models).

    Waves longer than 30 s are encoded in windows (see `TransformersEncoder`). With random weights, two thirds to three
    quarters of the tokens equal those of the whole wave.

    Args:
        checkpoint_path: fairseq's checkpoint, a folder in transformers' format (any model that `TransformersEncoder`
            reads), or a hub id.
        kmeans_path: A file that `read_centroids` reads: joblib's file of a (MiniBatch)KMeans, or safetensors.
        target_sample_hz: Rate of the model, which its files decide; any other rate raises a ValueError.
        output_layer: The layer that the centroids were fitted to, 1-based; later blocks are dropped.
        seq_len_multiple_of: Samples: waves are cut to a multiple of it. None = no cut.
        normalise_wave: Whether items are normalised to zero mean and unit variance; None = as the model was trained.
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
                "fitted to another model; give the file that belongs to this one"
            )
        super().__init__(encoder=encoder, layer=output_layer, seq_len_multiple_of=seq_len_multiple_of, **tensors)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HubertWithKmeans":
        """Build a tokenizer with random weights, without the published files."""
        tokenizer = cls.__new__(cls)
        KMeansTokenizer.__init__(tokenizer, **{**config, "encoder": build_module(config["encoder"])})
        return tokenizer
