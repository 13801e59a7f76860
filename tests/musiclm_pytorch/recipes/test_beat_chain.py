"""The links of the chain from a real clip to a caption."""

import pytest
import torch

from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm import CoarseTransformer
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from musiclm_pytorch.recipes.metrics.beat_chain import chain_waves, teacher_forced_samples


def tokens(batch=2, seconds=1) -> AudioTokens:
    generator = torch.Generator().manual_seed(0)
    semantic = torch.randint(20, (batch, 25 * seconds), generator=generator)
    acoustic = torch.randint(16, (batch, 50 * seconds, 3), generator=generator)
    return AudioTokens({"semantic": semantic, "acoustic": acoustic}, {})


@pytest.mark.parametrize("pattern", ["flat", "delayed", "parallel"])
def test_teacher_forced_samples_are_the_most_probable_tokens_given_the_real_past(pattern):
    """At temperature 0: each code equals the argmax of a forward pass, in every pattern."""
    torch.manual_seed(0)
    sizes = dict(num_semantic_tokens=20, codebook_size=16, num_coarse_quantizers=2, dim=16, depth=1, heads=1)
    stage = CoarseTransformer(**sizes, pattern=pattern).eval()
    real = tokens()
    sampled = teacher_forced_samples(stage, real, {}, SamplingSettings(temperature=0))
    assert sampled.shape == (2, 50, 2) and 0 <= sampled.min() and sampled.max() < 16
    changed = AudioTokens({**real.tokens, "acoustic": real.tokens["acoustic"].clone()}, {})
    changed.tokens["acoustic"][:, 40:] = 0
    again = teacher_forced_samples(stage, changed, {}, SamplingSettings(temperature=0))
    # Codes before the change do not depend on it; the sampled code replaces no input of the next code.
    assert torch.equal(again[:, :40], sampled[:, :40])
    packed = stage.packed(real)
    hidden = stage.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1], stage.fuse(None, 2))
    expected = packed.ids.clone()
    for number, head in enumerate(stage.layout.heads):
        best = stage.logits(hidden, number)[..., :16].argmax(dim=-1) + head.first_id
        is_own = packed.loss_mask & (packed.ids >= head.first_id) & (packed.ids < head.first_id + 16)
        for item, row, column in is_own.nonzero().tolist():
            expected[item, row, column] = best[item, row - 1]
    assert torch.equal(stage.layout.unpack(expected, {"semantic": 25, "coarse": 50})["coarse"], sampled)


@pytest.mark.slow
def test_links_of_the_bundled_model():
    """One wave per clip and link; a copy with all levels follows the clip most closely."""
    from musiclm_pytorch import MusicLM

    model = MusicLM.from_pretrained("tiny")
    time = torch.arange(2 * model.sample_hz) / model.sample_hz
    waves = 0.3 * torch.sin(2 * torch.pi * torch.tensor([[220.0], [330.0]]) * time)
    links = chain_waves(model, waves, ["slow flute", "fast piano"])
    assert list(links) == [
        "codec copy, 4 levels",
        "codec copy, 2 levels",
        "codec copy, 1 level",
        "coarse codes sampled given the real past",
        "real coarse codes, fine generated",
        "real semantic tokens",
        "captions",
    ]
    assert all(made.shape == waves.shape and made.isfinite().all() for made in links.values())
    errors = {name: float((made - waves).square().mean()) for name, made in links.items()}
    assert errors["codec copy, 4 levels"] < errors["captions"]
