"""What users hand to a layout, tokens and numbers of frames: brought into one form, refused where it is wrong."""

from collections.abc import Collection, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.tokens.streams import Stream

__all__ = ["check_tokens", "frame_counts", "stream_tokens"]


def stream_tokens(streams: Sequence[Stream], handed: Mapping[str, Tensor], batch_size: int | None) -> dict[str, Tensor]:
    """Bring tokens into one shape.

    Args:
        streams: Streams of the layout.
        handed: Tokens `[b, f, levels]` (or `[b, f]` for one level) of every stream, by name.
        batch_size: Number of items b that is expected; None = any, but the same for all.

    Returns:
        Tokens `[b, f, levels]` int64 by name, in the order of the layout.

    Raises:
        ValueError: If a stream is missing, unknown, of a wrong shape or type, or of another number of items.
    """
    _check_names(streams, handed, "tokens")
    tokens: dict[str, Tensor] = {}
    for stream in streams:
        found = handed[stream.name]
        if found.ndim == 2 and stream.num_levels == 1:
            found = rearrange(found, "b f -> b f 1")
        is_integer = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        if found.ndim != 3 or found.shape[-1] != stream.num_levels or not is_integer:
            raise ValueError(
                f"stream '{stream.name}' must be integers [b, f, {stream.num_levels}], "
                f"got {found.dtype} {tuple(handed[stream.name].shape)}"
            )
        tokens[stream.name] = found.long()
    sizes = {name: len(found) for name, found in tokens.items()}
    if len({*sizes.values(), *([] if batch_size is None else [batch_size])}) > 1:
        wanted = "the same" if batch_size is None else str(batch_size)
        raise ValueError(f"streams need {wanted} number of items each (their first dimension), got {sizes}")
    return tokens


def frame_counts(streams: Sequence[Stream], handed: Mapping[str, int | Tensor], batch_size: int) -> Tensor:
    """Bring numbers of frames into one tensor.

    Args:
        streams: Streams of the layout.
        handed: Frames of every stream by name, `[b]` integers or one int for all items.
        batch_size: Number of items b.

    Returns:
        `[b, streams]` int64 on the CPU.

    Raises:
        ValueError: If a stream is missing or unknown, or numbers are negative, broken or of another number of items.
    """
    _check_names(streams, handed, "the number of frames")
    columns = []
    for stream in streams:
        count = torch.as_tensor(handed[stream.name]).cpu()
        if count.is_floating_point() or count.ndim > 1 or count.numel() not in (1, batch_size) or (count < 0).any():
            raise ValueError(
                f"frames of '{stream.name}' must be one whole number or {batch_size} of them, 0 or more; "
                f"got {count.tolist()}"
            )
        columns.append(count.long().expand(batch_size))
    return torch.stack(columns, dim=1)


def check_tokens(streams: Sequence[Stream], tokens: Mapping[str, Tensor], counts: Tensor) -> None:
    """Refuse lengths beyond the tokens, and tokens that would silently become tokens of another stream.

    Args:
        streams: Streams of the layout.
        tokens: Tokens `[b, f, levels]` by name.
        counts: True frames `[b, streams]`.

    Raises:
        ValueError: If there are such.
    """
    for index, stream in enumerate(streams):
        ids = tokens[stream.name]
        longest = int(counts[:, index].max()) if len(counts) else 0
        if longest > ids.shape[1]:
            raise ValueError(
                f"the length of '{stream.name}' is said to be {longest} frames, but there are tokens of {ids.shape[1]}"
            )
        valid = rearrange(torch.arange(ids.shape[1]) < counts[:, index, None], "b f -> b f 1").to(ids.device)
        wrong = ((ids < 0) | (ids >= stream.vocab_size)) & valid
        if wrong.any():
            item, frame, level = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"stream '{stream.name}' holds {int(ids[item, frame, level])} at item {item}, frame {frame}, level "
                f"{level}, outside [0, {stream.vocab_size}); where that is padding, say so by lengths="
            )


def _check_names(streams: Sequence[Stream], handed: Collection[str], what: str) -> None:
    """Refuse what is missing, and what would silently not be read."""
    names = [stream.name for stream in streams]
    missing = [name for name in names if name not in handed]
    unknown = [name for name in handed if name not in names]
    if missing:
        raise ValueError(f"{what} of {missing} missing: the streams are {names}, got {list(handed)}")
    if unknown:
        raise ValueError(f"{what} of {unknown} handed in, but the streams are {names}")
