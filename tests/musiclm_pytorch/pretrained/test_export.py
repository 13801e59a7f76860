import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.saving import model_folder as folders
from audiolm_pytorch.saving.files import read_json, write_json
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.saving.sources import bundled_models
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.semantic.pretrained import open_encoder
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.export import export_musiclm
from musiclm_pytorch.pretrained.parts import PARTS

SETTINGS = {
    "sampling": {"semantic": {"temperature": 0.7, "top_k": 5}, "coarse": {"guidance_scale": 2.0}},
    "num_levels": 1,
}
REQUEST = {"num_samples": 2, "seconds": 0.5, "seed": 3, "return_all": True}


@pytest.fixture
def model(micro_run, tmp_path):
    """A copy of the micro model that a test may change."""
    return shutil.copytree(micro_run / "model", tmp_path / "model")


def change_card(model, **fields):
    write_json(model / "musiclm.json", {**read_json(model / "musiclm.json"), **fields})


@pytest.mark.slow
def test_exported_model_generates_the_same(micro_run, tmp_path):
    """The model of the run and its export in half precision generate equal waves."""
    num_bytes = export_musiclm(micro_run, tmp_path / "shipped")
    files = [file for file in (tmp_path / "shipped").rglob("*") if file.is_file()]
    assert num_bytes == sum(file.stat().st_size for file in files) < 1_000_000
    for name in PARTS:
        weights = load_file(tmp_path / "shipped" / name / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} <= {torch.float16, torch.int64, torch.bool}
    ours = MusicLM.from_pretrained(micro_run / "model")("a low tone", **REQUEST)
    shipped = MusicLM.from_pretrained(tmp_path / "shipped")("a low tone", **REQUEST)
    assert torch.equal(ours.waves, shipped.waves) and torch.equal(ours.scores, shipped.scores)


def test_trained_conditioning_tables_are_in_the_model(micro_run):
    """The quantizer of the model has the conditioning tables that were trained with the stages."""
    assembled = MusicLM.from_pretrained(micro_run / "model").mulan_embed_quantizer
    for stage in ("semantic", "coarse", "fine"):
        trained = load_file(micro_run / stage / "conditioning_table.safetensors")["weight"]
        assert torch.equal(assembled.table(stage).weight, trained.half().float())


@pytest.mark.slow
def test_settings_of_the_card_are_the_defaults(micro_run, tmp_path):
    """Sampling settings and the number of levels are stored in the model."""
    export_musiclm(micro_run, tmp_path / "chosen", SETTINGS)
    musiclm = MusicLM.from_pretrained(tmp_path / "chosen")
    sampling = musiclm.audio_lm.sampling
    assert (sampling["semantic"].temperature, sampling["semantic"].top_k) == (0.7, 5)
    assert sampling["coarse"].guidance_scale == 2.0 and sampling["fine"].temperature == 0.4
    assert musiclm.num_levels == 1
    plain = MusicLM.from_pretrained(micro_run)
    # The exported settings replace all sampling settings of the run.
    sampling = {name: vars(settings) for name, settings in sampling.items()}
    said = plain("a low tone", **REQUEST, sampling=sampling, num_levels=1)
    assert torch.equal(musiclm("a low tone", **REQUEST).waves, said.waves)
    assert not torch.equal(plain("a low tone", **REQUEST).waves, said.waves)
    export_musiclm(tmp_path / "chosen", tmp_path / "again")
    assert read_json(tmp_path / "again" / "musiclm.json")["sampling"] == SETTINGS["sampling"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"num_levels": 99},
        {"num_levels": "two"},
        {"sampling": {"corse": {"temperature": 1.0}}},
        {"sampling": {"coarse": {"temprature": 1.0}}},
        {"sampling": {"coarse": {"temperature": -1.0}}},
        {"sampling": {"coarse": {"temperature": "hot"}}},
    ],
    ids=json.dumps,
)
def test_invalid_settings_are_refused(micro_run, model, tmp_path, settings):
    """Invalid settings raise an error in the export, and when a model is loaded."""
    with pytest.raises(ValueError, match="are not compatible"):
        export_musiclm(micro_run, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    change_card(model, **settings)
    with pytest.raises(ValueError, match="are not compatible"):
        MusicLM.from_pretrained(model)


@pytest.mark.parametrize("file", ["codec/config.json", "fine/model.safetensors", "quantizer"])
def test_missing_file_is_named(model, file):
    """The error for an incomplete copy names the missing file."""
    shutil.rmtree(model / file) if (model / file).is_dir() else (model / file).unlink()
    with pytest.raises(ValueError, match=f"lacks .*{file}.*copy"):
        MusicLM.from_pretrained(model)


def test_damaged_or_replaced_files_are_named(model):
    """Truncated weights, parts of another class and cards of another format raise an error."""
    weights = model / "fine" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="fine/model.safetensors has changed since it was written"):
        MusicLM.from_pretrained(model)
    shutil.rmtree(model / "fine")
    shutil.copytree(model / "coarse", model / "fine")
    with pytest.raises(ValueError, match="fine holds a CoarseTransformer, but a FineTransformer is needed"):
        MusicLM.from_pretrained(model)
    change_card(model, format_version=2)
    with pytest.raises(ValueError, match=r"musiclm.json has format_version 2, but this release of the library reads 1"):
        MusicLM.from_pretrained(model)
    (model / "musiclm.json").write_text("[]")
    with pytest.raises(ValueError, match="format_version None"):
        MusicLM.from_pretrained(model)


def exchange(model, part):
    """Put another part of the same sizes in a model's folder."""
    module = load_module(model / part)
    with torch.no_grad():
        for weight in module.state_dict().values():
            if weight.is_floating_point():
                weight.mul_(1.5)
    save_module(module, model / part)
    return module.fingerprint()


@pytest.mark.parametrize(
    ("part", "kind", "stage"),
    [
        ("codec", "acoustic", "coarse"),
        ("semantic_tokenizer", "semantic", "semantic"),
        ("quantizer", "conditioner", "semantic"),
    ],
)
def test_parts_of_different_models_are_refused(model, tmp_path, part, kind, stage):
    """Stages refuse another codec, tokenizer or quantizer than those of their training."""
    known = read_json(model / stage / "config.json")["config"]["token_fingerprints"][kind]
    assert load_module(model / part).fingerprint() == known
    other = exchange(model, part)
    codes = "conditioning codes" if kind == "conditioner" else f"{kind} tokens"
    message = f"are not compatible: the {codes} .* {stage} transformer was trained with {known}, .* is {other}"
    with pytest.raises(ValueError, match=message):
        MusicLM.from_pretrained(model)
    with pytest.raises(ValueError, match=message):
        export_musiclm(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_model_of_an_older_release_is_loaded(model, tmp_path):
    """Stages without fingerprints accept any parts, and the export adds no fingerprints."""
    for stage in ("semantic", "coarse", "fine"):
        config = read_json(model / stage / "config.json")
        del config["config"]["token_fingerprints"]
        write_json(model / stage / "config.json", config)
    exchange(model, "codec")
    exchange(model, "quantizer")
    assert MusicLM.from_pretrained(model)("a low tone", **REQUEST).waves.isfinite().all()
    export_musiclm(model, tmp_path / "out")
    assert "token_fingerprints" not in read_json(tmp_path / "out" / "coarse" / "config.json")["config"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind"), [("codec", "acoustic"), ("semantic_tokenizer", "semantic"), ("quantizer", "conditioner")]
)
def test_what_half_precision_would_change_is_exported_as_it_is(model, tmp_path, part, kind):
    """A part whose fingerprint would change in half precision is exported without rounding."""
    module = load_module(model / part)
    with torch.no_grad():
        for name, weight in module.state_dict().items():
            if weight.is_floating_point() and not name.startswith("mulan."):
                weight.mul_(1 + 1e-5)
    save_module(module, model / part)
    for stage in ("semantic", "coarse", "fine"):
        config = read_json(model / stage / "config.json")
        if kind in config["config"]["token_fingerprints"]:
            config["config"]["token_fingerprints"][kind] = module.fingerprint()
        write_json(model / stage / "config.json", config)
    export_musiclm(model, tmp_path / "out")
    assert load_module(tmp_path / "out" / part).fingerprint() == module.fingerprint()
    ours, shipped = (
        MusicLM.from_pretrained(folder)("a low tone", **REQUEST).waves for folder in (model, tmp_path / "out")
    )
    assert torch.equal(ours, shipped)
    stored = {name: load_file(tmp_path / "out" / name / "model.safetensors").values() for name in PARTS}
    assert [name for name, tensors in stored.items() if any(t.dtype == torch.float32 for t in tensors)] == [part]


def test_tables_of_a_quantizer_may_be_rounded(model, tmp_path):
    """The fingerprint of the quantizer does not include its tables, so they are exported in half precision."""
    quantizer = load_module(model / "quantizer")
    with torch.no_grad():
        quantizer.tables["coarse"].weight.mul_(1 + 1e-5)
    save_module(quantizer, model / "quantizer")
    export_musiclm(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "quantizer" / "model.safetensors").values()
    assert all(tensor.dtype != torch.float32 for tensor in stored)
    assert MusicLM.from_pretrained(tmp_path / "out").mulan_embed_quantizer.fingerprint() == quantizer.fingerprint()


@pytest.fixture
def packaged(model, tmp_path, monkeypatch):
    """A package that bundles the codec and semantic tokenizer of the model, another codec, and a model."""
    folder = tmp_path / "packaged"
    shutil.copytree(model / "codec", folder / "codec_micro")
    shutil.copytree(model / "semantic_tokenizer", folder / "semantic_micro")
    exchange_copy = shutil.copytree(model / "codec", folder / "codec_another")
    exchange(exchange_copy.parent, exchange_copy.name)
    shutil.copytree(model, folder / "whole")
    monkeypatch.setattr(folders, "bundled_models", lambda: {path.name: path for path in sorted(folder.iterdir())})
    return folder


SHARED = {"codec": "codec_micro", "semantic_tokenizer": "semantic_micro"}


@pytest.mark.slow
def test_parts_of_the_package_are_loaded(model, packaged, tmp_path):
    """A card may name parts that the package has: the model generates the same, and its export has all parts."""
    shared = tmp_path / "shared"
    export_musiclm(model, shared, bundled=SHARED)
    assert read_json(shared / "musiclm.json")["bundled_parts"] == SHARED
    assert not any((shared / part).exists() for part in SHARED)
    waves = [MusicLM.from_pretrained(folder)("a low tone", **REQUEST).waves for folder in (model, shared)]
    assert torch.equal(*waves)
    assert export_musiclm(shared, tmp_path / "exported") == export_musiclm(model, tmp_path / "whole")
    assert "bundled_parts" not in read_json(tmp_path / "exported" / "musiclm.json")
    assert torch.equal(MusicLM.from_pretrained(tmp_path / "exported")("a low tone", **REQUEST).waves, waves[0])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"codec": "codec_24khz"},
            "bundled module 'codec_24khz', but.* has codec_another, codec_micro, semantic_micro;",
        ),
        ({"codec": "../packaged/codec_micro"}, "bundled module '../packaged/codec_micro', but"),
        ({"codec": "whole/codec"}, "bundled module 'whole/codec', but"),
        ({"codec": "whole"}, "bundled module 'whole', but"),
        ({"codec": ["codec_micro"]}, "install the release that wrote the model, or export the model again"),
        ({"codek": "codec_micro"}, "must be a dict with keys from codec, semantic_tokenizer, quantizer"),
        (["codec_micro"], "must be a dict with keys from codec"),
        ({"codec": "semantic_micro"}, "semantic_micro holds a KMeansTokenizer, but a Codec is needed"),
        ({"codec": "codec_another"}, "acoustic tokens have different fingerprints"),
    ],
    ids=str,
)
def test_parts_that_the_package_lacks_are_named(model, packaged, named, message):
    """Only plain names of bundled parts are accepted, and the error lists the available ones."""
    change_card(model, bundled_parts=named)
    with pytest.raises(ValueError, match=message):
        MusicLM.from_pretrained(model)


def test_only_equal_parts_are_left_out_of_an_export(model, packaged, tmp_path):
    """A bundled module with other weights, and one that is missing, raise an error, and nothing is written."""
    with pytest.raises(ValueError, match="the codec is not the bundled module codec_another: .* differ; store"):
        export_musiclm(model, tmp_path / "out", bundled={"codec": "codec_another"})
    with pytest.raises(ValueError, match="got --bundled codec codec_24khz; choose one of codec_another, "):
        export_musiclm(model, tmp_path / "out", bundled={"codec": "codec_24khz"})
    assert not (tmp_path / "out").exists()


def test_names_and_folders_of_models(micro_run, tmp_path):
    """A model is found by its folder or by the folder of its run; other names raise an error."""
    assert MusicLM.find(micro_run) == MusicLM.find(micro_run / "model") == micro_run / "model"
    with pytest.raises(ValueError, match="there is no folder nobody; .* bundled model: .*tiny"):
        MusicLM.find("nobody")
    with pytest.raises(
        ValueError, match=r"no complete MusicLM .musiclm.json is missing.; pass .* finished training run"
    ):
        MusicLM.find(tmp_path)


def test_export_destroys_nothing(micro_run, tmp_path):
    """A folder with other files is refused; an older model is replaced."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="photos contains files that do not belong to a model"):
        export_musiclm(micro_run, tmp_path / "photos")
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["me.jpg"]
    for own_file in ("codec/config.json", "musiclm.json", "fine/model.safetensors"):  # not those of a model
        file = tmp_path / own_file.replace("/", "_") / own_file
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        with pytest.raises(ValueError, match="do(es)? not belong to a model"):
            export_musiclm(micro_run, tmp_path / own_file.replace("/", "_"))
        assert file.read_text() == "{}"
    assert export_musiclm(micro_run, tmp_path / "new") == export_musiclm(micro_run, tmp_path / "new")


def test_an_interrupted_export_leaves_the_old_model(micro_run, model, monkeypatch):
    """A full disk or an interrupt, while parts are written or moved, leaves the old model and no other files."""
    (model / "README.md").write_text("about it")
    (model / "codec" / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    rename = type(model).rename

    def fail_in_the_third(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save_module(*arguments, **named)

    def fail_in_the_twentieth(source, target):
        calls.append(source)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return rename(source, target)

    for owner, name, fault in (
        (folders, "save_module", fail_in_the_third),
        (type(model), "rename", fail_in_the_twentieth),
    ):
        calls = []
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fault)
            with pytest.raises((OSError, KeyboardInterrupt)):
                export_musiclm(micro_run, model)
        assert {file: file.read_bytes() for file in model.rglob("*") if file.is_file()} == before
    export_musiclm(micro_run, model)
    assert read_json(model / "musiclm.json")["weights"] == "float16"
    assert (model / "README.md").read_text() == "about it" and (model / "codec" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_bundled_tokenizer_and_its_encoder_have_one_name():
    """The encoder is found in the tokenizer."""
    tokenizer = SemanticTokenizer.from_pretrained("semantic_16khz")
    ids = tokenizer(torch.zeros(1, 32_000), input_sample_hz=32_000)
    assert ids.shape == (1, 25) and 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.codebook_size
    assert open_encoder("semantic_16khz").depth == tokenizer.layer
    with pytest.raises(ValueError, match="semantic_16khz holds a KMeansTokenizer, but a Codec is needed"):
        Codec.from_pretrained("semantic_16khz")


@pytest.mark.slow
def test_bundled_stages_have_fingerprints():
    """The bundled stages have the fingerprints of the bundled tokenizers, quantizer and melody embedder."""
    folder = bundled_models()["tiny"]
    known = {
        "semantic": SemanticTokenizer.from_pretrained("semantic_16khz").fingerprint(),
        "acoustic": Codec.from_pretrained("codec_16khz").fingerprint(),
    }
    known["conditioner"] = load_module(folder / "quantizer").fingerprint()
    known["melody"] = load_module(folder / "melody").fingerprint()
    stages = {"semantic": ["semantic", "melody"], "coarse": ["semantic", "acoustic", "melody"], "fine": ["acoustic"]}
    for stage, kinds in stages.items():
        assert load_module(folder / stage).token_fingerprints == {kind: known[kind] for kind in [*kinds, "conditioner"]}
