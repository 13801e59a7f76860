"""Compatibility of stages with modules and with each other, and the loss of each stream."""

import logging
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.lm.compatibility import check_compatible, check_stages_compatible
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.task import chance_losses
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers import fakes

PATTERNS = ["flat", "delayed", "parallel"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def semantic(**changes):
    return SemanticTransformer(**{"num_semantic_tokens": 12, **fakes.SIZES, **changes})


def coarse(**changes):
    sizes = {"num_semantic_tokens": 12, "codebook_size": 16, "num_coarse_quantizers": 2}
    return CoarseTransformer(**{**sizes, **fakes.SIZES, **changes})


def fine(**changes):
    sizes = {"num_coarse_quantizers": 2, "num_fine_quantizers": 2, "codebook_size": 16}
    return FineTransformer(**{**sizes, **fakes.SIZES, **changes})


def codec_of(**changes):
    codec = fakes.FakeCodec()
    for name, value in changes.items():
        setattr(codec, name, value)
    return codec


def tokenizer_of(**changes):
    tokenizer = fakes.FakeSemanticTokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@every_pattern
def test_compatible_parts_are_accepted(pattern, caplog):
    """Stages and modules with equal numbers raise no error and log no warning, in every pattern."""
    sizes = {**fakes.CONDITION, "text_dim": 6}
    parts = semantic(**sizes), coarse(pattern=pattern, **sizes), fine(pattern=pattern, **sizes)
    for stage in parts:
        check_compatible(
            stage,
            fakes.FakeSemanticTokenizer(),
            fakes.FakeCodec(),
            fakes.FakeConditioner(),
            fakes.FakeTextConditioner(),
        )
        check_compatible(stage)
    check_stages_compatible(*parts)
    check_stages_compatible(*parts[::-1])
    check_stages_compatible()
    assert not caplog.records


@pytest.mark.parametrize(
    ("build", "parts", "message"),
    [
        (
            semantic,
            {"wav2vec": tokenizer_of(codebook_size=13)},
            "stream 'semantic' has 12 tokens, its tokenizer has 13",
        ),
        (coarse, {"wav2vec": tokenizer_of(codebook_size=13)}, "stream 'semantic' has 12 tokens, its tokenizer has 13"),
        (coarse, {"codec": codec_of(codebook_size=32)}, "stream 'coarse' has 16 tokens, its tokenizer has 32"),
        (coarse, {"codec": codec_of(num_quantizers=1)}, "stream 'coarse' needs 2 levels, the codec has 1"),
        (fine, {"codec": codec_of(num_quantizers=3)}, "stream 'fine' needs 4 levels, the codec has 3"),
        (
            lambda: coarse(num_groups=2),
            {"codec": codec_of(num_groups=4)},
            "stream 'coarse' has 2 groups, the codec has 4",
        ),
        (lambda: fine(num_groups=2), {"codec": codec_of(num_groups=1)}, "stream 'fine' has 2 groups, the codec has 1"),
        (
            lambda: semantic(**fakes.CONDITION),
            {"audio_conditioner": fakes.FakeConditioner(9)},
            "the conditioner has width 9, the stage needs 8; set cond_dim=9",
        ),
        (
            lambda: fine(text_dim=5),
            {"text_conditioner": fakes.FakeTextConditioner()},
            "the text conditioner has width 6, the stage needs 5; set text_dim=6",
        ),
    ],
)
def test_differences_from_modules_raise_errors(build, parts, message):
    """The message names the stage and both sides of the difference."""
    stage = build()
    with pytest.raises(ValueError, match=rf"the {stage.namespace} transformer does not match the modules: .*{message}"):
        check_compatible(stage, **parts)


def test_one_error_lists_all_differences():
    """The user can fix all differences together."""
    with pytest.raises(ValueError) as raised:
        check_compatible(
            coarse(num_groups=2, **fakes.CONDITION),
            tokenizer_of(codebook_size=13, downsample_factor=16),
            codec_of(codebook_size=32, num_quantizers=1, num_groups=4),
            fakes.FakeConditioner(9),
        )
    for part in (
        "tokens, its tokenizer has 13",
        "its tokenizer has 32",
        "needs 2 levels",
        "2 groups",
        "rates",
        "cond_dim=9",
    ):
        assert part in str(raised.value)


@every_pattern
def test_other_ratios_of_rates_raise_errors(pattern):
    """Semantic tokens at twice the declared rate are not aligned with acoustic ones, whatever the pattern."""
    fast = tokenizer_of(downsample_factor=16)
    message = (
        r"'semantic': 25\.0, 'coarse': 50\.0.* frames per second, .*'semantic': 50\.0, 'coarse': 50\.0.*the rates of"
    )
    with pytest.raises(ValueError, match=message):
        check_compatible(coarse(pattern=pattern), fast, fakes.FakeCodec())
    check_compatible(coarse(pattern=pattern, semantic_rate_hz=50), fast, fakes.FakeCodec())
    check_compatible(coarse(pattern=pattern), fast)  # without the codec there is no ratio


def test_rates_with_one_common_factor_log_a_warning(caplog):
    """The streams stay aligned, but durations in seconds are wrong."""
    with caplog.at_level(logging.WARNING):
        check_compatible(semantic(), tokenizer_of(downsample_factor=16))
    assert "'semantic': 25.0" in caplog.text and "'semantic': 50.0" in caplog.text


def test_stages_of_one_group_accept_codecs_with_groups():
    """A stage with one group may delay every code; another number of groups must be the codec's."""
    grouped = SoundStream(codebook_size=16, rq_num_quantizers=2, rq_groups=2, channels=2, codebook_dim=16)
    assert grouped.num_groups == 2 and SoundStream(codebook_size=4, channels=2, codebook_dim=8).num_groups == 1
    assert grouped.num_quantizers == 4
    check_compatible(coarse(), codec=grouped)
    check_compatible(coarse(num_groups=2), codec=grouped)
    with pytest.raises(ValueError, match="4 groups, the codec has 2"):
        check_compatible(coarse(num_groups=4, num_coarse_quantizers=4), codec=grouped)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            (semantic, lambda: coarse(num_semantic_tokens=13)),
            "stream 'semantic': the semantic transformer has vocabulary 12, the coarse transformer has vocabulary 13",
        ),
        (
            (semantic, lambda: coarse(semantic_rate_hz=50)),
            "the semantic transformer has frames per second 25, the coarse transformer has frames per second 50",
        ),
        (
            (lambda: coarse(num_coarse_quantizers=3), fine),
            "'coarse': the coarse transformer has levels 1 to 3 of acoustic, the fine transformer has levels 1 to 2",
        ),
        (
            (coarse, lambda: fine(codebook_size=32, rate_hz=75)),
            "coarse transformer has vocabulary 16, frames per second 50, "
            "the fine transformer has vocabulary 32, frames per second 75",
        ),
        ((coarse, lambda: fine(num_groups=2)), "groups 1, the fine transformer has groups 2"),
        (
            tuple(
                lambda size=size: fine(extra_streams=[Stream("melody", size, rate_hz=10, is_input=True)])
                for size in (12, 24)
            ),
            "stream 'melody': the fine transformer has vocabulary 12, the fine transformer has vocabulary 24",
        ),
    ],
)
def test_stages_with_different_declarations_raise_errors(stages, message):
    """Shared streams must be declared alike; the order of the stages does not matter."""
    stages = [build() for build in stages]
    with pytest.raises(ValueError, match=f"not compatible with each other: .*{message}"):
        check_stages_compatible(*stages)
    with pytest.raises(ValueError, match="not compatible"):
        check_stages_compatible(*stages[::-1])


def test_stages_with_different_fingerprints_raise_errors():
    """Fingerprints of a shared kind are compared if both stages have one."""
    shared = {"conditioner": "q", "text_encoder": "t"}
    known = {
        "semantic": {"semantic": "one", **shared},
        "coarse": {"semantic": "one", "acoustic": "two", **shared},
        "fine": {"acoustic": "two", **shared},
    }
    stages = fakes.tiny_stages(**fakes.CONDITION, text_dim=6)
    for name, stage in stages.items():
        stage.token_fingerprints = dict(known[name])
    check_stages_compatible(*stages.values())
    for name, kind, words in [
        ("semantic", "semantic", "on different semantic tokens, the semantic transformer other, .* one"),
        ("fine", "acoustic", "on different acoustic tokens, the coarse transformer two, .* other"),
        ("coarse", "conditioner", "on different conditioning codes, the semantic transformer q, .* other"),
        ("fine", "text_encoder", "on different text states, the semantic transformer t, .* other"),
    ]:
        stages[name].token_fingerprints[kind] = "other"
        with pytest.raises(ValueError, match=words):
            check_stages_compatible(*stages.values())
        del stages[name].token_fingerprints[kind]
        check_stages_compatible(*stages.values())


@every_pattern
def test_loss_of_every_stream_counts_its_own_tokens(pattern):
    """The losses equal those of a loop over all cells, for several streams, levels, lengths and ends."""
    torch.manual_seed(0)
    layout = TokenLayout(
        [
            Stream("melody", 5, rate_hz=2, is_input=True),
            Stream("semantic", 7, rate_hz=4, eos=True),
            Stream("acoustic", 9, num_levels=4, rate_hz=4, num_groups=2),
        ],
        pattern,
    )
    model = TokenTransformer(layout=layout, **{**fakes.SIZES, "dim": 16}).eval()
    for weight in model.parameters():
        weight.data = weight.data + 0.3 * torch.randn_like(weight)
    streams = {
        "melody": torch.randint(5, (2, 3, 1)),
        "semantic": torch.randint(7, (2, 6, 1)),
        "acoustic": torch.randint(9, (2, 6, 4)),
    }
    counts = torch.tensor([6, 4])
    lengths = {"melody": torch.tensor([3, 2]), "semantic": counts, "acoustic": counts}
    packed = layout.pack(streams, lengths, torch.tensor([True, False]))
    with torch.no_grad():
        found = model(packed)
        hidden = model.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1], model.fuse(None, 2))
    nats: dict[str, list[float]] = {}
    for item, row, column in packed.loss_mask.nonzero().tolist():
        target = int(packed.ids[item, row, column])
        number, head = next((n, h) for n, h in enumerate(layout.heads) if target in h.ids(allow_eos=True))
        logits = model.logits(hidden[item, row - 1], number)
        loss = float(F.cross_entropy(logits.detach(), torch.tensor(target - head.first_id)))
        for name in {head.stream, f"{head.stream}.{head.level}"}:
            nats.setdefault(name, []).append(loss)
    del nats["semantic.0"]  # a stream of one level has no losses per level
    assert len(nats["semantic"]) == 10 + 1 and len(nats["acoustic"]) == 40 and len(nats["acoustic.3"]) == 10
    assert found.per_stream.keys() == nats.keys()
    for name, losses in nats.items():
        assert float(found.per_stream[name]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    everything = nats["semantic"] + nats["acoustic"]
    assert float(found.loss) == pytest.approx(sum(everything) / len(everything), abs=1e-5)


def test_chance_level_is_weighted_by_tokens_per_second():
    """With 2 levels of 16 tokens at 50 Hz and one of 4 tokens at 25 Hz, the former are four fifths of all tokens."""

    class Both:
        layout = TokenLayout([Stream("a", 4, rate_hz=25), Stream("b", 16, 2, Fraction(50))], "flat")

    chance = chance_losses(Both())
    assert chance["loss"] == pytest.approx(0.2 * math.log(4) + 0.8 * math.log(16))
    assert chance["loss_a"] == pytest.approx(math.log(4)) and chance["loss_b.1"] == pytest.approx(math.log(16))
