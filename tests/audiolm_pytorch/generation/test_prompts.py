"""Waves that generation continues."""

import pytest
import torch

from audiolm_pytorch.generation.prompts import read_prompts


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 800)])
def test_waves_of_other_ranks_are_named(shape: tuple[int, ...]) -> None:
    """A number is no wave, and neither is an array of batches; the error is not that of the iteration."""
    with pytest.raises(ValueError, match=r"prime_wave must be \[n\], \[b, n\] or \[b, c, n\], got shape"):
        read_prompts(torch.full(shape, 0.5), 16000)
    with pytest.raises(ValueError, match=r"prompt 0 must be \[n\] or \[c, n\], got shape"):
        read_prompts([torch.full(shape, 0.5)], 16000)
    assert [list(wave.shape) for wave, _ in read_prompts(torch.zeros(2, 800), 16000)] == [[1, 800]] * 2
