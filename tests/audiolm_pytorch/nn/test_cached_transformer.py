"""Decoding row by row equals one pass over whole sequences, in memory that is allocated once and without waiting."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.conditioning.fuser import ConditionSpec
from audiolm_pytorch.generation import decode_session
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stages import CoarseTransformer
from audiolm_pytorch.nn import row_products
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.transformer import FusedConditions, Transformer
from audiolm_pytorch.tokens.streams import PackedTokens
from tests.helpers.fakes import tiny_stages
from tests.helpers.quick import only_quick

SIZES: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 4, "dim_head": 8, "ff_mult": 2.0}


class MaxNorm(nn.Module):
    """A norm that the library does not have."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (1 + x.abs().amax(dim=-1, keepdim=True))


class SineLayer(nn.Module):
    """A feed-forward layer that the library does not have."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.up(x))


def stage_of(**options: Any) -> CoarseTransformer:
    """A stage with three levels and random weights of every kind, norms and biases included."""
    torch.manual_seed(1)
    stage = CoarseTransformer(
        num_semantic_tokens=11,
        codebook_size=13,
        num_coarse_quantizers=3,
        **{**SIZES, "audio_text_condition": True, "cond_dim": 10, **options},
    ).eval()
    for parameter in stage.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    stage.embedding.weight.data[-1] = 0  # of empty cells
    return stage


def conditions_of(stage: CoarseTransformer, batch: int, num_frames: int) -> Conditions:
    """Codes, texts of unequal length and an embedding per frame, if the stage accepts them."""
    conditions = {"codes": ConditionTensor.of(torch.randn(batch, 4, 10))}
    if "text" in stage.fuser.specs:
        mask = torch.arange(5) < torch.tensor([5, 2, 4] * batch)[:batch, None]
        conditions["text"] = ConditionTensor(torch.randn(batch, 5, 12), mask)
    if "tempo" in stage.fuser.specs:
        conditions["tempo"] = ConditionTensor.of(torch.randn(batch, num_frames - 5, 3))
    return conditions


def session_of(
    stage: CoarseTransformer, batch: int, num_frames: int, guidance: float = 1.0, unequal: bool = False, **options: Any
) -> DecodeSession:
    """A session with prompts of 6 frames, or with unequal prompts and lengths."""
    prompts = torch.tensor([6, 2, 0] * batch)[:batch] if unequal else torch.full((batch,), 6)
    counts = torch.tensor([num_frames, num_frames - 20, num_frames - 7] * batch)[:batch] if unequal else num_frames
    streams = {"semantic": torch.randint(11, (batch, num_frames // 2, 1)), "coarse": torch.randint(13, (batch, 6, 3))}
    return DecodeSession(
        stage,
        streams,
        {"coarse": counts},
        lengths={"coarse": prompts},
        conditioning=conditions_of(stage, batch, num_frames),
        settings=SamplingSettings(guidance_scale=guidance),
        seeds=list(range(batch)),
        **options,
    )


def compare(session: DecodeSession, monkeypatch: pytest.MonkeyPatch) -> int:
    """Decode, and compare the logits of every row with those of the whole sequences; return the number of rows."""
    read: list[tuple[list[int], list[int], int, Tensor]] = []  # rows of all items, heads, number of logits, logits
    original = decode_session._Heads.logits

    def recorded(heads: decode_session._Heads) -> Tensor:
        logits = original(heads)
        key = next(key for key, value in session.heads.items() if value is heads)
        read.append((list(session.rows) * session.copies, list(key), heads.num_logits, logits.clone()))
        return logits

    monkeypatch.setattr(decode_session._Heads, "logits", recorded)
    session.advance()
    assert session.is_done and len(read) > 40
    stage, ids = session.model, session.ids
    mask = ids != stage.layout.num_ids
    with torch.inference_mode():
        fused = stage.fuse(session._doubled_conditions(), session.copies * session.batch)
        if session.copies == 2:
            everybody = torch.ones(session.batch, dtype=torch.bool)
            packed = PackedTokens(ids, mask, mask, stage.layout.streams, stage.layout.pattern)
            ids = torch.cat((ids, stage.layout.without_conditions(packed, everybody).ids))
            mask = mask.repeat(2, 1, 1)
        hidden = stage.hidden(ids, mask, fused)
        items = torch.arange(len(ids))
        for rows, heads, num_logits, logits in read:
            states = hidden[items, torch.tensor(rows) - 1]
            # Items that are complete repeat their last row.
            expected = torch.stack([stage.logits(states, head)[:, :num_logits] for head in heads], dim=1)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    return fused.num_rows + max(max(rows) for rows, *_ in read)


QUICK_CASES = (
    "rotary, unequal",
    "relative",
    "shared keys",
    "text",
    "text prefix, relative",
    "other parts",
    "many items",
)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # options of the stage, options of the session
    "rotary, unequal": ({}, {"guidance": 2.0, "unequal": True}),
    "one item": ({}, {"batch": 1, "num_frames": 130}),
    "one item, guidance": ({"positions": "relative", "kv_heads": 1}, {"batch": 1, "guidance": 1.5}),
    "relative": ({"positions": "relative"}, {"num_frames": 130, "unequal": True}),
    "sinusoidal": (
        {"positions": "sinusoidal", "norm": "layer", "feed_forward": "gelu", "bias": True},
        {"guidance": 2.0},
    ),
    "no positions": ({"positions": "none", "norm": "layer", "feed_forward": "relu"}, {"unequal": True}),
    "biases": ({"feed_forward": "gelu_tanh", "bias": True, "kv_heads": 2, "text_dim": 12}, {"unequal": True}),
    "shared keys": ({"kv_heads": 1}, {"unequal": True}),
    "shared keys, relative": ({"kv_heads": 2, "positions": "relative"}, {"guidance": 2.0}),
    "text": ({"text_dim": 12}, {"guidance": 2.0, "unequal": True}),
    "text, one item": ({"text_dim": 12}, {"batch": 1}),
    "text prefix": ({"text_dim": 12, "text_as": "prefix"}, {"guidance": 2.0, "unequal": True}),
    "text prefix, relative": ({"text_dim": 12, "text_as": "prefix", "positions": "relative"}, {"unequal": True}),
    "other parts": ({"norm": MaxNorm, "feed_forward": SineLayer}, {"guidance": 2.0, "unequal": True}),
    "other norm": ({"norm": MaxNorm, "text_dim": 12}, {"batch": 1}),
    "many items": ({}, {"batch": 17, "num_frames": 62}),
    "many items, unequal": ({"kv_heads": 2, "text_dim": 12}, {"batch": 17, "num_frames": 62, "unequal": True}),
    "sum by frame": ({"conditions": {"tempo": ConditionSpec(3, "sum")}}, {"guidance": 2.0, "unequal": True}),
    "ends": ({"positions": "relative"}, {"unequal": True, "allow_eos": True}),
    "flat": ({"pattern": "flat"}, {"num_frames": 36, "unequal": True}),
    "parallel": ({"pattern": "parallel", "kv_heads": 2}, {"guidance": 2.0}),
}


@pytest.mark.parametrize("case", only_quick(CASES, QUICK_CASES))
def test_logits_of_decoding_equal_those_of_whole_sequences(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-5, over more than one extent of the cache, for all parts of a transformer."""
    options, plan = CASES[case]
    session = session_of(stage_of(**options), **{"batch": 3, "num_frames": 70, **plan})
    num_positions = compare(session, monkeypatch)
    assert num_positions > (128 if plan.get("num_frames") == 130 else 64)


class Adapted(nn.Linear):
    """A linear layer with an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "part",
    only_quick(["to_qkv", "to_out", "up", "down", "to_q", "heads", "feed_forward", "norm"], ["to_qkv", "down", "norm"]),
)
def test_adapters_and_hooks_of_layers_have_an_effect(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding does not only use the weights of a subclass, or of a layer with a hook."""
    stage = stage_of(text_dim=12, norm="layer" if part == "norm" else lambda dim: nn.LayerNorm(dim, bias=False))
    for name, module in stage.named_modules():
        if part in name and isinstance(module, nn.Linear):
            module.__class__ = Adapted
        elif part in name and not name.endswith("heads"):
            module.register_forward_hook(lambda layer, inputs, output: 0.7 * output)
    compare(session_of(stage, 3, 70, unequal=True, guidance=2.0), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_large_weights_of_other_types_are_decoded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, products are float32, also in programs with another default type."""
    monkeypatch.setattr(row_products, "_MIN_PACKED_WEIGHTS", 0)
    stage = stage_of(text_dim=12).to(dtype)
    sessions = [session_of(copy, 3, 50) for copy in (stage, deepcopy(stage).float())]
    sessions[1].conditioning = sessions[0].conditioning
    sessions[1].ids.copy_(sessions[0].ids)
    sessions[1].advance()
    torch.set_default_dtype(torch.float64)
    try:
        sessions[0].advance()
    finally:
        torch.set_default_dtype(torch.float32)
    agreement = (sessions[0].ids == sessions[1].ids).double().mean()
    assert agreement == 1 if dtype == torch.float64 else agreement > 0.8


@pytest.mark.parametrize("batch", [1, 3])
def test_products_of_large_weights_give_the_same_logits(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small weights of this file are multiplied as large weights are."""
    monkeypatch.setattr(row_products, "_MIN_PACKED_ROWS", 1)
    monkeypatch.setattr(row_products, "_MIN_PACKED_WEIGHTS", 0)
    compare(session_of(stage_of(text_dim=12, norm="layer", feed_forward="gelu", bias=True), batch, 50), monkeypatch)


def test_a_prepared_transformer_of_another_session_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a cache of another length, which was released, and other conditions."""
    stage = stage_of(text_dim=12)
    first = session_of(stage, 3, 70, unequal=True)
    first.advance()
    second = session_of(stage, 3, 50, transformer=first.transformer)
    assert second.transformer is first.transformer
    compare(second, monkeypatch)
    assert session_of(stage, 2, 50, transformer=first.transformer).transformer is None
    with torch.no_grad():
        stage.transformer.blocks[0].attention.to_qkv.weight.add_(0.1)
    assert session_of(stage, 3, 50, transformer=first.transformer).transformer is None


# memory


def tensors_of(cached: CachedTransformer) -> dict[str, Tensor]:
    """All tensors that belong to a cached transformer, by name."""
    owners = {"": cached, "buffers": cached._buffers}
    owners |= {f"block {number}": block for number, block in enumerate(cached._blocks)}
    found = {}
    for owner, module in owners.items():
        for name, value in vars(module).items():
            parts = value if isinstance(value, tuple) else (value,)
            found |= {f"{owner}.{name}.{n}": part for n, part in enumerate(parts) if isinstance(part, Tensor)}
    return found


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_memory_is_bounded_and_allocated_once(positions: str) -> None:
    """Tensors keep address and shape while the extent is the same; the cache has one place per position, rounded up."""
    stack = Transformer(**SIZES, positions=positions, kv_heads=2).eval()
    cached = CachedTransformer(stack, 3)
    with torch.inference_mode():
        cached.prefill(torch.randn(3, 4, 24), FusedConditions(torch.randn(3, 2, 24)), [4, 2, 3], 150)
        memories = [block._memory for block in cached._blocks]
        assert [memory.numel() for memory in memories] == [2 * 3 * 2 * 160 * 8] * 2
        addresses: dict[int, set[tuple]] = {}
        for row in range(4, 148):
            hidden = cached.step(torch.randn(3, 24), [row, row - 2, row - 1])
            places = tuple((name, part.data_ptr(), part.shape) for name, part in tensors_of(cached).items())
            addresses.setdefault(cached._buffers.extent, set()).add(places)
            assert hidden is cached.hidden
        assert {extent: len(places) for extent, places in addresses.items()} == dict.fromkeys(range(32, 161, 32), 1)
        assert len(next(iter(addresses[32]))) > 30
        assert all(block._memory is memory for block, memory in zip(cached._blocks, memories))
        cached.release()
        assert not any(part.numel() >= memories[0].numel() for part in tensors_of(cached).values())


# waiting

WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")


class NoWait(TorchDispatchMode):
    """Fails for operators that would wait for the result of a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        assert not name.startswith(WAITS), f"{func} waits for the device"
        if name == "index":  # with a mask it would call nonzero
            assert not any(part is not None and part.dtype == torch.bool for part in args[1]), "index by a mask"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail for operators and methods that would wait for the result of a GPU."""
    with monkeypatch.context() as patch, NoWait():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the device"))
        yield


@pytest.mark.parametrize(
    "wait", [lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.tolist()]
)
def test_waiting_is_noticed(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the next tests fails for a row that waits."""
    with pytest.raises((AssertionError, pytest.fail.Exception)), no_wait(monkeypatch):
        wait(torch.randn(3))


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "relative", "kv_heads": 2}, {"positions": "sinusoidal", "norm": "layer"}, {"cross": True}],
    ids=str,
)
def test_a_step_does_not_wait(options: dict, unequal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the row that changes the extent of the cache, with a prefix, with states and with a sum per row."""
    cached = CachedTransformer(Transformer(**SIZES, **options).eval(), 3)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    conditions = FusedConditions(
        torch.randn(3, 2, 24), torch.tensor([0, 1, 0]), torch.randn(3, 2, 24), mask, torch.randn(3, 9, 24)
    )
    with torch.inference_mode():
        cached.prefill(torch.randn(3, 58, 24), conditions, [58, 57, 58], 80)
        with no_wait(monkeypatch):
            for row in range(58, 66):
                cached.step(torch.randn(3, 24), [row, row - unequal, row])
    assert cached._buffers.extent == 96


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("options", [{}, {"positions": "relative", "text_dim": 12}], ids=str)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_a_row_of_a_session_does_not_wait(
    sampling: dict, options: dict, unequal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the embedding to the sampled tokens, without end tokens, with the check for NaN of a GPU."""
    session = session_of(stage_of(**options), 3, 40, guidance=2.0, unequal=unequal)
    session.settings = SamplingSettings(guidance_scale=2.0, **sampling)
    session.advance(12)

    def recorded(self: DecodeSession, logits: Tensor, items: list[int], rows: list[int]) -> None:
        is_good = logits.sum().isfinite() | (self.bad_row >= 0)
        self.bad_row = torch.where(is_good, self.bad_row, max(rows))

    monkeypatch.setattr(DecodeSession, "_check_finite", recorded)
    with torch.inference_mode():
        session._read_row()
        session._fill_row()
        places = {name: part.data_ptr() for name, part in tensors_of(session.transformer).items()}
        first = max(session.rows)
        with no_wait(monkeypatch):
            for _ in range(6):
                session._read_row()
                session._fill_row()
    assert max(session.rows) == first + 6 and int(session.bad_row) == -1
    assert places == {name: part.data_ptr() for name, part in tensors_of(session.transformer).items()}


def test_a_finished_session_leaves_the_cache_to_the_next_one() -> None:
    """A further call of a finished session does not free the cache of the session that uses its transformer."""
    stage = tiny_stages()["semantic"].eval()
    first = DecodeSession(stage, {}, {"semantic": 6}, seeds=[0])
    first.advance()
    alone, second = (
        DecodeSession(stage, {}, {"semantic": 8}, seeds=[1], transformer=transformer)
        for transformer in (None, first.transformer)
    )
    second.advance(3)
    first.advance()
    for session in (alone, second):
        session.advance()
    assert torch.equal(second.decoded().streams["semantic"], alone.decoded().streams["semantic"])
