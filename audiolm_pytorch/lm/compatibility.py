"""Checks that a language model is used with the tokenizers and conditioners from its training.

Two tokenizers can have vocabularies of the same size, but tokens of different meaning. A language model accepts tokens
of a wrong tokenizer without an error, but then generates noise. Token shards and saved stages therefore store the
fingerprints of their tokenizers and conditioners.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = [
    "agreed_fingerprints",
    "as_loaded",
    "check_compatible",
    "check_loadable",
    "check_stages_compatible",
    "shard_fingerprint",
]

logger = logger_named(__name__)

# For error messages: the name of the tokens and of the module that computes them. Extra streams are not listed.
_IN_WORDS = {
    "semantic": ("semantic tokens", "semantic tokenizer (wav2vec)"),
    "acoustic": ("acoustic tokens", "codec"),
    "conditioner": ("conditioning codes", "conditioner (audio_conditioner)"),
    "text_encoder": ("text states", "text encoder (text_conditioner)"),
}
_CONDITIONS = ("conditioner", "text_encoder")  # computed in training, not stored in shards
# Keys of the tokenizers in the fingerprint of shards. The key of an extra stream is its name.
_SHARD_KEYS = {"semantic": "semantic_tokenizer", "acoustic": "codec"}
_Tokenizers = Mapping[str, SemanticTokenizer | Codec | None]


@typed
def check_compatible(
    transformer: StageTransformer,
    wav2vec: SemanticTokenizer | None = None,
    codec: Codec | None = None,
    audio_conditioner: Conditioner | None = None,
    text_conditioner: TextEncoder | None = None,
) -> None:
    """Check that a stage can use the passed tokenizers and conditioners. Unneeded modules are ignored."""
    tokenizers = {"semantic": wav2vec, "acoustic": codec}
    differences = [
        *_token_differences(transformer, tokenizers),
        *_rate_differences(transformer, tokenizers),
        *_width_differences(transformer, audio_conditioner, text_conditioner),
    ]
    if differences:
        raise ValueError(
            f"the {transformer.namespace} transformer does not match the modules: {'; '.join(differences)}"
        )
    # Fingerprints are compared last, because they are expensive. Only those stored in the stage can differ.
    kinds = transformer.token_fingerprints
    agreed_fingerprints(transformer, wav2vec, codec, audio_conditioner, text_conditioner, kinds=kinds)


@typed
def check_stages_compatible(*transformers: StageTransformer) -> None:
    """Check that all stages of a model declare equal properties of shared streams and have equal fingerprints."""
    differences = [line for pair in combinations(transformers, 2) for line in _stage_differences(*pair)]
    if differences:
        raise ValueError(f"the stages of the model are not compatible with each other: {'; '.join(differences)}")


def check_loadable(
    transformers: Iterable[StageTransformer],
    wav2vec: SemanticTokenizer | None = None,
    codec: Codec | None = None,
    audio_conditioner: Conditioner | None = None,
    text_conditioner: TextEncoder | None = None,
) -> None:
    """Check that a model can be loaded once it is saved: no part has changed since the stages were trained with it."""
    wav2vec, codec, audio_conditioner, text_conditioner = map(
        as_loaded, (wav2vec, codec, audio_conditioner, text_conditioner)
    )
    for transformer in transformers:
        try:
            kinds = transformer.token_fingerprints
            agreed_fingerprints(transformer, wav2vec, codec, audio_conditioner, text_conditioner, kinds=kinds)
        except ValueError as error:
            raise ValueError(f"the saved model could not be loaded, so nothing is written: {error}") from error


def as_loaded(module: Any) -> Any:
    """Return a module as `load_module` will return it, in float32; a copy if it has another dtype."""
    is_float = isinstance(module, nn.Module) and all(
        not tensor.is_floating_point() or tensor.dtype == torch.float32 for tensor in module.state_dict().values()
    )
    return module if module is None or is_float else copy.deepcopy(module).float()


def shard_fingerprint(wav2vec: SemanticTokenizer, codec: Codec) -> dict[str, str]:
    """Return the fingerprints of both tokenizers as the `fingerprint` argument of `write_shards`."""
    return {_SHARD_KEYS["semantic"]: wav2vec.fingerprint(), _SHARD_KEYS["acoustic"]: codec.fingerprint()}


def agreed_fingerprints(
    transformer: StageTransformer,
    wav2vec: SemanticTokenizer | None,
    codec: Codec | None,
    audio_conditioner: Conditioner | None,
    text_conditioner: TextEncoder | None,
    shards: Sequence[TokenShards] = (),
    kinds: Collection[str] | None = None,
) -> dict[str, str]:
    """Check that the fingerprints of the modules equal the fingerprints stored in the stage and in the shards.

    Args:
        kinds: Keys of the fingerprints to compare; None = all fingerprints that the stage uses.

    Returns:
        The known fingerprints by key (`semantic`, `acoustic`, `conditioner`, `text_encoder`, names of extra streams and
        of further conditions).
    """
    modules = {
        "semantic": wav2vec,
        "acoustic": codec,
        "conditioner": audio_conditioner,
        "text_encoder": text_conditioner,
    }
    agreed: dict[str, str] = {}
    for kind in transformer.fingerprinted if kinds is None else kinds:
        claims: dict[str, Any] = {
            f"the {transformer.namespace} transformer was trained with": transformer.token_fingerprints.get(kind)
        }
        for part in shards if kind not in _CONDITIONS else ():
            claims[f"the shards in {part.folder} were made with"] = part.fingerprint.get(_SHARD_KEYS.get(kind, kind))
        module = modules.get(kind)
        if module is not None:
            claims[f"the passed {type(module).__name__} is"] = module.fingerprint()
        # The fingerprint of shards can contain any JSON; only strings are fingerprints of tokenizers.
        known = {claim: value for claim, value in claims.items() if isinstance(value, str)}
        if len(set(known.values())) > 1:
            tokens, module_name = _words(kind)
            fingerprints = ", ".join(f"{claim} {value}" for claim, value in known.items())
            raise ValueError(
                f"the {tokens} have different fingerprints: {fingerprints}; pass the {module_name} that the stage was "
                f"trained with, or remove {kind!r} from token_fingerprints if both modules compute equal {tokens}"
            )
        if known:
            agreed[kind] = next(iter(known.values()))
    return agreed


def _words(kind: str) -> tuple[str, str]:
    """Return a name of the tokens and a name of the module that computes the tokens, for error messages."""
    return _IN_WORDS.get(kind, (f"{kind} tokens", f"tokenizer of {kind!r}"))


def _token_differences(transformer: StageTransformer, tokenizers: _Tokenizers) -> Iterator[str]:
    """Yield a message for each vocabulary, number of levels or number of groups in which stage and tokenizer differ."""
    for stream in transformer.layout.streams:
        source = transformer.sources[stream.name]
        tokenizer = tokenizers.get(source.kind)
        if tokenizer is None:
            continue
        where = f"stream '{stream.name}'"
        if tokenizer.codebook_size != stream.vocab_size:
            yield f"{where} has {stream.vocab_size} tokens, its tokenizer has {tokenizer.codebook_size}"
        last_level = source.first_level + source.num_levels
        num_levels = getattr(tokenizer, "num_quantizers", last_level)
        if last_level > num_levels:
            yield f"{where} needs {last_level} levels, the codec has {num_levels}"
        # A stream of one group fits any codec. Not every codec has the attribute `num_groups`.
        num_groups = getattr(tokenizer, "num_groups", stream.num_groups)
        if stream.num_groups not in (1, num_groups):
            yield f"{where} has {stream.num_groups} groups, the codec has {num_groups}"


def _rate_differences(transformer: StageTransformer, tokenizers: _Tokenizers) -> Iterator[str]:
    """Yield a message if the frame rate ratios of stage and tokenizers differ; warn if only the rates differ."""
    declared_hz: dict[str, Fraction] = {}
    actual_hz: dict[str, Fraction] = {}
    for stream in transformer.layout.streams:
        tokenizer = tokenizers.get(transformer.sources[stream.name].kind)
        if tokenizer is not None and stream.is_in_time:
            declared_hz[stream.name] = stream.exact_hz
            actual_hz[stream.name] = Fraction(tokenizer.target_sample_hz, tokenizer.downsample_factor)
    if declared_hz == actual_hz:
        return
    declared, actual = ({name: float(hz) for name, hz in rates.items()} for rates in (declared_hz, actual_hz))
    difference = f"its streams have {declared} frames per second, the tokenizers have {actual}"
    if len({actual_hz[name] / hz for name, hz in declared_hz.items()}) > 1:
        yield f"{difference}; build the stage with the rates of the tokenizers"
    else:
        logger.warning(
            "the %s transformer: %s; durations will be wrong; build the stage with the rates of the tokenizers",
            transformer.namespace,
            difference,
        )


def _width_differences(
    transformer: StageTransformer, audio_conditioner: Conditioner | None, text_conditioner: TextEncoder | None
) -> Iterator[str]:
    """Yield a message for each condition whose embeddings have another width than the stage needs."""
    if audio_conditioner is not None and transformer.cond_dim is not None:
        width = audio_conditioner.dim(transformer.namespace)
        if width != transformer.cond_dim:
            yield f"the conditioner has width {width}, the stage needs {transformer.cond_dim}; set cond_dim={width}"
    if text_conditioner is not None and transformer.text_dim not in (None, text_conditioner.dim):
        width = text_conditioner.dim
        yield f"the text conditioner has width {width}, the stage needs {transformer.text_dim}; set text_dim={width}"


def _stage_differences(first: StageTransformer, second: StageTransformer) -> Iterator[str]:
    """Yield a message for each shared stream that two stages define differently, and each fingerprint that differs."""
    names = f"the {first.namespace} transformer", f"the {second.namespace} transformer"
    declared = _declarations(first), _declarations(second)
    for stream in [name for name in declared[0] if name in declared[1]]:
        facts = declared[0][stream], declared[1][stream]
        differing = [fact for fact in facts[0] if facts[0][fact] != facts[1][fact]]
        if differing:
            sides = (", ".join(f"{fact} {side[fact]}" for fact in differing) for side in facts)
            yield f"stream '{stream}': " + ", ".join(f"{name} has {side}" for name, side in zip(names, sides))
    for kind in [kind for kind in first.token_fingerprints if kind in second.token_fingerprints]:
        prints = first.token_fingerprints[kind], second.token_fingerprints[kind]
        if prints[0] != prints[1]:
            tokens, module_name = _words(kind)
            known = ", ".join(f"{name} {fingerprint}" for name, fingerprint in zip(names, prints))
            yield f"they were trained on different {tokens}, {known}; train both with one {module_name}"


def _declarations(transformer: StageTransformer) -> dict[str, dict[str, Any]]:
    """Return the properties of each stream by stream name. The names of the stream properties are used in messages."""
    declared: dict[str, dict[str, Any]] = {}
    for stream in transformer.layout.streams:
        source = transformer.sources[stream.name]
        first, last = source.first_level + 1, source.first_level + source.num_levels
        declared[stream.name] = {
            "vocabulary": stream.vocab_size,
            "levels": f"{first} to {last} of {source.kind}",
            "groups": stream.num_groups,
            "frames per second": f"{float(stream.exact_hz):g}" if stream.is_in_time else "none",
        }
    return declared
