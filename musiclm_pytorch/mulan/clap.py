"""CLAP of transformers (arXiv:2211.06687) in the place of MuLaN: without its randomness, for audio of any length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.mel import mel_edges, triangular_filters
from audiolm_pytorch.audio.padding import check_waves, items_by_length
from audiolm_pytorch.conditioning.published_text import PublishedText, tokenizer_of
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import (
    LoadedModel,
    find_folder,
    load_model,
    model_settings,
    portable_origin,
    require_transformers,
)
from audiolm_pytorch.saving.modules import load_module, register
from musiclm_pytorch.mulan.joint import JointEmbedding, average_latents

__all__ = ["ClapMuLaN", "ClapSpectrogram"]

_MODEL_TYPE, _MODEL_CLASS = "clap", "ClapModel"
# Settings that change embeddings without showing in the shape of any weight.
_TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "pad_token_id", "projection_hidden_act")
_AUDIO_SETTINGS = (
    "depths",
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "patch_stride",
    "projection_hidden_act",
    "spec_size",
    "window_size",
)
# The energy that counts as silence: -100 dB.
_FLOOR = 1e-10
# Clips whose spectra are held at once in float64: 25 MB each.
_CLIPS_AT_ONCE = 8


class ClapSpectrogram:
    """Log-mel spectrograms (dB) as transformers' `ClapFeatureExtractor` makes them of clips that need no cutting.

    A shorter clip is repeated as often as it fits whole, and zeros follow. What the extractor does with longer clips (a
    random crop, or three of them beside the whole) has no place here: the same sound has to have the same embedding.

    Args:
        preprocessor: Numbers of `preprocessor_config.json`; what is missing is as in the extractor's constructor.

    Raises:
        ValueError: If a number is out of range, or the padding is of no kind that CLAP knows.
    """

    def __init__(self, preprocessor: dict[str, Any]) -> None:
        self.settings: dict[str, Any] = {
            "feature_size": int(preprocessor.get("feature_size", 64)),
            "sampling_rate": int(preprocessor.get("sampling_rate", 48_000)),
            "hop_length": int(preprocessor.get("hop_length", 480)),
            "max_length_s": float(preprocessor.get("max_length_s", 10)),
            "fft_window_size": int(preprocessor.get("fft_window_size", 1024)),
            "frequency_min": float(preprocessor.get("frequency_min", 0)),
            "frequency_max": float(preprocessor.get("frequency_max", 14_000)),
            "truncation": str(preprocessor.get("truncation", "fusion")),
            "padding": str(preprocessor.get("padding", "repeatpad")),
        }
        repeats = {"repeatpad": 0, "repeat": 1, "pad": None}
        if self.settings["padding"] not in repeats:
            raise ValueError(f"padding must be one of {sorted(repeats)}, got {self.settings['padding']!r}")
        self._repeats = repeats[self.settings["padding"]]
        self.sample_hz: int = self.settings["sampling_rate"]
        self.seconds: float = self.settings["max_length_s"]
        self.num_samples = round(self.seconds * self.sample_hz)
        self._filters = torch.from_numpy(self._mel_filters())

    def _mel_filters(self) -> "np.ndarray[Any, Any]":
        """`[m, bins]` float64: the models that fuse were trained on torchaudio's filters, the others on librosa's."""
        settings = self.settings
        slaney = settings["truncation"] != "fusion"
        span = settings["frequency_min"], settings["frequency_max"]
        edges_hz = mel_edges(*span, settings["feature_size"], scale="slaney" if slaney else "htk")
        filters = triangular_filters(edges_hz, self.sample_hz, settings["fft_window_size"])
        # librosa's filters have an area of 1, torchaudio's a peak of 1
        return filters * rearrange(2 / (edges_hz[2:] - edges_hz[:-2]), "m -> m 1") if slaney else filters

    def __call__(self, wave: Tensor) -> Tensor:
        """Transform clips.

        Args:
            wave: `[b, n]` without padding, at `sample_hz`, at most `num_samples` long.

        Returns:
            `[b, f, m]` float32, in dB, on the device of the wave.
        """
        missing = self.num_samples - wave.shape[1]
        if missing > 0 and self._repeats is not None:
            wave = wave.repeat(1, self.num_samples // wave.shape[1] + self._repeats)[:, : self.num_samples]
        wave = F.pad(wave, (0, self.num_samples - wave.shape[1]))
        return torch.cat([self._log_mel(part) for part in wave.split(_CLIPS_AT_ONCE)])

    def _log_mel(self, wave: Tensor) -> Tensor:
        """Spectrograms `[b, f, m]` of waves of full length; as in the extractor, in float64 where there is any."""
        wide = torch.float32 if wave.device.type == "mps" else torch.float64
        n_fft, hop = self.settings["fft_window_size"], self.settings["hop_length"]
        window = torch.hann_window(n_fft, dtype=wide, device=wave.device)
        padded = F.pad(wave.to(wide), (n_fft // 2, n_fft // 2), mode="reflect")
        spectrum = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True)
        energies = self._filters.to(wave.device, wide) @ (spectrum.real.square() + spectrum.imag.square())
        return rearrange(10.0 * energies.clamp(min=_FLOOR).log10(), "b m f -> b f m").float()


@register
class ClapMuLaN(JointEmbedding):
    """CLAP as a joint embedding: frozen, always in eval mode, float32 unless moved.

    The embedding of a sound is a function of the sound alone: a clip of up to `window_seconds` goes in as a whole, a
    longer one as the mean over windows at fixed places. Models that were trained to fuse crops of long audio
    (laion/clap-htsat-fused) are read as well, and never fuse.

    Args:
        source: Folder in transformers' format, hub id, or a model that is loaded already (it is taken over).
        tokenizer: The model's tokenizer; None = the one beside the weights in `source`.
        window_stride_seconds: From the start of one window of longer audio to that of the next.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is missing, of another architecture, not in safetensors, incomplete, or without
            tokenizer or preprocessor.
    """

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        tokenizer: TextTokenizer | None = None,
        window_stride_seconds: float | int = 1.0,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        where: dict[str, Any] = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
        loaded = source
        if not isinstance(loaded, LoadedModel):
            loaded = load_model(loaded, {_MODEL_TYPE: _MODEL_CLASS}, **where)
        if not loaded.preprocessor:
            raise ValueError(
                f"{loaded.source} has no preprocessor_config.json, which says how waves come in; copy it from where "
                "the weights are from"
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

    @classmethod
    @beartype
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> "ClapMuLaN":
        """Open any CLAP: a folder written by `audiolm_pytorch.saving.modules.save_module`, or a published one.

        Args:
            source: A folder of ours or in transformers' format, or a hub id; a local folder always wins.
            offline: Whether to keep off the network.
            revision: Branch, tag or commit of the hub.
            cache_dir: Where downloads are kept.

        Returns:
            The model in eval mode.

        Raises:
            ImportError: If transformers is not installed.
            ValueError: If there is no CLAP.
        """
        folder, _ = find_folder(source, offline=offline, revision=revision, cache_dir=cache_dir)
        config_file = folder / "config.json"
        if config_file.is_file() and "class" in read_json(config_file):
            saved = load_module(folder, expect=cls)
            return saved  # type: ignore[return-value]
        return cls(source, offline=offline, revision=revision, cache_dir=cache_dir)

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this model, tokenizer and all."""
        return {
            "model": model_settings(self.model),
            "tokenizer": self._text.tokenizer.to_json(),
            "options": {"window_stride_seconds": self.window_stride_seconds},
            "origin": portable_origin(self.origin),
            "preprocessor": self._spectrogram.settings,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ClapMuLaN":
        """Build from the dictionary that `config` holds, with fresh weights (for `audiolm_pytorch.saving.modules`)."""
        transformers = require_transformers()
        model = getattr(transformers, _MODEL_CLASS)(transformers.ClapConfig.from_dict(dict(config["model"])))
        loaded = LoadedModel(model, preprocessor=config["preprocessor"], **config["origin"])
        tokenizer = TextTokenizer.from_json(config["tokenizer"], special_tokens=True)
        return cls(loaded, tokenizer=tokenizer, **config["options"])

    def fingerprint(self) -> str:
        """Hash of all that embeddings depend on: the same on any device and from any file of the same model."""
        parts = (self.model.config.text_config, _TEXT_SETTINGS), (self.model.config.audio_config, _AUDIO_SETTINGS)
        settings = [[getattr(part, name, None) for name in names] for part, names in parts]
        windows = [self.window_seconds, self.window_stride_seconds, self._text.max_tokens]
        facts = [settings, windows, self._spectrogram.settings, self._text.tokenizer.to_json()]
        return nameless_fingerprint(self.model, facts)

    def train(self, mode: bool = True) -> "ClapMuLaN":
        """Stay in eval mode: the model is frozen, and its norms would take their statistics from the batch."""
        return super().train(False)

    @beartype
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts with their special tokens, -1 past the end; ids given are checked."""
        return self._text.tokenize(texts)

    @torch.no_grad()
    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips; one that is longer than a window is the mean over its windows. See `JointEmbedding`."""
        check_waves(wavs, lengths, device_of(self.model))
        latents = torch.empty(len(wavs), self.dim_latent, device=wavs.device)
        images, places = [], []
        with torch.autocast(wavs.device.type, enabled=False):
            for rows, part in items_by_length(wavs, lengths):
                if part.shape[1] <= self.window_samples:
                    images.append(self._spectrogram(part))
                    places.append(rows)
                else:
                    latents[rows] = torch.stack([average_latents(self.window_latents(wav)) for wav in part])
            if images:
                latents[torch.cat(places)] = self._embed(torch.cat(images))
        return latents

    def _embed(self, images: Tensor) -> Tensor:
        """Latents `[b, d]` of spectrograms `[b, f, m]`."""
        features = rearrange(images, "b f m -> b 1 f m").to(next(self.model.parameters()).dtype)
        # models that fuse ask which clips are crops of longer ones: none ever is
        is_longer = torch.zeros(len(images), 1, dtype=torch.bool, device=images.device)
        pooled = self.model.audio_model(input_features=features, is_longer=is_longer).pooler_output
        return F.normalize(self.model.audio_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts; see `JointEmbedding`."""
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        with torch.autocast(device.type, enabled=False):
            pooled = self.model.text_model(**self._text.inputs(ids)).pooler_output
            return F.normalize(self.model.text_projection(pooled).float(), dim=-1)
