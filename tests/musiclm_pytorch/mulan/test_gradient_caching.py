from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer, mulan
from tests.helpers.alive_tensors import AliveTensors
from tests.helpers.tiny_mulan import tiny_mulan, tones

TEXTS = ["low tone", "a deep one", "middle tone", "high tone", "very high tone", "like a bat"]
CLIP_INDEX = torch.tensor([0, 0, 1, 2, 3, 3])
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
CHUNKS = "musiclm_pytorch.mulan.mulan.checkpoint"


def _all_at_random() -> MuLaN:
    """A MuLaN in training mode with everything in it that draws random numbers."""
    torch.manual_seed(0)
    mel = {"patch_size": 8, "sample_hz": 8000, "num_mels": 24, "spec_n_fft": 256}
    changes = {"spec_aug_stretch_factor": 0.8, "spec_aug_freq_mask": 0.3, "spec_aug_time_mask": 0.3}
    audio = AudioSpectrogramTransformer(**SIZES, **mel, **changes, patch_dropout=0.3, dropout=0.2)
    text = TextTransformer(**SIZES, num_tokens=256, dropout=0.2)
    return tiny_mulan(audio_transformer=audio, text_transformer=text).train()


def _step(model: MuLaN, chunk_size: int | None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and the random state after a step on four clips of unequal length with six texts."""
    torch.manual_seed(1)
    model.zero_grad()
    lengths = torch.tensor([3200, 2000, 1600, 3100])
    loss = model(tones(110, 330, 990, 2970), TEXTS, lengths, clip_index=CLIP_INDEX, chunk_size=chunk_size)
    state = torch.get_rng_state()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()], state


def _assert_as_uncached(model: MuLaN, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = _step(model, chunk_size)
    with monkeypatch.context() as patch:
        patch.setattr(CHUNKS, lambda embed, *rows, **_: embed(*rows))
        uncached = _step(model, chunk_size)
    for own, expected in zip(tree_leaves(cached), tree_leaves(uncached)):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_cached_step_is_the_uncached_one(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and random state are those of the same chunks kept alive, with dropout and SpecAugment on."""
    _assert_as_uncached(_all_at_random(), chunk_size, monkeypatch)


def test_check_of_caching_sees_other_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pass with other dropout masks, the classical fault, fails the check above."""
    model = _all_at_random()
    monkeypatch.setattr(mulan, "checkpoint", partial(checkpoint, preserve_rng_state=False, determinism_check="none"))
    with pytest.raises((AssertionError, RuntimeError)):
        _assert_as_uncached(model, 3, monkeypatch)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_change_nothing_where_nothing_is_random(chunk_size: int) -> None:
    """Without dropout, a step in chunks equals the step of the whole batch, for any chunk size."""
    model = _all_at_random().eval()
    for own, expected in zip(tree_leaves(_step(model, chunk_size)), tree_leaves(_step(model, None))):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-4)


def test_chunks_keep_autocast() -> None:
    """The second pass uses the precision of the first, after the end of the `with` block."""
    model = _all_at_random().eval()
    gradients = []
    for chunk_size in (None, 2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tones(110, 330, 990, 2970), TEXTS, clip_index=CLIP_INDEX, chunk_size=chunk_size)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def _peak_bytes(model: MuLaN, num_clips: int, chunk_size: int | None) -> int:
    """Most bytes alive at a time in forward and backward, beside the batch itself."""
    model.zero_grad()
    wavs, ids = torch.randn(num_clips, 2000), torch.arange(num_clips * 20).reshape(num_clips, 20) % 256
    with AliveTensors() as alive:
        model(wavs, ids, chunk_size=chunk_size).backward()
    return alive.peak_bytes - wavs.nbytes - ids.nbytes


@pytest.mark.slow
def test_activations_of_one_chunk_are_alive_at_a_time() -> None:
    """Four times the batch takes the same memory in chunks, and about four times as much when all is kept."""
    model = tiny_mulan().train()
    few, many = (_peak_bytes(model, num_clips, 2) for num_clips in (4, 16))
    assert many < 1.05 * few
    assert _peak_bytes(model, 16, None) > 2.5 * _peak_bytes(model, 4, None) > 2.5 * few
