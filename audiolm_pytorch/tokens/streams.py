"""Descriptions of token streams and their id ranges, checks of tokens, and packed tokens."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.types import typed

__all__ = [
    "exact_rate",
    "Grid",
    "Head",
    "IdBlock",
    "PackedTokens",
    "Stream",
    "checked_streams",
    "frame_counts",
    "number_ids",
]


_MAX_LEVELS = 2048


def exact_rate(rate_hz: float | str | Fraction) -> Fraction:
    """Convert frames per second to a fraction; 12.5, "12.5" and "25/2" are the same rate."""
    text = str(rate_hz)
    try:
        # A short text with an exponent may be a number of a billion digits.
        if len(text) <= 40 and "e" not in text.lower() and "_" not in text:
            return Fraction(text)
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError(f"rate_hz must be a number like 25, 12.5 or '25/2', got {text:.40}")


@typed
@dataclass(frozen=True)
class Stream:
    """Description of a token stream: its vocabulary, its levels and its frame rate.

    Args:
        name: Name of the stream, which is the key in dicts of tokens and lengths.
        vocab_size: Number of different tokens per level.
        num_levels: Number of tokens per frame: 1 for semantic tokens, `num_groups` times the number of residual levels
            for a codec.
        rate_hz: Frames per second, or None if the tokens are not a time series (ids of a text, codes of a whole
            recording). A stream without `rate_hz` must be an input and may be empty.
        is_input: True if the model only reads the stream, False if the model predicts it.
        eos: Whether the stream has an end-of-sequence id, with which the model can end the stream early.
        num_groups: Number of codes per residual level; in the delayed pattern, all groups of a level have equal delays.
        lookahead_frames: Number of later frames of an input stream that each row also contains, in further columns with
            further ids; not for the flat pattern, in which predicted streams follow all input tokens.
        guided: Whether training drops the tokens of an input stream together with the conditions, and guidance is also
            along this stream. Input streams without a `rate_hz` are always guided.
        filler: Whether every level of a predicted stream has a filler id, which fills the cells of the level that
            contain no token, as the special token of MusicGen; not for the flat pattern.
    """

    name: str
    vocab_size: int
    num_levels: int = 1
    rate_hz: int | Fraction | None = 1
    is_input: bool = False
    eos: bool = False
    num_groups: int = 1
    lookahead_frames: int = 0
    guided: bool = False
    filler: bool = False

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("vocab_size", "num_levels", "rate_hz", "num_groups")}
        wrong = {name: number for name, number in numbers.items() if number is not None and number <= 0}
        if wrong:
            raise ValueError(f"stream '{self.name}' needs positive numbers, got {wrong}")
        num_tables = self.num_levels * (1 + self.lookahead_frames)
        if max(num_tables, self.vocab_size / 2**20) > _MAX_LEVELS:
            raise ValueError(
                f"stream '{self.name}' has num_levels={self.num_levels}, lookahead_frames={self.lookahead_frames} and "
                f"vocab_size={self.vocab_size}; at most {_MAX_LEVELS} levels, also counting those of the look-ahead "
                f"frames, of {_MAX_LEVELS * 2**20} tokens are possible"
            )
        if self.num_levels % self.num_groups:
            raise ValueError(
                f"stream '{self.name}' has num_levels={self.num_levels}, which is not a multiple of "
                f"num_groups={self.num_groups}; num_levels counts the codes of all groups"
            )
        if self.is_input and self.eos:
            raise ValueError(f"stream '{self.name}' is an input, so the model cannot predict its end; set eos=False")
        if not self.is_input and self.rate_hz is None:
            raise ValueError(f"stream '{self.name}' is predicted, so it needs a rate_hz (frames per second)")
        if self.lookahead_frames < 0 or (self.lookahead_frames and not (self.is_input and self.is_in_time)):
            raise ValueError(
                f"stream '{self.name}' has lookahead_frames={self.lookahead_frames}; an input stream with a rate_hz "
                "can have 0 or more, every other stream has 0"
            )
        if self.guided and not self.is_input:
            raise ValueError(f"stream '{self.name}' is predicted, so it cannot be guided; set is_input=True")
        if self.filler and (self.is_input or self.eos):
            raise ValueError(f"stream '{self.name}' has a filler, so it must be predicted and cannot have an eos id")

    @property
    def is_in_time(self) -> bool:
        """Whether the stream has a frame rate."""
        return self.rate_hz is not None

    @property
    def is_condition(self) -> bool:
        """Whether the stream is dropped for classifier-free guidance."""
        return self.guided or not self.is_in_time

    @property
    def exact_hz(self) -> Fraction:
        """Frames per second as an exact fraction; a stream without a frame rate raises a ValueError."""
        if self.rate_hz is None:
            raise ValueError(f"stream '{self.name}' has no frame rate; pass rate_hz")
        return Fraction(self.rate_hz)

    def to_dict(self) -> dict[str, Any]:
        """Convert the stream to data that JSON can store."""
        fields = {**asdict(self), "rate_hz": str(self.exact_hz) if self.is_in_time else None}
        fields["given"] = fields.pop("is_input")  # the key in saved files
        # Without default values, as in files from before these fields.
        return {
            key: value for key, value in fields.items() if value or key not in ("lookahead_frames", "guided", "filler")
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Stream":
        """Build a stream from the result of `to_dict`."""
        fields = {**data, "rate_hz": None if data["rate_hz"] is None else exact_rate(data["rate_hz"])}
        return cls(**{"is_input" if key == "given" else key: value for key, value in fields.items()})


@dataclass(frozen=True)
class Head:
    """Output head of a language model, which predicts the tokens of one level of one stream.

    Attributes:
        stream: Name of the predicted stream.
        level: Level of the predicted tokens, counted from 0.
        first_id: Id of token 0 of the level; logit k is for id `first_id + k`.
        has_eos: Whether the last logit is for the end-of-sequence id of the stream.
    """

    stream: str
    level: int
    first_id: int
    vocab_size: int
    has_eos: bool

    @property
    def num_logits(self) -> int:
        """Number of logits, including the logit of the end-of-sequence id."""
        return self.vocab_size + int(self.has_eos)

    def ids(self, allow_eos: bool) -> range:
        """Return the ids that the head can predict, with the end-of-sequence id only if `allow_eos` is True."""
        return range(self.first_id, self.first_id + (self.num_logits if allow_eos else self.vocab_size))


@dataclass(frozen=True)
class IdBlock:
    """Range of ids for the tokens of one level, or the single id of a special token (start, end, filler or null token).

    Attributes:
        stream: Index of the stream; -1 for the start token and the null token.
        level: Level of the tokens in a frame.
        first_id: Smallest id of the range.
        is_token: True for the tokens of a level, False for a special token.
        head: Index of the output head that predicts the ids of the range; -1 for ids that are never predicted.
        ahead: Number of frames between the time of a row and the look-ahead tokens of an input stream.
    """

    stream: int
    level: int
    first_id: int
    is_token: bool
    head: int
    ahead: int = 0


def number_ids(streams: Sequence[Stream]) -> tuple[tuple[IdBlock, ...], tuple[Head, ...], int]:
    """Assign id ranges without overlap to the start token, each level, end and filler of streams, and the null token.

    Returns:
        The id ranges, the output heads and the number of ids. The first id range is that of the start token. If any
        stream has no frame rate, the last id range is that of the null token, which replaces an empty stream.
    """
    blocks = [IdBlock(stream=-1, level=0, first_id=0, is_token=False, head=-1)]
    heads: list[Head] = []
    next_id = 1
    for index, stream in enumerate(streams):
        for level in range(stream.num_levels):
            has_eos = stream.eos and level == 0
            head = -1 if stream.is_input else len(heads)
            if not stream.is_input:
                heads.append(Head(stream.name, level, next_id, stream.vocab_size, has_eos))
            for ahead in range(1 + stream.lookahead_frames):
                blocks.append(IdBlock(index, level, next_id, True, head, ahead))
                next_id += stream.vocab_size
            if has_eos:  # directly after the level, so that the ids of a head are contiguous
                blocks.append(IdBlock(index, level, next_id, False, head))
                next_id += 1
            if stream.filler:
                blocks.append(IdBlock(index, level, next_id, False, -1))
                next_id += 1
    if not all(stream.is_in_time for stream in streams):
        blocks.append(IdBlock(stream=-1, level=0, first_id=next_id, is_token=False, head=-1))
        next_id += 1
    return tuple(blocks), tuple(heads), next_id


@dataclass(frozen=True)
class PackedTokens:
    """Token streams of a batch, packed into the rows and columns of a layout.

    Attributes:
        ids: `[b, rows, columns]` int64 ids of the layout; undefined where `input_mask` is False.
        input_mask: `[b, rows, columns]` bool, True where a row and column contain a token.
        loss_mask: `[b, rows, columns]` bool, True where the model must predict the token.
        streams: Streams of the layout.
        pattern: Pattern of the layout.
    """

    ids: Tensor
    input_mask: Tensor
    loss_mask: Tensor
    streams: tuple[Stream, ...]
    pattern: str

    def to(self, device: torch.device | str) -> "PackedTokens":
        """Copy all tensors to a device."""
        tensors = self.ids.to(device), self.input_mask.to(device), self.loss_mask.to(device)
        return PackedTokens(*tensors, self.streams, self.pattern)


@dataclass(frozen=True)
class Grid:
    """Packed rows for decoding; the ids of inputs and prompts are known, and decoding predicts all other ids.

    Attributes:
        packed: Known ids; `packed.loss_mask` is True for the ids that decoding predicts.
        head: `[b, rows, columns]` int64 on the CPU, index of the output head that predicts the id, or -1.
        frame: `[b, rows, columns]` int64 on the CPU, index of the frame that contains the token.
        num_frames: Number of frames `[b]` int64 of every stream by name, on the CPU.
    """

    packed: PackedTokens
    head: Tensor
    frame: Tensor
    num_frames: dict[str, Tensor]


def frame_counts(streams: Sequence[Stream], num_frames: Mapping[str, int | Tensor], batch_size: int) -> Tensor:
    """Stack the numbers of frames of all streams, each `[b]` or one int, to `[b, streams]` int64 on the CPU."""
    _check_names(streams, num_frames, "numbers of frames")
    columns = []
    for stream in streams:
        count = torch.as_tensor(num_frames[stream.name]).cpu()
        if count.is_floating_point() or count.ndim > 1 or count.numel() not in (1, batch_size) or (count < 0).any():
            raise ValueError(
                f"num_frames of '{stream.name}' must be one integer or {batch_size} integers, 0 or more; "
                f"got {count.tolist()}"
            )
        columns.append(count.long().expand(batch_size))
    return torch.stack(columns, dim=1)


def checked_streams(
    streams: Sequence[Stream],
    tokens: Mapping[str, Tensor],
    lengths: Mapping[str, int | Tensor],
    batch_size: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Check the tokens of all streams, and convert them to int64 `[b, f, levels]`.

    Args:
        tokens: Tokens `[b, f, levels]` (or `[b, f]` for one level) of every stream, by stream name.
        lengths: Numbers of unpadded frames by stream name, `[b]` or one int; no entry means no padding.

    Returns:
        Tokens `[b, f, levels]` by stream name in the order of `streams`, and numbers of frames `[b, streams]` int64.
    """
    _check_names(streams, tokens, "tokens")
    checked: dict[str, Tensor] = {}
    for stream in streams:
        ids = tokens[stream.name]
        if ids.ndim == 2 and stream.num_levels == 1:
            ids = rearrange(ids, "b f -> b f 1")
        is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.ndim != 3 or ids.shape[-1] != stream.num_levels or not is_integer:
            raise ValueError(
                f"tokens of stream '{stream.name}' must be integers [b, f, {stream.num_levels}], "
                f"got {ids.dtype} {tuple(tokens[stream.name].shape)}"
            )
        checked[stream.name] = ids.long()
    sizes = {name: len(ids) for name, ids in checked.items()}
    batch = next(iter(sizes.values())) if batch_size is None else batch_size
    if set(sizes.values()) != {batch}:
        needed = "the same number of items" if batch_size is None else f"{batch} items"
        raise ValueError(f"the tokens of all streams need {needed} in the first dimension, got {sizes}")
    counts = frame_counts(streams, {**{name: ids.shape[1] for name, ids in checked.items()}, **lengths}, batch)
    for stream, count in zip(streams, counts.T):
        _check_values(stream, checked[stream.name], count)
    return checked, counts


def _check_values(stream: Stream, ids: Tensor, count: Tensor) -> None:
    """Check that item i of `ids [b, f, levels]` has `count[i]` frames, whose ids are in the vocabulary."""
    longest = int(count.max()) if len(count) else 0
    if longest > ids.shape[1]:
        raise ValueError(
            f"lengths of stream '{stream.name}' must be at most {ids.shape[1]}, the number of its frames; got {longest}"
        )
    is_real = rearrange(torch.arange(ids.shape[1]) < count.unsqueeze(1), "b f -> b f 1").to(ids.device)
    wrong = ((ids < 0) | (ids >= stream.vocab_size)) & is_real
    if wrong.any():
        item, frame, level = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"stream '{stream.name}' has token {int(ids[item, frame, level])} at item {item}, frame {frame}, level "
            f"{level}, outside [0, {stream.vocab_size}); if this is padding, pass lengths"
        )


def _check_names(streams: Sequence[Stream], names: Collection[str], what: str) -> None:
    """Check that `names` are exactly the names of the streams."""
    needed = [stream.name for stream in streams]
    missing = [name for name in needed if name not in names]
    unknown = [name for name in names if name not in needed]
    if missing:
        raise ValueError(f"{what} of streams {missing} are missing; pass {what} of {needed}, got only {list(names)}")
    if unknown:
        raise ValueError(f"got {what} of unknown streams {unknown}; the streams are {needed}")
