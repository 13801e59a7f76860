"""Base class of the three AudioLM stages, and container of the tokens that the stages receive and predict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audiolm_pytorch.audio.units import frames_inside
from audiolm_pytorch.checks.types import keep_arguments, typed
from audiolm_pytorch.conditioning.fuser import ConditionSpec
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import PackedTokens, Stream, exact_rate

__all__ = ["AudioTokens", "StageTransformer", "TokenSource"]

_SHARD_FIELDS = ("latents", "text_latents", "captions", "duration_seconds")
_RESERVED = ("semantic", "acoustic", "conditioner", "text_encoder")


@dataclass(frozen=True)
class TokenSource:
    """Type and codebook levels of the tokens in one stream of a stage.

    Attributes:
        kind: Type of the tokens: `semantic`, `acoustic`, or the name of an extra stream.
        first_level: Index of the first level; the first level of the tokenizer is 0.
    """

    kind: str
    first_level: int
    num_levels: int


@dataclass(frozen=True)
class AudioTokens:
    """Semantic, acoustic and extra tokens of a batch of recordings.

    Attributes:
        tokens: int64 tokens by name, which are `semantic [b, t]`, `acoustic [b, f, q]`, and `[b, f]` or
            `[b, f, levels]` for an extra stream; -1 in the padding.
        lengths: Number of frames without padding, `[b]` int64, by the names in `tokens`; tokens without a length have
            no padding.
    """

    tokens: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Check that every key of `lengths` is also a key of `tokens`."""
        unknown = set(self.lengths) - set(self.tokens)
        if unknown:
            raise ValueError(f"got lengths without tokens for {sorted(unknown)}; pass the tokens or remove the lengths")


class StageTransformer(TokenTransformer):
    """Base class of the AudioLM stages, a language model that selects the tokens of its streams from `AudioTokens`.

    Args:
        sources: For each stream in `streams`, the type and levels of its tokens, by stream name.
        config: Constructor arguments of the subclass, which are added to the attribute `config`.
        pattern: Order of the tokens: `flat`, `delayed` or `parallel`, see `TokenLayout`.
        extra_streams: Further input streams, as `Stream` or as the dict of `Stream.to_dict`, e.g. ids of a text
            (without a rate) or a melody (with a rate); `AudioTokens` holds their tokens under the name of the stream.
        audio_text_condition: Whether the model is conditioned on codes of audio or captions.
        cond_dim: Width of the embeddings of codes; None = `dim`.
        token_fingerprints: Fingerprints, set by the trainer, of the tokenizers (keys `semantic`, `acoustic`), the
            `conditioner`, the `text_encoder` and the further conditions of the training; a missing fingerprint is not
            checked.
        **stack: Further arguments of `TokenTransformer`.
    """

    namespace: ClassVar[str]

    @typed
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
        check_positive(cond_dim=cond_dim)
        width = (dim if cond_dim is None else cond_dim) if audio_text_condition else None
        extra = [stream if isinstance(stream, Stream) else Stream.from_dict(stream) for stream in extra_streams]
        for stream in extra:
            if not stream.is_input:
                raise ValueError(f"extra stream '{stream.name}' must be an input stream; set is_input=True")
            if stream.name in _RESERVED:
                raise ValueError(f"extra streams cannot be named {stream.name!r}, a reserved name; choose another name")
        super().__init__(layout=TokenLayout([*streams, *extra], pattern), dim=dim, depth=depth, cond_dim=width, **stack)
        self.sources = {**sources, **{stream.name: TokenSource(stream.name, 0, stream.num_levels) for stream in extra}}
        self.token_fingerprints: dict[str, str] = dict(token_fingerprints or {})
        unused = set(self.token_fingerprints) - set(self.fingerprinted)
        if unused:
            raise ValueError(f"got unused token_fingerprints {unused}; pass only fingerprints of {self.fingerprinted}")
        taken = {*self.kinds, *_RESERVED, *_SHARD_FIELDS} & set(self.further_conditions)
        if taken:
            raise ValueError(f"conditions cannot be named {sorted(taken)} (reserved); choose other names")
        layout_config: dict[str, Any] = {"pattern": pattern}
        if extra:
            layout_config["extra_streams"] = [stream.to_dict() for stream in extra]
        condition_config = {"cond_dim": cond_dim, "audio_text_condition": audio_text_condition}
        self._config = {**config, **layout_config, **self._config, **condition_config}
        self._keep_config()

    def _keep_config(self) -> None:
        """Make the arguments in the config attributes, with rates as numbers."""
        rates = {name: exact_rate(rate) for name, rate in self._config.items() if name.endswith("rate_hz")}
        keep_arguments(self, {**self._config, **rates})

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments of the stage, in a form that JSON can store."""
        fingerprints = {"token_fingerprints": dict(self.token_fingerprints)} if self.token_fingerprints else {}
        return {**self._config, "max_seconds": self.max_seconds, **fingerprints}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "StageTransformer":
        """Build a stage from its `config`, with newly initialised weights."""
        return cls(**config)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the tokens that the stage needs: `semantic`, `acoustic`, and names of extra streams."""
        return tuple(dict.fromkeys(source.kind for source in self.sources.values()))

    @property
    def window_frames(self) -> int | None:
        """Length of the longest training sequence in predicted frames; None = no limit."""
        if self.max_seconds is None:
            return None
        return frames_inside(self.max_seconds, self.layout.predicted[0].exact_hz)

    @property
    def further_conditions(self) -> tuple[str, ...]:
        """Names of all conditions of the stage except `codes` and `text`."""
        return tuple(name for name in self.fuser.specs if name not in ("codes", "text"))

    @property
    def fingerprinted(self) -> tuple[str, ...]:
        """Keys that `token_fingerprints` may have: names of the tokens and condition modules that the stage uses."""
        widths = {"conditioner": self.cond_dim, "text_encoder": self.text_dim}
        kinds = [kind for kind, width in widths.items() if width is not None]
        return (*self.kinds, *kinds, *self.further_conditions)

    @typed
    def with_condition(self, name: str, dim: int, drop_prob: float = 0.0) -> "StageTransformer":
        """Return a copy of the stage with one more condition of width `dim`, which is added to the tokens.

        Until the copy is trained, its logits equal those of the stage, because the projection of the new condition is
        zero. Without the condition, the projection has no influence at any time. See `ConditionSpec` for `drop_prob`.
        """
        if name in self.fuser.specs:
            raise ValueError(f"the {self.namespace} transformer already has the condition {name}; train this stage on")
        spec = ConditionSpec(dim, "sum", "zero", drop_prob=drop_prob, projection="linear")
        conditions = {**self._config.get("conditions", {}), name: spec.to_dict()}
        extended = type(self).from_config({**self.config, "conditions": conditions})
        extended.load_state_dict(self.state_dict(), strict=False)
        for parameter in extended.fuser.entries[name].parameters():
            nn.init.zeros_(parameter)
        return extended.to(self.device).train(self.training)

    def packed(self, tokens: AudioTokens, ends: Tensor | None = None) -> PackedTokens:
        """Pack tokens into model inputs. `ends [b]` (bool) marks items whose tokens reach the end of their file."""
        streams, lengths = self.streams_of(tokens)
        return self.layout.pack(streams, lengths, ends)

    @typed
    def streams_of(
        self, tokens: AudioTokens, names: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, int | Tensor]]:
        """Select the tokens of the streams `names`, or of all streams of the stage with `names=None`.

        Returns:
            Tokens `[b, f, levels]` by stream name, and numbers of frames `[b]` by stream name.
        """
        streams: dict[str, Tensor] = {}
        lengths: dict[str, int | Tensor] = {}
        for name, source in self.sources.items():
            if names is not None and name not in names:
                continue
            if source.kind not in tokens.tokens:
                raise ValueError(f"got {sorted(tokens.tokens)}, the {self.namespace} stage needs {source.kind} tokens")
            ids = tokens.tokens[source.kind]
            ids = ids.unsqueeze(-1) if ids.ndim == 2 else ids
            last_level = source.first_level + source.num_levels
            if ids.shape[-1] < last_level:
                raise ValueError(f"stream '{name}' needs {last_level} {source.kind} levels, got {ids.shape[-1]} levels")
            streams[name] = ids[..., source.first_level : last_level]
            lengths[name] = tokens.lengths.get(source.kind, torch.tensor(ids.shape[1]))
        return streams, lengths
