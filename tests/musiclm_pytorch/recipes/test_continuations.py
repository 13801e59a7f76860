"""Greedy continuations of clips, and their exact and approximate matches."""

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import load_items
from musiclm_pytorch.recipes.metrics.continuations import greedy_continuations, match_metrics


def test_copies_match_and_unrelated_tokens_do_not():
    """A copied clip is an exact match; the same tokens in another order are an approximate one."""
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(50, 4, generator=generator)
    expected = list(torch.randint(50, (30, 40), generator=generator))
    shuffled = [tokens.flip(0) for tokens in expected]
    unrelated = list(torch.randint(50, (30, 40), generator=generator))
    for generated, shares in ((expected, [1.0, 1.0]), (shuffled, [0.0, 1.0]), (unrelated, [0.0, 0.0])):
        values = match_metrics("x", generated, expected, centroids)
        assert [value.value for value in values[:2]] == pytest.approx(shares, abs=0.04)


@pytest.mark.slow
def test_continuations_of_the_bundled_model(tmp_path):
    """The same clip has the same continuation, whose length is that of the rest of the clip."""
    from musiclm_pytorch import MusicLM

    model = MusicLM.from_pretrained("tiny")
    time = torch.arange(2 * 16_000) / 16_000
    for number, pitch_hz in enumerate((220, 330, 220)):
        write_audio(tmp_path / f"{number}.wav", 0.3 * torch.sin(2 * torch.pi * pitch_hz * time), 16_000)
    items = load_items(tmp_path).items
    generated, expected = greedy_continuations(model, items, 1.0, 2.0)
    assert [len(tokens) for tokens in generated] == [25] * 3 == [len(tokens) for tokens in expected]
    assert torch.equal(generated[0], generated[2]) and torch.equal(expected[0], expected[2])
