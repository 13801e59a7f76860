"""What the stages have in common: a token model that knows which tokens of a sound its streams are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import PackedTokens, Stream

__all__ = ["AudioTokens", "StageTransformer", "TokenSource"]


@dataclass(frozen=True)
class TokenSource:
    """Where a stream's tokens come from: some levels of one kind of token of a sound.

    Attributes:
        kind: `semantic`, `acoustic`, or the name of an extra stream.
        first_level: First level taken.
        num_levels: Number of levels taken.
    """

    kind: str
    first_level: int
    num_levels: int


@dataclass(frozen=True)
class AudioTokens:
    """Tokens of the same sounds, as far as they are known.

    Attributes:
        tokens: By kind: `semantic [b, t]`, `acoustic [b, f, q]`, and `[b, f]` or `[b, f, levels]` of extra streams by
            name, int64; -1 past an item's length.
        lengths: By kind: true frames `[b]` int64; a kind that is absent here is whole.

    Raises:
        ValueError: If there is a length of tokens that are not there.
    """

    tokens: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse lengths that would silently not be used."""
        unknown = set(self.lengths) - set(self.tokens)
        if unknown:
            raise ValueError(f"there are lengths of {sorted(unknown)}, but tokens of {sorted(self.tokens)} only")


class StageTransformer(TokenTransformer):
    """A token model that knows which tokens of a sound its streams are.

    Args:
        sources: Source of every stream of the stage's own, by stream name.
        config: What `config` gives back, apart from the arguments named here and those of the stack.
        streams: The stage's own streams.
        pattern: Pattern of the layout.
        extra_streams: Further given streams (as objects, or as `Stream.to_dict` described them), whose tokens are of
            the kind of their name: ids of a text or MuLaN codes, which are not in time, a melody, which is.
        audio_text_condition: Whether the model takes a condition.
        cond_dim: Width of the condition; None = `dim`.
        dim: Width d.
        depth: Number of blocks.
        token_fingerprints: Fingerprints of the tokenizers that made the tokens it was trained on, by kind (`semantic`,
            `acoustic`), of the `conditioner` whose codes conditioned it, and of the `text_encoder` whose states it
            heard; trainers fill the attribute of that name. A kind that is absent is unknown, and not checked.
        **stack: Further arguments of `TokenTransformer`.

    Raises:
        ValueError: If there is a fingerprint for a kind of token that the stage does not use, or an extra stream is no
            given one or bears the name of other tokens.
    """

    namespace: ClassVar[str]

    @beartype
    def __init__(
        self,
        *,
        sources: Mapping[str, TokenSource],
        config: Mapping[str, Any],
        streams: Sequence[Stream],
        pattern: str,
        extra_streams: Sequence[Stream | Mapping[str, Any]] = (),
        audio_text_condition: bool,
        cond_dim: int | None,
        dim: int,
        depth: int,
        token_fingerprints: Mapping[str, str] | None = None,
        **stack: Any,
    ) -> None:
        width = (dim if cond_dim is None else cond_dim) if audio_text_condition else None
        extra = [one if isinstance(one, Stream) else Stream.from_dict(one) for one in extra_streams]
        _check_extra(extra)
        super().__init__(layout=TokenLayout([*streams, *extra], pattern), dim=dim, depth=depth, cond_dim=width, **stack)
        self.sources = {**sources, **{one.name: TokenSource(one.name, 0, one.num_levels) for one in extra}}
        self.token_fingerprints: dict[str, str] = dict(token_fingerprints or {})
        unused = set(self.token_fingerprints) - set(self.fingerprinted)
        if unused:
            raise ValueError(f"the {self.namespace} stage has tokens of {self.kinds}, no fingerprint for {unused}")
        arranged: dict[str, Any] = {"pattern": pattern}
        if extra:
            arranged["extra_streams"] = [one.to_dict() for one in extra]
        conditioned = {"cond_dim": cond_dim, "audio_text_condition": audio_text_condition}
        self._config = {**config, **arranged, **self._config, **conditioned}

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON-able data."""
        known = {"token_fingerprints": dict(self.token_fingerprints)} if self.token_fingerprints else {}
        return {**self._config, "max_seconds": self.max_seconds, **known}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "StageTransformer":
        """Build the model that `config` describes, with fresh weights."""
        return cls(**config)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tokens that the stage needs."""
        return tuple(dict.fromkeys(source.kind for source in self.sources.values()))

    @property
    def fingerprinted(self) -> tuple[str, ...]:
        """What `token_fingerprints` may speak of: the kinds of tokens, and what made the conditions that it takes."""
        widths = {"conditioner": self.cond_dim, "text_encoder": self.text_dim}
        return (*self.kinds, *(kind for kind, width in widths.items() if width is not None))

    def packed(self, tokens: AudioTokens, ends: Tensor | None = None) -> PackedTokens:
        """Pack the stage's streams of some sounds.

        Args:
            tokens: Tokens of the sounds.
            ends: `[b]` bool, whether the file really ends where the tokens do.

        Returns:
            The packed streams.
        """
        streams, lengths = self.streams_of(tokens)
        return self.layout.pack(streams, lengths, ends)

    @beartype
    def streams_of(
        self, tokens: AudioTokens, names: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, int | Tensor]]:
        """Take the stage's streams out of the tokens of sounds.

        Args:
            tokens: Tokens of the sounds.
            names: Streams to take; None = all.

        Returns:
            Tokens `[b, f, levels]` and true frames of the streams, by name, ready for `layout.pack`.

        Raises:
            ValueError: If a kind of token is missing or has too few levels.
        """
        streams: dict[str, Tensor] = {}
        lengths: dict[str, int | Tensor] = {}
        for name, source in self.sources.items():
            if names is not None and name not in names:
                continue
            if source.kind not in tokens.tokens:
                raise ValueError(f"the {self.namespace} stage needs {source.kind} tokens, got {sorted(tokens.tokens)}")
            found = tokens.tokens[source.kind]
            found = found.unsqueeze(-1) if found.ndim == 2 else found
            last_level = source.first_level + source.num_levels
            if found.shape[-1] < last_level:
                raise ValueError(f"stream '{name}' needs {last_level} {source.kind} levels, got {found.shape[-1]}")
            streams[name] = found[..., source.first_level : last_level]
            lengths[name] = tokens.lengths.get(source.kind, torch.tensor(found.shape[1]))
        return streams, lengths


def _check_extra(streams: Sequence[Stream]) -> None:
    """Refuse extra streams that are predicted, or would be taken for the tokens of the sound itself."""
    for stream in streams:
        if not stream.is_input:
            raise ValueError(f"extra stream '{stream.name}' is only read by the stage: set is_input=True")
        if stream.name in ("semantic", "acoustic", "conditioner", "text_encoder"):
            raise ValueError(f"extra stream '{stream.name}' would be taken for the {stream.name} tokens: rename it")
