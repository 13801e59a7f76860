"""From tokens of streams to ids of a layout, and back, for a table that says what stands in every cell."""

from collections.abc import Collection, Mapping, Sequence

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.tokens.patterns import EMPTY
from audiolm_pytorch.tokens.streams import PackedTokens, Stream, number_ids

__all__ = ["IdSpace"]


class IdSpace:
    """The ids of all tokens of some streams. They follow from the streams alone, so there is nothing to save.

    Args:
        streams: The streams, in the order of the layout.

    Attributes:
        blocks: Ranges of ids of one meaning.
        heads: Outputs of a model that predicts the streams.
        num_ids: Number of ids.
        head_of_block: `[blocks + 1]` int64, head that predicts a block; -1 where nothing does, and for an empty cell,
            which has block -1 and so reads the last entry.
        stream_of_block: `[blocks + 1]` int64, position of the stream of a block; 0 where there is none.
    """

    @beartype
    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = tuple(streams)
        self.blocks, self.heads, self.num_ids = number_ids(self.streams)
        self.head_of_block = torch.tensor([block.head for block in self.blocks] + [-1])
        self.stream_of_block = torch.tensor([max(block.stream, 0) for block in self.blocks] + [0])
        self._first_id_of_block = torch.tensor([block.first_id for block in self.blocks] + [0])

    @property
    def null_id(self) -> int | None:
        """Id of the null token; None if all streams are in time."""
        return None if all(stream.is_in_time for stream in self.streams) else self.blocks[-1].first_id

    def fill(self, tokens: Mapping[str, Tensor], block: Tensor, frame: Tensor) -> PackedTokens:
        """Look the token of every cell up in one gather.

        Args:
            tokens: Tokens `[b, f, levels]` of every stream, by name.
            block: `[b, rows, columns]` int64 on the CPU, block of each cell.
            frame: `[b, rows, columns]` int64 on the CPU, frame of each cell.

        Returns:
            The packed tokens, on the device of the tokens.
        """
        device = tokens[self.streams[0].name].device
        starts, total = [], 1  # column 0 of the source is the 0 that start and end cells add to their id
        for stream in self.streams:
            starts.append(total)
            total += tokens[stream.name].shape[1] * stream.num_levels
        offset = [starts[item.stream] + item.level if item.is_token else 0 for item in self.blocks] + [0]
        stride = [self.streams[item.stream].num_levels if item.is_token else 0 for item in self.blocks] + [0]
        source = (torch.tensor(offset)[block] + torch.tensor(stride)[block] * frame).to(device)
        flat = [rearrange(tokens[stream.name], "b f q -> b (f q)") for stream in self.streams]
        values = torch.cat([flat[0].new_zeros(len(flat[0]), 1), *flat], dim=1)
        ids = values.gather(1, rearrange(source, "b r c -> b (r c)")).view_as(source)
        ids = ids + self._first_id_of_block[block].to(device)
        return PackedTokens(ids, (block != EMPTY).to(device), (self.head_of_block[block] >= 0).to(device))

    def read(
        self, ids: Tensor, block: Tensor, frame: Tensor, counts: Tensor, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Read streams back.

        Args:
            ids: `[b, rows, columns]` as filled in.
            block: `[b, rows, columns]` int64, block of each cell.
            frame: `[b, rows, columns]` int64, frame of each cell.
            counts: Frames `[b, streams]` int64.
            names: Streams to read.

        Returns:
            Tokens `[b, f, levels]` int64 by name; -1 where no cell holds the frame, and where the null token stands.
        """
        local = ids - self._first_id_of_block.to(ids.device)[block]
        if self.null_id is not None:
            local = local.masked_fill(ids == self.null_id, -1)
        found: dict[str, Tensor] = {}
        for index, stream in enumerate(self.streams):
            if stream.name in names:
                found[stream.name] = ids.new_full((len(ids), int(counts[:, index].max()), stream.num_levels), -1)
        for number, source in enumerate(self.blocks):
            if source.is_token and self.streams[source.stream].name in found:
                item, row, column = (block == number).nonzero(as_tuple=True)
                out = found[self.streams[source.stream].name]
                out[item, frame[item, row, column], source.level] = local[item, row, column]
        return found

    def out_of_time(self, ids: Tensor) -> Tensor:
        """Where tokens stand that are not in time, bool like `ids`."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for block in self.blocks:
            if block.is_token and not self.streams[block.stream].is_in_time:
                found |= (ids >= block.first_id) & (ids < block.first_id + self.streams[block.stream].vocab_size)
        return found
