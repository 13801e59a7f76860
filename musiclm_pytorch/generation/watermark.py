"""Inaudible watermarks in generated music, which a detector finds again (the extra [watermark])."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.waves import check_samples
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.sources import find_folder
from audiolm_pytorch.saving.text import one_line
from audiolm_pytorch.saving.torch_checkpoint import TorchCheckpoint

__all__ = ["AudioSealWatermark"]

_SAMPLE_HZ = 16_000
# Files of facebook/audioseal, and their configurations in the package audioseal.
_GENERATOR = ("generator_base.pth", "audioseal_wm_16bits")
_DETECTOR = ("detector_base.pth", "audioseal_detector_16bits")


class AudioSealWatermark(nn.Module):
    """Watermark of AudioSeal (arXiv:2401.17264) with a message of 16 bits.

    For example, `watermark(musiclm("a slow waltz"), musiclm.sample_hz)`; `MusicLM` itself does not add a watermark.

    Args:
        generator: Generator of the package audioseal, which computes the watermark of waves `[b, 1, n]` at 16 kHz.
        detector: Detector of the package audioseal.
        message: Number in 0..65535, which the detector returns.
    """

    generator: Any
    detector: Any

    @typed
    def __init__(self, generator: nn.Module, detector: nn.Module, *, message: int = 0) -> None:
        super().__init__()
        self.generator, self.detector = generator, detector
        if not 0 <= message < 2**self.detector.nbits:
            raise ValueError(f"message must be in 0..{2**self.detector.nbits - 1}, got {message}")
        self.message = message

    @classmethod
    @typed
    def from_pretrained(
        cls,
        source: str | Path = "facebook/audioseal",
        *,
        message: int = 0,
        device: str | torch.device = "cpu",
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> "AudioSealWatermark":
        """Load the published weights from a folder or from the hub.

        The files are `generator_base.pth` and `detector_base.pth`. Their pickles are read without running code.
        `SharedModel.from_pretrained` documents the other arguments.
        """
        try:
            from audioseal.builder import (
                AudioSealDetectorConfig,
                AudioSealWMConfig,
                create_detector,
                create_generator,
            )
        except ImportError as error:
            raise ImportError(f'watermarks need: pip install "musiclm[watermark]" ({one_line(error)})') from error
        names = [_GENERATOR[0], _DETECTOR[0]]
        folder, _ = find_folder(
            source,
            offline=offline,
            revision=revision,
            cache_dir=cache_dir,
            allow_noncommercial=allow_noncommercial,
            files=["README.md", *names],
        )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} has no {' and no '.join(missing)}; pass the folder of the weights of AudioSeal")
        generator = _loaded(folder / _GENERATOR[0], _GENERATOR[1], create_generator, AudioSealWMConfig)
        detector = _loaded(folder / _DETECTOR[0], _DETECTOR[1], create_detector, AudioSealDetectorConfig)
        return cls(generator, detector, message=message).to(device).eval()

    @typed
    @torch.no_grad()
    def forward(self, wave: Tensor, sample_hz: int) -> Tensor:
        """Add the watermark to every channel of waves `[..., n]` of any sample rate; the peaks can grow a little.

        The watermark is computed at 16 kHz.
        """
        rows = self._rows(wave, sample_hz)
        message = (self.message >> torch.arange(self.detector.nbits, device=rows.device)) & 1
        with _eagerly():
            added = self.generator.get_watermark(rows, message=message.expand(len(rows), -1))
        added = resample(added, _SAMPLE_HZ, sample_hz)[..., : wave.shape[-1]]
        return wave + F.pad(added, (0, wave.shape[-1] - added.shape[-1])).view(wave.shape).to(wave)

    @typed
    @torch.no_grad()
    def detect(self, wave: Tensor, sample_hz: int) -> tuple[Tensor, Tensor]:
        """Return the share `[...]` of samples of waves `[..., n]` with a watermark, and the messages `[...]` int64."""
        with _eagerly():
            share, bits = self.detector.detect_watermark(self._rows(wave, sample_hz))
        messages = (bits.long() << torch.arange(self.detector.nbits, device=bits.device)).sum(dim=1)
        return share.view(wave.shape[:-1]), messages.view(wave.shape[:-1])

    def _rows(self, wave: Tensor, sample_hz: int) -> Tensor:
        """Return all channels as a batch `[b, 1, n]` at 16 kHz on the device of the weights."""
        check_samples(wave)
        rows = wave.to(device_of(self), torch.float32).reshape(-1, 1, wave.shape[-1])
        return resample(rows, sample_hz, _SAMPLE_HZ)


def _eagerly() -> Any:
    """Context without torch.compile, which audioseal would call for every length of a wave, for a minute and more."""
    return torch.compiler.set_stance("force_eager")


def _loaded(path: Path, card: str, create: Callable[[Any], nn.Module], config: type) -> nn.Module:
    """Build a module of the package audioseal and load its weights; a ValueError names a file that does not fit."""
    from audioseal import loader

    checkpoint = TorchCheckpoint(path)
    content = checkpoint.content.get("best_state", checkpoint.content)
    content = content.get("model", content)
    try:
        module = create(loader.AudioSeal.parse_config(loader.load_local_model_config(card), config))
        weights = {name: checkpoint.tensor(value) for name, value in content.items()}
        loader.load_state_dict(module, loader.convert_state_dict_for_scriptable_model(weights))
    except (AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not have the weights of AudioSeal's {card}: {one_line(error)}") from error
    return module
