"""Token batches: items of unequal length, and tokens that grow at the end and are dropped at the beginning."""

import torch

from audiolm_pytorch.tokens.streams import Stream
from audiolm_pytorch.tokens.token_batch import GrowingTokens, TokenBatch, batches_of_streams


def test_a_batch_keeps_its_items():
    """Padding is -1; items can be repeated and truncated."""
    items = [torch.arange(6).view(3, 2), torch.arange(2).view(1, 2), torch.zeros(0, 2).long()]
    batch = TokenBatch.of_items(items)
    assert batch.ids.shape == (3, 3, 2) and batch.lengths.tolist() == [3, 1, 0] and len(batch) == 3
    assert (batch.ids[1, 1:] == -1).all() and all(torch.equal(*pair) for pair in zip(batch.items(), items))
    assert batch.truncate(torch.tensor([2, 5, 1])).lengths.tolist() == [2, 1, 0]
    alone = TokenBatch.of_items(items[:1]).expand(3)
    assert len(alone) == 3 and all(torch.equal(tokens, items[0]) for tokens in alone.items())
    assert TokenBatch.empty(2, 4).ids.shape == (2, 0, 4)


def test_streams_become_batches():
    """Tokens past the length of an item are replaced by the padding."""
    streams = [Stream("a", 9, 2), Stream("b", 9)]
    tokens = {"a": torch.ones(2, 3, 2).long()}
    batch = batches_of_streams(streams, tokens, {"a": torch.tensor([3, 1])})["a"]
    assert batch.ids[1, :, 0].tolist() == [1, -1, -1] and batch.lengths.tolist() == [3, 1]
    assert batches_of_streams(streams, {}, {}) == {}


def test_dropped_frames_do_not_change_indices():
    """The last frame of an item is never dropped."""
    tokens = GrowingTokens(
        TokenBatch.of_items([torch.arange(5).view(5, 1), torch.arange(2).view(2, 1)]), torch.device("cpu")
    )
    tokens.append(1, torch.tensor([[7], [8]]))
    tokens.drop_before(torch.tensor([3, 9]))
    tokens.append(0, torch.tensor([[5]]))
    assert tokens.counts.tolist() == [6, 4]
    part = tokens.between(torch.tensor([1, 0]), torch.tensor([3, 4]), torch.tensor([4, 6]))
    assert part.ids[..., 0].tolist() == [[8, -1], [4, 5]] and part.lengths.tolist() == [1, 2]
    assert [len(item) for item in tokens.all().items()] == [3, 1]
