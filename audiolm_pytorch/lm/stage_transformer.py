"""The base class of the stages, and the tokens of recordings that stages read and predict."""

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

_SHARD_FIELDS = ("latents", "text_latents", "captions", "duration_seconds")
_RESERVED = ("semantic", "acoustic", "conditioner", "text_encoder")


@dataclass(frozen=True)
class TokenSource:
    """The source of a stream: some levels of one kind of token.

    Attributes:
        kind: `semantic`, `acoustic`, or the name of an extra stream.
        first_level: First of the levels, from 0.
        num_levels: Number of levels.
    """

    kind: str
    first_level: int
    num_levels: int


@dataclass(frozen=True)
class AudioTokens:
    """Tokens of some recordings.

    Attributes:
        tokens: By kind, int64, -1 past an item's length: `semantic [b, t]`, `acoustic [b, f, q]`, and `[b, f]` or
            `[b, f, levels]` of extra streams.
        lengths: True frames `[b]` int64 by kind; a kind without an entry has no padding.
    """

    tokens: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Check that there are tokens for every length."""
        unknown = set(self.lengths) - set(self.tokens)
        if unknown:
            raise ValueError(f"got lengths of {sorted(unknown)}, but only tokens of {sorted(self.tokens)}")


class StageTransformer(TokenTransformer):
    """A token model of one stage of a chain: it selects its streams from the tokens of recordings.

    Args:
        sources: Source of every own stream, by stream name.
        config: The part of `config` that a subclass adds.
        streams: The stage's own streams.
        pattern: `flat`, `delayed` or `parallel`, see `TokenLayout`.
        extra_streams: Further input streams (as objects, or as `Stream.to_dict` describes them). The name of a stream
            is its kind of token, e.g. ids of a text (not in time) or a melody (in time).
        audio_text_condition: Whether the model is conditioned on codes.
        cond_dim: Width of the embeddings of codes; None = `dim`.
        token_fingerprints: Fingerprints of the modules that the stage was trained with, by kind: of tokenizers
            (`semantic`, `acoustic`), of the `conditioner` and of the `text_encoder`. Trainers set the attribute. A kind
            without an entry is unknown and not checked.
        **stack: Further arguments of `TokenTransformer`.
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
        dim: int,
        depth: int,
        extra_streams: Sequence[Stream | Mapping[str, Any]] = (),
        audio_text_condition: bool = False,
        cond_dim: int | None = None,
        token_fingerprints: Mapping[str, str] | None = None,
        **stack: Any,
    ) -> None:
        width = (dim if cond_dim is None else cond_dim) if audio_text_condition else None
        extra = [stream if isinstance(stream, Stream) else Stream.from_dict(stream) for stream in extra_streams]
        for stream in extra:
            if not stream.is_input:
                raise ValueError(f"extra stream '{stream.name}' must be an input: set is_input=True")
            if stream.name in _RESERVED:
                raise ValueError(f"extra streams cannot be named {stream.name!r}: choose another name")
        super().__init__(layout=TokenLayout([*streams, *extra], pattern), dim=dim, depth=depth, cond_dim=width, **stack)
        self.sources = {**sources, **{stream.name: TokenSource(stream.name, 0, stream.num_levels) for stream in extra}}
        self.token_fingerprints: dict[str, str] = dict(token_fingerprints or {})
        unused = set(self.token_fingerprints) - set(self.fingerprinted)
        if unused:
            raise ValueError(f"the {self.namespace} stage uses {self.fingerprinted}, but got fingerprints of {unused}")
        taken = {*self.kinds, *_RESERVED, *_SHARD_FIELDS} & set(self.further_conditions)
        if taken:
            raise ValueError(f"conditions cannot be named {sorted(taken)}: choose other names")
        layout_config: dict[str, Any] = {"pattern": pattern}
        if extra:
            layout_config["extra_streams"] = [stream.to_dict() for stream in extra]
        condition_config = {"cond_dim": cond_dim, "audio_text_condition": audio_text_condition}
        self._config = {**config, **layout_config, **self._config, **condition_config}

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON-able data."""
        fingerprints = {"token_fingerprints": dict(self.token_fingerprints)} if self.token_fingerprints else {}
        return {**self._config, "max_seconds": self.max_seconds, **fingerprints}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "StageTransformer":
        """Build the model that `config` describes, with fresh weights."""
        return cls(**config)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tokens that the stage needs."""
        return tuple(dict.fromkeys(source.kind for source in self.sources.values()))

    @property
    def further_conditions(self) -> tuple[str, ...]:
        """Names of the conditions other than `codes` and `text`."""
        return tuple(name for name in self.fuser.specs if name not in ("codes", "text"))

    @property
    def fingerprinted(self) -> tuple[str, ...]:
        """Possible keys of `token_fingerprints`: the kinds of tokens, and the modules of the stage's conditions."""
        widths = {"conditioner": self.cond_dim, "text_encoder": self.text_dim}
        return (*self.kinds, *(kind for kind, width in widths.items() if width is not None))

    def packed(self, tokens: AudioTokens, ends: Tensor | None = None) -> PackedTokens:
        """Pack the stage's streams; `ends [b]` (bool) marks items whose file ends with the tokens."""
        streams, lengths = self.streams_of(tokens)
        return self.layout.pack(streams, lengths, ends)

    @beartype
    def streams_of(
        self, tokens: AudioTokens, names: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, int | Tensor]]:
        """Select streams (None = all) from tokens.

        Returns:
            Tokens `[b, f, levels]` and true frames by stream name, the arguments of `layout.pack`.
        """
        streams: dict[str, Tensor] = {}
        lengths: dict[str, int | Tensor] = {}
        for name, source in self.sources.items():
            if names is not None and name not in names:
                continue
            if source.kind not in tokens.tokens:
                raise ValueError(f"the {self.namespace} stage needs {source.kind} tokens, got {sorted(tokens.tokens)}")
            ids = tokens.tokens[source.kind]
            ids = ids.unsqueeze(-1) if ids.ndim == 2 else ids
            last_level = source.first_level + source.num_levels
            if ids.shape[-1] < last_level:
                raise ValueError(f"stream '{name}' needs {last_level} {source.kind} levels, got {ids.shape[-1]}")
            streams[name] = ids[..., source.first_level : last_level]
            lengths[name] = tokens.lengths.get(source.kind, torch.tensor(ids.shape[1]))
        return streams, lengths
