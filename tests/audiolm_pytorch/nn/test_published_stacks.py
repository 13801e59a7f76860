"""Stacks of GPT-2, T5 and MusicGen, built from parts, against the modules of transformers with the same weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.transformer import FusedConditions, Transformer
from tests.helpers.quick import only_quick

transformers = pytest.importorskip("transformers")

# The hidden layer is so wide that its products use packed weights in decoding.
DIM, HIDDEN_DIM, DEPTH, HEADS, VOCAB, CODEBOOKS = 128, 2048, 2, 4, 50, 4
SIZES: dict[str, Any] = {
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
    "dim_head": DIM // HEADS,
    "ff_mult": HIDDEN_DIM / DIM,
}


@dataclass
class Published:
    """A module of transformers, and the stack with its weights.

    Attributes:
        module: Decoder that receives ids `[b * streams, n]`.
        embed: Inputs `[b, n, d]` of the stack for the ids.
        stack: Stack from parts.
        rows: Length n of the tests; decoding extends its masks and views after 64 rows.
        streams: Ids of an item in one row.
        states: `[b, s, d]` states for cross-attention; None = no cross-attention.
        states_mask: `[b, s]` bool, False at padding.
    """

    module: nn.Module
    embed: Callable[[Tensor], Tensor]
    stack: Transformer
    rows: int = 80
    streams: int = 1
    states: Tensor | None = None
    states_mask: Tensor | None = None
    ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ids = torch.randint(VOCAB, (3 * self.streams, self.rows))

    def run(self, ids: Tensor, **options: Any) -> Any:
        """Run the module with the states."""
        if self.states is not None:
            options |= {"encoder_hidden_states": self.states, "encoder_attention_mask": self.states_mask}
        return self.module(ids, **options)

    def conditions(self, batch: int = 3) -> FusedConditions:
        """States of the first items, for the stack."""
        if self.states is None or self.states_mask is None:
            return FusedConditions()
        return FusedConditions(states=self.states[:batch], states_mask=self.states_mask[:batch])


def randomised(module: nn.Module) -> nn.Module:
    """Draw all weights, those of norms too, so that attention is far from uniform."""
    for parameter in module.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5
    return module.eval()


def padded_states() -> dict[str, Tensor]:
    """States of three items; two are padded."""
    return {"states": torch.randn(3, 7, DIM), "states_mask": torch.arange(7) < torch.tensor([[7], [4], [1]])}


def joined(*linears: nn.Module) -> Tensor:
    """Rows of several matrices, as in one product for keys and values."""
    return torch.cat([linear.get_parameter("weight") for linear in linears])


def gpt2() -> Published:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=DIM,
        n_layer=DEPTH,
        n_head=HEADS,
        n_inner=HIDDEN_DIM,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = randomised(transformers.GPT2Model(config))
    stack = Transformer(
        **SIZES,
        norm="layer",
        feed_forward="gelu_tanh",
        positions="none",
        bias=True,
    )
    state = {"norm.weight": module.ln_f.weight, "norm.bias": module.ln_f.bias}
    for index, block in enumerate(module.h):
        parts = {
            "attention_norm": block.ln_1,
            "attention.to_qkv": block.attn.c_attn,
            "attention.to_out": block.attn.c_proj,
            "feed_forward_norm": block.ln_2,
            "feed_forward.up": block.mlp.c_fc,
            "feed_forward.down": block.mlp.c_proj,
        }
        for name, part in parts.items():
            is_norm = isinstance(part, nn.LayerNorm)
            state[f"blocks.{index}.{name}.weight"] = part.weight if is_norm else part.weight.T  # of `Conv1D`
            state[f"blocks.{index}.{name}.bias"] = part.bias
    stack.load_state_dict(state)
    return Published(module, lambda ids: module.wte(ids) + module.wpe.weight[: ids.shape[1]], stack.eval())


class GatedGELU(nn.Module):
    """Feed-forward layer of T5 v1.1, which is not a part of the library."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(dim, hidden_dim, bias=False) for _ in range(2))
        self.wo = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Norm(nn.Module):
    """Norm of T5 that the library does not know."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def t5(gated: bool) -> Published:
    """The decoder of T5, or that of T5 v1.1 with a norm and a feed-forward layer of our own."""
    dim_head = 24  # heads of T5 do not fill the width
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=DIM,
        d_kv=dim_head,
        d_ff=HIDDEN_DIM,
        num_layers=1,
        num_decoder_layers=DEPTH,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    module = randomised(transformers.T5Model(config).decoder)
    factor = dim_head**0.5  # T5 does not scale the scores of attention; its queries are smaller instead
    for name, parameter in module.named_parameters():
        if name.endswith("Attention.q.weight"):
            parameter.data /= factor
    stack = Transformer(
        dim=DIM,
        depth=DEPTH,
        heads=HEADS,
        dim_head=dim_head,
        ff_mult=HIDDEN_DIM / DIM,
        norm=T5Norm if gated else "rms",
        feed_forward=partial(GatedGELU, hidden_dim=HIDDEN_DIM) if gated else "relu",
        positions="relative",
        cross=True,
    )
    table = module.block[0].layer[0].SelfAttention.relative_attention_bias
    state = {"norm.weight": module.final_layer_norm.weight, "relative.bias.weight": table.weight}
    for index, block in enumerate(module.block):
        own, cross, feed_forward = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2]
        parts = {
            "attention_norm": block.layer[0].layer_norm.weight,
            "attention.to_qkv": torch.cat((own.q.weight * factor, own.k.weight, own.v.weight)),
            "attention.to_out": own.o.weight,
            "cross_norm": block.layer[1].layer_norm.weight,
            "cross.to_q": cross.q.weight * factor,
            "cross.to_kv": joined(cross.k, cross.v),
            "cross.to_out": cross.o.weight,
            "feed_forward_norm": feed_forward.layer_norm.weight,
        }
        names = {"wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"} if gated else {"up": "wi", "down": "wo"}
        layer = feed_forward.DenseReluDense
        parts |= {f"feed_forward.{name}": layer.get_submodule(theirs).weight for name, theirs in names.items()}
        state |= {f"blocks.{index}.{name}.weight": weight for name, weight in parts.items()}
    stack.load_state_dict(state)
    return Published(module, module.embed_tokens, stack.eval(), 150, **padded_states())  # 150 rows reach every bucket


def musicgen() -> Published:
    config = transformers.MusicgenDecoderConfig(
        vocab_size=VOCAB,
        num_hidden_layers=DEPTH,
        ffn_dim=HIDDEN_DIM,
        num_attention_heads=HEADS,
        hidden_size=DIM,
        num_codebooks=CODEBOOKS,
        pad_token_id=VOCAB,
        bos_token_id=VOCAB,
    )
    module = randomised(transformers.MusicgenForCausalLM(config).model.decoder)
    stack = Transformer(
        **SIZES,
        norm="layer",
        feed_forward="gelu",
        positions="sinusoidal",
        cross=True,
    )
    state = {"norm.weight": module.layer_norm.weight, "norm.bias": module.layer_norm.bias}
    for index, layer in enumerate(module.layers):
        own, cross = layer.self_attn, layer.encoder_attn
        parts = {
            "attention.to_qkv": joined(own.q_proj, own.k_proj, own.v_proj),
            "attention.to_out": own.out_proj.weight,
            "cross.to_q": cross.q_proj.weight,
            "cross.to_kv": joined(cross.k_proj, cross.v_proj),
            "cross.to_out": cross.out_proj.weight,
            "feed_forward.up": layer.fc1.weight,
            "feed_forward.down": layer.fc2.weight,
        }
        norms = {
            "attention_norm": layer.self_attn_layer_norm,
            "cross_norm": layer.encoder_attn_layer_norm,
            "feed_forward_norm": layer.final_layer_norm,
        }
        state |= {f"blocks.{index}.{name}.weight": weight for name, weight in parts.items()}
        state |= {f"blocks.{index}.{name}.weight": norm.weight for name, norm in norms.items()}
        state |= {f"blocks.{index}.{name}.bias": norm.bias for name, norm in norms.items()}
    stack.load_state_dict(state)

    def embed(ids: Tensor) -> Tensor:
        levels = ids.unflatten(0, (-1, CODEBOOKS)).unbind(1)
        return torch.stack([table(level) for table, level in zip(module.embed_tokens, levels)]).sum(0)

    return Published(module, embed, stack.eval(), streams=CODEBOOKS, **padded_states())


PUBLISHED = {"gpt2": gpt2, "t5": partial(t5, False), "t5_v1_1": partial(t5, True), "musicgen": musicgen}


@pytest.fixture(params=only_quick(PUBLISHED, ["gpt2", "t5", "musicgen"]))
def published(request: pytest.FixtureRequest) -> Published:
    return PUBLISHED[request.param]()


@torch.no_grad()
def test_outputs_of_sequences_equal_those_of_the_published_module(published: Published) -> None:
    """All rows, to 1e-5."""
    expected = published.run(published.ids).last_hidden_state
    result = published.stack(published.embed(published.ids), published.conditions())
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([9, 4, 1], id="unequal"),
        pytest.param([5, 5, 5], id="equal", marks=pytest.mark.slow),
        pytest.param([6], id="one_item", marks=pytest.mark.slow),
    ],
)
def test_decoded_rows_equal_those_of_the_published_module_with_its_cache(
    published: Published, counts: list[int]
) -> None:
    """Row by row after a prefill of unequal or equal lengths, to 1e-5."""
    out = published.run(published.ids[:, :4], use_cache=True)
    cache_name = "cache" if out.get("cache") is not None else "past_key_values"  # the name depends on the version
    expected = [out.last_hidden_state]
    for row in range(4, published.rows):
        out = published.run(published.ids[:, row : row + 1], use_cache=True, **{cache_name: out[cache_name]})
        expected.append(out.last_hidden_state)
    cached = CachedTransformer(published.stack, len(counts))
    conditions, items = published.conditions(len(counts)), torch.arange(len(counts))
    x = published.embed(published.ids)[: len(counts)]
    decoded = [cached.prefill(x[:, : max(counts)], conditions, counts, published.rows).clone()]
    for step in range(published.rows - max(counts)):
        rows = [count + step for count in counts]
        decoded.append(cached.step(x[items, rows], rows).clone())
    places = torch.tensor(counts).unsqueeze(1) - 1 + torch.arange(len(decoded))
    reference = torch.cat(expected, dim=1)[items.unsqueeze(1), places]
    torch.testing.assert_close(torch.stack(decoded, dim=1), reference, atol=1e-5, rtol=1e-5)
