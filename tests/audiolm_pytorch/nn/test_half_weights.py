"""Copies with bfloat16 weights: close to the original, which does not change."""

import copy
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.conditioning.tensors import ConditionTensor
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.nn import half_weights
from audiolm_pytorch.nn.half_weights import with_half_weights
from audiolm_pytorch.saving.modules import save_module
from tests.helpers.decoding import decode
from tests.helpers.fakes import CONDITION, SAMPLE_HZ, FakeCodec, FakeConditioner, FakeSemanticTokenizer, tiny_stages


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("options", [{}, {"positions": "relative", "kv_heads": 1, "text_dim": 6}], ids=str)
def test_half_weights_give_nearly_the_same_logits(packs: bool, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed and unpacked weights give equal logits, within the precision of bfloat16 of the original."""
    torch.manual_seed(0)
    stage = tiny_stages(**CONDITION, **options)["coarse"].eval()
    before = {name: weight.clone() for name, weight in stage.state_dict().items()}
    if not packs:
        monkeypatch.setattr(half_weights, "_can_pack", lambda: False)
    half = with_half_weights(stage)
    packed = stage.layout.pack({"semantic": torch.randint(0, 12, (2, 4, 1)), "coarse": torch.randint(0, 16, (2, 8, 2))})
    mask = torch.ones(2, 3, dtype=torch.bool)
    conditions = {"text": ConditionTensor(torch.randn(2, 3, 6), mask)} if "text_dim" in options else {}
    conditions["codes"] = ConditionTensor(torch.randn(2, 3, 8), mask)
    with torch.no_grad():
        hidden, near = (
            model.hidden(packed.ids, packed.input_mask, model.fuse(conditions, 2)) for model in (stage, half)
        )
    assert near.dtype == (torch.float32 if packs else torch.bfloat16) and half.logits(near, 0).dtype == torch.float32
    torch.testing.assert_close(near.float(), hidden, atol=0.06, rtol=0.06)
    assert any("Packed" in type(module).__name__ for module in half.modules()) == packs
    assert all(torch.equal(weight, before[name]) for name, weight in stage.state_dict().items())


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("options", [{"positions": "relative"}, {"kv_heads": 1}, {"text_dim": 6}], ids=str)
def test_half_weights_decode_with_every_option(packs: bool, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row through a cache of another precision, at equal and unequal positions."""
    if not packs:
        monkeypatch.setattr(half_weights, "_can_pack", lambda: False)
    half = with_half_weights(tiny_stages(**options)["semantic"])
    text = ConditionTensor(torch.randn(2, 3, 6), torch.tensor([[True] * 3, [True, False, False]]))
    conditions = {"text": text} if "text_dim" in options else None
    for lengths in ([2, 2], [0, 2]):
        result = decode(
            half,
            {"semantic": torch.ones(2, 2, 1, dtype=torch.long)},
            {"semantic": 8},
            lengths={"semantic": torch.tensor(lengths)},
            conditioning=conditions,
        )
        assert (result.streams["semantic"] >= 0).all()


def test_half_weights_decode_nearly_the_same_tokens() -> None:
    """Greedy decoding of a model with distinct logits, with guidance and in batches."""
    torch.manual_seed(0)
    stage = tiny_stages(**CONDITION)["semantic"].eval()
    for weight in stage.heads.parameters():
        weight.data.mul_(40)
    conditions = {"codes": ConditionTensor.of(torch.randn(4, 3, 8))}
    settings = SamplingSettings(temperature=0, guidance_scale=1.5)
    result = [
        decode(model, {}, {"semantic": 8}, batch_size=4, conditioning=conditions, settings=settings).streams["semantic"]
        for model in (stage, with_half_weights(stage))
    ]
    assert (result[0] == result[1]).float().mean() > 0.7


def test_half_weights_need_half_the_memory() -> None:
    """Parameters and packed weights together."""
    stage = tiny_stages()["semantic"]
    half = with_half_weights(stage)
    packed = sum(m.in_features * m.out_features for m in half.modules() if type(m).__name__ == "_PackedProjection")
    kept = sum(parameter.numel() for parameter in half.parameters()) + packed
    assert kept == sum(parameter.numel() for parameter in stage.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters() if parameter.ndim > 1)


def test_an_audiolm_generates_with_half_weights() -> None:
    """Stages are copied, everything else is shared."""
    audio_lm = AudioLM(
        wav2vec=FakeSemanticTokenizer(),
        codec=FakeCodec(),
        audio_conditioner=FakeConditioner(),
        **{f"{name}_transformer": stage for name, stage in tiny_stages(**CONDITION).items()},
        sampling={"fine": {"temperature": 0.1}},
    )
    half = audio_lm.with_half_weights()
    assert half.codec is audio_lm.codec and half.audio_conditioner is audio_lm.audio_conditioner
    assert half.sampling == audio_lm.sampling
    assert half.semantic_transformer.embedding.weight.dtype == torch.bfloat16
    assert audio_lm.semantic_transformer.embedding.weight.dtype == torch.float32
    request = GenerationRequest(text=["a", "bb"], seconds=0.4, seeds=0)
    audio = half.generate(request)
    assert audio.wave.shape == (2, 0.4 * SAMPLE_HZ) and audio.wave.dtype == torch.float32
    again = half.generate(request)
    assert torch.equal(audio.wave, again.wave)


def test_packed_weights_are_never_lost(tmp_path: Path) -> None:
    """Deep copies work and a loss can be computed; saving, pickling and moving raise errors."""
    stage = tiny_stages()["semantic"]
    half = with_half_weights(stage)
    packed = stage.layout.pack({"semantic": torch.randint(0, 12, (2, 6, 1))})
    result = decode(half, {}, {"semantic": 8}, seeds=[1]).streams["semantic"]
    for twin in (copy.deepcopy(half), with_half_weights(half), half.to("cpu")):
        assert torch.equal(decode(twin, {}, {"semantic": 8}, seeds=[1]).streams["semantic"], result)
    torch.testing.assert_close(half(packed).loss, stage.eval()(packed).loss, atol=0.05, rtol=0.05)
    if not half_weights._can_pack():
        return
    refused = {
        "saved": lambda: save_module(half, tmp_path / "half"),
        "pickled": lambda: torch.save(half, tmp_path / "half.pt"),
        "moved to meta": lambda: half.to("meta"),
        "moved to cpu, torch.float32": lambda: half.float(),
    }
    for wish, refuse in refused.items():
        with pytest.raises(ValueError, match=f"cannot be {wish}"):
            refuse()
