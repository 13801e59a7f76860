"""Audio items of a torch `Dataset` of waves."""

from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from audiolm_pytorch.audio.waves import check_rate, check_samples
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import caption_and_labels
from audiolm_pytorch.data.items import AudioItem, Rejected
from audiolm_pytorch.saving.fingerprint import digest_of

__all__ = ["dataset_items"]

_DIGEST_SAMPLES = 2**12


@typed
def dataset_items(dataset: Dataset, sample_hz: int | None = None) -> list[AudioItem | Rejected]:
    """Read every example of a torch `Dataset` once, and return items that read its waves when they are needed.

    An example is a wave `[n]` or `[c, n]`, or a tuple of a wave, optionally its sample rate (an int), and optionally
    its caption (as in a manifest). `dataset[i]` must always return the same example. The item of example i has the path
    `Name[i]`, where Name is the class of the data set.

    Args:
        sample_hz: Sample rate of waves without a rate, if the data set has no attribute `sample_hz`.
    """
    rate_hz = getattr(dataset, "sample_hz", None) or sample_hz
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"{type(dataset).__name__} has no length; pass a data set with __len__ and __getitem__")
    items: list[AudioItem | Rejected] = []
    for index in range(len(dataset)):
        path = Path(f"{type(dataset).__name__}[{index}]")
        try:
            items.append(_item(dataset, index, path, rate_hz))
        except Exception as error:  # of any kind: the data set is code of the user
            items.append(Rejected(path, _reason(error)))
    if not items:
        raise ValueError(f"{type(dataset).__name__} has no examples; pass at least one wave")
    return items


def _item(dataset: Any, index: int, path: Path, rate_hz: int | None) -> AudioItem:
    wave, example_hz, caption = _example(dataset[index])
    rate_hz = example_hz or rate_hz
    if rate_hz is None:
        raise ValueError("the sample rate is not known; give the data set an attribute sample_hz")
    rate_hz = check_rate(int(rate_hz))
    step = max(1, wave.shape[1] // _DIGEST_SAMPLES)
    first, labels = caption_and_labels({"caption": caption})
    digest = digest_of({"shape": list(wave.shape)}, {"samples": wave[:, ::step].contiguous()})
    load = partial(_load, dataset, index, path)
    return AudioItem(path, first, labels, rate_hz, wave.shape[1], len(wave), f":{digest}", load)


def _load(dataset: Any, index: int, path: Path) -> Tensor:
    try:
        return _example(dataset[index])[0]
    except Exception as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) if type(error) in (ValueError, TypeError) else f"{type(error).__name__}: {error}"


def _example(example: Any) -> tuple[Tensor, int | None, Any]:
    """Return the wave `[c, n]` float32, the sample rate and the caption of an example."""
    wave, *others = example if isinstance(example, (tuple, list)) else (example,)
    check_samples(wave)
    wave = wave.detach().to("cpu", torch.float32)
    wave = rearrange(wave, "n -> 1 n") if wave.ndim == 1 else wave
    if wave.ndim != 2 or not wave.numel():
        raise ValueError(f"wave must be [n] or [c, n] and not empty, got shape {list(wave.shape)}")
    if len(wave) > wave.shape[1]:
        raise ValueError(
            f"wave must be [n] or [c, n], got shape {list(wave.shape)}; samples are the last axis: wave.transpose(0, 1)"
        )
    # NaN marks a missing caption in tables of pandas.
    others = [None if isinstance(other, Real) and other != other else other for other in others]
    rates_hz = [other for other in others if isinstance(other, Real)]
    captions = [other for other in others if not isinstance(other, Real)]
    if not all(float(rate).is_integer() for rate in rates_hz):
        raise ValueError(f"the sample rate must be a whole number, got {rates_hz[0]}")
    if len(rates_hz) > 1 or len(captions) > 1:
        raise ValueError(f"an example must be (wave, sample rate, caption), got {len(others)} values beside the wave")
    return wave, int(float(rates_hz[0])) if rates_hz else None, captions[0] if captions else None
