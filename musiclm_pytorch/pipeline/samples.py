"""Music for captions of held-out files, which a finished training writes to its folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem, captions_of
from audiolm_pytorch.training import samples as training

__all__ = ["MAX_SAMPLE_SECONDS", "write_samples"]

_NUM_SAMPLES, MAX_SAMPLE_SECONDS = 3, 5.0


@typed
def write_samples(
    folder: Path, items: Sequence[AudioItem], generate: Callable[..., Sequence[Tensor] | Tensor], sample_hz: int
) -> None:
    """Write music for the first captions of items, and the captions; `generate` receives a list of captions."""
    captions = list(dict.fromkeys(text for item in items for text in captions_of(item)))[:_NUM_SAMPLES]
    music = generate(captions) if captions else []
    pairs = enumerate(zip(captions, music, strict=True), start=1)
    training.write_samples(folder, [training.Sample(str(n), wave, sample_hz, text) for n, (text, wave) in pairs])
