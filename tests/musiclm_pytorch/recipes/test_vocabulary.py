"""Share of known words: counted by hand on three captions."""

import pytest

from musiclm_pytorch.recipes.metrics.vocabulary import known_share


def test_shares_are_counted_per_caption() -> None:
    """Of "slow piano", "slow jazz" and "the drums" (6 words), "slow" (2) and "piano" (1) are known: 3 of 6."""
    share = known_share(["slow", "piano"], ["slow slow piano", "slow jazz", "the drums"], num_frequent=4)
    assert share == {"words": pytest.approx(0.5), "frequent content words": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="no words"):
        known_share(["slow"], ["", "1 2"])
