"""Self-supervised audio encoders of transformers (HuBERT and its kin, w2v-BERT) behind the `FrameEncoder` contract."""

import copy
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from einops import reduce
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import check_waves, checked_lengths, items_by_length, length_mask
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import LoadedModel, load_model, model_settings, portable_origin, require_transformers
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.semantic.base import FrameEncoder
from audiolm_pytorch.semantic.pretrained.convolutions import convolved, group_statistics
from audiolm_pytorch.semantic.pretrained.filterbank import Filterbank
from audiolm_pytorch.semantic.windows import ReceptiveField, Windows, features_in_windows

__all__ = ["TransformersEncoder"]

_FILTERBANK_MODEL = "wav2vec2-bert"
_CLASSES = {
    "data2vec-audio": "Data2VecAudioModel",
    "hubert": "HubertModel",
    "unispeech": "UniSpeechModel",
    "unispeech-sat": "UniSpeechSatModel",
    "wav2vec2": "Wav2Vec2Model",
    "wav2vec2-conformer": "Wav2Vec2ConformerModel",
    "wavlm": "WavLMModel",
    _FILTERBANK_MODEL: "Wav2Vec2BertModel",
}
# Settings that change features without showing in the shape of any weight.
_FEATURE_SETTINGS = (
    "do_stable_layer_norm",
    "feat_extract_activation",
    "feat_extract_norm",
    "hidden_act",
    "layer_norm_eps",
    "left_max_position_embeddings",
    "max_bucket_distance",
    "num_attention_heads",
    "num_buckets",
    "position_embeddings_type",
    "right_max_position_embeddings",
    "rotary_embedding_base",
)


@register
class TransformersEncoder(FrameEncoder):
    """Hidden states of a published audio encoder: frozen, always in eval mode, float32 unless moved.

    Reads HuBERT (arXiv:2106.07447), WavLM (arXiv:2110.13900), wav2vec 2.0, data2vec-audio, UniSpeech(-SAT), the
    conformer of wav2vec 2.0, and w2v-BERT 2.0 (from filterbanks) in the format of transformers. Layer k is what comes
    out of block k (1-based) and 0 what goes into the first: `hidden_states[k]` of transformers, except that the norm
    which some models put behind their last block belongs to no layer here, so that hidden states do not depend on how
    many blocks are kept.

    Items of unequal length are encoded in groups of equal length, so that padding reaches no feature: the group norm
    over time and the convolutional positions would let it in. Long waves are encoded in windows at fixed places: in a
    wave of up to `window_seconds` attention reaches everywhere, in one that is longer `context_seconds` beyond each
    window. Norms over time hear the whole wave in either case.

    Args:
        source: Folder in transformers' format, hub id, or a model that is loaded already (it is taken over).
        layer_count: Blocks to keep, from the first; None = all.
        normalise_wave: Whether each item is brought to zero mean and unit variance first. None = where the model was
            trained so: those with layer norm in their convolutions were, those with group norm (HuBERT base) were not,
            whatever their `preprocessor_config.json` says.
        window_seconds: What one window answers for.
        context_seconds: What it sees on each side of that.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is missing, of an architecture that is not read here, not in safetensors, incomplete,
            or without that many blocks; or if a number is out of range.
    """

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        layer_count: int | None = None,
        normalise_wave: bool | None = None,
        window_seconds: float | int = 30.0,
        context_seconds: float | int = 2.0,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        loaded = source
        if not isinstance(loaded, LoadedModel):
            loaded = load_model(loaded, _CLASSES, offline=offline, revision=revision, cache_dir=cache_dir)
        settings: Any = loaded.model.config
        self.origin = loaded.origin
        self.model_type: str = settings.model_type
        if self.model_type not in _CLASSES:
            raise ValueError(f"models of type {self.model_type!r} cannot be read; these can: {sorted(_CLASSES)}")
        depth = len(loaded.model.encoder.layers)  # type: ignore[union-attr,arg-type]
        if layer_count is not None and not 0 <= layer_count <= depth:
            raise ValueError(f"{loaded.source} has {depth} layers: give one of 0..{depth}, not {layer_count}")
        self.model: Any = _first_blocks(loaded.model, depth if layer_count is None else layer_count)
        self.model.requires_grad_(False)
        self.depth, self.dim = len(self.model.encoder.layers), settings.hidden_size
        self._read_front(loaded)
        self.downsample_factor = self._frames.stride
        if normalise_wave and self._filterbank:
            raise ValueError(f"{self.model_type} reads filterbanks, which are normalised: leave normalise_wave away")
        trained_normalised = not self._filterbank and getattr(settings, "feat_extract_norm", "layer") == "layer"
        self.normalise_wave = trained_normalised if normalise_wave is None else normalise_wave
        self.window_seconds, self.context_seconds = float(window_seconds), float(context_seconds)
        frame_hz = self.sample_hz / self.downsample_factor
        self._windows = Windows(round(self.window_seconds * frame_hz), round(self.context_seconds * frame_hz))
        self.train(False)

    def _read_front(self, loaded: LoadedModel) -> None:
        """Learn how waves come in: their rate, and which samples each frame is made of."""
        settings, preprocessor = self.model.config, loaded.preprocessor
        self.sample_hz = int(preprocessor.get("sampling_rate", 16_000))
        self._filterbank: Filterbank | None = None
        if self.model_type != _FILTERBANK_MODEL:
            self._frames = ReceptiveField.of_convolutions(settings.conv_kernel, settings.conv_stride)
            return
        stride = int(preprocessor.get("stride", 2))
        num_mels = int(preprocessor.get("num_mel_bins", settings.feature_projection_input_dim // stride))
        self._filterbank = Filterbank(sample_hz=self.sample_hz, num_mels=num_mels, stride=stride)
        self._frames = self._filterbank.frames
        if self._filterbank.dim != settings.feature_projection_input_dim:
            raise ValueError(
                f"{loaded.source} reads vectors of {settings.feature_projection_input_dim}, but its "
                f"preprocessor_config.json makes them of {self._filterbank.dim}: the files are not of one model"
            )

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this encoder."""
        options = {
            "normalise_wave": self.normalise_wave,
            "window_seconds": self.window_seconds,
            "context_seconds": self.context_seconds,
        }
        preprocessor: dict[str, Any] = {"sampling_rate": self.sample_hz}
        if self._filterbank:
            preprocessor |= {"num_mel_bins": self._filterbank.num_mels, "stride": self._filterbank.stride}
        origin = portable_origin(self.origin)
        return dict(model=model_settings(self.model), options=options, origin=origin, preprocessor=preprocessor)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformersEncoder":
        """Build from the dictionary that `config` holds, with fresh weights (for `audiolm_pytorch.saving.modules`)."""
        model_class = getattr(require_transformers(), _CLASSES[config["model"]["model_type"]])
        model = model_class(model_class.config_class.from_dict(dict(config["model"])))
        return cls(LoadedModel(model, preprocessor=config["preprocessor"], **config["origin"]), **config["options"])

    def fingerprint(self) -> str:
        """Hash of all that features depend on: the same from any file of the same model, with as many blocks kept."""
        settings = {name: getattr(self.model.config, name, None) for name in _FEATURE_SETTINGS}
        front = [self.sample_hz, self._frames.reach, self._frames.stride, self.normalise_wave]
        facts = [self.model_type, front, [self._windows.keep, self._windows.context], settings]
        return nameless_fingerprint(self.model, facts)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a wave, exactly: 49 for a second of 16 kHz in HuBERT.

        Args:
            num_samples: Length of the wave at `sample_hz`.

        Returns:
            `(num_samples - reach) // downsample_factor + 1`, with the 400 samples that a frame of HuBERT is made of.

        Raises:
            ValueError: If the wave is shorter than one frame.
        """
        frames = self._frames.num_frames(num_samples)
        if not frames:
            reach = self._frames.reach
            raise ValueError(
                f"audio of {num_samples} samples is too short: a frame is made of {reach} samples "
                f"({1000 * reach / self.sample_hz:g} ms at {self.sample_hz} Hz); pass a longer wave, or add silence"
            )
        return frames

    def train(self, mode: bool = True) -> "TransformersEncoder":
        """Stay in eval mode: the encoder is frozen, and masks and dropout would change its features."""
        return super().train(False)

    @torch.no_grad()
    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of a layer.

        Args:
            wave: `[b, n]`, float, at `sample_hz`.
            lengths: `[b]` int, samples that belong to each item; None = all.
            layer: 0..depth; None = the last.

        Returns:
            Features `[b, t, d]` and the mask `[b, t]` bool of real frames. Padding changes nothing at real frames; what
            stands at the others is zero.

        Raises:
            ValueError: If shapes do not fit, samples are not finite, an item is shorter than one frame or there is no
                such layer.
        """
        layer = self.depth if layer is None else layer
        self.check_layer(layer)
        check_waves(wave, lengths, device_of(self.model))
        if lengths is not None:
            lengths = checked_lengths(lengths, wave)
            self.num_frames(int(lengths.min()))
        num_frames = self.num_frames(wave.shape[1])
        encoder = _first_blocks(self.model, layer).encoder
        dtype = next(self.model.parameters()).dtype
        found = torch.zeros(len(wave), num_frames, self.dim, dtype=dtype, device=wave.device)
        counts = torch.zeros(len(wave), dtype=torch.int64, device=wave.device)
        with torch.autocast(wave.device.type, enabled=False):
            for rows, part in items_by_length(wave, lengths):
                hidden = self._encode(part, encoder, dtype)
                found[rows, : hidden.shape[1]] = hidden
                counts[rows] = hidden.shape[1]
        return found, length_mask(counts, num_frames)

    def _encode(self, wave: Tensor, encoder: nn.Module, dtype: torch.dtype) -> Tensor:
        """Hidden states `[r, t, d]` of waves `[r, n]` without padding, behind the blocks of `encoder`."""
        wave = wave.float()
        if self._filterbank:
            vectors = self._filterbank(wave).to(dtype)
            return features_in_windows(lambda part: self._run(part, encoder), vectors, ReceptiveField(), self._windows)
        if self.normalise_wave:
            # over the whole item, as transformers does it, whatever windows follow
            mean = reduce(wave, "r n -> r 1", "mean")
            wave = (wave - mean) / (wave.var(dim=1, correction=0, keepdim=True) + 1e-7).sqrt()

        wave, extractor, statistics = wave.to(dtype), self.model.feature_extractor, None
        if self._frames.num_frames(wave.shape[1]) > self._windows.keep:
            samples_at_once = self._frames.span(0, self._windows.keep).stop
            statistics = group_statistics(extractor, wave, samples_at_once)

        def of_waves(part: Tensor) -> Tensor:
            return self._run(convolved(extractor, part, statistics), encoder)

        return features_in_windows(of_waves, wave, self._frames, self._windows)

    def _run(self, vectors: Tensor, encoder: nn.Module) -> Tensor:
        """Hidden states of vectors `[r, t, d']` of the front end; spans are never masked, as they are in training."""
        projected = self.model.feature_projection(vectors)
        return encoder(projected[0] if isinstance(projected, tuple) else projected)[0]

    @beartype
    def truncated(self, layer: int) -> "TransformersEncoder":
        """An independent copy of the first `layer` blocks, whose hidden states are those of this encoder.

        Args:
            layer: Blocks to keep, 0..depth.

        Raises:
            ValueError: If there is no such layer.
        """
        self.check_layer(layer)
        short = copy.copy(self)
        short._modules = {**self._modules, "model": _first_blocks(self.model, layer)}
        short.depth = layer
        return copy.deepcopy(short)


def _first_blocks(model: Any, count: int) -> Any:
    """A model of the first blocks of another, that shares their weights and ends with the last of them."""
    short, encoder = copy.copy(model), copy.copy(model.encoder)
    encoder._modules = {**encoder._modules, "layers": encoder.layers[:count]}
    if type(encoder).__name__.endswith(("StableLayerNorm", "ConformerEncoder")):
        # a norm behind the last block; elsewhere the norm of that name stands before the first
        encoder._modules["layer_norm"] = nn.Identity()
    # What may stand behind the blocks, or serves training alone, is left out.
    behind = {name: None for name in ("adapter", "intermediate_ffn") if name in short._modules}
    short._modules = {**short._modules, **behind, "encoder": encoder}
    short._parameters = {name: weight for name, weight in short._parameters.items() if name != "masked_spec_embed"}
    short.config = copy.deepcopy(model.config)
    short.config.num_hidden_layers = count
    return short
