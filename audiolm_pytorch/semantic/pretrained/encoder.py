"""Published self-supervised encoders (HuBERT, WavLM, wav2vec 2.0, w2v-BERT and others), and functions to open them."""

import copy
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import checked_lengths, items_by_length, length_mask
from audiolm_pytorch.audio.units import check_durations
from audiolm_pytorch.audio.waves import mono_waves
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import LoadedModel, load_model, model_of, model_settings, portable_origin
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.saving.sources import find_folder
from audiolm_pytorch.semantic.base import FrameEncoder
from audiolm_pytorch.semantic.pretrained.fairseq import hubert_from_fairseq, read_fairseq
from audiolm_pytorch.semantic.pretrained.filterbank import Filterbank
from audiolm_pytorch.semantic.windows import ReceptiveField, Windows, convolved, features_in_windows, group_norm_moments

__all__ = ["TransformersEncoder", "open_encoder", "open_published"]

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
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
# Settings that change features, but no shape of a weight.
_FEATURE_SETTINGS = (
    "do_stable_layer_norm feat_extract_activation feat_extract_norm hidden_act layer_norm_eps "
    "left_max_position_embeddings max_bucket_distance num_attention_heads num_buckets position_embeddings_type "
    "right_max_position_embeddings rotary_embedding_base"
).split()


@register
class TransformersEncoder(FrameEncoder):
    """A published audio encoder in the format of transformers, frozen and loaded in float32.

    Supported models are HuBERT (arXiv:2106.07447), WavLM (arXiv:2110.13900), wav2vec 2.0 and its conformer,
    data2vec-audio, UniSpeech(-SAT), and w2v-BERT 2.0. Layer k is `hidden_states[k]` of transformers: layer 0 is the
    input of the first transformer layer. If a model has a norm after its last layer, the norm is not applied, so that
    hidden states do not depend on `layer_count`.

    Items of equal length are encoded in one batch, so that padding does not change the result. Waves longer than
    `window_seconds` are encoded in windows at fixed positions, with a context of `context_seconds` on each side. Layers
    that normalise over time use statistics of the whole wave, not of a window.

    Args:
        source: Folder in transformers' format, hub id, or a loaded model, whose weights are frozen and not copied.
        layer_count: Number of transformer layers to keep, counted from the first; None means all layers.
        normalise_wave: Whether each item is normalised to zero mean and unit variance; None means True for a model
            with layer norms in the convolutions and False for a model with a group norm, as in their training.
                `normalise_wave` is not read from `preprocessor_config.json`.
        offline: Use only local files and the local cache of the hub.
        allow_noncommercial: Whether to load weights with a non-commercial licence.
    """

    published = dict.fromkeys(_CLASSES, "TransformersEncoder")

    @typed
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        layer_count: int | None = None,
        normalise_wave: bool | None = None,
        window_seconds: float = 30.0,
        context_seconds: float = 2.0,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        super().__init__()
        check_durations(window_seconds=window_seconds)
        if context_seconds < 0:
            raise ValueError(f"context_seconds must be 0 or more, got {context_seconds}")
        hub: dict[str, Any] = dict(
            offline=offline, revision=revision, cache_dir=cache_dir, allow_noncommercial=allow_noncommercial
        )
        loaded = load_model(source, _CLASSES, **hub)
        settings: Any = loaded.model.config
        self.origin = loaded.origin
        self.model_type: str = settings.model_type
        depth = len(loaded.model.encoder.layers)  # type: ignore[union-attr,arg-type]
        if layer_count is not None and not 0 <= layer_count <= depth:
            raise ValueError(
                f"layer_count (output_layer of a tokenizer) must be in 0..{depth}, since {loaded.source} has {depth} "
                f"layers, got {layer_count}"
            )
        self.model: Any = _first_blocks(loaded.model, depth if layer_count is None else layer_count)
        self.model.requires_grad_(False)
        self.depth, self.dim = len(self.model.encoder.layers), settings.hidden_size
        self._read_front(loaded)
        self.downsample_factor = self._frames.stride
        if normalise_wave and self._filterbank:
            raise ValueError(f"{self.model_type} normalises filterbanks, not waves; do not pass normalise_wave=True")
        is_trained_so = not self._filterbank and getattr(settings, "feat_extract_norm", "layer") == "layer"
        self.normalise_wave = is_trained_so if normalise_wave is None else normalise_wave
        self.window_seconds, self.context_seconds = float(window_seconds), float(context_seconds)
        frame_hz = self.sample_hz / self.downsample_factor
        self._windows = Windows(round(self.window_seconds * frame_hz), round(self.context_seconds * frame_hz))
        self.train(False)

    def _read_front(self, loaded: LoadedModel) -> None:
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
                f"{loaded.source} needs vectors of width {settings.feature_projection_input_dim}, but the width in "
                f"preprocessor_config.json is {self._filterbank.dim}; use files of the same model"
            )

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description of the model, its preprocessor and origin, and the options of encoding."""
        options = {name: getattr(self, name) for name in ("normalise_wave", "window_seconds", "context_seconds")}
        preprocessor: dict[str, Any] = {"sampling_rate": self.sample_hz}
        if self._filterbank:
            preprocessor |= {"num_mel_bins": self._filterbank.num_mels, "stride": self._filterbank.stride}
        origin = portable_origin(self.origin)
        return dict(model=model_settings(self.model), options=options, origin=origin, preprocessor=preprocessor)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformersEncoder":
        """Build an encoder with random weights from the `config` of an encoder."""
        model = model_of(config["model"], _CLASSES)
        return cls(LoadedModel(model, preprocessor=config["preprocessor"], **config["origin"]), **config["options"])

    def fingerprint(self) -> str:
        """Return a hash of everything that features depend on; the hash does not depend on the file format."""
        settings = {name: getattr(self.model.config, name, None) for name in _FEATURE_SETTINGS}
        front = [self.sample_hz, self._frames.reach, self._frames.stride, self.normalise_wave]
        facts = [self.model_type, front, [self._windows.keep, self._windows.context], settings]
        return nameless_fingerprint(self.model, facts)

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of a wave at `sample_hz`; for one second, HuBERT has 49 frames."""
        frames = self._frames.num_frames(num_samples)
        if not frames:
            raise ValueError(
                f"audio of {num_samples} samples is too short: a frame needs {self._frames.reach} samples at "
                f"{self.sample_hz} Hz; pass a longer wave, or add silence"
            )
        return frames

    def train(self, mode: bool = True) -> "TransformersEncoder":
        """Keep the encoder in eval mode, because masks and dropout would change the features."""
        return super().train(False)

    @torch.no_grad()
    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute the hidden states `[b, t, d]` of a layer, which are zero at padding, and the mask `[b, t]`."""
        layer = self.depth if layer is None else layer
        self.check_layer(layer)
        wave = mono_waves(wave, lengths, device_of(self.model))
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
        """Compute the output `[b, t, d]` of the last layer of `encoder` for waves `[b, n]` without padding."""
        wave = wave.float()
        if self._filterbank:
            vectors = self._filterbank(wave).to(dtype)
            return features_in_windows(lambda part: self._run(part, encoder), vectors, ReceptiveField(), self._windows)
        if self.normalise_wave:
            # Over the whole item, as transformers does it.
            mean = reduce(wave, "r n -> r 1", "mean")
            wave = (wave - mean) / (wave.var(dim=1, correction=0, keepdim=True) + 1e-7).sqrt()

        wave, extractor, moments = wave.to(dtype), self.model.feature_extractor, None
        if self._frames.num_frames(wave.shape[1]) > self._windows.keep:
            moments = group_norm_moments(extractor, wave, self._frames.span(0, self._windows.keep).stop)

        def of_waves(part: Tensor) -> Tensor:
            return self._run(convolved(extractor, part, moments), encoder)

        return features_in_windows(of_waves, wave, self._frames, self._windows)

    def _run(self, vectors: Tensor, encoder: nn.Module) -> Tensor:
        """Compute hidden states of front-end vectors `[b, t, width]`, without the random masks of training."""
        projected = self.model.feature_projection(vectors)
        return encoder(projected[0] if isinstance(projected, tuple) else projected)[0]

    @typed
    def truncated(self, layer: int) -> "TransformersEncoder":
        """Return an independent copy of the encoder with the first `layer` transformer layers."""
        self.check_layer(layer)
        short = copy.copy(self)
        short._modules = {**self._modules, "model": _first_blocks(self.model, layer)}
        short.depth = layer
        return copy.deepcopy(short)


def _first_blocks(model: Any, count: int) -> Any:
    """Return a model that has only the first `count` layers of `model`, and shares their weights with `model`."""
    short, encoder = copy.copy(model), copy.copy(model.encoder)
    encoder._modules = {**encoder._modules, "layers": encoder.layers[:count]}
    if type(encoder).__name__.endswith(("StableLayerNorm", "ConformerEncoder")):
        # Here this is the norm behind the last block; in other models, it is the norm before the first.
        encoder._modules["layer_norm"] = nn.Identity()
    # Parts behind the blocks, and the embedding of masked frames, are left out.
    behind = {name: None for name in ("adapter", "intermediate_ffn") if name in short._modules}
    short._modules = {**short._modules, **behind, "encoder": encoder}
    short._parameters = {name: weight for name, weight in short._parameters.items() if name != "masked_spec_embed"}
    short.config = copy.deepcopy(model.config)
    short.config.num_hidden_layers = count
    return short


@typed
def open_published(
    source: str | Path, *, layer_count: int | None = None, normalise_wave: bool | None = None, **hub: Any
) -> TransformersEncoder:
    """Load an encoder from a HuBERT checkpoint of fairseq, a folder in transformers' format, or a hub id.

    `TransformersEncoder` documents the arguments; `normalise_wave=None` uses the setting in a fairseq checkpoint.
    """
    path = Path(source).expanduser()
    options: dict[str, Any] = {"layer_count": layer_count, "normalise_wave": normalise_wave}
    if not _is_checkpoint_file(path):
        return TransformersEncoder(source, **hub, **options)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; pass the path of a checkpoint, a folder, or a hub id (owner/name)")
    checkpoint = read_fairseq(path)
    if normalise_wave is None:
        options["normalise_wave"] = checkpoint.normalise_wave
    preprocessor = {"sampling_rate": checkpoint.sample_hz}
    model = hubert_from_fairseq(checkpoint)
    loaded = LoadedModel(model, str(path), licence="MIT (fairseq, code and models)", preprocessor=preprocessor)
    return TransformersEncoder(loaded, **options)


def _is_checkpoint_file(path: Path) -> bool:
    """Return whether a path is an existing file, or has the suffix of a checkpoint file and is not a folder."""
    return path.is_file() or (path.suffix in _CHECKPOINT_SUFFIXES and not path.is_dir())


@typed
def open_encoder(
    source: str | Path,
    *,
    offline: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_noncommercial: bool = False,
) -> FrameEncoder:
    """Load an audio encoder in eval mode from any source.

    The source is a checkpoint file or a published encoder, which `open_published` loads, or a source of
    `FrameEncoder.from_pretrained`, which also documents the further arguments.
    """
    hub: dict[str, Any] = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
    hub["allow_noncommercial"] = allow_noncommercial
    if _is_checkpoint_file(Path(source).expanduser()):
        return open_published(source)
    folder, _ = find_folder(source, **hub)
    if (folder / "config.json").is_file() and "class" in read_json(folder / "config.json"):
        return FrameEncoder.from_pretrained(source, **hub)
    return open_published(source, **hub)
