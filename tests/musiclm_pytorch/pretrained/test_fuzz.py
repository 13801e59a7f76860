"""Mutated model folders: models, or errors of one line, in bounded time and memory."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.saving.files import digest_of_file, read_json, write_json
from audiolm_pytorch.saving.modules import load_module
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.mutations import TEXTS, mutated, mutated_json, outcome
from tests.helpers.small_models import small_musiclm

pytestmark = pytest.mark.slow


def change_bytes(file: Path, rng: random.Random) -> None:
    """Change bytes of any file; digests do not fit any more."""
    data = file.read_bytes()
    file.unlink() if rng.random() < 0.1 else file.write_bytes(mutated(data, rng, [*TEXTS, b"\0" * 64]))


def change_json(file: Path, rng: random.Random) -> None:
    """Change the content of a config or card, and write a digest that fits."""
    changed = mutated_json(read_json(file), rng)
    write_json(file, changed, sealed=isinstance(changed, dict) and "sha256" not in changed)


def change_header(file: Path, rng: random.Random) -> None:
    """Change names, types, shapes and offsets in the header of a file of weights."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, tensors = data[8:end], data[end:]
    kind = rng.random()
    if kind < 0.3:
        changed = mutated(header, rng, TEXTS)
    elif kind < 0.6:
        facts = json.loads(header)
        tensor = facts[rng.choice([name for name in facts if name != "__metadata__"])]
        tensor["shape"] = rng.choice([tensor["shape"][::-1], [*tensor["shape"], 1], [1, *tensor["shape"]]])
        tensor["dtype"] = rng.choice([tensor["dtype"], "I32", "F16"])
        changed = json.dumps(facts).encode()
    else:
        changed = json.dumps(mutated_json(json.loads(header), rng)).encode()
    size = len(changed) if rng.random() < 0.9 else rng.choice([0, 2**31, 2**63, 2**64 - 1])
    file.write_bytes(size.to_bytes(8, "little") + changed + tensors)


def change_weights(file: Path, rng: random.Random) -> None:
    """Overwrite values of tensors."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 10])):
        place = rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data))
        data[place : place + 4] = rng.choice([b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"])[: len(data) - place]
    file.write_bytes(data)


def write_digest(weights: Path) -> None:
    """Write the digest of a file of weights to the config beside it."""
    config = read_json(weights.with_name("config.json"))
    write_json(weights.with_name("config.json"), {**config, "weights_sha256": digest_of_file(weights)}, sealed=True)


def state(model: Any) -> list[Any]:
    """Weights of a model."""
    return [tensor.tolist() for tensor in model.state_dict().values()]


def test_300_mutated_model_folders(tmp_path: Path) -> None:
    """Bytes of any file, and contents with digests that fit, so that the checks behind the digests are reached."""
    model = small_musiclm()
    model.save_pretrained(tmp_path / "musiclm")
    model.audio_lm.save_pretrained(tmp_path / "audiolm")
    loaders: dict[Path, Callable[[Any], Any]] = {
        tmp_path / "musiclm": MusicLM.from_pretrained,
        tmp_path / "audiolm": AudioLM.from_pretrained,
        **{file.parent: load_module for file in sorted((tmp_path / "musiclm").glob("*/config.json"))},
    }
    originals = {folder: state(load(folder)) for folder, load in loaders.items()}
    rng, num_models = random.Random(3), 0
    for number in range(300):
        folder = rng.choice(list(loaders))
        damaged = tmp_path / "damaged"
        shutil.copytree(folder, damaged)
        change = (change_bytes, change_json, change_json, change_header, change_weights)[number % 5]
        is_text = change is change_json or (change is change_bytes and rng.random() < 0.5)
        file = rng.choice(sorted(damaged.rglob("*.json" if is_text else "*.safetensors")))
        before = file.read_bytes()
        change(file, rng)
        if change in (change_header, change_weights):
            write_digest(file)
        result = outcome(loaders[folder], damaged)
        is_error = isinstance(result, ValueError)
        is_changed = not file.is_file() or file.read_bytes() != before
        assert is_error or change is not change_bytes or not is_changed or state(result) == originals[folder], file
        num_models += not is_error
        shutil.rmtree(damaged)
    assert 30 < num_models < 200


def test_100_mutated_tokenizers() -> None:
    """Tokenizers in JSON encode texts, or are refused."""
    from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer

    trained = TextTokenizer.train(["a slow waltz", "a slow song for a lute"], vocab_size=270, min_frequency=1)
    original, rng, num_read = json.loads(trained.to_json()), random.Random(4), 0
    for number in range(100):
        if number % 4:
            text = json.dumps(mutated_json(original, rng))
        else:
            text = mutated(trained.to_json().encode(), rng, TEXTS).decode(errors="replace")
        tokenizer = outcome(TextTokenizer.from_json, text)
        if not isinstance(tokenizer, ValueError):
            ids = outcome(tokenizer.encode, ["a slow waltz for a lute"])
            num_read += not isinstance(ids, ValueError)
            assert isinstance(ids, ValueError) or ids.dtype == torch.long
    assert 10 < num_read < 90
