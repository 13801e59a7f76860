"""A causal transformer prepared for decoding: it computes one row of every item at a time with cached keys and values.

A row needs few operators, because the call of an operator takes most of the time in small models. Every step uses the
same preallocated tensors, and the CPU never waits for the GPU, so that a CUDA graph can capture the operators.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from audiolm_pytorch.nn.layers import FeedForward, GatedFeedForward, is_plain
from audiolm_pytorch.nn.row_products import prepare_norm, prepare_norm_and_product, prepare_product
from audiolm_pytorch.nn.transformer import Block, FusedConditions, Transformer
from audiolm_pytorch.saving.fingerprint import state_of

__all__ = ["CachedTransformer"]

# Attention reads the cache up to a multiple of this number of positions, so that the cache is rarely arranged again.
_EXTENT_STEP = 32


class CachedTransformer:
    """A transformer with a cache of the keys and values of earlier rows. On a CPU, the weights are copied.

    The first call is `prefill`, which starts new sequences. Each call of `step` adds one row to every sequence.
    """

    def __init__(self, transformer: Transformer, batch: int) -> None:
        if not transformer.causal or transformer.position_bias is not None:
            raise ValueError("decoding needs a transformer with causal=True and position_bias=None")
        self.transformer, self.batch, self._states = transformer, batch, list(map(state_of, transformer.parameters()))
        self._buffers = _RowBuffers(transformer, batch)
        self._blocks = [_CachedBlock(cast(Block, block), self._buffers) for block in transformer.blocks]
        # Normalised rows `[b, d]`, written in place.
        self.hidden = torch.zeros_like(self._buffers.x)
        self._norm = prepare_norm(transformer.norm, self._buffers.x, self.hidden)

    @property
    def is_current(self) -> bool:
        """Whether the weights of the transformer are unchanged since they were prepared."""
        return self._states == list(map(state_of, self.transformer.parameters()))

    def prefill(self, x: Tensor, conditions: FusedConditions, counts: Sequence[int], num_positions: int) -> Tensor:
        """Start new sequences with a prefix and first rows; return the last normalised row of each item `[b, d]`.

        The returned tensor is `hidden`, which the next call overwrites.

        Args:
            x: First rows `[b, n, d]`, padded on the right.
            counts: Number of rows of each item without padding.
            num_positions: Largest length of a sequence, prefix included.
        """
        keys_values: list[tuple[Tensor, Tensor]] = []
        normalised = self.transformer(x, conditions, keys_values=keys_values)
        self._num_prefix, self._row_sums = conditions.num_rows, conditions.row_sums
        padding = conditions.prefix_padding
        self._num_padding = torch.zeros_like(self._buffers.positions) if padding is None else padding.to(x.device)
        known = [conditions.num_rows + count for count in counts]
        self._buffers.start(num_positions, conditions, known)
        self._buffers.set_extent(max(known))
        for block, (keys, values) in zip(self._blocks, keys_values):
            block.start(keys, values, conditions)
        return self.hidden.copy_(normalised[self._buffers.items, torch.tensor(counts, device=x.device) - 1])

    def step(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Compute the output at sequence position `rows[i]` of every item i from `x[i]`; return the outputs `[b, d]`.

        Position 0 is the first row after the prefix. As in `prefill`, outputs are normalised. The new row replaces a
        cached row of the same item and position.
        """
        buffers, stack = self._buffers, self.transformer
        positions = [row + self._num_prefix for row in rows]
        if max(positions) >= buffers.extent:
            buffers.set_extent(max(positions) + 1)
            for block in self._blocks:
                block.extend()
        buffers.set_positions(positions)
        buffers.x.copy_(x)
        if self._row_sums is not None:
            index = (buffers.positions - self._num_prefix).clamp(max=self._row_sums.shape[1] - 1)
            buffers.x.add_(self._row_sums[buffers.items, index])
        if stack.sinusoidal is not None:
            buffers.x.add_(stack.sinusoidal(buffers.positions - self._num_padding))
        if stack.relative is not None:
            bias = stack.relative(buffers.positions.unsqueeze(1), buffers.extent)[:, :, 0]
            torch.add(bias.reshape(buffers.bias.shape), buffers.visible, out=buffers.bias)
        for block in self._blocks:
            block.step()
        self._norm()
        return self.hidden

    def release(self) -> None:
        """Free the cache. The prepared weights stay in memory for a later `prefill`."""
        for block in self._blocks:
            block.release()


class _RowBuffers:
    """Tensors of one row that all blocks share.

    Attributes:
        x: `[b, d]`, the rows, to which every branch of a block adds its output.
        normed: `[b, d]`, normalised `x`.
        branch: `[b, d]`, output of a branch.
        qkv: `[b, (h + 2 g) d]`, queries of h heads, keys and values of g heads, before rotation.
        queries: `[b g, h / g, d]`, one matrix for the h / g heads of queries that share keys.
        keys_values: `[2, b, g, 1, d]`, keys and values of the row.
        attended: `[b g, h / g, d]`, outputs of attention.
        slot: `[2, b, g, 1, d]` int64, the position in the cache at which each item stores its row.
        bias: `[b g, h / g or 1, extent]`, added to the scores; minus infinity at positions without a row.
        scores: `[b g, h / g, extent]`, scores of attention.
    """

    def __init__(self, stack: Transformer, batch: int) -> None:
        weight = cast(Block, stack.blocks[0]).attention.to_qkv.weight
        # On a CPU, norms, sums and attention of one row are faster in float32, also if the weights are bfloat16.
        is_on_cpu = weight.device.type == "cpu"
        dtype = torch.promote_types(weight.dtype, torch.float32) if is_on_cpu else weight.dtype
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        heads, num_kv, dim_head = stack.heads, stack.kv_heads, stack.dim_head
        self.stack, self.batch, self.options = stack, batch, options
        self.x = torch.zeros(batch, stack.dim, **options)
        self.normed, self.branch = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.qkv = torch.zeros(batch, (heads + 2 * num_kv) * dim_head, **options)
        self._unrotated = self.qkv.view(batch, heads + 2 * num_kv, dim_head)
        self._rotated = self._unrotated if stack.rotary is None else torch.zeros_like(self._unrotated)
        query_heads = self._rotated[:, :heads].unflatten(1, (num_kv, -1))
        self.queries = query_heads.reshape(batch * num_kv, heads // num_kv, dim_head)
        self._query_heads = query_heads if self.queries.data_ptr() != query_heads.data_ptr() else None
        self.keys_values = self._rotated[:, heads:].unflatten(1, (2, num_kv)).transpose(0, 1).unsqueeze(3)
        self.attended = torch.zeros(batch * num_kv, heads // num_kv, dim_head, **options)
        self.attended_rows = self.attended.view(batch, heads * dim_head)
        self.items = torch.arange(batch, device=weight.device)
        self.positions = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.slot = self.positions.view(1, batch, 1, 1, 1).expand(self.keys_values.shape)
        if stack.rotary is not None:
            # Values are multiplied by 1.
            self._cos_row = torch.zeros(batch, dim_head, **options)
            self._sin_row = torch.zeros(batch, dim_head // 2, **options)
            self._cos, self._sin = torch.ones_like(self._rotated), self._sin_row.unsqueeze(1)
            self._rotated_cos = self._cos[:, : heads + num_kv], self._cos_row.unsqueeze(1)
            halves = self._unrotated[:, : heads + num_kv].chunk(2, dim=-1)
            rotated_halves = self._rotated[:, : heads + num_kv].chunk(2, dim=-1)
            self._halves = (rotated_halves[0], halves[1]), (rotated_halves[1], halves[0])

    def start(self, num_positions: int, conditions: FusedConditions, known: Sequence[int]) -> None:
        """Prepare masks for up to `num_positions` positions; the first `known[i]` of item i are already cached."""
        stack, device = self.stack, self.x.device
        self.num_positions = _EXTENT_STEP * ceil(num_positions / _EXTENT_STEP)
        places = torch.arange(self.num_positions, device=device)
        visible = places < torch.tensor(known, device=device).unsqueeze(1)
        if conditions.prefix_padding is not None:
            visible &= places >= conditions.prefix_padding.to(device).unsqueeze(1)
        mask = torch.zeros(visible.shape, **self.options).masked_fill(~visible, float("-inf"))
        self._mask = mask.unsqueeze(1).repeat(1, stack.kv_heads, 1).view(self.batch * stack.kv_heads, 1, -1)
        self._mask_of_items = self._mask.view(self.batch, -1, self.num_positions)
        self._mask_slot = self.positions.view(-1, 1).expand(-1, stack.kv_heads).unsqueeze(-1)
        self.cross_bias = torch.zeros(1, 1, 1, **self.options)
        if conditions.states_mask is not None:
            is_padding = ~conditions.states_mask.to(device)
            bias = torch.zeros(is_padding.shape, **self.options).masked_fill(is_padding, float("-inf"))
            self.cross_bias = bias.repeat_interleave(stack.heads, dim=0).unsqueeze(1)
        if stack.rotary is not None:
            cos, sin = stack.rotary(places)
            self._cos_table, self._sin_table = cos.to(mask.dtype), sin[:, sin.shape[1] // 2 :].to(mask.dtype)

    def set_extent(self, num_positions: int) -> None:
        """Include at least the first `num_positions` positions of the cache in attention."""
        stack = self.stack
        self.extent = min(_EXTENT_STEP * ceil(num_positions / _EXTENT_STEP), self.num_positions)
        self.visible = self._mask[:, :, : self.extent]
        shape = (len(self.queries), self.queries.shape[1], self.extent)
        self.bias = self.visible if stack.relative is None else torch.zeros(shape, **self.options)
        self.scores = torch.zeros(shape, **self.options)

    def set_positions(self, positions: Sequence[int]) -> None:
        """Set the position of the current row of each item, and include this position in attention."""
        if min(positions) == max(positions):
            self.positions.fill_(positions[0])  # without a copy to the device
        else:
            self.positions.copy_(torch.tensor(positions), non_blocking=True)
        self._mask_of_items.scatter_(2, self._mask_slot, 0.0)
        if self.stack.rotary is not None:
            torch.index_select(self._cos_table, 0, self.positions, out=self._cos_row)
            torch.index_select(self._sin_table, 0, self.positions, out=self._sin_row)
            self._rotated_cos[0].copy_(self._rotated_cos[1])

    def rotate(self) -> None:
        """Apply rotary positions to queries and keys; copy the queries to `queries` unless both share memory."""
        if self.stack.rotary is not None:
            torch.mul(self._unrotated, self._cos, out=self._rotated)
            self._halves[0][0].addcmul_(self._halves[0][1], self._sin, value=-1)
            self._halves[1][0].addcmul_(self._halves[1][1], self._sin)
        if self._query_heads is not None:
            self.queries.view_as(self._query_heads).copy_(self._query_heads)


class _CachedBlock:
    """A block that computes one row of every item."""

    def __init__(self, block: Block, buffers: _RowBuffers) -> None:
        self.buffers, self._block = buffers, block
        self._scale, self._weight_dtype = buffers.stack.dim_head**-0.5, block.attention.to_qkv.weight.dtype
        x, normed, branch = buffers.x, buffers.normed, buffers.branch
        to_out, layer, cross = block.attention.to_out, block.feed_forward, block.cross
        self._qkv = prepare_norm_and_product(block.attention_norm, block.attention.to_qkv, x, normed, buffers.qkv)
        self._out = prepare_product(to_out, buffers.attended_rows, branch)
        if cross is not None and block.cross_norm is not None:
            shape = (buffers.batch * buffers.stack.heads, 1, buffers.stack.dim_head)
            self._cross_queries, self._cross_attended = (torch.zeros(shape, **buffers.options) for _ in range(2))
            queries, attended = (part.view(buffers.batch, -1) for part in (self._cross_queries, self._cross_attended))
            self._to_cross = prepare_norm_and_product(block.cross_norm, cross.to_q, x, normed, queries)
            self._cross_out = prepare_product(cross.to_out, attended, branch)
        self._has_plain_layer = isinstance(layer, (GatedFeedForward, FeedForward)) and is_plain(layer)
        if isinstance(layer, (GatedFeedForward, FeedForward)) and self._has_plain_layer:
            self._hidden = torch.zeros(buffers.batch, layer.up.out_features, **buffers.options)
            self._value, self._gate = self._hidden.chunk(2, dim=-1)
            self._activated = torch.zeros(buffers.batch, layer.down.in_features, **buffers.options)
            self._up = prepare_norm_and_product(block.feed_forward_norm, layer.up, x, normed, self._hidden)
            self._down = prepare_product(layer.down, self._activated, branch)

    def start(self, keys: Tensor, values: Tensor, conditions: FusedConditions) -> None:
        """Allocate the cache, and store the keys and values `[b, heads, n, d]` of the first n rows."""
        num_values = self.buffers.keys_values.numel() * self.buffers.num_positions
        self._memory = torch.zeros(num_values, **self.buffers.options)
        self._arrange(torch.stack((keys, values)))
        if self._block.cross is not None and conditions.states is not None:
            keys, values = self._block.cross.keys_values(conditions.states)
            dtype = self.buffers.x.dtype
            self._cross_keys, self._cross_values = keys.flatten(0, 1).mT.to(dtype), values.flatten(0, 1).to(dtype)

    def release(self) -> None:
        """Free the cache."""
        self._memory = self._cache = self._keys = self._values = torch.empty(0)
        self._cross_keys = self._cross_values = torch.empty(0)

    def extend(self) -> None:
        """Make room for more rows, after a change of `buffers.extent`."""
        self._arrange(self._cache.clone())

    def _arrange(self, rows: Tensor) -> None:
        """Store `rows [2, b, g, n, d]` without gaps up to the extent; a CPU reads gaps at half the speed."""
        shape = (*rows.shape[:3], self.buffers.extent, rows.shape[4])
        self._cache = self._memory[: prod(shape)].view(shape)
        self._cache[:, :, :, : rows.shape[3]] = rows
        keys, values = self._cache.flatten(1, 2)
        self._keys, self._values = keys.mT, values

    def step(self) -> None:
        """Add the outputs of attention, cross-attention and feed-forward layer to the rows in `buffers.x`."""
        shared = self.buffers
        self._qkv()
        shared.rotate()
        self._cache.scatter_(3, shared.slot, shared.keys_values)
        torch.baddbmm(shared.bias, shared.queries, self._keys, alpha=self._scale, out=shared.scores)
        torch.softmax(shared.scores, -1, out=shared.scores)
        torch.bmm(shared.scores, self._values, out=shared.attended)
        self._out()
        shared.x.add_(shared.branch)
        if self._block.cross is not None:
            self._step_cross()
        self._step_feed_forward()

    def _step_cross(self) -> None:
        shared, queries = self.buffers, self._cross_queries
        self._to_cross()
        with torch.autocast(queries.device.type, enabled=False):  # which would compute scores of another type
            scores = torch.baddbmm(shared.cross_bias, queries, self._cross_keys, alpha=self._scale)
            torch.bmm(scores.softmax(-1), self._cross_values, out=self._cross_attended)
        self._cross_out()
        shared.x.add_(shared.branch)

    def _step_feed_forward(self) -> None:
        shared, layer = self.buffers, self._block.feed_forward
        if not self._has_plain_layer:
            x = self._block.feed_forward_norm(shared.x.to(self._weight_dtype))
            shared.x.add_(layer(x.unsqueeze(1)).squeeze(1))
            return
        self._up()
        if isinstance(layer, GatedFeedForward):
            torch.mul(silu(self._gate, inplace=True), self._value, out=self._activated)
        elif isinstance(layer, FeedForward):
            self._activated.copy_(layer.activation(self._hidden))
        self._down()
        shared.x.add_(shared.branch)
