"""A MuLaN small enough to be built in every test."""

import torch

from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer


def tiny_mulan(**changes: object) -> MuLaN:
    """MuLaN at 8 kHz with windows of 0.5 s every 0.25 s, in eval mode, the same at every call."""
    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(
        dim=32, depth=1, heads=2, dim_head=16, patch_size=8, sample_hz=8000, num_mels=24, spec_n_fft=256
    )
    text = TextTransformer(dim=32, depth=1, heads=2, dim_head=16, num_tokens=256)
    parts = {"audio_transformer": audio, "text_transformer": text, "dim_latent": 16}
    return MuLaN(**{**parts, "window_seconds": 0.5, "window_stride_seconds": 0.25, **changes}).eval()


def tones(*pitches_hz: float, seconds: float = 0.4, sample_hz: int = 8000) -> torch.Tensor:
    """One sine tone `[b, n]` for each pitch."""
    time = torch.arange(round(seconds * sample_hz)) / sample_hz
    return torch.stack([0.5 * torch.sin(2 * torch.pi * hz * time) for hz in pitches_hz])
