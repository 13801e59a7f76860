"""By what a stage's tokens are made: found out where it is trained, compared wherever it meets tokenizers or stages.

Token 17 of one tokenizer is not token 17 of another, though both may have as many: a stage that reads another's tokens
runs without an error and makes noise. So the fingerprints of tokenizers travel with shards and stages, and so do those
of what makes a stage's conditions: the conditioner whose codes it gets, the text encoder whose states it hears.
"""

from collections.abc import Collection, Sequence

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["agreed_fingerprints", "made_by", "shard_fingerprint"]

# Conditions are made on the way, of what shards hold: latents, captions.
_CONDITIONS = {"conditioner": "codes of conditions", "text_encoder": "states of texts"}
# What makes each kind of token: its key in the fingerprint of shards, and how people are told of it. An extra stream
# goes by its own name.
_IN_SHARDS = {"semantic": "semantic_tokenizer", "acoustic": "codec"}
_IN_WORDS = {
    "semantic": "semantic tokenizer (wav2vec)",
    "acoustic": "codec",
    "conditioner": "conditioner (audio_conditioner)",
    "text_encoder": "text encoder (text_conditioner)",
}


def made_by(kind: str) -> tuple[str, str]:
    """Say what a stage reads of a kind, and what makes it, in words for messages."""
    return _CONDITIONS.get(kind, f"{kind} tokens"), _IN_WORDS.get(kind, f"tokenizer of {kind!r}")


def shard_fingerprint(wav2vec: SemanticTokenizer, codec: Codec) -> dict[str, str]:
    """Say in the fingerprint of shards what made their tokens, so that stages trained on them remember it.

    Args:
        wav2vec: What makes `semantic`.
        codec: What makes `acoustic`.

    Returns:
        Entries for the `fingerprint` of `write_shards`.
    """
    return {_IN_SHARDS["semantic"]: wav2vec.fingerprint(), _IN_SHARDS["acoustic"]: codec.fingerprint()}


def agreed_fingerprints(
    transformer: StageTransformer,
    wav2vec: SemanticTokenizer | None,
    codec: Codec | None,
    audio_conditioner: Conditioner | None,
    text_conditioner: TextEncoder | None,
    shards: Sequence[TokenShards] = (),
    kinds: Collection[str] | None = None,
) -> dict[str, str]:
    """Find out what makes the tokens of a stage, from all who know: the stage, shards, the tokenizers themselves.

    Tokenizers hash all their weights to say so: ask once a run.

    Args:
        transformer: The stage, with what it remembers of earlier training.
        wav2vec: Semantic tokenizer; None = says nothing.
        codec: Codec; None = says nothing.
        audio_conditioner: What makes the codes that it is conditioned on; None, or one without a `fingerprint` = says
            nothing.
        text_conditioner: What makes the states of texts that it hears; None = says nothing.
        shards: Records that the stage learns from; those that name no tokenizer say nothing.
        kinds: Kinds of tokens to find out about; None = all that the stage uses, and what makes its conditions.

    Returns:
        Fingerprints by kind (`semantic`, `acoustic`, `conditioner`, `text_encoder`), as far as anybody knows.

    Raises:
        ValueError: If two of them name different tokenizers.
    """
    conditioners = {"conditioner": audio_conditioner, "text_encoder": text_conditioner}
    makers = {"semantic": wav2vec, "acoustic": codec, **conditioners}
    agreed: dict[str, str] = {}
    for kind in transformer.fingerprinted if kinds is None else kinds:
        said = {f"the {transformer.namespace} transformer was trained on": transformer.token_fingerprints.get(kind)}
        if kind not in _CONDITIONS:
            said.update(
                {f"{one.folder} holds those of": one.fingerprint.get(_IN_SHARDS.get(kind, kind)) for one in shards}
            )
        maker = makers.get(kind)
        if maker is not None:
            # No conditioner is asked to have one.
            said[f"the {type(maker).__name__} here is"] = maker.fingerprint() if hasattr(maker, "fingerprint") else None
        # Shards may be described in any way: what is no text is no fingerprint.
        known = {who: one for who, one in said.items() if isinstance(one, str)}
        if len(set(known.values())) > 1:
            claims = ", ".join(f"{who} {one}" for who, one in known.items())
            made, make = made_by(kind)
            raise ValueError(
                f"the {made} are of different makers: {claims}; take the {make} that the {made} were made with, or "
                f"make tokens and stage anew with this one (where both surely give the same: remove {kind!r} from the "
                "transformer's token_fingerprints)"
            )
        if known:
            agreed[kind] = next(iter(known.values()))
    return agreed
