import argparse
import random
import re
import subprocess
import sys
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans

from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
from audiolm_pytorch.semantic.pretrained.fairseq import (
    FairseqCheckpoint,
    conv_layers_of,
    hubert_from_fairseq,
    read_fairseq,
)
from tests.helpers.hostile_files import peak_bytes
from tests.helpers.published_files import (
    hubert_settings,
    hubert_state,
    tiny_hubert,
    write_hubert_checkpoint,
    write_kmeans,
)
from tests.helpers.quick import only_quick

pytest.importorskip("transformers")

LAYOUTS = {
    "dictionaries": {},
    "omegaconf": {"omegaconf": True},
    "namespace": {"args": True},
    "before_torch_1_6": {"legacy": True},
}
VARIANTS = {"base": {}, "large": {"large": True}}


def same_weights(one, other):
    """Whether two models have the same parameters under the same names."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_memory(model, **changes):
    """A checkpoint as from `read_fairseq`, with changed settings of the model (None = missing)."""
    settings = hubert_settings(model)
    said = {name: value for name, value in (settings["model"] | changes).items() if value is not None}
    return FairseqCheckpoint(dict(hubert_state(model)), said, settings["task"], "a.pt")


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("variant", only_quick(VARIANTS, ["base"]))
def test_hubert_comes_back(tmp_path, layout, variant):
    """The model built from fairseq's layout has every parameter and every hidden state of the one that was written."""
    model = tiny_hubert(num_layers=3, **VARIANTS[variant])
    checkpoint = read_fairseq(write_hubert_checkpoint(tmp_path / "a.pt", model, **LAYOUTS[layout]))
    made = hubert_from_fairseq(checkpoint)
    assert same_weights(made, model) and not made.training
    wave = torch.randn(2, 4000)
    with torch.no_grad():
        got, expected = (each(wave, output_hidden_states=True).hidden_states for each in (made, model))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert checkpoint.normalise_wave is (variant == "large") and checkpoint.sample_hz == 16000
    assert made.config.do_stable_layer_norm is made.config.conv_bias is (variant == "large")
    assert made.config.feat_extract_norm == ("layer" if variant == "large" else "group")
    with torch.no_grad():  # masking is off, even in training
        assert made.config.apply_spec_augment is False


def test_weights_are_what_was_written(tmp_path):
    """All tensors of the `model` entry come back bit for bit under fairseq's names, those of pretraining too."""
    model = tiny_hubert(num_layers=2)
    expected = hubert_state(model)
    got = read_fairseq(write_hubert_checkpoint(tmp_path / "a.pt", model)).weights
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert {"label_embs_concat", "final_proj.weight", "mask_emb", "encoder.pos_conv.0.weight_g"} <= got.keys()
    assert got["label_embs_concat"].shape[0] == 504


@pytest.mark.slow
def test_every_weight_has_its_own_place():
    """A change of any used weight in the checkpoint changes the features, so no weight is lost."""
    model = tiny_hubert(num_layers=2)
    wave = torch.randn(1, 3000)
    features = model(wave).last_hidden_state
    unused = ("final_proj", "label_embs_concat", "mask_emb")
    # a bias of the keys shifts all scores of a query alike
    silent = re.compile(r".*k_proj\.bias")
    for name, tensor in hubert_state(model).items():
        checkpoint = in_memory(model)
        checkpoint.weights[name] = tensor + torch.randn(tensor.shape) * 0.5
        changed = hubert_from_fairseq(checkpoint)(wave).last_hidden_state
        is_used = not name.startswith(unused) and not silent.fullmatch(name)
        assert torch.allclose(changed, features, atol=1e-5) is not is_used, name


@pytest.mark.parametrize("wanted", ["weight_g", "original"])
def test_weight_norm_under_both_names(monkeypatch, wanted):
    """Weight norm fills a model of transformers that has its old or its new names."""
    model = tiny_hubert(num_layers=1)
    checkpoint = in_memory(model)
    if wanted == "weight_g":
        monkeypatch.delattr(torch.nn.utils.parametrizations, "weight_norm")
    made = hubert_from_fairseq(checkpoint)
    assert ("encoder.pos_conv_embed.conv.weight_g" in made.state_dict()) is (wanted == "weight_g")
    wave = torch.randn(1, 3000)
    torch.testing.assert_close(made(wave).last_hidden_state, model(wave).last_hidden_state)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_silent_settings_are_seen_in_the_shapes(variant):
    """Sizes that are missing in the settings are those of the weights."""
    model = tiny_hubert(num_layers=3, **VARIANTS[variant])
    sizes = ["encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "conv_bias", "conv_pos", "conv_pos_groups"]
    silent = dict.fromkeys([*sizes, "extractor_mode", "activation_fn"])
    assert same_weights(hubert_from_fairseq(in_memory(model, **silent)), model)


@pytest.mark.slow
def test_half_precision_becomes_float32(tmp_path):
    """Weights that were stored in float16 fill a float32 model."""
    model = tiny_hubert(num_layers=1)
    weights = {name: tensor.half() for name, tensor in hubert_state(model).items()}
    made = hubert_from_fairseq(read_fairseq(write_hubert_checkpoint(tmp_path / "a.pt", model, weights=weights)))
    assert {tensor.dtype for tensor in made.parameters()} == {torch.float32}
    assert torch.equal(made.encoder.layer_norm.weight, weights["encoder.layer_norm.weight"].float())


def test_opening_leaves_random_numbers_alone():
    """Building the model does not change the state of the global random generator."""
    checkpoint = in_memory(tiny_hubert(num_layers=1))
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    hubert_from_fairseq(checkpoint)
    assert torch.equal(torch.randn(3), expected)


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: without(w, "encoder.layers.1.fc2.bias"), "missing.*layers.1.feed_forward.output_dense.bias"),
        (lambda w: without(w, "encoder.pos_conv.0.weight_g"), "missing.*pos_conv"),
        (lambda w: w | {"encoder.odd": torch.ones(1)}, "not known.*encoder.odd"),
        (lambda w: w | {"layer_norm.bias": torch.ones(3)}, r"another shape.*layer_norm.bias \(3,\) instead of"),
        (lambda w: w | {"encoder.pos_conv.0.weight_v": torch.ones(())}, "another shape"),
        (lambda w: w | {"encoder.layer_norm.weight": torch.ones(2**14)}, "settings need a model of"),
        (lambda w: {"w2v_encoder.w2v_model." + name: tensor for name, tensor in w.items()}, "fine-tuned"),
        (lambda w: {"feature_extractor.x": torch.ones(1)}, "has no HuBERT"),
    ],
)
def test_wrong_weights(tmp_path, change, words):
    """Missing, unknown and misshapen weights raise an error of one line with the file and the weights."""
    model = tiny_hubert(num_layers=2)
    path = write_hubert_checkpoint(tmp_path / "a.pt", model, weights=change(hubert_state(model)))
    with pytest.raises(ValueError, match=words) as caught:
        hubert_from_fairseq(read_fairseq(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_name": "wav2vec2"}, "has a model 'wav2vec2'"),
        ({"activation_fn": "swish"}, "swish"),
        ({"extractor_mode": "conformer"}, "conformer"),
        ({"encoder_attention_heads": 3}, "no valid settings.*num_heads"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads"),
        ({"encoder_layers": 10**9}, "encoder_layers"),
        ({"encoder_layers": 2}, "encoder_layers is 2, but the file has weights of 1 "),
        ({"_name": "\x1b[2J\n"}, r"has a model '\\x1b\[2J\\n'"),
        ({"conv_feature_layers": {"a": 1}}, "conv_feature_layers a dict"),
        ({"conv_feature_layers": [(1, 1, 1)] * 2 + [1]}, "conv_feature_layers a list"),
        ({"encoder_layers": "12"}, "encoder_layers"),
        ({"layer_norm_first": "yes"}, "layer_norm_first"),
        ({"conv_feature_layers": "__import__('os').system('x')"}, "conv_feature_layers"),
        ({"conv_feature_layers": "[(8,10,5)]"}, "not known"),
    ],
)
def test_wrong_settings(changes, words):
    """Settings that no HuBERT has raise an error of one line."""
    with pytest.raises(ValueError, match=words) as caught:
        hubert_from_fairseq(in_memory(tiny_hubert(num_layers=1), **changes))
    assert "a.pt" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["encoder_layers", "activation_fn", "conv_feature_layers", "layer_norm_first"])
def test_settings_are_not_written_out(name):
    """Messages hold only the type of nested settings and large numbers, which would be long as text."""
    nested = []
    for _ in range(18):
        nested = [nested, nested]
    for value in (nested, {"a": nested}, 10**5000):
        checkpoint = in_memory(tiny_hubert(num_layers=1), **{name: value})

        def refused(checkpoint=checkpoint):
            with pytest.raises(ValueError, match=f"{name}.* an? (list|dict|int)") as caught:
                hubert_from_fairseq(checkpoint)
            assert len(str(caught.value)) < 300

        assert peak_bytes(refused) < 2**19


def test_each_namespace_keeps_its_own_settings(tmp_path):
    """Settings of task and model in two Namespaces are kept apart."""
    path, settings = tmp_path / "a.pt", {"task": {"sample_rate": 8000}, "model": {"encoder_layers": 3}}
    cfg = {name: argparse.Namespace(**said) for name, said in settings.items()}
    torch.save({"model": {"a": torch.ones(1)}, "cfg": cfg}, path)
    checkpoint = read_fairseq(path)
    assert {"task": checkpoint.task, "model": checkpoint.model} == settings


def test_strange_weights_are_refused(tmp_path):
    """Weights with unprintable, long or non-text names are refused, and so are many weights in one storage."""
    path, tensor = tmp_path / "a.pt", torch.ones(2)
    for weights, words in (
        ({"\x1b[2J\n": tensor}, "not the name of a tensor"),
        ({"x" * 1000: tensor}, "not the name of a tensor"),
        ({(1, 2): tensor}, "a tuple as a key"),
        ({1: tensor}, "'1' in 'model'"),
        ({f"encoder.layers.{number}.x": tensor for number in range(5)}, "share the same bytes"),
    ):
        torch.save({"model": weights}, path)
        with pytest.raises(ValueError, match=words) as caught:
            read_fairseq(path)
        assert str(path) in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400
    torch.save({"model": {"one": tensor, "other": tensor}}, path)
    assert read_fairseq(path).weights.keys() == {"one", "other"}


def test_checkpoints_without_settings_or_weights(tmp_path):
    """Weights alone are not enough for a HuBERT; a file without weights is no checkpoint of fairseq."""
    bare = replace(in_memory(tiny_hubert(num_layers=1)), model={})
    with pytest.raises(ValueError, match="entries cfg and args are missing"):
        hubert_from_fairseq(bare)
    path = tmp_path / "a.pt"
    for value in ({"state_dict": {}}, [1, 2], {"model": {}}, {"model": {"a": "text"}}, torch.ones(2)):
        torch.save(value, path)
        with pytest.raises(ValueError, match="not a checkpoint of|a str where a tensor belongs") as caught:
            read_fairseq(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_references_between_settings_count_as_silent(tmp_path):
    """Settings that omegaconf did not resolve ("${task.rate}", "???") count as missing."""
    model = tiny_hubert(num_layers=1)
    settings = hubert_settings(model)
    settings["model"] |= {"encoder_layers": "${task.layers}", "encoder_embed_dim": "???"}
    settings["task"]["sample_rate"] = "${rate}"
    path = write_hubert_checkpoint(tmp_path / "a.pt", model, settings=settings, omegaconf=True)
    checkpoint = read_fairseq(path)
    assert checkpoint.model["encoder_layers"] is None and checkpoint.sample_hz == 16000
    assert same_weights(hubert_from_fairseq(checkpoint), model)


def test_convolution_settings():
    """Descriptions of convolutions equal Python's evaluation of them; any other text raises an error and is not run."""
    rng = random.Random(0)
    for _ in range(50):
        terms = []
        for _ in range(rng.randint(1, 3)):
            layers = [tuple(rng.randint(1, 600) for _ in range(3)) for _ in range(rng.randint(1, 2))]
            terms.append(str(layers) + rng.choice(["", " * 2", "*4"]))
        text = " + ".join(terms)
        assert conv_layers_of(text) == [list(layer) for layer in eval(text)]
    published = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    assert conv_layers_of(published) == [[512, 10, 5]] + [[512, 3, 2]] * 4 + [[512, 2, 2]] * 2
    wrong = [
        "",
        "[]",
        "[(1,2)]",
        "[(1,2,3)] * 99",
        "[(0,1,1)]",
        "[(1,2,3)] - [(1,2,3)]",
        "1",
        "(" * 500,
        [1],
        [[1, 2, "3"]],
    ]
    for setting in wrong:
        with pytest.raises(ValueError, match="conv_feature_layers"):
            conv_layers_of(setting)


@pytest.mark.slow
@pytest.mark.parametrize("compress", [0, 3, "gzip", "bz2", "lzma", "xz", ("zlib", 9)])
def test_centroids_come_back(tmp_path, compress, rng):
    """Centroids of every type and order, in every protocol and compression, as joblib itself reads them."""
    path = tmp_path / "k.bin"
    for protocol in (None, 2, 3, 5):
        for dtype in ("f4", "f8", ">f4"):
            for order in "CF":
                centroids = np.asarray(rng.normal(size=(12, 5)).astype(dtype), order=order)
                write_kmeans(path, centroids, compress=compress, protocol=protocol)
                got = read_centroids(path)["centroids"]
                assert got.dtype == torch.float32 and got.is_contiguous()
                expected = joblib.load(path).cluster_centers_
                np.testing.assert_array_equal(got.numpy(), expected.astype("f4"))
                np.testing.assert_array_equal(got.numpy(), centroids.astype("f4"))


def test_kmeans_of_older_joblib(tmp_path, rng, monkeypatch):
    """Files without padding (joblib before 1.2) and of the joblib inside scikit-learn are read."""
    path, centroids = tmp_path / "k.bin", rng.normal(size=(6, 3))
    wrapper = joblib.numpy_pickle.NumpyArrayWrapper
    monkeypatch.setattr(wrapper, "safe_get_numpy_array_alignment_bytes", lambda self: None)
    created = joblib.numpy_pickle.NumpyPickler._create_array_wrapper

    def without_padding(self, array):
        made = created(self, array)
        del made.numpy_array_alignment_bytes
        return made

    monkeypatch.setattr(joblib.numpy_pickle.NumpyPickler, "_create_array_wrapper", without_padding)
    write_kmeans(path, centroids)
    np.testing.assert_array_equal(read_centroids(path)["centroids"].numpy(), centroids.astype("f4"))
    write_kmeans(path, centroids, protocol=2)
    old, older = b"cjoblib.numpy_pickle\nNumpy", b"csklearn.externals.joblib.numpy_pickle\nNumpy"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, older))
    np.testing.assert_array_equal(read_centroids(path)["centroids"].numpy(), centroids.astype("f4"))


def test_full_kmeans_is_read_too(tmp_path, rng):
    """A fitted KMeans is read, also after a second dump from a memory map."""
    kmeans = KMeans(3, n_init=1, random_state=0).fit(rng.normal(size=(40, 4)).astype("f4"))
    joblib.dump(kmeans, tmp_path / "a.bin")
    joblib.dump(joblib.load(tmp_path / "a.bin", mmap_mode="r"), tmp_path / "b.bin")
    for name in ("a.bin", "b.bin"):
        np.testing.assert_array_equal(read_centroids(tmp_path / name)["centroids"].numpy(), kmeans.cluster_centers_)


@pytest.mark.parametrize(
    ("centers", "words"),
    [
        (np.zeros(3), r"\[k, d\].*\(3,\)"),
        (np.zeros((2, 2, 2)), r"\[k, d\].*\(2, 2, 2\)"),
        (np.zeros((0, 4)), r"\[k, d\].*\(0, 4\)"),
        (np.full((2, 2), np.nan), "finite"),
        (np.zeros((2, 2), dtype=int), "floats are needed"),
        ([[1.0]], "without cluster_centers_"),
        (None, "without cluster_centers_"),
    ],
)
def test_wrong_centroids(tmp_path, centers, words):
    """Centroids that are missing, not finite, or of another shape or type raise an error of one line."""
    path = tmp_path / "k.bin"
    write_kmeans(path, np.eye(3), cluster_centers_=centers)
    with pytest.raises(ValueError, match=words) as caught:
        read_centroids(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_objects_in_a_kmeans_file(tmp_path):
    """Other objects raise an error with their type; a checkpoint is not read as a k-means, nor the reverse."""
    path = tmp_path / "k.bin"
    for value, words in (({"a": 1}, "dict"), (np.eye(3), "ndarray"), (KMeans(3), "KMeans without cluster_centers_")):
        joblib.dump(value, path)
        with pytest.raises(ValueError, match=words):
            read_centroids(path)
    checkpoint = write_hubert_checkpoint(tmp_path / "a.pt", tiny_hubert(num_layers=1))
    with pytest.raises(ValueError, match=r"a\.pt"):
        read_centroids(checkpoint)
    write_kmeans(path, np.eye(3))
    with pytest.raises(ValueError, match="not a checkpoint of torch"):
        read_fairseq(path)


def test_centroids_as_safetensors(tmp_path):
    """Centroids with and without normalisation come back from a safetensors file as float32."""
    path = tmp_path / "c.safetensors"
    tensors = {"centroids": torch.randn(5, 3), "mean": torch.randn(3), "std": torch.rand(3) + 0.1}
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    found = read_centroids(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    save_file({"centroids": tensors["centroids"]}, path)
    assert read_centroids(str(path)).keys() == {"centroids"}


def test_wrong_safetensors(tmp_path):
    """Missing and damaged files, other tensors and other shapes raise an error of one line."""
    path = tmp_path / "c.safetensors"
    for tensors in (
        None,
        {"weight": torch.ones(2)},
        {"centroids": torch.ones(2)},
        {"centroids": torch.ones(2, 2), "x": torch.ones(1)},
    ):
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(ValueError) as caught:
            read_centroids(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="safetensors"):
        read_centroids(path)


@pytest.mark.slow
def test_published_files_are_read_without_their_makers(tmp_path, rng):
    """Both files are read without fairseq, omegaconf, torchaudio, joblib and scikit-learn."""
    model, centroids = tiny_hubert(num_layers=2), rng.normal(size=(7, 16))
    write_hubert_checkpoint(tmp_path / "a.pt", model, omegaconf=True)
    write_kmeans(tmp_path / "k.bin", centroids, compress="zlib")
    program = f"""
import sys
from importlib.machinery import PathFinder
names = {{"fairseq", "omegaconf", "torchaudio", "sklearn", "joblib"}}
class Wall(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in names else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Wall
from safetensors.torch import save_file
from audiolm_pytorch.semantic.pretrained.fairseq import hubert_from_fairseq, read_fairseq
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
model = hubert_from_fairseq(read_fairseq({str(tmp_path / "a.pt")!r}))
save_file({{**model.state_dict(), **read_centroids({str(tmp_path / "k.bin")!r})}}, {str(tmp_path / "out")!r})
assert not names & {{name.split(".")[0] for name in sys.modules}}
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
    got = load_file(tmp_path / "out")
    np.testing.assert_array_equal(got.pop("centroids").numpy(), centroids.astype("f4"))
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())
