import weakref

import pytest
import torch

from audiolm_pytorch.nn.positions import WavePositionBias
from audiolm_pytorch.nn.transformer import Transformer, build_encoder


@pytest.fixture
def encoder() -> Transformer:
    torch.manual_seed(0)
    return build_encoder(dim=24, depth=2, heads=2, dim_head=8).eval()


def test_encoder_ignores_padding_and_other_items(encoder: Transformer) -> None:
    """An item is the same alone, in a batch and with padding."""
    x = torch.randn(3, 11, 24)
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    batch = encoder(x, mask=mask)
    for item, size in enumerate((11, 4, 1)):
        torch.testing.assert_close(batch[item, :size], encoder(x[item : item + 1, :size])[0], atol=1e-5, rtol=0)


def test_encoder_matches_a_naive_block(encoder: Transformer) -> None:
    """Oracle: attention written out with loops over heads, without rotary positions."""
    torch.manual_seed(1)
    plain = Transformer(dim=24, depth=1, heads=2, dim_head=8, positions="none", causal=False, init_std=None).eval()
    x = torch.randn(1, 5, 24)
    block = plain.blocks[0]
    qkv = block.attention.to_qkv(block.attention_norm(x))[0]
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, 16 * part + 8 * head : 16 * part + 8 * head + 8] for part in range(3))
        heads.append((q @ k.T / 8**0.5).softmax(dim=-1) @ v)
    y = x + block.attention.to_out(torch.cat(heads, dim=-1))
    y = y + block.feed_forward(block.feed_forward_norm(y))
    torch.testing.assert_close(plain(x), plain.norm(y))


def test_encoder_is_bidirectional_with_relative_positions(encoder: Transformer) -> None:
    """A later token changes an earlier one, and a shift of all positions changes nothing."""
    x = torch.randn(1, 6, 24)
    changed = x.clone()
    changed[0, 5] += 1
    assert not torch.allclose(encoder(x)[0, 0], encoder(changed)[0, 0], atol=1e-4)
    torch.testing.assert_close(encoder(x), encoder(x, positions=torch.arange(6) + 7), atol=1e-5, rtol=0)


def test_encoder_uses_the_positions_of_the_caller(encoder: Transformer) -> None:
    """Tokens and positions in another order give the same outputs in that order."""
    x = torch.randn(2, 6, 24)
    order = torch.tensor([[3, 1, 0, 5, 4, 2], [5, 4, 3, 2, 1, 0]])
    shuffled = torch.stack([row[index] for row, index in zip(x, order)])
    expected = torch.stack([row[index] for row, index in zip(encoder(x), order)])
    torch.testing.assert_close(encoder(shuffled, positions=order), expected, atol=1e-5, rtol=0)


def test_encoder_returns_hidden_states(encoder: Transformer) -> None:
    """Layer 0 is the input, the last layer lacks the final norm, and None is the output of `forward`."""
    x = torch.randn(2, 4, 24)
    last, first, whole = encoder.hidden_states(x, layers=(2, 0, None))
    assert torch.equal(first, x) and torch.equal(whole, encoder(x))
    torch.testing.assert_close(encoder.norm(last), encoder(x))
    with pytest.raises(ValueError, match="layers"):
        encoder.hidden_states(x, layers=(3,))


def test_encoder_stops_after_the_last_requested_layer(encoder: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer of a deep encoder costs one block."""
    monkeypatch.setattr(encoder.blocks[1], "forward", None)
    encoder.hidden_states(torch.randn(1, 3, 24), layers=(1, 0))


def test_encoder_keeps_only_requested_layers() -> None:
    """At inference a deep encoder does not hold the states of all blocks."""
    encoder = build_encoder(dim=8, depth=6, heads=1, dim_head=8).eval()
    inputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def note(_: object, arguments: object, output: torch.Tensor) -> None:
        inputs.append(weakref.ref(output))
        alive.append(sum(state() is not None for state in inputs))

    for block in encoder.blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        second, _ = encoder.hidden_states(torch.randn(1, 3, 8), layers=(2, None))
    # the output of a block, its input, and the stored second state
    assert max(alive) <= 3 and inputs[1]() is second


def _biased_encoder() -> Transformer:
    torch.manual_seed(2)
    bias = WavePositionBias(heads=2, num_axes=2, num_waves=3)
    torch.nn.init.normal_(bias.amplitudes)
    torch.nn.init.normal_(bias.phases)
    sizes = {"dim": 24, "depth": 1, "heads": 2, "dim_head": 8, "init_std": None}
    return Transformer(**sizes, positions="none", position_bias=bias, causal=False).eval()


def test_position_bias_is_a_sum_of_waves_over_offsets() -> None:
    """The bias of every pair by its formula, in float64, added to plain attention, gives the same result."""
    encoder = _biased_encoder()
    bias, block = encoder.position_bias, encoder.blocks[0]
    x, places = torch.randn(1, 6, 24), torch.cartesian_prod(torch.arange(3), torch.arange(2)).unsqueeze(0)
    offsets = (places[0].unsqueeze(1) - places[0].unsqueeze(0)).double()
    qkv = block.attention.to_qkv(block.attention_norm(x))[0]
    heads = []
    for head in range(2):
        waves = zip(bias.amplitudes[head].double(), bias.frequencies[head].double(), bias.phases[head].double())
        added = sum(amplitude * torch.cos(offsets @ frequency + phase) for amplitude, frequency, phase in waves)
        q, k, v = (qkv[:, 16 * part + 8 * head : 16 * part + 8 * head + 8] for part in range(3))
        heads.append((q @ k.T / 8**0.5 + added.float()).softmax(dim=-1) @ v)
    y = x + block.attention.to_out(torch.cat(heads, dim=-1))
    y = encoder.norm(y + block.feed_forward(block.feed_forward_norm(y)))
    torch.testing.assert_close(encoder(x, positions=places), y, atol=1e-5, rtol=1e-5)
    # The result depends on the positions of tokens relative to each other, and not on a shift of all positions.
    torch.testing.assert_close(encoder(x, positions=places + 5), y, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(encoder(x, positions=places.flip(1) * 3), y, atol=1e-2)


def test_position_bias_starts_at_zero() -> None:
    """Its amplitudes get a gradient, and bfloat16 gives nearly the same result."""
    x, places = torch.randn(2, 5, 24), torch.cartesian_prod(torch.arange(5), torch.arange(1)).unsqueeze(0)
    torch.manual_seed(0)
    bias = WavePositionBias(heads=2, num_axes=2)
    encoder = build_encoder(24, 1, 2, 8, position_bias=bias).eval()
    with_bias = encoder(x, positions=places)
    encoder.position_bias = None
    torch.testing.assert_close(with_bias, encoder(x, positions=places), atol=1e-6, rtol=0)
    with_bias.square().mean(dim=(1, 2))[0].backward()
    with_bias = _biased_encoder()(x, positions=places)
    assert bias.amplitudes.grad is not None and bias.amplitudes.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert (_biased_encoder()(x, positions=places) - with_bias).abs().max() < 0.1
    with pytest.raises(ValueError, match="num_waves"):
        WavePositionBias(heads=2, num_waves=0)


@pytest.mark.parametrize("masked", [False, True])
def test_encoder_bfloat16_attention_matches_float32(encoder: Transformer, masked: bool) -> None:
    """The faster product of bfloat16 on a CPU computes the same attention."""
    x = torch.randn(2, 40, 24)
    mask = torch.arange(40) < torch.tensor([[40], [13]]) if masked else torch.ones(2, 40, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x, mask=mask)
    difference = (half.float() - encoder(x, mask=mask))[mask]
    assert difference.abs().max() < 0.1


def test_encoder_raises_errors_for_wrong_shapes(encoder: Transformer) -> None:
    """The message contains the shape that is needed."""
    with pytest.raises(ValueError, match="24"):
        encoder(torch.randn(2, 4, 23))
    with pytest.raises(ValueError, match="bool"):
        encoder(torch.randn(2, 4, 24), mask=torch.ones(2, 4))
    for places in (torch.arange(3), torch.zeros(3, 4), torch.zeros(2, 4, 2, 1)):
        with pytest.raises(ValueError, match="positions"):
            encoder(torch.randn(2, 4, 24), positions=places)
    with pytest.raises(ValueError, match=r"\[b or 1, n, 2\]"):
        _biased_encoder()(torch.randn(2, 4, 24), positions=torch.arange(4))
    with pytest.raises(ValueError, match="even"):
        build_encoder(dim=8, depth=1, heads=1, dim_head=7)
    with pytest.raises(ValueError, match="depth"):
        build_encoder(dim=8, depth=0, heads=1)
