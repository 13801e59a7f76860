"""A joint embedding without weights whose latents are stored in the waves and texts, and clips for it."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.saving.modules import register
from musiclm_pytorch.mulan.joint import JointEmbedding

WORDS = ("flute", "cello", "organ", "slow", "fast", "with", "without")
HEADER = len(WORDS)
RATE_HZ = 8000


@register
class PlantedMuLaN(JointEmbedding):
    """One axis per word. The first samples of a clip are its latent, and texts may have an offset (modality gap).

    Args:
        gap: Length of what is added to every text on an axis of its own, before texts are brought to unit norm.
    """

    def __init__(self, gap: float = 0.0) -> None:
        super().__init__(dim_latent=HEADER + 1, sample_hz=RATE_HZ)
        self.gap = gap

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"gap": self.gap}

    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The first samples are the latent."""
        return normalize(torch.nn.functional.pad(wavs[:, :HEADER].float(), (0, 1)), dim=-1)

    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Count the words that have an axis."""
        rows = [[float(word in text.split()) for word in WORDS] + [self.gap] for text in texts]
        return normalize(torch.tensor(rows), dim=-1)


def planted_items(folder: Path, confused: dict[str, str] | None = None, copies: int = 1) -> list[AudioItem]:
    """Clips of all twelve combinations of three instruments, two tempi, and drums or none, each so many times.

    `confused` maps words to those whose axis their clips have. Clips have different lengths.
    """
    items = []
    kinds = [kind for _ in range(copies) for kind in product(WORDS[:3], WORDS[3:5], (True, False))]
    for index, (instrument, tempo, drums) in enumerate(kinds):
        words = (tempo, instrument, "with" if drums else "without")
        wave = torch.zeros(800 + 8 * index)
        for word in words:
            wave[WORDS.index((confused or {}).get(word, word))] = 0.5
        path = folder / f"{index}.wav"
        write_audio(path, wave, RATE_HZ)
        caption = f"{tempo} {instrument} {words[2]} drums"
        labels = {"instrument": instrument, "tempo": tempo, "drums": drums, "bpm": 60.0 + index}
        items.append(AudioItem(path, caption, labels, RATE_HZ, len(wave)))
    return items
