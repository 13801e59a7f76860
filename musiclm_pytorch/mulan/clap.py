"""CLAP models (arXiv:2211.06687) of the transformers library as a deterministic joint embedding of long audio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.mel import mel_edges, triangular_filters
from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.audio.waves import mono_waves
from audiolm_pytorch.checks.damage import check_finite
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.published_text import PublishedText, tokenizer_of
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving import hub
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register
from musiclm_pytorch.mulan.joint import JointEmbedding, average_latents

__all__ = ["ClapMuLaN", "ClapSpectrogram"]

# Settings that change embeddings but not the shape of any weight; part of the fingerprint.
_TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "pad_token_id", "projection_hidden_act")
_AUDIO_SETTINGS = (
    "depths", "hidden_act", "layer_norm_eps", "num_attention_heads",
    "patch_stride", "projection_hidden_act", "spec_size", "window_size",
)  # fmt: skip
# Settings of transformers' `ClapFeatureExtractor`, with its defaults.
_PREPROCESSOR: dict[str, Any] = dict(
    feature_size=64, sampling_rate=48_000, hop_length=480, max_length_s=10.0, fft_window_size=1024,
    frequency_min=0.0, frequency_max=14_000.0, truncation="fusion", padding="repeatpad",
)  # fmt: skip
# Lower bound of the energies: -100 dB.
_FLOOR = 1e-10
# Clips that are transformed at a time; the float64 spectra of a clip need 25 MB.
_CLIPS_PER_CHUNK = 8


class ClapSpectrogram:
    """Computes log-mel spectrograms (dB) of clips of up to `num_samples` like transformers' `ClapFeatureExtractor`.

    A clip shorter than `num_samples` is repeated a whole number of times and padded with zeros. Random crops of longer
    clips are not supported, since a clip must always have the same embedding.
    """

    def __init__(self, preprocessor: dict[str, Any]) -> None:
        self.settings = {name: type(value)(preprocessor.get(name, value)) for name, value in _PREPROCESSOR.items()}
        repeats = {"repeatpad": 0, "repeat": 1, "pad": None}
        if self.settings["padding"] not in repeats:
            raise ValueError(f"padding must be one of {sorted(repeats)}, got {self.settings['padding']!r}")
        self._repeats = repeats[self.settings["padding"]]
        self.sample_hz: int = self.settings["sampling_rate"]
        self.seconds: float = self.settings["max_length_s"]
        self.num_samples = round(self.seconds * self.sample_hz)
        # Filters of torchaudio (peak 1) for the models that fuse, of librosa (area 1) for the others.
        slaney = self.settings["truncation"] != "fusion"
        span = self.settings["frequency_min"], self.settings["frequency_max"]
        edges_hz = mel_edges(*span, self.settings["feature_size"], scale="slaney" if slaney else "htk")
        filters = triangular_filters(edges_hz, self.sample_hz, self.settings["fft_window_size"])
        if slaney:
            filters = filters * rearrange(2 / (edges_hz[2:] - edges_hz[:-2]), "m -> m 1")
        self._filters = torch.from_numpy(filters)

    def __call__(self, wave: Tensor) -> Tensor:
        """Compute spectrograms `[b, f, m]` (dB, float32, m mel bands) of clips `[b, n]` with n <= `num_samples`."""
        missing = self.num_samples - wave.shape[1]
        if missing > 0 and self._repeats is not None:
            wave = wave.repeat(1, self.num_samples // wave.shape[1] + self._repeats)[:, : self.num_samples]
        wave = F.pad(wave, (0, self.num_samples - wave.shape[1]))
        return torch.cat([self._log_mel(part) for part in wave.split(_CLIPS_PER_CHUNK)])

    def _log_mel(self, wave: Tensor) -> Tensor:
        """Compute spectrograms `[b, f, m]` of m mel bands, in float64 if the device supports it."""
        wide = torch.float32 if wave.device.type == "mps" else torch.float64
        n_fft, hop = self.settings["fft_window_size"], self.settings["hop_length"]
        window = torch.hann_window(n_fft, dtype=wide, device=wave.device)
        padded = F.pad(wave.to(wide), (n_fft // 2, n_fft // 2), mode="reflect")
        spectrum = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True)
        energies = self._filters.to(wave.device, wide) @ (spectrum.real.square() + spectrum.imag.square())
        return rearrange(10.0 * energies.clamp(min=_FLOOR).log10(), "b m f -> b f m").float()


@register
class ClapMuLaN(JointEmbedding):
    """Joint embedding by a published CLAP model with frozen weights, which is always in eval mode.

    A clip longer than `window_seconds` is embedded as the mean over windows at fixed positions. CLAP models that fuse
    crops of long audio (laion/clap-htsat-fused) can be loaded, but the fusion is not used.

    Args:
        source: Folder in transformers' format, hub id, or a loaded model, which is not copied.
        offline: Whether to use only local folders and the local cache of the hub.
        allow_noncommercial: Whether to load weights with a non-commercial licence.
    """

    @typed
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        tokenizer: TextTokenizer | None = None,
        window_stride_seconds: float = 1.0,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        where: dict[str, Any] = dict(
            offline=offline, revision=revision, cache_dir=cache_dir, allow_noncommercial=allow_noncommercial
        )
        loaded = source
        if not isinstance(loaded, LoadedModel):
            loaded = hub.load_model(loaded, {"clap": "ClapModel"}, **where)
        if not loaded.preprocessor:
            raise ValueError(
                f"{loaded.source} has no preprocessor_config.json with the settings of the spectrogram; copy that file "
                "from where the weights were published"
            )
        spectrogram = ClapSpectrogram(loaded.preprocessor)
        settings: Any = loaded.model.config
        super().__init__(
            dim_latent=settings.projection_dim,
            sample_hz=spectrogram.sample_hz,
            window_seconds=spectrogram.seconds,
            window_stride_seconds=window_stride_seconds,
        )
        self.origin = loaded.origin
        self.model: Any = loaded.model.requires_grad_(False)
        self._spectrogram = spectrogram
        self._text = PublishedText(self.model.text_model, tokenizer_of(loaded, source, tokenizer, **where))
        self.train(False)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able settings of the model and its tokenizer, from which `from_config` builds a copy."""
        return {
            "model": hub.model_settings(self.model),
            "tokenizer": self._text.tokenizer.to_json(),
            "options": {"window_stride_seconds": self.window_stride_seconds},
            "origin": hub.portable_origin(self.origin),
            "preprocessor": self._spectrogram.settings,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ClapMuLaN":
        """Build a model with random weights from `config`."""
        transformers = hub.require_transformers()
        model = transformers.ClapModel(transformers.ClapConfig.from_dict(dict(config["model"])))
        loaded = LoadedModel(model, preprocessor=config["preprocessor"], **config["origin"])
        tokenizer = TextTokenizer.from_json(config["tokenizer"], special_tokens=True)
        return cls(loaded, tokenizer=tokenizer, **config["options"])

    def fingerprint(self) -> str:
        """Hash of the weights and settings on which embeddings depend, equal on every device and for every copy."""
        parts = (self.model.config.text_config, _TEXT_SETTINGS), (self.model.config.audio_config, _AUDIO_SETTINGS)
        settings = [[getattr(part, name, None) for name in names] for part, names in parts]
        windows = [self.window_seconds, self.window_stride_seconds, self._text.max_tokens]
        facts = [settings, windows, self._spectrogram.settings, self._text.tokenizer.to_json()]
        return nameless_fingerprint(self.model, facts)

    def train(self, mode: bool = True) -> "ClapMuLaN":
        """Keep the model in eval mode, since its normalisation layers use batch statistics in training mode."""
        return super().train(False)

    @typed
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Return token ids `[b, t]` int64 of texts, -1 past the end; token ids as input are checked and returned."""
        return self._text.tokenize(texts)

    @torch.no_grad()
    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips (see `JointEmbedding`); a clip longer than a window is embedded as the mean over its windows."""
        wavs = mono_waves(wavs, lengths, device_of(self.model), name="wavs")
        latents = torch.empty(len(wavs), self.dim_latent, device=wavs.device)
        spectrograms, short_rows = [], []
        with torch.autocast(wavs.device.type, enabled=False):
            for rows, part in items_by_length(wavs, lengths):
                if part.shape[1] > self.window_samples:
                    latents[rows] = torch.stack([average_latents(self.window_latents(wav)) for wav in part])
                else:
                    spectrograms.append(self._spectrogram(part))
                    short_rows.append(rows)
            if spectrograms:
                latents[torch.cat(short_rows)] = self._embed(torch.cat(spectrograms))
        return latents

    def _embed(self, spectrograms: Tensor) -> Tensor:
        """Embed spectrograms `[b, f, m]` of m mel bands as latents `[b, d]`."""
        features = rearrange(spectrograms, "b f m -> b 1 f m").to(next(self.model.parameters()).dtype)
        # Input of models that fuse: no clip is a crop of a longer one.
        is_longer = torch.zeros(len(spectrograms), 1, dtype=torch.bool, device=spectrograms.device)
        pooled = self.model.audio_model(input_features=features, is_longer=is_longer).pooler_output
        return check_finite(
            F.normalize(self.model.audio_projection(pooled).float(), dim=-1), self, "latents of the audio"
        )

    @torch.no_grad()
    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts; see `JointEmbedding`."""
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        with torch.autocast(device.type, enabled=False):
            pooled = self.model.text_model(**self._text.inputs(ids)).pooler_output
            latents = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
        return check_finite(latents, self, "latents of the texts")
