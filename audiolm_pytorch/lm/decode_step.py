"""One decoding step of a language model as a function of its cache, for torch.export and ONNX."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.attention import AttentionContext, attend
from audiolm_pytorch.nn.positions import rotate
from audiolm_pytorch.nn.transformer import Block

__all__ = ["DecodeStep"]


class DecodeStep(nn.Module):
    """Decoding step without state: it receives the keys and values of earlier rows, and returns them with a new row.

    The first call receives a cache of length 0. Conditions that are prepended to the rows are decoded as rows too, with
    empty ids and the embedding as `extra`. `DecodeSession` is faster in Python, because it writes the cache in place.
    """

    @typed
    def __init__(self, model: TokenTransformer) -> None:
        super().__init__()
        if not model.transformer.causal or model.transformer.position_bias is not None:
            raise ValueError("decoding needs a transformer with causal=True and position_bias=None")
        self.model = model

    def empty_cache(self, batch: int, length: int = 0) -> Tensor:
        """Return keys or values `[layers, b, kv_heads, length, dim_head]` of zeros."""
        stack = self.model.transformer
        shape = stack.depth, batch, stack.kv_heads, length, stack.dim_head
        return torch.zeros(shape, device=self.model.device, dtype=self.model.embedding.weight.dtype)

    def forward(
        self, ids: Tensor, extra: Tensor, keys: Tensor, values: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Add a row to every sequence.

        Args:
            ids: Ids `[b, columns]` of the row; an empty cell has the id `layout.num_ids`.
            extra: `[b, d]`, added to the embeddings of the ids.
            keys: Keys `[layers, b, kv_heads, t, dim_head]` of the earlier rows.
            values: Values of the same shape.
            states: `[b, s, d]`, projected states for cross-attention, without padding.

        Returns:
            The keys and values of t + 1 rows, and the logits `[b, v]` of every head.
        """
        stack, position = self.model.transformer, keys.shape[3]
        x = (F.embedding(ids, self.model.embedding.weight).sum(dim=1) + extra).unsqueeze(1)
        place = torch.full((1, 1), position, device=ids.device)
        if stack.sinusoidal is not None:
            x = x + stack.sinusoidal(place).to(x.dtype)
        angles = None if stack.rotary is None else stack.rotary(place)
        bias = None if stack.relative is None else stack.relative(place, position + 1).to(x.dtype)
        context = AttentionContext(states=states)
        all_keys, all_values = [], []
        for block, old_keys, old_values in zip(stack.blocks, keys, values):
            if not isinstance(block, Block):
                raise TypeError(f"a decoding step needs blocks of the class Block, got {type(block).__name__}")
            attention = block.attention
            num_rotated = attention.heads + attention.kv_heads
            qkv = attention.to_qkv(block.attention_norm(x)).unflatten(-1, (num_rotated + attention.kv_heads, -1))
            rotated = qkv[:, :, :num_rotated]
            if angles is not None:
                rotated = rotate(rotated, *(part.unsqueeze(2) for part in angles))
            parts = rotated[:, :, : attention.heads], rotated[:, :, attention.heads :], qkv[:, :, num_rotated:]
            queries, new_keys, new_values = (part.transpose(1, 2) for part in parts)
            all_keys.append(torch.cat((old_keys, new_keys), dim=2))
            all_values.append(torch.cat((old_values, new_values), dim=2))
            attended = attend(queries, all_keys[-1], all_values[-1], bias)
            x = x + attention.to_out(attended.transpose(1, 2).flatten(2))
            if block.cross is not None and block.cross_norm is not None:
                x = x + block.cross(block.cross_norm(x), context)
            x = x + block.feed_forward(block.feed_forward_norm(x))
        hidden = stack.norm(x)[:, 0]
        logits = [self.model.logits(hidden, head) for head in range(len(self.model.heads))]
        return torch.stack(all_keys), torch.stack(all_values), *logits
