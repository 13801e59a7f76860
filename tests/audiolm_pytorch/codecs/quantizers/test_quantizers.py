"""Quantizers of the codecs: all kinds behind one interface, against vector-quantize-pytorch's own eval path."""

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualLFQ, ResidualVQ

from audiolm_pytorch.codecs.quantizers import (
    FrameQuantizer,
    GroupedQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualLookupFreeQuantizer,
    ResidualQuantizer,
    code_usage,
    make_quantizer,
)
from audiolm_pytorch.codecs.quantizers.fixed_grid import grid_steps
from audiolm_pytorch.saving.modules import build_module, module_spec
from tests.helpers.quick import only_quick

KINDS = {
    "residual": {},
    "lookup_free": {"lookup_free": True},
    "finite_scalar": {"finite_scalar": True},
    "groups": {"groups": 2},
    "groups_lookup_free": {"groups": 2, "lookup_free": True},
    "groups_finite_scalar": {"groups": 2, "finite_scalar": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def made(kind: dict, dim: int = 16, codebook_size: int = 64, levels: int = 3, frames: Tensor | None = None):
    quantizer = make_quantizer(dim=dim, codebook_size=codebook_size, num_quantizers=levels, **kind)
    quantizer.initialise(torch.randn(500, dim) if frames is None else frames)
    return quantizer.eval()


def set_level_dropout(quantizer: nn.Module, share: float) -> None:
    for module in quantizer.modules():
        if hasattr(module, "level_dropout"):
            module.level_dropout = share


@every_kind
def test_every_kind_meets_the_contract(kind):
    """The codec relies on these attributes, shapes and types."""
    quantizer = made(kind)
    columns = 3 * kind.get("groups", 1)
    assert isinstance(quantizer, FrameQuantizer)
    assert (quantizer.dim, quantizer.num_quantizers, quantizer.codebook_size) == (16, columns, 64)
    output = quantizer(torch.randn(2, 50, 16))
    assert output.frames.shape == (2, 50, 16) and output.codes.shape == (2, 50, columns)
    assert output.codes.dtype == torch.int64 and 0 <= output.codes.min() and output.codes.max() < 64
    assert output.loss.shape == () and output.loss == 0
    copy = build_module(module_spec(quantizer)).eval()
    copy.load_state_dict(quantizer.state_dict())
    assert torch.equal(copy.encode(output.frames), quantizer.encode(output.frames))


@pytest.mark.parametrize("kind", ["residual", "lookup_free", "finite_scalar"])
def test_codes_are_those_of_vector_quantize_pytorch(kind):
    """An independent implementation has the same codes and frames, for every prefix of the levels."""
    quantizer = made(KINDS[kind], levels=4)
    frames = torch.randn(3, 50, 16)
    oracle, oracle_input = quantizer.rvq, frames
    if kind == "residual":
        oracle = ResidualVQ(dim=16, codebook_size=64, num_quantizers=4).eval()
        oracle.load_state_dict(quantizer.rvq.state_dict())
    if kind == "lookup_free":
        # it has no soft bound of its own: hand it the bounded coordinates
        oracle, oracle_input = (
            ResidualLFQ(dim=6, codebook_size=64, num_quantizers=4).eval(),
            quantizer._project(frames),
        )
    with torch.no_grad():
        _, codes, *_, parts = oracle(oracle_input, return_all_codes=True)
    assert torch.equal(quantizer.encode(frames), codes)
    for levels in range(1, 5):
        expected = quantizer.rvq.project_out(parts[:levels].sum(dim=0))
        torch.testing.assert_close(quantizer.decode(codes[..., :levels]), expected, rtol=1e-5, atol=1e-5)


def test_training_is_that_of_vector_quantize_pytorch():
    """Codes, loss, gradients and updated codebooks of three training steps equal those of the package."""
    sizes = dict(dim=16, codebook_size=64, num_quantizers=3, codebook_dim=8)
    quantizer = ResidualQuantizer(**sizes, dead_below_share=0.0, level_dropout=0.0)
    quantizer.initialise(torch.randn(500, 16))
    oracle = ResidualVQ(**sizes, decay=0.95, threshold_ema_dead_code=0, rotation_trick=True, commitment_weight=0.25)
    oracle.load_state_dict(quantizer.rvq.state_dict())
    for _ in range(3):
        frames = torch.randn(2, 40, 16)
        inputs = [frames.clone().requires_grad_() for _ in range(2)]
        output = quantizer.train()(inputs[0])
        quantized, codes, losses = oracle.train()(inputs[1])
        (output.frames.square().sum() + output.loss).backward()
        (quantized.square().sum() + losses.sum()).backward()
        assert torch.equal(output.codes, codes)
        torch.testing.assert_close(output.frames, quantized, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, losses.sum(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(quantizer.rvq.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@every_kind
def test_training_equals_encode_and_decode(kind):
    """Training has the codes and frames of encode and decode, also with levels left out."""
    quantizer = made(kind)
    set_level_dropout(quantizer, 1.0)
    groups, counts = kind.get("groups", 1), set()
    for _ in range(16):
        frames = torch.randn(2, 40, 16)
        quantizer.eval()
        codes = quantizer.encode(frames)
        columns = [quantizer.decode(codes[..., : groups * levels]) for levels in range(1, 4)]
        output = quantizer.train()(frames)
        levels = int((output.codes[0, 0] >= 0).sum()) // groups
        counts.add(levels)
        assert torch.equal(output.codes[..., : groups * levels], codes[..., : groups * levels])
        assert (output.codes[..., groups * levels :] == -1).all()
        torch.testing.assert_close(output.frames, columns[levels - 1], rtol=1e-5, atol=1e-5)
    assert counts == {1, 2, 3}


def test_groups_leave_out_the_same_levels():
    """The remaining codes are a prefix of all codes."""
    quantizer = made({"groups": 4}, levels=3).train()
    for _ in range(20):
        kept = quantizer(torch.randn(1, 4, 16)).codes[0, 0] >= 0
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)
        assert int(kept.sum()) % 4 == 0


def test_level_dropout_keeps_all_levels_in_half_of_the_batches():
    """In the other half, every number of levels is equally likely."""
    quantizer = ResidualLookupFreeQuantizer(dim=8, codebook_size=16, num_quantizers=5)
    drawn = torch.tensor([quantizer.draw_num_levels(torch.device("cpu")) for _ in range(3000)])
    shares = torch.bincount(drawn, minlength=6) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.1, 0.1, 0.1, 0.1, 0.6]), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", [{}, {"groups": 2}, {"groups": 4}], ids=["residual", "two_groups", "four_groups"])
def test_any_prefix_of_the_columns_is_a_coarser_version(kind):
    """Every further column brings frames closer, from the first on."""
    frames = torch.randn(1, 1500, 16) + 3.0
    quantizer = made(kind, codebook_size=32, frames=frames[0])
    codes = quantizer.encode(frames)
    columns = range(1, quantizer.num_quantizers + 1)
    errors = [(quantizer.decode(codes[..., :count]) - frames).square().mean().item() for count in columns]
    assert errors == sorted(errors, reverse=True)
    # groups that are not there yet stand at their mean, so one column is already better than the mean frame
    assert errors[0] < frames.var(dim=1).mean()


def test_groups_quantize_their_part_of_the_frame():
    """Columns of a level are in the order of the groups."""
    quantizer = made({"groups": 2}, levels=2)
    frames = torch.randn(1, 30, 16)
    changed = frames.clone()
    changed[..., 8:] = torch.randn(1, 30, 8)
    differs = (quantizer.encode(frames) != quantizer.encode(changed)).any(dim=1)[0]
    assert differs.tolist() == [False, True, False, True]


@every_kind
def test_autocast_changes_no_code(kind):
    """Distances in bfloat16 would select other codes."""
    quantizer = made(kind)
    frames = torch.randn(2, 60, 16)
    codes, decoded = quantizer.encode(frames), quantizer.decode(quantizer.encode(frames))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(frames), codes)
        assert quantizer.decode(codes).dtype == torch.float32
        assert torch.equal(quantizer.decode(codes), decoded)
        set_level_dropout(quantizer, 0.0)
        output = quantizer.train()(frames)
    assert output.frames.dtype == torch.float32
    assert torch.equal(output.codes, codes)


@every_kind
def test_every_parameter_and_the_frames_have_a_gradient(kind):
    """A projection without a gradient would stay random."""
    quantizer = made(kind).train()
    frames = torch.randn(2, 40, 16, requires_grad=True)
    output = quantizer(frames)
    (output.frames.square().mean() + output.loss).backward()
    assert frames.grad.abs().sum(dim=-1).min() > 0
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


DEGENERATE = {
    "silent": torch.zeros(2, 30, 16),
    "constant": torch.full((2, 30, 16), 0.7),
    "one_frame": torch.linspace(-1, 1, 16).view(1, 1, 16),
    "few_frames": torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16),
    "loud": torch.linspace(-1e4, 1e4, 2 * 30 * 16).view(2, 30, 16),
    "partly_silent": torch.cat([torch.zeros(1, 30, 16), torch.linspace(-1, 1, 30 * 16).view(1, 30, 16)]),
}


@every_kind
@pytest.mark.parametrize("name", only_quick(DEGENERATE, ["silent", "few_frames"]))
def test_degenerate_frames_have_finite_results(kind, name):
    """Silence and clips shorter than a codebook: loss, codes and gradients are finite."""
    frames = DEGENERATE[name]
    quantizer = made(kind, frames=rearrange(frames, "b f d -> (b f) d"))
    set_level_dropout(quantizer, 0.0)
    for _ in range(3):
        given = frames.clone().requires_grad_()
        output = quantizer.train()(given)
        (output.frames.sum() + output.loss).backward()
        # every level passes the gradient on once, a little turned; the steep rotations would make it thousands
        assert given.grad.norm(dim=-1).max() < 1e3 * max(1.0, float(frames.abs().max()))
    for value in (output.frames, output.loss, given.grad, *quantizer.state_dict().values()):
        assert torch.isfinite(value).all()
    quantizer.eval()
    codes = quantizer.encode(frames)
    assert torch.equal(codes, quantizer(frames).codes)
    assert torch.isfinite(quantizer.decode(codes)).all()


def test_gradients_of_silence_are_bounded():
    """The rotation trick scales a gradient by |code| / |residual|, which has no bound by itself."""
    quantizer = ResidualQuantizer(dim=8, codebook_size=16, num_quantizers=3, level_dropout=0.0)
    for layer in quantizer.rvq.layers:
        layer._codebook.embed[0, 0] = 0.0
    silence = torch.full((1, 20, 8), 1e-5, requires_grad=True)
    quantizer.rvq.layers[1]._codebook.embed[0, 0] = 1.0
    quantizer(silence).frames.sum().backward()
    assert silence.grad.abs().max() < 50


def planted(quantizer: ResidualQuantizer, point: Tensor) -> None:
    """Put all codes of all levels on one point."""
    for layer in quantizer.rvq.layers:
        state = layer._codebook
        state.embed.copy_(point.expand_as(state.embed))
        state.embed_avg.copy_(state.embed)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.0, 100.0])
def test_dead_codes_are_revived(distance):
    """Three clusters and all codes on one point, near or far: finally at least 95% of the codes are used."""
    centres = torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]])

    def batch(count: int) -> Tensor:
        return (centres[torch.randint(3, (count,))] + 0.3 * torch.randn(count, 4))[None]

    quantizer = ResidualQuantizer(dim=4, codebook_size=32, num_quantizers=2, level_dropout=0.0)
    planted(quantizer, torch.full((4,), distance))
    start = code_usage(quantizer.encode(batch(3000)), 32)
    assert (start["usage"] <= 1 / 32).all()
    for _ in range(150):
        quantizer.train()(batch(300))
    usage = code_usage(quantizer.eval().encode(batch(3000)), 32)
    assert (usage["usage"] >= 0.95).all()
    assert (usage["perplexity"] >= 0.6).all()


def test_a_revived_code_has_new_averages_and_time_to_be_used():
    """The averages of a revived code neither move it back nor let it be replaced at the next step."""
    quantizer = ResidualQuantizer(dim=4, codebook_size=8, num_quantizers=1)
    state = quantizer.rvq.layers[0]._codebook
    state.embed[0, 3], state.embed_avg[0, 3], state.cluster_size[0, 3] = 50.0, 1e-3 * 50.0, 1e-3
    frames = torch.randn(1, 64, 4)
    quantizer.train()(frames)
    revived = state.embed[0, 3].clone()
    assert (frames[0] == revived).all(dim=-1).any()
    torch.testing.assert_close(state.embed_avg[0, 3] / state.cluster_size[0, 3], revived)
    # nothing comes near it for a while: it stays where it is
    away = state.embed[0, 0] + 0.01 * torch.randn(1, 64, 4)
    for _ in range(10):
        quantizer(away)
    torch.testing.assert_close(state.embed[0, 3], revived, rtol=1e-3, atol=1e-3)
    # and it is used when something does
    assert (quantizer.eval().encode(revived.view(1, 1, 4)) == 3).all()
    # but not kept for ever
    for _ in range(60):
        quantizer.train()(away)
    assert (state.embed[0, 3] - away[0, 0]).norm() < 0.1 < (revived - away[0, 0]).norm()


@pytest.mark.slow
@pytest.mark.parametrize("batch_frames", [20, 2000])
def test_codes_in_uniform_use_are_kept_at_any_batch_size(batch_frames):
    """An absolute threshold would replace every code when batches are small."""
    frames = torch.randn(4000, 4)
    quantizer = ResidualQuantizer(dim=4, codebook_size=128, num_quantizers=1)
    quantizer.initialise(frames)
    replaced = 0
    for _ in range(60):
        before = quantizer.codebook(0).clone()
        quantizer.train()(frames[torch.randint(4000, (batch_frames,))][None])
        replaced += int(((quantizer.codebook(0) - before).norm(dim=-1) > 1.0).sum())
    assert replaced < 0.01 * 60 * 128


def test_revival_spreads_over_different_frames():
    """Dead codes are not revived on equal frames, e.g. silence."""
    quantizer = ResidualQuantizer(dim=4, codebook_size=16, num_quantizers=1)
    planted(quantizer, torch.full((4,), 5.0))
    state = quantizer.rvq.layers[0]._codebook
    state.cluster_size[0, 1:], state.embed_avg[0, 1:] = 1e-2, 5e-2
    frames = torch.cat([torch.zeros(90, 4), torch.randn(10, 4)])[None]
    quantizer.train()(frames)
    # the first code was in use; what stayed at 5 waits for the next step
    revived = quantizer.codebook(0)[1:]
    revived = revived[((revived - 5.0).abs() > 0.1).any(dim=-1)]
    assert len(revived) >= 2
    assert len(revived.unique(dim=0)) == len(revived)


def test_initialised_codebooks_are_in_use():
    """After k-means every code is used, even if a third of the frames is silence."""
    quantizer = ResidualQuantizer(dim=8, codebook_size=64, num_quantizers=2)
    frames = torch.cat([torch.randn(4000, 8), torch.zeros(2000, 8)])
    quantizer.initialise(frames)
    usage = code_usage(quantizer.encode(frames[None, :4000]), 64)
    assert (usage["usage"] > 0.95).all()
    assert (usage["perplexity"] > 0.5).all()


def test_code_usage_ignores_missing_codes():
    """Known values of usage and perplexity; codes of -1 are not counted."""
    codes = torch.tensor([[[0, 0, -1], [1, 0, -1], [2, 0, 3], [3, 0, 3]]])
    usage = code_usage(codes, 8)
    torch.testing.assert_close(usage["usage"], torch.tensor([4 / 8, 1 / 8, 1 / 8]))
    torch.testing.assert_close(usage["perplexity"], torch.tensor([4 / 8, 1 / 8, 1 / 8]))


def trained(quantizer: nn.Module, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """Train a small autoencoder around the quantizer; usage of its codes and error with 1, 2 … columns."""
    mixing = torch.randn(12, 24) * torch.linspace(1.0, 0.1, 12)[:, None]
    encoder, decoder = nn.Linear(24, quantizer.dim), nn.Linear(quantizer.dim, 24)
    parameters = [*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        sound = torch.randn(1, 300, 12) @ mixing
        output = quantizer.train()(encoder(sound))
        loss = (decoder(output.frames) - sound).square().mean() + output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sound = torch.randn(1, 3000, 12) @ mixing
    quantizer.eval()
    with torch.no_grad():
        codes = quantizer.encode(encoder(sound))
        decoded = [decoder(quantizer.decode(codes[..., :count])) for count in range(1, codes.shape[-1] + 1)]
    errors = [((wave - sound).square().mean() / sound.square().mean()).item() for wave in decoded]
    return code_usage(codes, quantizer.codebook_size), errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"lookup_free": True}, {"finite_scalar": True}], ids=["lookup_free", "finite_scalar"])
@pytest.mark.parametrize("start", ["default", "collinear"])
def test_fixed_grids_are_used_after_training(kind, start):
    """Coordinates do not become equal, even from a start where they are."""
    quantizer = make_quantizer(dim=16, codebook_size=64, num_quantizers=3, **kind)
    if start == "collinear":
        weight = quantizer.rvq.project_in.weight
        weight.data.copy_(weight[:1] + 0.01 * torch.randn_like(weight))
        quantizer.rvq.project_in.bias.data.fill_(1.0)
    usage, errors = trained(quantizer, steps=150)
    assert (usage["usage"] > 0.9).all()
    assert (usage["perplexity"] > 0.3).all()
    assert errors == sorted(errors, reverse=True)
    # three coordinates (64 = 4 x 4 x 4) hold less of the sound than six signs do
    assert errors[-1] < (0.55 if "lookup_free" in kind else 0.75)


def test_entropy_loss_is_that_of_the_paper():
    """Equal to a softmax over all codes; 0 for certain frames with uniform codes, 1 at collapse."""
    quantizer = ResidualLookupFreeQuantizer(
        dim=6, codebook_size=64, num_quantizers=3, entropy_weight=1.0, temperature=0.7
    )
    for level in range(3):
        residual = torch.randn(2, 20, 6) * 2.0**-level
        codes = quantizer.codebook(level) * 2**level
        shares = ((rearrange(residual, "b f d -> (b f) d") * 2**level) @ codes.t() / 0.7).softmax(dim=-1)
        unsure = -(shares * shares.log()).sum(dim=-1).mean()
        mean = shares.mean(dim=0)
        expected = 1 + (unsure + (mean * mean.log()).sum()) / math.log(64)
        torch.testing.assert_close(quantizer.level_loss(residual, level), expected)
    torch.testing.assert_close(
        quantizer.level_loss(30 * quantizer.codebook(0)[None], 0), torch.tensor(0.0), atol=1e-5, rtol=0
    )
    collapsed = 30 * quantizer.codebook(0)[:1].expand(1, 50, 6)
    torch.testing.assert_close(quantizer.level_loss(collapsed, 0), torch.tensor(1.0))


def test_grid_steps_multiply_to_the_codebook_size():
    """Every product of numbers from 3 to 8 is factored; other sizes raise and name possible sizes."""
    possible = {size for size in range(3, 9)}
    for _ in range(4):
        possible |= {size * step for size in possible for step in range(3, 9) if size * step <= 600}
    for size in range(1, 601):
        if size in possible:
            assert math.prod(grid_steps(size)) == size and all(3 <= step <= 8 for step in grid_steps(size))
        else:
            with pytest.raises(ValueError, match=f"of {size} codes"):
                grid_steps(size)
    assert grid_steps(1024) == (4, 4, 4, 4, 4) and grid_steps(1000) == (8, 5, 5, 5)
    with pytest.raises(ValueError, match="1008 or 1024"):
        ResidualFiniteScalarQuantizer(dim=8, codebook_size=1021)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lookup_free": True, "finite_scalar": True}, "set at most one of them"),
        ({"groups": 3}, "divisor of 16"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"lookup_free": True, "codebook_size": 1000}, "512 or 1024"),
        ({"finite_scalar": True, "codebook_size": 2}, "3"),
    ],
)
def test_impossible_sizes_raise(wrong, message):
    """The message names possible values."""
    with pytest.raises(ValueError, match=message):
        make_quantizer(**{"dim": 16, "codebook_size": 64, "num_quantizers": 2, **wrong})


def test_groups_of_different_sizes_raise():
    """All groups need equal numbers of levels and codes."""
    with pytest.raises(ValueError, match="equal .num_quantizers, codebook_size."):
        GroupedQuantizer(quantizers=[ResidualQuantizer(dim=4, num_quantizers=count) for count in (2, 3)])
    with pytest.raises(ValueError, match="not be empty, got none"):
        GroupedQuantizer(quantizers=[])


@pytest.mark.gpu
@every_kind
def test_every_kind_trains_on_the_gpu(kind):
    """New tensors are created on the device of the frames."""
    quantizer = made(kind).cuda().train()
    frames = torch.randn(2, 40, 16, device="cuda")
    for _ in range(3):
        assert torch.isfinite(quantizer(frames).frames).all()
    quantizer.eval()
    assert torch.equal(quantizer.encode(frames), quantizer(frames).codes)
