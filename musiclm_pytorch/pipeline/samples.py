"""Music for captions of held-out files, which a finished training writes to its folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe, write_audio
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem, captions_of

__all__ = ["MAX_SAMPLE_SECONDS", "write_samples"]

_NUM_SAMPLES, MAX_SAMPLE_SECONDS = 3, 5.0


@typed
def write_samples(
    folder: Path, items: Sequence[AudioItem], generate: Callable[..., Sequence[Tensor] | Tensor], sample_hz: int
) -> None:
    """Write music for the first captions of items, and the captions; `generate` receives a list of captions."""
    captions = list(dict.fromkeys(text for item in items for text in captions_of(item)))[:_NUM_SAMPLES]
    music = generate(captions) if captions else []
    for number, (caption, wave) in enumerate(zip(captions, music, strict=True), start=1):
        # a diverged model may return NaN, which no file can hold
        finite = wave.float().nan_to_num(posinf=0.0, neginf=0.0)
        write_audio(folder / f"{number}.wav", peak_safe(finite), sample_hz, comment=caption)
        (folder / f"{number}.txt").write_text(caption + "\n", encoding="utf-8")
