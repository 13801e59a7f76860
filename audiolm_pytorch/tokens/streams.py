"""What layouts are made of: streams of tokens, the ids they get, and the tensors they are packed into."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

__all__ = ["Grid", "Head", "IdBlock", "PackedTokens", "Stream", "number_ids"]


@beartype
@dataclass(frozen=True)
class Stream:
    """One kind of token: its vocabulary, its levels and its rate in time.

    Args:
        name: Name under which the tokens of the stream are handed in and out.
        vocab_size: Number of different tokens of every level.
        num_levels: Tokens per frame (residual levels of a codec, all groups of a level side by side; 1 for semantic
            tokens).
        rate_hz: Frames per second. None = not in time (ids of a text, codes of a whole recording): such a stream is
            given, and may be empty.
        is_input: Whether the model reads the stream but never predicts it.
        eos: The stream may end early: it has one end-of-sequence id of its own.
        num_groups: Codes of one residual level; they do not wait for one another where levels do.

    Raises:
        ValueError: If a number is not positive, groups do not divide the levels, a given stream is said to end, or a
            stream that is not in time is to be predicted.
    """

    name: str
    vocab_size: int
    num_levels: int = 1
    rate_hz: int | Fraction | None = 1
    is_input: bool = False
    eos: bool = False
    num_groups: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        numbers = {name: getattr(self, name) for name in ("vocab_size", "num_levels", "rate_hz", "num_groups")}
        wrong = {name: number for name, number in numbers.items() if number is not None and number <= 0}
        if wrong:
            raise ValueError(f"stream '{self.name}' needs positive {', '.join(wrong)}, got {wrong}")
        if self.num_levels % self.num_groups:
            raise ValueError(
                f"stream '{self.name}' has {self.num_levels} levels, which are no whole number of {self.num_groups} "
                "groups each: num_levels counts the codes of all groups"
            )
        if self.is_input and self.eos:
            raise ValueError(f"stream '{self.name}' is given, so it cannot end by itself: set eos=False")
        if not self.is_input and self.rate_hz is None:
            raise ValueError(f"stream '{self.name}' is to be predicted, so it needs a rate_hz: say how many frames/s")

    @property
    def is_in_time(self) -> bool:
        """Whether frames follow one another at a rate."""
        return self.rate_hz is not None

    @property
    def exact_hz(self) -> Fraction:
        """Frames per second; a ValueError where the stream is not in time."""
        if self.rate_hz is None:
            raise ValueError(f"stream '{self.name}' is not in time: it has no rate")
        return Fraction(self.rate_hz)

    def to_dict(self) -> dict[str, Any]:
        """Describe the stream as JSON-able data."""
        fields = {**asdict(self), "rate_hz": str(self.exact_hz) if self.is_in_time else None}
        fields["given"] = fields.pop("is_input")  # its name in saved files
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Stream":
        """Build the stream that `to_dict` described."""
        fields = {**data, "rate_hz": None if data["rate_hz"] is None else Fraction(data["rate_hz"])}
        return cls(**{"is_input" if name == "given" else name: value for name, value in fields.items()})


@dataclass(frozen=True)
class Head:
    """One output of the model: the token of one level of one predicted stream.

    Attributes:
        stream: Name of the predicted stream.
        level: Level inside the frame, from 0.
        first_id: Id of token 0 in the layout's id space.
        vocab_size: Number of tokens; local numbers are `id - first_id`.
        has_eos: Whether local number `vocab_size` means the end of the stream.
    """

    stream: str
    level: int
    first_id: int
    vocab_size: int
    has_eos: bool

    @property
    def num_logits(self) -> int:
        """Number of outputs of the head, the end id included."""
        return self.vocab_size + int(self.has_eos)

    def ids(self, allow_eos: bool) -> range:
        """Ids that the head may produce."""
        return range(self.first_id, self.first_id + (self.num_logits if allow_eos else self.vocab_size))


@dataclass(frozen=True)
class IdBlock:
    """A range of ids of one meaning: a level of a stream, the end of a stream, the start, or the null token.

    Attributes:
        stream: Position of the stream; -1 for the start and the null id.
        level: Level inside the frame.
        first_id: First id of the range.
        is_token: True for the tokens of a level; False for the single id of an end, of the start or of the null token.
        head: Number of the head that predicts these ids; -1 if nothing does.
    """

    stream: int
    level: int
    first_id: int
    is_token: bool
    head: int


def number_ids(streams: Sequence[Stream]) -> tuple[tuple[IdBlock, ...], tuple[Head, ...], int]:
    """Give the start, every level of every stream, every end and the null token an id range of its own.

    Args:
        streams: The streams of a layout, in order.

    Returns:
        The blocks (the start is the first; the null token, where a stream is not in time, the last), the heads, and
        the size of the whole id space.
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
            blocks.append(IdBlock(index, level, next_id, True, head))
            next_id += stream.vocab_size
            if has_eos:  # right behind its level, so that the range of one head covers both
                blocks.append(IdBlock(index, level, next_id, False, head))
                next_id += 1
    if not all(stream.is_in_time for stream in streams):
        blocks.append(IdBlock(stream=-1, level=0, first_id=next_id, is_token=False, head=-1))
        next_id += 1
    return tuple(blocks), tuple(heads), next_id


@dataclass(frozen=True)
class PackedTokens:
    """Streams packed into the grid of a layout.

    Attributes:
        ids: `[b, rows, columns]` int64 in the layout's id space; meaningless where `input_mask` is False.
        input_mask: `[b, rows, columns]` bool, True where a token stands.
        loss_mask: `[b, rows, columns]` bool, True where the model has to produce the token.
    """

    ids: Tensor
    input_mask: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device | str) -> "PackedTokens":
        """Copy to a device."""
        return PackedTokens(self.ids.to(device), self.input_mask.to(device), self.loss_mask.to(device))


@dataclass(frozen=True)
class Grid:
    """A grid that decoding completes: what is known stands in it, `packed.loss_mask` marks what is missing.

    Attributes:
        packed: The known ids.
        head: `[b, rows, columns]` int64 on the CPU, head that predicts the cell; -1 elsewhere.
        frame: `[b, rows, columns]` int64 on the CPU, frame that the cell belongs to.
        num_frames: Frames `[b]` int64 of every stream, on the CPU.
    """

    packed: PackedTokens
    head: Tensor
    frame: Tensor
    num_frames: dict[str, Tensor]
