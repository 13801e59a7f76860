"""MusicGen against the models of transformers, with small random weights in the files that transformers writes."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.conditioning.base import ConditionTensor
from musiclm_pytorch.musicgen.musicgen import MusicGen

transformers = pytest.importorskip("transformers")

from tests.helpers.published_musicgen import VOCAB, oracle, write_musicgen  # noqa: E402
from tests.helpers.quick import only_quick  # noqa: E402

TEXTS = ["slow piano ballad", "Fast violin jig with drums"]
KINDS: dict[str, dict[str, Any]] = {"mono": {}, "stereo": {"channels": 2}, "audiogen": {"audiogen": True}}
every_scale = pytest.mark.parametrize(
    "scale", [pytest.param(1.0, marks=pytest.mark.slow, id="no_guidance"), pytest.param(3.0, id="guidance")]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per kind of model."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_musicgen(root / name, **options) for name, options in KINDS.items()}


@lru_cache
def loaded(folder: Path, melody: bool = False) -> tuple[MusicGen, Any]:
    """The model in a folder, loaded by this library and by transformers; tests must not change them."""
    return MusicGen.from_pretrained(folder), oracle(folder, melody)


@pytest.fixture(scope="module")
def melody_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a melody."""
    return write_musicgen(tmp_path_factory.mktemp("melody"), melody=True)


def text_inputs(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and mask of texts, as the tokenizer of the folder computes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(text, truncation=False, padding=False)["input_ids"] for text in texts]
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    return {"input_ids": ids, "attention_mask": mask}


def grid_of(codes: Tensor, channels: int) -> Tensor:
    """Rows `[b * k, rows]` of codes `[b, f, k]` in the delay pattern, written out by hand."""
    batch, frames, levels = codes.shape
    delays = [level // channels for level in range(levels)]
    rows = torch.full((batch, levels, 1 + frames + max(delays)), VOCAB)
    for level, delay in enumerate(delays):
        rows[:, level, 1 + delay : 1 + delay + frames] = codes[..., level]
    return rows.flatten(0, 1)


def own_logits(model: MusicGen, codes: Tensor, conditions: dict[str, ConditionTensor]) -> Tensor:
    """Logits `[b, levels, rows, vocab]` of the language model."""
    packed = model.transformer.layout.pack({"acoustic": codes})
    hidden = model.transformer.hidden(packed.ids, packed.input_mask, model.transformer.fuse(conditions, len(codes)))
    return torch.stack([model.transformer.logits(hidden, head) for head in range(codes.shape[-1])], dim=1)


def recording(decode: Callable[..., Any], decoded: list[Tensor]) -> Callable[..., Any]:
    """Function `decode` that also appends its codes to a list."""

    def record(codes: Tensor, *args: Any, **options: Any) -> Any:
        decoded.append(codes)
        return decode(codes, *args, **options)

    return record


@torch.no_grad()
@pytest.mark.parametrize("kind", only_quick(KINDS, ["stereo"]))
def test_logits_equal_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    """All rows of all levels, with texts of unequal length and without a text, to 1e-5."""
    model, reference = loaded(folders[kind])
    channels = model.codec.channels
    codes = torch.randint(VOCAB, (2, 12, 4 * channels))
    ids = grid_of(codes, channels)
    expected = reference(**text_inputs(folders[kind], TEXTS), decoder_input_ids=ids).logits
    assert model.text_conditioner is not None
    states = {"text": model.text_conditioner.forward(TEXTS)}
    torch.testing.assert_close(own_logits(model, codes, states).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    # Without a text, the states are zero.
    nothing = torch.zeros(2, 3, model.transformer.transformer.dim)
    mask = torch.ones(2, 3, dtype=torch.long)
    expected = reference.decoder(ids, encoder_hidden_states=nothing, encoder_attention_mask=mask).logits
    torch.testing.assert_close(own_logits(model, codes, {}).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompt_frames", only_quick([0, 6], [6]), ids=["no_prompt", "prompt"])
@every_scale
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "mono" else pytest.mark.slow) for kind in KINDS]
)
def test_greedy_tokens_equal_those_of_transformers(
    folders: dict[str, Path], kind: str, scale: float, prompt_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames and 3 new rows in transformers are the frames of this library, and the waves are equal to 1e-5."""
    model, reference = loaded(folders[kind])
    channels, factor, frames = model.codec.channels, model.codec.downsample_factor, 20
    prompt = 0.3 * torch.randn(2, channels, prompt_frames * factor) if prompt_frames else None
    decoded: list[Tensor] = []
    decode = reference.audio_encoder.decode
    monkeypatch.setattr(reference.audio_encoder, "decode", recording(decode, decoded))
    audio = {} if prompt is None else {"input_values": prompt, "padding_mask": torch.ones(2, prompt.shape[-1])}
    waves = reference.generate(
        **text_inputs(folders[kind], TEXTS),
        **audio,
        do_sample=False,
        guidance_scale=scale,
        max_new_tokens=frames - prompt_frames + 3,
    )
    music = model.generate(
        texts=TEXTS, prompt=prompt, seconds=frames / 50, temperature=0, guidance_scale=scale, seeds=0
    )
    expected = torch.stack(decoded, dim=-1)[0].permute(0, 2, 1, 3).flatten(2)  # levels and channels alternate
    assert torch.equal(music.tokens, expected)
    torch.testing.assert_close(torch.stack(music.waves).view_as(waves), waves, atol=1e-5, rtol=1e-5)


MELODY_FRAMES = 5  # repeated to the 9 frames of the model


@torch.no_grad()
@every_scale
@pytest.mark.parametrize("with_melody", only_quick([True, False], [True]), ids=["melody", "no_melody"])
def test_greedy_tokens_with_a_melody_equal_those_of_transformers(
    melody_folder: Path, with_melody: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaint: melody ignored. A batch equals the single items of transformers, which has no mask for texts."""
    model, reference = loaded(melody_folder, melody=True)
    chroma = [torch.eye(12)[torch.randint(12, (MELODY_FRAMES,))] for _ in TEXTS]
    decoded: list[Tensor] = []
    decode = reference.audio_encoder.decode
    monkeypatch.setattr(reference.audio_encoder, "decode", recording(decode, decoded))
    music = model.generate(
        texts=TEXTS, melody=chroma if with_melody else None, seconds=0.3, temperature=0, guidance_scale=scale
    )
    for item, text in enumerate(TEXTS):
        features = {"input_features": chroma[item].unsqueeze(0)} if with_melody else {}
        reference.generate(
            **text_inputs(melody_folder, [text]), **features, do_sample=False, guidance_scale=scale, max_new_tokens=18
        )
        assert torch.equal(music.tokens[item], decoded[item][0, 0].T)
    if with_melody:
        other = model.generate(texts=TEXTS, melody=chroma[::-1], seconds=0.3, temperature=0, guidance_scale=scale)
        assert not torch.equal(other.tokens, music.tokens)


@torch.no_grad()
def test_logits_with_a_melody_equal_those_of_transformers(melody_folder: Path) -> None:
    """All rows of all levels, to 1e-5."""
    model, reference = loaded(melody_folder, melody=True)
    codes, chroma = torch.randint(VOCAB, (1, 12, 4)), torch.eye(12)[torch.randint(12, (1, 9))]
    expected = reference(
        **text_inputs(melody_folder, TEXTS[:1]), input_features=chroma, decoder_input_ids=grid_of(codes, 1)
    ).logits
    assert model.text_conditioner is not None
    states = model.text_conditioner.forward(TEXTS[:1])
    conditions = {"text": states, "melody": ConditionTensor.of(chroma)}
    logits = own_logits(model, codes, conditions).flatten(0, 1)
    torch.testing.assert_close(logits, expected[:, -logits.shape[1] :], atol=1e-5, rtol=1e-5)
