import collections
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import joblib
import numpy as np
import pytest
import torch
from joblib.numpy_pickle import NumpyArrayWrapper

from audiolm_pytorch.saving import restricted_pickle
from audiolm_pytorch.saving.restricted_pickle import DataUnpickler, StandIn
from audiolm_pytorch.saving.torch_checkpoint import TorchCheckpoint
from audiolm_pytorch.semantic.pretrained import centroids
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
from audiolm_pytorch.semantic.pretrained.fairseq import read_fairseq
from tests.helpers.hostile_files import (
    LIVE,
    PACK,
    TRICKS,
    Call,
    Reference,
    TensorOf,
    TypeWithState,
    doubled,
    legacy_checkpoint,
    named,
    peak_bytes,
    pickled,
    places,
    protocol4,
    refusal,
    text,
    touch,
    written,
    zip_checkpoint,
)
from tests.helpers.published_files import (
    fairseq_classes,
    hubert_settings,
    tiny_hubert,
    write_hubert_checkpoint,
    write_kmeans,
)


@pytest.mark.parametrize("name", list(LIVE))
def test_python_would_run_it(name, tmp_path):
    """Python's unpickler runs the calls in these files, so the next test is meaningful."""
    marker = tmp_path / "marker"
    try:
        pickle.loads(LIVE[name](marker))
    except TypeError:
        pass  # after the call, what it gave cannot be used
    assert marker.exists()


@pytest.mark.parametrize("name", list(LIVE))
def test_calls_are_refused_and_nothing_runs(name, tmp_path):
    """os.system, eval and similar calls are refused in every file format, and nothing runs."""
    marker = tmp_path / "marker"
    for reader, path in places(tmp_path, LIVE[name](marker)):
        assert "refused" in refusal(reader, path)
        assert not marker.exists()


@pytest.mark.parametrize("name", list(TRICKS))
def test_tricks_are_refused(name, tmp_path):
    """Attribute paths, states of live objects, references and extensions are refused in every file format."""
    for reader, path in places(tmp_path, TRICKS[name]):
        refusal(reader, path)
    assert not hasattr(collections.OrderedDict, "__code__")


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_object_in_a_whole_checkpoint(tmp_path, legacy):
    """One call in the settings of a valid checkpoint is refused by name, and nothing runs."""
    model, marker = tiny_hubert(num_layers=1), tmp_path / "marker"
    settings = hubert_settings(model) | {"common": Call(os.system, touch(marker))}
    path = write_hubert_checkpoint(tmp_path / "a.pt", model, settings=settings, legacy=legacy)
    assert "system'" in refusal(read_fairseq, path) and not marker.exists()
    with fairseq_classes():
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("compress", [0, "zlib", "gzip", "bz2", "lzma", "xz"])
def test_hostile_object_in_a_whole_kmeans(tmp_path, compress):
    """One call, or an object array with one, in a valid k-means file is refused, and nothing runs."""
    marker, path = tmp_path / "marker", tmp_path / "k.bin"
    call = Call(os.system, touch(marker))
    hidden = np.empty(1, dtype=object)
    hidden[0] = call
    for value, words in ((call, "system'"), (hidden, "Python objects")):
        write_kmeans(path, np.eye(4), compress=compress, init=value)
        assert words in refusal(read_centroids, path) and not marker.exists()
        joblib.load(path)
        assert marker.exists()
        marker.unlink()


def test_object_array_in_a_checkpoint(tmp_path):
    """An object array with a call is refused; arrays of records and text stay stand-ins or are refused."""
    marker = tmp_path / "marker"
    hidden = np.empty(1, dtype=object)
    hidden[0] = Call(os.system, touch(marker))
    for reader, path in places(tmp_path, pickle.dumps({"model": hidden}, 2)):
        assert "refused" in refusal(reader, path)
    for value in (np.zeros(2, dtype=[("a", object)]), np.array(["text"]), np.zeros(2, dtype="M8[s]")):
        path = zip_checkpoint(tmp_path / "a.pt", pickle.dumps({"model": value}, 2))
        assert isinstance(TorchCheckpoint(path).content["model"], StandIn)
        write_kmeans(tmp_path / "k.bin", np.eye(4), init=value)
        assert "values are not numbers" in refusal(read_centroids, tmp_path / "k.bin")
    assert not marker.exists()


def test_types_that_turn_into_others(tmp_path):
    """A numeric dtype whose state turns it into a record type, or has an unknown byte order, is refused."""
    for state in (
        (3, "<", None, ("a",), {"a": ("f8", 0)}, 8, 8, 0),
        (3, "<", ("f8", (2,)), None, None, 16, 8, 0),
        (3, "O", None, None, None, -1, -1, 0),
    ):
        wrapper = NumpyArrayWrapper(np.ndarray, (1,), "C", TypeWithState(*state))
        (tmp_path / "k.bin").write_bytes(pickle.dumps(wrapper, 4) + bytes(100))
        assert re.search("values are not numbers|damaged", refusal(read_centroids, tmp_path / "k.bin"))


def test_torchscript_archive_is_refused(tmp_path):
    """A TorchScript archive, which is a program, is refused."""
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    assert "TorchScript" in refusal(TorchCheckpoint, path)


def test_tar_of_old_torch_is_refused(tmp_path):
    """The tar archive of torch before 0.4 is refused, since its loader writes files."""
    path = tmp_path / "a.pt"
    data = bytearray(1024)
    data[257:262] = b"ustar"
    path.write_bytes(data)
    assert "before 0.4" in refusal(TorchCheckpoint, path)


def test_reading_imports_nothing_that_is_named(tmp_path, monkeypatch):
    """Packages called fairseq and omegaconf are in the path, and reading does not import them."""
    marker = tmp_path / "marker"
    for package in ("fairseq", "omegaconf"):
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(written(marker))
    monkeypatch.syspath_prepend(tmp_path / "site")
    read_fairseq(write_hubert_checkpoint(tmp_path / "a.pt", tiny_hubert(num_layers=1), omegaconf=True))
    assert not marker.exists()
    __import__("fairseq")
    assert marker.exists()
    sys.modules.pop("fairseq")


def plain(rng, depth=4):
    """A random plain object."""
    kind = rng.randrange(10 if depth else 5)
    many = range(rng.randrange(4))
    match kind:
        case 0:
            return rng.choice([None, True, False])
        case 1:
            return rng.choice([0, -1, 255, 256, 65536, -(2**31), 2**31, 2**70, -(2**70), 3**1000])
        case 2:
            return rng.choice([0.0, -1.5, 1e300, float("inf")])
        case 3:
            return rng.choice(["", "a", "line\nline", "ü\u2603", "x" * 300])
        case 4:
            return ()
        case 5 | 6:
            return [plain(rng, depth - 1) for _ in range(rng.choice([0, 1, 2, 3, 5]))]
        case 7:
            return tuple(plain(rng, depth - 1) for _ in many)
        case 8:
            return collections.OrderedDict((str(number), plain(rng, depth - 1)) for number in many)
        case _:
            shared = plain(rng, depth - 1)
            return {"a": shared, 2: [shared, shared], None: 1.5, False: 2, 2.5: 3}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_as_python_reads_them(protocol):
    """Random nested values in every protocol equal those of Python's own unpickler, in one pickle after another."""
    rng = random.Random(protocol)
    values = [plain(rng) for _ in range(60)] + ([b"", b"\x00\xff", {b"y" * 300: 1}] if protocol > 2 else [])
    file = io.BytesIO(b"".join(pickle.dumps(value, protocol) for value in values) + b"rest")
    for value in values:
        assert DataUnpickler(file, ("collections.OrderedDict",), ()).load() == value
    assert file.read() == b"rest"


def test_text_protocol_is_refused():
    """No published file is in protocol 0."""
    with pytest.raises(ValueError, match="pickle instruction"):
        DataUnpickler(io.BytesIO(pickle.dumps([1, "a", 2.5], 0)), (), ()).load()


def test_stand_ins_keep_arguments_and_state():
    """The arguments and the state of an object are kept; items and entries for it are refused."""
    made = named("fairseq.data", "Outer.Inner") + text("x") + pickle.TUPLE1 + b"R"
    state = b"}" + text("a") + b"K\x01" + b"s" + b"b"
    found = DataUnpickler(io.BytesIO(protocol4(made + state)), (), ("fairseq",)).load()
    assert isinstance(found, StandIn) and found.name == "fairseq.data.Outer.Inner"
    assert found.arguments == ("x",) and found.state == {"a": 1}
    for more in (b"K\x05a", text("k") + b"K\x06s", b"(K\x05e", b"(" + text("k") + b"K\x06u"):
        with pytest.raises((AttributeError, TypeError)):
            DataUnpickler(io.BytesIO(protocol4(made + more)), (), ("fairseq",)).load()


def test_dense_files_end_soon(tmp_path):
    """Values that share parts 2^40 times, and keys that take long to hash, are read or refused within seconds."""
    model = tiny_hubert(num_layers=1)
    leaves = ["leaf"]
    for _ in range(30):
        leaves = [leaves, leaves]
    settings = hubert_settings(model)
    settings["model"]["bomb"] = leaves
    start = time.process_time()
    assert (
        read_fairseq(write_hubert_checkpoint(tmp_path / "a.pt", model, settings=settings)).model["encoder_layers"] == 1
    )
    for _ in range(40):
        leaves = [leaves, leaves]
    settings["model"]["bomb"] = leaves
    with pytest.raises(ValueError, match="nested too deeply"):
        read_fairseq(write_hubert_checkpoint(tmp_path / "a.pt", model, settings=settings))
    for key in (doubled(40), b"(" + 9 * b"N" + b"t", pickle.dumps(2**65, 2)[2:-1]):
        path = zip_checkpoint(tmp_path / "b.pt", protocol4(b"}" + key + b"Ns"))
        assert "as a key" in refusal(TorchCheckpoint, path)
    assert time.process_time() - start < 5


def test_keys_of_an_older_file_are_not_written_out(tmp_path):
    """Keys of storages that are not names are refused without writing them out, which could fill the memory."""
    path = legacy_checkpoint(tmp_path / "a.pt", protocol4(b"N"), protocol4(b"]" + doubled(18) + b"a"))
    assert peak_bytes(lambda: refusal(TorchCheckpoint, path)) < 2**19


def test_files_of_many_steps_end(tmp_path, monkeypatch):
    """Instructions are counted, since each of them takes memory."""
    path = zip_checkpoint(tmp_path / "a.pt", pickle.dumps({"a": 2001 * [None]}, 4))
    assert len(TorchCheckpoint(path).content["a"]) == 2001
    monkeypatch.setattr(restricted_pickle, "_MAX_INSTRUCTIONS", 2000)
    assert "2000 steps" in refusal(TorchCheckpoint, path)


@pytest.mark.slow
def test_marks_are_bounded(tmp_path):
    """A few kB that unpack to 2^27 instructions end after the largest number of steps, in bounded memory."""
    path = tmp_path / "k.bin"
    path.write_bytes(zlib.compress(protocol4(2**27 * b"(")))
    peak = peak_bytes(lambda: refusal(read_centroids, path))
    assert path.stat().st_size < 2**18 and peak < 2**29


COPIES = {
    "ordered dictionaries": (named("collections", "OrderedDict"), pickle.REDUCE),
    "default dictionaries": (named("collections", "defaultdict"), pickle.REDUCE),
    "sets": (named("builtins", "set"), pickle.REDUCE),
    "lists": (named("builtins", "list"), pickle.NEWOBJ),
    "sizes": (named("torch", "Size"), pickle.REDUCE),
    "settings": (named("argparse", "Namespace") + b")" + pickle.NEWOBJ, b"b"),
}


def copying_pickle(callee, step, times):
    """A pickle that passes one dictionary of 30,000 entries to one callable many times."""
    entries = b"".join(pickle.BININT + struct.pack("<i", number) + b"N" for number in range(30_000))
    large = b"}(" + entries + b"u" + pickle.BINPUT + b"\x00"
    argument = pickle.BINGET + b"\x00" + (b"" if step == b"b" else pickle.TUPLE1)
    known = callee + pickle.BINPUT + b"\x01" + pickle.POP
    return protocol4(
        b"}" + text("a") + b"](" + large + known + times * (pickle.BINGET + b"\x01" + argument + step) + b"es"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", COPIES)
def test_one_dictionary_is_not_copied_again_and_again(tmp_path, kind):
    """Guards case E9: a file of 1 MB that would copy 30,000 entries 100,000 times needs less than 256 MB and 60 s."""
    content = copying_pickle(*COPIES[kind], times=100_000)
    assert len(content) < 2**20
    paths = [zip_checkpoint(tmp_path / "a.pt", content), legacy_checkpoint(tmp_path / "b.pt", content)]
    (tmp_path / "k.bin").write_bytes(zlib.compress(content))
    program = """
import resource, sys
from pathlib import Path
from audiolm_pytorch.saving.torch_checkpoint import TorchCheckpoint
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for reader, path in zip((TorchCheckpoint, TorchCheckpoint, read_centroids), sys.argv[1:]):
    try:
        reader(path)
    except ValueError as error:
        assert "MemoryError" not in str(error) and str(path) in str(error), error
"""
    arguments = [sys.executable, "-c", program, *map(str, [*paths, tmp_path / "k.bin"])]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_conjugated_and_negated_views_are_refused(tmp_path):
    """Conjugated and negated views are refused, since their values differ from their stored numbers."""
    for name, value in (
        ("a.pt", torch.randn(3, dtype=torch.complex64).conj()),
        ("b.pt", torch._neg_view(torch.ones(3))),
    ):
        torch.save({"model": {"a": value}}, tmp_path / name)
        assert "resolve_conj" in refusal(read_fairseq, tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["zlib", "gzip", "bz2", "xz", "lzma"])
def test_bombs_are_not_unpacked(tmp_path, monkeypatch, packing):
    """A small compressed file with large content is refused before the content is in memory."""
    assert centroids._MAX_BYTES <= 2**28
    monkeypatch.setattr(centroids, "_MAX_BYTES", 2**21)
    path = tmp_path / "k.bin"
    path.write_bytes(PACK[packing](bytes(2**26)))
    assert peak_bytes(lambda: refusal(read_centroids, path)) < 2**24
    assert "unpacked" in refusal(read_centroids, path)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**62, 2**62), (5, 4), (3,), (-1, 3), (2.5, 2), "abc", (1,) * 40])
def test_arrays_that_are_not_there(tmp_path, shape):
    """An array with a wrong shape, or with more bytes than the file, is refused before memory is taken."""
    path = tmp_path / "k.bin"
    wrapper = NumpyArrayWrapper(np.ndarray, shape, "C", np.dtype("f8"))
    path.write_bytes(pickle.dumps({"centroids": wrapper, "more": 1}, 4))
    assert "damaged" in refusal(read_centroids, path)


def test_tensors_stay_within_the_file(tmp_path):
    """Tensors within their storage are read; sizes, strides and storages beyond it are refused."""
    data = np.arange(6, dtype="<f4").tobytes()

    def read(*parts):
        path = zip_checkpoint(tmp_path / "a.pt", pickled({"a": TensorOf(*parts)}), {"0": data})
        checkpoint = TorchCheckpoint(path)
        return checkpoint.tensor(checkpoint.content["a"])

    assert torch.equal(read(Reference(6), 1, (2, 2), (1, 2)), torch.tensor([[1.0, 3], [2, 4]]))
    assert torch.equal(read(Reference(6), 0, (), ()), torch.tensor(0.0))
    for parts in (
        (Reference(7), 0, (6,), (1,)),
        (Reference(5), 0, (5,), (1,)),
        (Reference(10**15), 0, (6,), (1,)),
        (Reference(-1), 0, (6,), (1,)),
        (Reference(True), 0, (1,), (1,)),
        (Reference(6, "1"), 0, (6,), (1,)),
        (Reference(6, "../data.pkl"), 0, (6,), (1,)),
        (Reference(6, 0), 0, (6,), (1,)),
        (Reference(6, "\x1b[2J\n"), 0, (6,), (1,)),
        (Reference(6), 0, (1,) * 65, (1,) * 65),
        (Reference(6, "0", torch.DoubleStorage), 0, (6,), (1,)),
        (Reference(6, "0", torch.FloatStorage, ("0", 1, 2)), 0, (6,), (1,)),
        (Reference(6), 0, (7,), (1,)),
        (Reference(6), 1, (6,), (1,)),
        (Reference(6), -1, (2,), (1,)),
        (Reference(6), 0, (2,), (-1,)),
        (Reference(6), 0, (2, 2), (1,)),
        (Reference(6), 0, (10**9,), (0,)),
        (Reference(6), 0, (2**40, 2**40), (2**40, 1)),
        (Reference(6), 0, ("2",), (1,)),
        (b"bytes", 0, (1,), (1,)),
    ):
        with pytest.raises(ValueError, match="a.pt") as caught:
            read(*parts)
        assert str(caught.value).isprintable()


def test_references_to_anything_but_storages(tmp_path):
    """A reference of another kind than "storage" is refused."""
    reference = Reference(6)
    reference.parts = ("module", *reference.parts[1:])
    path = zip_checkpoint(tmp_path / "a.pt", pickled(reference), {"0": bytes(24)})
    assert "not a tensor storage" in refusal(TorchCheckpoint, path)


def test_storages_that_are_not_in_an_older_file(tmp_path):
    """Storages that are missing or shorter than declared are refused, in the format before torch 1.6."""
    for count in (10, 10**10):
        content = pickled({"a": TensorOf(Reference(count), 0, (1,), (1,))})
        path = legacy_checkpoint(tmp_path / "a.pt", content)
        assert "the tensor storages that the file lists" in refusal(TorchCheckpoint, path)
        path = legacy_checkpoint(
            tmp_path / "a.pt", content, pickle.dumps(["0"], 2) + struct.pack("<q", count) + b"abcd"
        )
        assert "does not have the size" in refusal(TorchCheckpoint, path)


def test_records_are_as_torch_writes_them(tmp_path):
    """Compressed records, big-endian files, and archives without a pickle or with two are refused."""
    path, value = tmp_path / "a.pt", pickle.dumps({"a": 1}, 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", value)
    assert "missing or compressed" in refusal(TorchCheckpoint, path)
    zip_checkpoint(path, value, extra={"archive/byteorder": "big"})
    assert "big-endian" in refusal(TorchCheckpoint, path)
    zip_checkpoint(path, value, extra={"archive/byteorder": "little"})
    assert TorchCheckpoint(path).content == {"a": 1}
    zip_checkpoint(path, value, extra={"other/data.pkl": value})
    assert "not a checkpoint of torch" in refusal(TorchCheckpoint, path)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_read_as_torch_reads_them(tmp_path, legacy):
    """Tensors of every kind equal those of torch.load: types, views, shared storages, empty ones, parameters."""
    base = torch.arange(24.0).reshape(4, 6)
    value = collections.OrderedDict(
        views=[base, base.t(), base[1:, ::2], base[2], base.reshape(2, 12)],
        small=[torch.tensor(1.5), torch.empty(0), torch.empty(3, 0, 2)],
        parameter=torch.nn.Parameter(torch.randn(3)),
        size=torch.Size([1, 2]),
        numbers={0: 1.5, "text": None, "nested": (1, [True])},
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32):
        value[str(dtype)] = (torch.randn(5) * 50).to(dtype)
    value["others"] = [torch.arange(3), torch.tensor([True, False]), torch.randn(2, dtype=torch.complex64)]
    value._metadata = {"": {"version": 1}}
    path = tmp_path / "a.pt"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    expected, checkpoint = torch.load(path, weights_only=True), TorchCheckpoint(path)
    size = checkpoint.content.pop("size")
    assert (size.name, size.arguments) == ("torch.Size", (tuple(expected.pop("size")),))
    flat, found = (torch.utils._pytree.tree_leaves(dict(tree)) for tree in (expected, checkpoint.content))
    assert len(flat) == len(found) > 20
    for one, other in zip(flat, found, strict=True):
        if isinstance(one, torch.Tensor):
            other = checkpoint.tensor(other)
            assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        else:
            assert one == other
    views = [checkpoint.tensor(view) for view in checkpoint.content["views"][:3:2]]
    assert views[0].untyped_storage().data_ptr() == views[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["zip", "legacy", *PACK])
def test_cut_or_altered_files(tmp_path, kind):
    """Truncated files raise an error of one line; altered files raise one or are read."""
    whole, path, rng = tmp_path / "whole", tmp_path / "part", random.Random(0)
    if kind in ("zip", "legacy"):
        reader = TorchCheckpoint
        torch.save(
            {"model": {"a": torch.randn(20), "b": torch.randn(3, 4)}},
            whole,
            _use_new_zipfile_serialization=kind == "zip",
        )
    else:
        reader = read_centroids
        write_kmeans(whole, np.random.randn(4, 3))
        whole.write_bytes(PACK[kind](whole.read_bytes()))
    reader(whole)
    data = whole.read_bytes()
    for length in sorted(
        {0, 1, 2, 3, 5, 10, 40, len(data) // 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(30))}
    ):
        path.write_bytes(data[:length])
        refusal(reader, path)
    for _ in range(100):
        altered = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            altered[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(altered)
        try:
            reader(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("reader", [TorchCheckpoint, read_fairseq, read_centroids])
def test_files_of_another_kind(tmp_path, reader):
    """A missing file, a folder, an empty file and other kinds of files raise an error of one line."""
    assert "No such file" in refusal(reader, tmp_path / "missing.pt")
    assert "cannot be read" in refusal(reader, tmp_path / (256 * "x"))
    assert "Is a directory" in refusal(reader, tmp_path)
    for content in (
        b"",
        b"hello, this is no checkpoint\n",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        bytes(500),
        b"{}",
        b"PK\x03\x04",
    ):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        refusal(reader, path)
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    refusal(reader, path)


def test_old_formats_of_joblib(tmp_path):
    """Files of joblib before 0.10 and of lz4 are refused with the call that writes them again."""
    path = tmp_path / "k.bin"
    for content in (
        b"ZF0x3\x00",
        b"\x04\x22\x4d\x18\x00",
        protocol4(named("joblib.numpy_pickle", "NDArrayWrapper") + b")\x81"),
    ):
        path.write_bytes(content)
        assert "joblib.dump" in refusal(read_centroids, path)
