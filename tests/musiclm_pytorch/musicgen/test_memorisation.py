"""A small MusicGen memorises clips by text, melody and prompt; low-rank updates of it memorise them, too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.trainer import MusicGenTrainer

pytest.importorskip("transformers")

from audiolm_pytorch.nn.lora import load_lora
from tests.helpers.musicgen_clips import CAPTIONS, HZ, all_items, clips, new_model, share_of_equal_tokens, write_clips
from tests.helpers.published_musicgen import write_musicgen

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"batch_size": 8, "warmup_steps": 10, "ema_decay": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the clips."""
    return write_clips(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a trained model. Its EnCodec has no look-ahead: tokens of a prompt are the first tokens of its clip."""
    torch.manual_seed(0)  # the result does not depend on the tests before
    root = tmp_path_factory.mktemp("trained")
    parts = MusicGen.from_pretrained(write_musicgen(root / "parts", causal=True))
    drop_probs = {"cond_drop_prob": 0.1, "text_drop_prob": 0.5, "melody_drop_prob": 0.25}  # melodies are learned last
    model = new_model(parts, melody=True, **drop_probs)
    MusicGenTrainer(
        model,
        items=all_items(folder),
        num_train_steps=700,
        learning_rate=3e-3,
        results_folder=root / "run",
        **SETTINGS,
    ).train()
    return root / "run" / "musicgen"


@pytest.fixture(scope="module")
def model(trained: Path) -> MusicGen:
    """The trained model."""
    return MusicGen.from_pretrained(trained)


@pytest.fixture(scope="module")
def waves(folder: Path) -> list[Tensor]:
    """Waves `[n]` of the clips."""
    return clips(folder)


@pytest.mark.parametrize("names", ["texts", "melody", "prompt", "texts melody", "texts melody prompt"])
def test_clips_are_memorised(model: MusicGen, waves: list[Tensor], names: str) -> None:
    """Each condition alone and together with others, for all clips in one batch, and for one clip alone."""
    inputs = {"texts": CAPTIONS, "melody": waves, "prompt": [wave[: HZ // 5] for wave in waves]}
    inputs = {name: inputs[name] for name in names.split()}
    assert share_of_equal_tokens(model, waves, **inputs) > 0.97
    for item in (0, 3, 7):
        alone = {name: values[item : item + 1] for name, values in inputs.items()}
        assert share_of_equal_tokens(model, waves[item : item + 1], **alone) > 0.9


def test_conditions_select_the_clip(model: MusicGen, waves: list[Tensor]) -> None:
    """Texts and melodies of other clips lead to other clips."""
    for inputs in ({"texts": CAPTIONS[::-1]}, {"melody": waves[::-1]}):
        assert share_of_equal_tokens(model, waves, **inputs) < 0.3
        assert share_of_equal_tokens(model, waves[::-1], **inputs) > 0.97


def test_low_rank_updates_memorise_and_merge_exactly(
    folder: Path, trained: Path, waves: list[Tensor], tmp_path: Path
) -> None:
    """Complaint: LoRA missing or wrong loss. A run of rank 4 learns other captions, is resumed, saved and merged."""
    (train, valid), others = all_items(folder), CAPTIONS[3:] + CAPTIONS[:3]
    items = [replace(item, caption=text) for item, text in zip(train, others)]
    options: dict[str, Any] = {"num_train_steps": 300, "learning_rate": 1e-2, "lora_rank": 4, **SETTINGS}
    options |= {"items": (items, valid), "results_folder": tmp_path / "run"}
    model = MusicGen.from_pretrained(trained)
    assert share_of_equal_tokens(model, waves, texts=others) < 0.3
    trainer = MusicGenTrainer(model, **options)
    transformer = model.transformer
    frozen = {name: weight.clone() for name, weight in transformer.named_parameters() if not weight.requires_grad}
    trainable = sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad)
    assert trainable < 0.25 * sum(weight.numel() for weight in frozen.values())
    trainer.train(stop_after_steps=50)
    assert all(torch.equal(weight, frozen[name]) for name, weight in transformer.named_parameters() if name in frozen)
    assert trainer.lora is not None
    trainer.lora.save(tmp_path / "updates")
    merged = MusicGen.from_pretrained(trained).transformer
    load_lora(merged, tmp_path / "updates")
    packed = transformer.layout.pack({"acoustic": model.codec.tokenize(torch.stack(waves))})
    with torch.no_grad():
        hidden = [
            one.eval().hidden(packed.ids, packed.input_mask, one.fuse({}, len(waves))) for one in (merged, transformer)
        ]
        torch.testing.assert_close(merged.logits(hidden[0], 0), transformer.logits(hidden[1], 0), rtol=0, atol=1e-4)

    resumed = MusicGen.from_pretrained(trained)
    MusicGenTrainer(resumed, **options).train()
    assert share_of_equal_tokens(resumed, waves, texts=others) > 0.97
    loaded = MusicGen.from_pretrained(tmp_path / "run" / "musicgen")
    expected = resumed.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.transformer.state_dict().items())
    assert share_of_equal_tokens(loaded, waves, texts=others) > 0.97
    updated = MusicGen.from_pretrained(trained)
    load_lora(updated.transformer, tmp_path / "run" / "lora")
    assert share_of_equal_tokens(updated, waves, texts=others) > 0.97
