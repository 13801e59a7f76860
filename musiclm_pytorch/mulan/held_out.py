"""Metrics of a joint embedding on held-out files during training: retrieval and zero-shot tagging."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.training.distributed import map_over_processes
from audiolm_pytorch.training.samples import Sample
from musiclm_pytorch.evaluation.retrieval import Retrieval, different_captions, retrieval
from musiclm_pytorch.evaluation.tagging import TagTest, tag_scores, tag_tests
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.mulan.evaluation import zero_shot_similarities
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = ["HeldOutClips"]

_RECALL_AT = (1, 5, 10)
_NUM_SAMPLES = 3


class HeldOutClips:
    """Evaluates a joint embedding on held-out clips, with the first caption and the labels of each clip.

    Each clip of the dataset has a caption or aspects. The default labels are all labels that can be used for tagging
    (see `tag_labels`). A batch has at most `max_batch` clips or captions.
    """

    @typed
    def __init__(self, dataset: CropDataset, *, labels: Sequence[str] | None = None, max_batch: int = 32) -> None:
        self.dataset, self.max_batch = dataset, max_batch
        # A caption of several clips is one query with several correct results.
        self._captions, self._describes = different_captions([texts_of(item)[:1] for item in dataset.items])
        self._tests = _select_tests(tag_tests(dataset.items), labels)
        self._nearest: list[int] = []

    @cached_property
    def chance(self) -> dict[str, float]:
        """Expected value of each metric of `measure` for a model that guesses."""
        directions = self._retrieval(torch.zeros(self._describes.shape))
        chance = {"map": directions[""].chance_precision(), "audio_map": directions["audio_"].chance_precision()}
        for prefix, direction in directions.items():
            chance |= {f"{prefix}recall_at_{k}": direction.chance_recall(k) for k in _RECALL_AT}
        for test in self._tests:
            chance |= {f"{test.label}_auc": 0.5, f"{test.label}_accuracy": 1 / len(test.values)}
        return chance

    @torch.no_grad()
    @typed
    def measure(self, mulan: JointEmbedding) -> dict[str, float]:
        """Compute the retrieval and tagging metrics of a model in eval mode.

        The metrics are `recall_at_<k>` and `map` (mean average precision) for text queries, and with the prefix
        `audio_` for audio queries. Each label has the metrics `<label>_auc` (area under the ROC curve, mean over
        values) and `<label>_accuracy` (balanced accuracy).
        """
        audio = self._audio_latents(mulan)
        parts = [
            self._captions[start : start + self.max_batch] for start in range(0, len(self._captions), self.max_batch)
        ]
        latents = map_over_processes(lambda captions: mulan.get_text_latents(captions).cpu(), parts)
        text = torch.cat(latents).to(audio.device)
        # In half precision many clips would be equally near.
        with torch.autocast(audio.device.type, enabled=False):
            similarities = text.float() @ audio.float().T
            directions = self._retrieval(similarities)
            tagged = [tag_scores(zero_shot_similarities(mulan, audio, t.prompts), t.truth) for t in self._tests]
        self._nearest = similarities[:_NUM_SAMPLES].argmax(dim=1).tolist()
        values: dict[str, float] = {}
        for prefix, direction in directions.items():
            values |= {f"{prefix}recall_at_{k}": float((direction.ranks <= k).mean()) for k in _RECALL_AT}
            values[f"{prefix}map"] = float(direction.average_precisions.mean())
        for test, scores in zip(self._tests, tagged, strict=True):
            values |= {f"{test.label}_auc": scores.auc, f"{test.label}_accuracy": scores.balanced_accuracy}
        return values

    def nearest_clips(self) -> list[Sample]:
        """Return, for the first captions, the clips that the last call of `measure` found to be the nearest."""
        rate_hz = self.dataset.rates_hz[0]
        return [
            Sample(str(number), self.dataset.get(0, index).waves[rate_hz], rate_hz, caption)
            for number, (caption, index) in enumerate(zip(self._captions, self._nearest), start=1)
        ]

    def _audio_latents(self, mulan: JointEmbedding) -> Tensor:
        """Embed the first crop of every clip as latents `[n, d]`; every process embeds a share of the clips."""
        device, rate_hz = device_of(mulan), mulan.sample_hz

        def embed(indices: Tensor) -> Tensor:
            crops = collate_crops([self.dataset.get(0, index) for index in indices.tolist()])
            waves, lengths = crops.waves[rate_hz].to(device), crops.lengths[rate_hz].to(device)
            return mulan.get_audio_latents(waves, lengths).cpu()

        return torch.cat(map_over_processes(embed, torch.arange(len(self.dataset)).split(self.max_batch))).to(device)

    def _retrieval(self, similarities: Tensor) -> dict[str, Retrieval]:
        """Rank by similarity the clips for each caption (key "") and the captions for each clip (key "audio_")."""
        describes = self._describes.to(similarities.device)
        # One query for each pair of clip and caption, as in the literature.
        caption_of_clip = describes.long().argmax(dim=0)
        return {
            "": retrieval(similarities[caption_of_clip], describes[caption_of_clip]),
            "audio_": retrieval(similarities.T, describes.T),
        }


def _select_tests(tests: Sequence[TagTest], labels: Sequence[str] | None) -> list[TagTest]:
    """Return the zero-shot tests of the labels in `labels`, or all tests with `labels=None`."""
    by_label = {test.label: test for test in tests}
    unknown = sorted(set(labels or ()) - set(by_label))
    if unknown:
        raise ValueError(
            f"the labels {unknown} cannot be used for tagging, which needs 2 to 50 different texts or booleans in the "
            f"held-out files; labels that can be used: {sorted(by_label)}"
        )
    return list(tests) if labels is None else [by_label[label] for label in dict.fromkeys(labels)]
