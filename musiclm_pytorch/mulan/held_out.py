"""How well a joint embedding does on held-out files while it is trained: retrieval both ways, and zero-shot tagging."""

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.retrieval import Retrieval, different_captions, retrieval
from musiclm_pytorch.evaluation.tagging import TagTest, tag_scores, tag_tests, zero_shot_similarities
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = ["HeldOutClips"]

_RECALL_AT = (1, 5, 10)
_T = TypeVar("_T")


class HeldOutClips:
    """Held-out clips with their first captions and labels, and what a joint embedding makes of them.

    Args:
        dataset: Their crops; each item has a caption, or aspects.
        labels: Labels to test zero-shot tagging by; None = those that look like tags (see `tag_tests`).
        max_batch: Clips or captions embedded at a time, which bounds the memory.

    Raises:
        ValueError: If a label is given that is no tag of these files.
    """

    @beartype
    def __init__(self, dataset: CropDataset, *, labels: Sequence[str] | None = None, max_batch: int = 32) -> None:
        self.dataset, self.max_batch = dataset, max_batch
        # a caption of several clips is one text with several right answers
        self._captions, self._describes = different_captions([texts_of(item)[:1] for item in dataset.items])
        self._tests = _chosen_tests(tag_tests(dataset.items), labels)

    @cached_property
    def chance(self) -> dict[str, float]:
        """What guessing gives for each figure of `measure`."""
        found = self._retrieval(torch.zeros(self._describes.shape))
        chance = {"map": found[""].chance_precision(), "audio_map": found["audio_"].chance_precision()}
        for prefix, direction in found.items():
            chance |= {f"{prefix}recall_at_{k}": direction.chance_recall(k) for k in _RECALL_AT}
        for test in self._tests:
            chance |= {f"{test.label}_auc": 0.5, f"{test.label}_accuracy": 1 / len(test.values)}
        return chance

    @torch.no_grad()
    @beartype
    def measure(self, mulan: JointEmbedding) -> dict[str, float]:
        """Search every clip by its caption and every caption by its clips, and name the labels of every clip.

        Args:
            mulan: In eval mode.

        Returns:
            `recall_at_<k>` and `map` of text to audio; the same with `audio_` before them of audio to text; and for
            each label `<label>_auc` (area under the ROC curve, mean over values) and `<label>_accuracy` (balanced).
        """
        audio = self._audio_latents(mulan)
        text = torch.cat([mulan.get_text_latents(part) for part in _parts(self._captions, self.max_batch)])
        # half the digits would make many clips equally near
        with torch.autocast(audio.device.type, enabled=False):
            found = self._retrieval(text.float() @ audio.float().T)
            tagged = [tag_scores(zero_shot_similarities(mulan, audio, t.prompts), t.truth) for t in self._tests]
        values: dict[str, float] = {}
        for prefix, direction in found.items():
            values |= {f"{prefix}recall_at_{k}": float((direction.ranks <= k).mean()) for k in _RECALL_AT}
            values[f"{prefix}map"] = float(direction.average_precisions.mean())
        for test, scores in zip(self._tests, tagged, strict=True):
            values |= {f"{test.label}_auc": scores.auc, f"{test.label}_accuracy": scores.balanced_accuracy}
        return values

    def _audio_latents(self, mulan: JointEmbedding) -> Tensor:
        """Latents `[n, d]` of the first crop of every clip."""
        device, hz = device_of(mulan), mulan.sample_hz
        latents = []
        for indices in _parts(range(len(self.dataset)), self.max_batch):
            crops = collate_crops([self.dataset.get(0, index) for index in indices])
            latents.append(mulan.get_audio_latents(crops.waves[hz].to(device), crops.lengths[hz].to(device)))
        return torch.cat(latents)

    def _retrieval(self, similarities: Tensor) -> dict[str, Retrieval]:
        """Fare of text to audio ("") and of audio to text ("audio_") by similarities `[captions, clips]`."""
        describes = self._describes.to(similarities.device)
        # a question for each pair of clip and caption, as retrieval is usually counted
        own = describes.long().argmax(dim=0)
        return {
            "": retrieval(similarities[own], describes[own]),
            "audio_": retrieval(similarities.T, describes.T),
        }


def _parts(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Cut a sequence into parts of at most so many."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _chosen_tests(tests: Sequence[TagTest], labels: Sequence[str] | None) -> list[TagTest]:
    """The tests of the labels asked for."""
    found = {test.label: test for test in tests}
    unknown = sorted(set(labels or ()) - set(found))
    if unknown:
        raise ValueError(
            f"{unknown} are no labels of the held-out files by which clips can be tagged (texts or truth values, 2 to "
            f"50 of them, each of several clips); there are {sorted(found)}"
        )
    return list(tests) if labels is None else [found[label] for label in dict.fromkeys(labels)]
