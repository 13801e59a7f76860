"""Published MusicGen weights in both formats: reading, writing, and refusal of wrong and hostile files."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.saving.weights import weights_of
from musiclm_pytorch.musicgen.musicgen import AudioGen, MusicGen

transformers = pytest.importorskip("transformers")

from tests.helpers.published_musicgen import oracle, write_audiocraft_files, write_musicgen  # noqa: E402
from tests.helpers.quick import only_quick  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "mono": {},
    "stereo": {"channels": 2},
    "melody": {"melody": True},
    "audiogen": {"audiogen": True},
}
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "mono" else pytest.mark.slow) for kind in KINDS]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per kind of model; audiocraft's files are in the folder `audiocraft` below it."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: write_musicgen(root / name, **options) for name, options in KINDS.items()}
    for name, folder in folders.items():
        write_audiocraft_files(folder / "audiocraft", oracle(folder, name == "melody"))
    return folders


def weights(model: MusicGen) -> dict[str, Tensor]:
    """All weights of a model by name."""
    return weights_of(model)


def assert_equal(first: MusicGen, second: MusicGen) -> None:
    """All weights and settings are equal bit for bit."""
    expected = weights(first)
    assert expected.keys() == weights(second).keys()
    assert [name for name, tensor in weights(second).items() if not torch.equal(tensor, expected[name])] == []
    assert first.transformer.config == second.transformer.config
    assert first.codec.fingerprint() == second.codec.fingerprint()
    assert first.text_conditioner.fingerprint() == second.text_conditioner.fingerprint()


@every_kind
def test_both_formats_load_to_the_same_model(folders: dict[str, Path], kind: str) -> None:
    """The weights of audiocraft's files were rounded to float16; loaded weights are float32."""
    model = MusicGen.from_pretrained(folders[kind])
    other = MusicGen.from_pretrained(folders[kind] / "audiocraft", text_conditioner=model.text_conditioner)
    for name, tensor in weights(model).items():
        rounded = tensor.half().float() if name.startswith("transformer.") else tensor
        assert torch.equal(weights(other)[name], rounded), name
    if kind != "melody":
        assert other.transformer.config == model.transformer.config


@pytest.mark.parametrize("format", only_quick(["own", "transformers", "audiocraft"], ["transformers"]))
@every_kind
def test_saved_models_load_bit_for_bit(folders: dict[str, Path], kind: str, format: Any, tmp_path: Path) -> None:
    """The text encoder is saved too, also beside audiocraft's files; no format reaches for the hub."""
    model = MusicGen.from_pretrained(folders[kind])
    if format == "audiocraft" and kind == "melody":  # its frames follow from the duration
        model.transformer.max_seconds = 1.1
    model.save_pretrained(tmp_path / "saved", format=format)
    assert_equal(model, MusicGen.from_pretrained(tmp_path / "saved", offline=True))


@pytest.mark.parametrize(
    "kind", ["mono", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("stereo", "melody"))]
)
def test_transformers_loads_saved_models(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """All weights are there, and the configs are equal."""
    MusicGen.from_pretrained(folders[kind]).save_pretrained(tmp_path, format="transformers")
    first, second = oracle(folders[kind], kind == "melody"), oracle(tmp_path, kind == "melody")
    expected = first.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_dict().items())
    assert second.generation_config.decoder_start_token_id == first.generation_config.decoder_start_token_id
    processor = transformers.AutoProcessor.from_pretrained(tmp_path) if kind == "mono" else None
    assert processor is None or processor(text=["a harp"])["input_ids"]


@pytest.mark.parametrize(
    ("format", "name"),
    [
        *[("transformers", name) for name in ("config.json", "model.safetensors", "tokenizer.json")],
        *[("audiocraft", name) for name in ("state_dict.bin", "compression_state_dict.bin")],
        ("audiocraft", "text_encoder/config.json"),
    ],
)
def test_files_of_others_are_not_overwritten(folders: dict[str, Path], format: Any, name: str, tmp_path: Path) -> None:
    """A file of the user, or a downloaded model, is named before anything is written; a saved model is replaced."""
    model = MusicGen.from_pretrained(folders["mono"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"model_type": "mine"}')
    with pytest.raises(ValueError, match=f"{Path(name).name} exists, and was not written by this library"):
        model.save_pretrained(tmp_path, format=format)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [Path(name).name]
    (tmp_path / name).unlink()
    for _ in range(2):
        model.save_pretrained(tmp_path, format=format)


@pytest.mark.slow
def test_sharded_weights_load(folders: dict[str, Path], tmp_path: Path) -> None:
    """Large models are published in several safetensors files."""
    oracle(folders["mono"]).save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["mono"] / name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(MusicGen.from_pretrained(folders["mono"]), MusicGen.from_pretrained(tmp_path))


@pytest.mark.slow
def test_training_checkpoint_of_audiocraft_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights may be below `best_state.model`."""
    model = MusicGen.from_pretrained(folders["mono"])
    write_audiocraft_files(tmp_path, oracle(folders["mono"]), nested=True)
    other = MusicGen.from_pretrained(tmp_path, text_conditioner=model.text_conditioner)
    assert torch.equal(
        weights(other)["transformer.heads.1.weight"].half(), weights(model)["transformer.heads.1.weight"].half()
    )


@pytest.mark.slow
def test_old_names_of_attention_load(folders: dict[str, Path], tmp_path: Path) -> None:
    """Audiocraft names attention `mha` without its own attention."""
    model = MusicGen.from_pretrained(folders["mono"])
    write_audiocraft_files(tmp_path, oracle(folders["mono"]), old_names=True)
    other = MusicGen.from_pretrained(tmp_path, text_conditioner=model.text_conditioner)
    name = "transformer.transformer.blocks.1.cross.to_kv.weight"
    assert torch.equal(weights(other)[name], weights(model)[name].half().float())


class _Call:
    """An object whose pickle calls a function."""

    def __reduce__(self) -> Any:
        return print, ("code of the file ran",)


@pytest.mark.parametrize("file", [pytest.param("state_dict.bin", marks=pytest.mark.slow), "compression_state_dict.bin"])
def test_hostile_files_are_refused(folders: dict[str, Path], tmp_path: Path, file: str, capsys: Any) -> None:
    """No code of a file runs."""
    write_audiocraft_files(tmp_path, oracle(folders["mono"]))
    torch.save({"best_state": {"x": _Call()}, "xp.cfg": "a: 1"}, tmp_path / file)
    with pytest.raises(ValueError, match="is not data"):
        MusicGen.from_pretrained(tmp_path, text_conditioner=MusicGen.from_pretrained(folders["mono"]).text_conditioner)
    (tmp_path / file).write_bytes(pickle.dumps(_Call()))
    with pytest.raises(ValueError, match="refused|not a checkpoint|cannot"):
        MusicGen.from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("transformer_lm", {"positional_embedding": "rope"}, "positional_embedding"),
        pytest.param("transformer_lm", {"qk_layer_norm": True}, "qk_layer_norm", marks=pytest.mark.slow),
        pytest.param("transformer_lm", {"num_layers": 3}, "missing", marks=pytest.mark.slow),
        pytest.param("codebooks_pattern", {"modeling": "parallel"}, "delays", marks=pytest.mark.slow),
        pytest.param("fuser", {"cross": [], "sum": ["description"]}, "fuser", marks=pytest.mark.slow),
        pytest.param("conditioners", {"style": {"model": "style"}}, "conditioners", marks=pytest.mark.slow),
    ],
)
def test_unsupported_settings_are_named(
    folders: dict[str, Path], tmp_path: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    """The message names the setting."""
    yaml = pytest.importorskip("yaml")
    model = MusicGen.from_pretrained(folders["mono"])
    write_audiocraft_files(tmp_path, oracle(folders["mono"]))
    content = torch.load(tmp_path / "state_dict.bin", weights_only=True)
    settings = yaml.safe_load(content["xp.cfg"])
    settings[section] |= changes
    torch.save(content | {"xp.cfg": yaml.safe_dump(settings)}, tmp_path / "state_dict.bin")
    with pytest.raises(ValueError, match=message):
        MusicGen.from_pretrained(tmp_path, text_conditioner=model.text_conditioner)


def test_unsupported_config_of_transformers_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """A scaled embedding or another activation is refused."""
    write_musicgen(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder"]["activation_function"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="activation_function"):
        MusicGen.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no MusicGen"):
        MusicGen.from_pretrained(tmp_path.parent)


def test_audiogen_loads_with_its_defaults(folders: dict[str, Path]) -> None:
    """AudioGen is the same class with other lengths."""
    model = AudioGen.from_pretrained(folders["audiogen"])
    assert type(model) is AudioGen
    assert model.sample_hz == 16000
    assert model.generate(seconds=0.1, seeds=0).waves[0].shape == (1600,)
