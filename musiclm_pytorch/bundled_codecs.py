"""The codecs that come with the package, and how any other is named."""

from importlib.resources import files
from pathlib import Path

import torch
from beartype import beartype
from torch import nn

from audiolm_pytorch.codecs.protocol import Codec

__all__ = ["BUNDLED_CODECS", "DEFAULT_CODEC", "codec_named"]

# name -> folder below musiclm_pytorch/bundled
BUNDLED_CODECS = {"16khz": "codec_16khz", "tiny": "tiny/codec"}
DEFAULT_CODEC = "16khz"


@beartype
def codec_named(name: str, device: str | torch.device = "cpu", offline: bool = False) -> Codec:
    """Open a codec for use.

    Args:
        name: Of a bundled codec, or a folder, or the id of a model on a hub (see `open_codec`).
        device: Where it shall compute.
        offline: Whether to refuse the hub.

    Returns:
        The codec in eval mode.

    Raises:
        ValueError: If there is no such codec, naming the bundled ones.
    """
    from audiolm_pytorch.codecs.pretrained.adapter import open_codec

    folder = BUNDLED_CODECS.get(name)
    try:
        codec = open_codec(bundled_folder(folder) if folder else name, offline=offline)
    except ValueError as error:
        raise ValueError(f"{error}; bundled codecs: {', '.join(BUNDLED_CODECS)}") from error
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} holds a {type(codec).__name__}, which is no codec")
    if isinstance(codec, nn.Module):
        codec.to(device).eval()
    return codec


def bundled_folder(name: str) -> Path:
    """A folder below musiclm_pytorch/bundled."""
    return Path(str(files("musiclm_pytorch") / "bundled" / name))
