"""HuBERT and its k-means from the two published files: the semantic tokens of most open replicas of AudioLM."""

from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.saving.modules import build_module, register
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
from audiolm_pytorch.semantic.pretrained.opening import open_published
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer

__all__ = ["HubertWithKmeans"]


@register
class HubertWithKmeans(KMeansTokenizer):
    """Tokens of HuBERT (arXiv:2106.07447): the nearest k-means centroid of the hidden states of one layer.

    Made for the published `hubert_base_ls960.pt` and `hubert_base_ls960_L9_km500.bin`: 500 tokens, 50 a second less one
    (a second of 16 kHz gives 49), from layer 9. The files are read as they are: without fairseq, joblib or
    scikit-learn, and through an unpickler that admits tensors, arrays, plain containers and inert stand-ins only.
    `save_module` writes both as safetensors, from where they load without any pickle.

    Card. Waves are not normalised (the model was trained so; the `preprocessor_config.json` of its folder in
    transformers' format says otherwise), no spans are masked, and hidden states are compared as they are. What is said
    here was checked against transformers' HubertModel and scikit-learn's predict on files of the published layout that
    the tests write with random weights. THE PUBLISHED FILES THEMSELVES COULD NOT BE OPENED where this was written (no
    network); the layout is that of fairseq's sources. The model heard English audiobooks (LibriSpeech) alone: it
    is a model of speech, and how much of music its tokens keep has to be measured (`musiclm evaluate semantic`).
    Licence: MIT, as fairseq says of its code and models.

    Waves of up to 30 s are heard whole. Longer ones are encoded in windows of 30 s at fixed places with 2 s more on
    each side, so that memory stays bounded. The convolutions see no seam, but attention ends at the window: with random
    weights two thirds to three quarters of the tokens are those of the whole file, wherever they stand.

    Args:
        checkpoint_path: fairseq's checkpoint, a folder in transformers' format (any model that `TransformersEncoder`
            reads), or a hub id.
        kmeans_path: joblib's file of a (MiniBatch)KMeans, plain or compressed, or a `.safetensors` file with
            `centroids [k, d]` and, where features are normalised, `mean [d]` and `std [d]`.
        target_sample_hz: Rate of the model (Hz), which its files decide: another one is refused.
        output_layer: The layer that the centroids were fitted to, 1-based; blocks behind it are dropped.
        seq_len_multiple_of: Samples that lengths are cut down to a multiple of; None = no cut.
        normalise_wave: Whether items are brought to zero mean and unit variance; None = as the model was trained.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If a file is missing, damaged, hostile or another one, the two do not fit each other, or the rate or
            the layer is not one of the model.
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
        tensors = read_centroids(kmeans_path)
        encoder = open_published(
            checkpoint_path,
            layer_count=output_layer,
            normalise_wave=normalise_wave,
            offline=offline,
            revision=revision,
            cache_dir=cache_dir,
        )
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
        super().__init__(
            encoder=encoder,
            layer=output_layer,
            seq_len_multiple_of=seq_len_multiple_of,
            centroids=tensors["centroids"],
            mean=tensors.get("mean"),
            std=tensors.get("std"),
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HubertWithKmeans":
        """Build a tokenizer whose weights and centroids are to be loaded: no published file is needed any more."""
        tokenizer = cls.__new__(cls)
        KMeansTokenizer.__init__(tokenizer, **{**config, "encoder": build_module(config["encoder"])})
        return tokenizer
