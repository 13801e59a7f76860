import pytest
import torch

from audiolm_pytorch.encoder import TransformerEncoder


@pytest.fixture
def encoder() -> TransformerEncoder:
    torch.manual_seed(0)
    return TransformerEncoder(dim=24, depth=2, heads=2, dim_head=8).eval()


def test_encoder_gives_the_same_alone_in_a_batch_and_padded(encoder: TransformerEncoder) -> None:
    """Padding and neighbours must change nothing."""
    x = torch.randn(3, 11, 24)
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    batch = encoder(x, mask)
    for item, size in enumerate((11, 4, 1)):
        torch.testing.assert_close(batch[item, :size], encoder(x[item : item + 1, :size])[0], atol=1e-5, rtol=0)


def test_encoder_matches_a_naive_block(encoder: TransformerEncoder) -> None:
    """Oracle: attention written out with loops over heads, without rotary positions."""
    torch.manual_seed(1)
    plain = TransformerEncoder(dim=24, depth=1, heads=2, dim_head=8, rotary_theta=None).eval()
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


def test_encoder_sees_both_directions_and_only_relative_positions(encoder: TransformerEncoder) -> None:
    """A later token reaches an earlier one, and shifting all positions changes nothing."""
    x = torch.randn(1, 6, 24)
    changed = x.clone()
    changed[0, 5] += 1
    assert not torch.allclose(encoder(x)[0, 0], encoder(changed)[0, 0], atol=1e-4)
    torch.testing.assert_close(encoder(x), encoder(x, positions=torch.arange(6) + 7), atol=1e-5, rtol=0)


def test_encoder_follows_given_positions(encoder: TransformerEncoder) -> None:
    """Tokens in another order, with their positions in the same order, give the same outputs in that order."""
    x = torch.randn(2, 6, 24)
    order = torch.tensor([[3, 1, 0, 5, 4, 2], [5, 4, 3, 2, 1, 0]])
    shuffled = torch.stack([row[index] for row, index in zip(x, order)])
    expected = torch.stack([row[index] for row, index in zip(encoder(x), order)])
    torch.testing.assert_close(encoder(shuffled, positions=order), expected, atol=1e-5, rtol=0)


def test_encoder_returns_hidden_states(encoder: TransformerEncoder) -> None:
    """return_layer counts blocks done: 0 is the input, the last one lacks only the final norm."""
    x = torch.randn(2, 4, 24)
    assert torch.equal(encoder(x, return_layer=0), x)
    torch.testing.assert_close(encoder.norm(encoder(x, return_layer=2)), encoder(x))
    with pytest.raises(ValueError, match="return_layer"):
        encoder(x, return_layer=3)


@pytest.mark.parametrize("masked", [False, True])
def test_encoder_bfloat16_attention_matches_float32(encoder: TransformerEncoder, masked: bool) -> None:
    """The faster product that a CPU takes in bfloat16 computes the same attention."""
    x = torch.randn(2, 40, 24)
    mask = torch.arange(40) < torch.tensor([[40], [13]]) if masked else torch.ones(2, 40, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x, mask)
    difference = (half.float() - encoder(x, mask))[mask]
    assert difference.abs().max() < 0.1


def test_encoder_rejects_what_does_not_fit(encoder: TransformerEncoder) -> None:
    """Errors name what is needed."""
    with pytest.raises(ValueError, match="24"):
        encoder(torch.randn(2, 4, 23))
    with pytest.raises(ValueError, match="bool"):
        encoder(torch.randn(2, 4, 24), torch.ones(2, 4))
    with pytest.raises(ValueError, match="even"):
        TransformerEncoder(dim=8, depth=1, heads=1, dim_head=7)
    with pytest.raises(ValueError, match="depth"):
        TransformerEncoder(dim=8, depth=0, heads=1)
