"""What goes together: a stage with tokenizers and conditioners, and stages with one another; else the difference."""

import logging
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

from beartype import beartype

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.token_fingerprints import agreed_fingerprints, made_by
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["check_compatible", "check_stages_compatible"]

logger = logging.getLogger(__name__)


@beartype
def check_compatible(
    transformer: StageTransformer,
    wav2vec: SemanticTokenizer | None = None,
    codec: Codec | None = None,
    audio_conditioner: Conditioner | None = None,
    text_conditioner: TextEncoder | None = None,
) -> None:
    """Refuse tokenizers whose tokens are not those that a stage's streams are declared for, and likewise conditioners.

    What a stage does not use is not looked at.

    Args:
        transformer: The stage.
        wav2vec: Semantic tokenizer; None = not checked.
        codec: Codec; None = not checked.
        audio_conditioner: Conditioner of texts, waves or codes; None = not checked.
        text_conditioner: Text encoder; None = not checked.

    Raises:
        ValueError: If vocabulary, number of levels, groups, ratio of rates, or width of conditions differ (the message
            shows all differences), or the stage was trained on tokens, codes or states of others.
    """
    tokenizers = {"semantic": wav2vec, "acoustic": codec}
    found = [
        *_token_differences(transformer, tokenizers),
        *_rate_differences(transformer, tokenizers),
        *_width_differences(transformer, audio_conditioner, text_conditioner),
    ]
    if found:
        raise ValueError(f"the {transformer.namespace} transformer does not fit: {'; '.join(found)}")
    # Last, since it takes longest; where the stage remembers nothing there is nothing to compare.
    makers = wav2vec, codec, audio_conditioner, text_conditioner
    agreed_fingerprints(transformer, *makers, kinds=transformer.token_fingerprints)


@beartype
def check_stages_compatible(*transformers: StageTransformer) -> None:
    """Refuse stages that were not made for one another.

    Args:
        *transformers: Stages of one chain, in any order.

    Raises:
        ValueError: If a stream that two of them share (by name) is declared otherwise, or tokens of a kind that two of
            them share, or their conditions, were made by others; the message shows all differences.
    """
    found = [line for one, other in combinations(transformers, 2) for line in _stage_differences(one, other)]
    if found:
        raise ValueError(f"the stages were not made for one another: {'; '.join(found)}")


def _token_differences(
    transformer: StageTransformer, tokenizers: Mapping[str, SemanticTokenizer | Codec | None]
) -> Iterator[str]:
    """Vocabularies, levels and groups that are not those of the tokenizers."""
    for stream in transformer.layout.streams:
        source = transformer.sources[stream.name]
        tokenizer = tokenizers.get(source.kind)
        if tokenizer is None:
            continue
        where = f"stream '{stream.name}'"
        if tokenizer.codebook_size != stream.vocab_size:
            yield f"{where} has {stream.vocab_size} tokens, its tokenizer {tokenizer.codebook_size}"
        last_level = source.first_level + source.num_levels
        num_levels = getattr(tokenizer, "num_quantizers", last_level)
        if last_level > num_levels:
            yield f"{where} reaches level {last_level}, the codec has {num_levels}"
        # A stage of one group reads any codec: each code then waits for the one before it. Not all codecs tell theirs.
        num_groups = getattr(tokenizer, "num_groups", stream.num_groups)
        if stream.num_groups not in (1, num_groups):
            yield f"{where} has {stream.num_groups} groups, the codec {num_groups}"


def _rate_differences(
    transformer: StageTransformer, tokenizers: Mapping[str, SemanticTokenizer | Codec | None]
) -> Iterator[str]:
    """Rates that stand in another ratio than those of the tokenizers, whatever the pattern; all times n only warn."""
    declared: dict[str, Fraction] = {}
    given: dict[str, Fraction] = {}
    for stream in transformer.layout.streams:
        tokenizer = tokenizers.get(transformer.sources[stream.name].kind)
        if tokenizer is not None and stream.is_in_time:
            declared[stream.name] = stream.exact_hz
            given[stream.name] = Fraction(tokenizer.target_sample_hz, tokenizer.downsample_factor)
    if declared == given:
        return
    said = f"its streams have {_as_floats(declared)} frames a second, the tokenizers give {_as_floats(given)}"
    if len({given[name] / rate_hz for name, rate_hz in declared.items()}) > 1:
        yield f"{said}: build it with their rates"
    else:
        logger.warning(
            "the %s transformer: %s; it counts seconds by its own: build it with theirs, or set them in its config",
            transformer.namespace,
            said,
        )


def _width_differences(
    transformer: StageTransformer, audio_conditioner: Conditioner | None, text_conditioner: TextEncoder | None
) -> Iterator[str]:
    """Widths of conditions that are not those that the stage takes."""
    if audio_conditioner is not None and transformer.cond_dim is not None:
        width = audio_conditioner.dim(transformer.namespace)
        if width != transformer.cond_dim:
            yield (
                f"the conditioner gives it embeddings of width {width}, it takes {transformer.cond_dim}: "
                f"set cond_dim={width}"
            )
    if (
        text_conditioner is not None
        and transformer.text_dim is not None
        and text_conditioner.dim != transformer.text_dim
    ):
        yield (
            f"the text conditioner gives states of width {text_conditioner.dim}, it takes {transformer.text_dim}: "
            f"set text_dim={text_conditioner.dim}"
        )


def _stage_differences(one: StageTransformer, other: StageTransformer) -> Iterator[str]:
    """What two stages declare or remember differently of what they share."""
    names = f"the {one.namespace} transformer", f"the {other.namespace} transformer"
    ours, theirs = _declarations(one), _declarations(other)
    for stream in [name for name in ours if name in theirs]:
        differing = [fact for fact in ours[stream] if ours[stream][fact] != theirs[stream][fact]]
        said = (", ".join(f"{fact} {facts[stream][fact]}" for fact in differing) for facts in (ours, theirs))
        if differing:
            yield f"stream '{stream}': " + ", ".join(f"{name} has {facts}" for name, facts in zip(names, said))
    for kind in [kind for kind in one.token_fingerprints if kind in other.token_fingerprints]:
        prints = one.token_fingerprints[kind], other.token_fingerprints[kind]
        if prints[0] != prints[1]:
            known = ", ".join(f"{name} {fingerprint}" for name, fingerprint in zip(names, prints))
            made, maker = made_by(kind)
            yield f"they were trained on {made} of different makers, {known}: train both with one {maker}"


def _declarations(transformer: StageTransformer) -> dict[str, dict[str, Any]]:
    """What a stage declares its streams to be, by name, in words for messages."""
    declared: dict[str, dict[str, Any]] = {}
    for stream in transformer.layout.streams:
        source = transformer.sources[stream.name]
        first, last = source.first_level + 1, source.first_level + source.num_levels
        declared[stream.name] = {
            "vocabulary": stream.vocab_size,
            "levels": f"{first} to {last} of {source.kind}",
            "groups": stream.num_groups,
            "frames a second": f"{float(stream.exact_hz):g}" if stream.is_in_time else "none",
        }
    return declared


def _as_floats(rates_hz: Mapping[str, Fraction]) -> dict[str, float]:
    return {name: float(rate_hz) for name, rate_hz in rates_hz.items()}
