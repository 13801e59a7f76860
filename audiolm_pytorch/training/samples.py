"""Audible samples of training runs: WAV files with their texts, and audio and spectrograms in TensorBoard."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe, write_audio

if TYPE_CHECKING:
    import accelerate

__all__ = ["Sample", "write_samples"]

_FFT_SECONDS, _RANGE_BELS = 0.032, 8.0


@dataclass(frozen=True, eq=False)
class Sample:
    """Audio that a task has generated, or that it has for comparison.

    Args:
        name: Beginning of the file name; the same in every validation.
        wave: Samples `[n]` or `[c, n]`, which may be out of range or not finite.
        text: Caption of the audio.
        codes: Codes `[f, q]` of the audio, whose use a tracker shows.
        is_reference: Whether the audio is the same in every validation.
    """

    name: str
    wave: Tensor
    sample_hz: int
    text: str = ""
    codes: Tensor | None = None
    is_reference: bool = False


def write_samples(
    folder: Path,
    samples: Sequence[Sample],
    step: int | None = None,
    accelerator: "accelerate.Accelerator | None" = None,
) -> None:
    """Write samples as `NAME_step_0000100.wav`, or as `NAME.wav` without a step, and log them with TensorBoard.

    References have no step in the name. Texts are in `NAME.txt` and in the comments of the audio files.
    """
    boards = [] if accelerator is None else [one.writer for one in accelerator.trackers if one.name == "tensorboard"]
    for sample in samples:
        # a diverged model may return NaN, which no file can hold
        wave = torch.atleast_2d(sample.wave.detach().float().cpu().nan_to_num(posinf=0.0, neginf=0.0))
        name = sample.name if step is None or sample.is_reference else f"{sample.name}_step_{step:07d}"
        write_audio(folder / f"{name}.wav", peak_safe(wave), sample.sample_hz, comment=sample.text)
        if sample.text:
            (folder / f"{sample.name}.txt").write_text(sample.text + "\n", encoding="utf-8")
        for board in boards:
            board.add_audio(f"samples/{sample.name}", peak_safe(wave[:1]), step, sample.sample_hz)
            board.add_image(f"spectrograms/{sample.name}", _spectrogram(wave[0], sample.sample_hz), step)
            for level, codes in enumerate([] if sample.codes is None else sample.codes.detach().cpu().T, start=1):
                board.add_histogram(f"codes/{sample.name}/level_{level}", codes, step)


def _spectrogram(wave: Tensor, sample_hz: int) -> Tensor:
    """Return a picture `[1, frequencies, frames]` from 0 (80 dB below the loudest value) to 1; low sounds are below."""
    size = min(round(_FFT_SECONDS * sample_hz), len(wave))
    window = torch.hann_window(size)
    levels = torch.stft(wave, size, max(1, size // 4), window=window, center=False, return_complex=True).abs()
    bels = 2 * (levels / levels.max().clamp_min(1e-9)).clamp_min(1e-9).log10()
    return (1 + bels / _RANGE_BELS).clamp_min(0).flip(0)[None]
