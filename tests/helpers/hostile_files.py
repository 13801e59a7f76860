"""Pickles that would run code, and all file formats that can hold them."""

import bz2
import collections
import gzip
import io
import lzma
import os
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch

from audiolm_pytorch.saving.torch_checkpoint import TorchCheckpoint
from audiolm_pytorch.semantic.pretrained.centroids import read_centroids

PACK = {
    "plain": bytes,
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Call:
    """Is pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


def text(word):
    return pickle.SHORT_BINUNICODE + struct.pack("<B", len(word.encode())) + word.encode()


def long_text(word):
    return pickle.BINUNICODE + struct.pack("<I", len(word.encode())) + word.encode()


def named(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


def protocol4(body):
    return pickle.PROTO + b"\x04" + body + pickle.STOP


def doubled(times):
    """A nested tuple that has 2^times leaves and takes five bytes per level."""
    steps = (pickle.BINPUT + bytes([n]) + pickle.BINGET + bytes([n]) + pickle.TUPLE2 for n in range(times))
    return b")" + b"".join(steps)


def peak_bytes(call):
    """Peak memory of Python objects during a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def touch(marker):
    return f"touch {marker}"


def written(marker):
    return f"open({str(marker)!r}, 'w').close()"


# Each makes the marker when Python's own unpickler reads it.
LIVE = {
    "os_system": lambda marker: pickle.dumps(Call(os.system, touch(marker)), 2),
    "os_system_protocol0": lambda marker: pickle.dumps(Call(os.system, touch(marker)), 0),
    "os_system_protocol5": lambda marker: pickle.dumps(Call(os.system, touch(marker)), 5),
    "eval": lambda marker: pickle.dumps(Call(eval, written(marker)), 4),
    "exec": lambda marker: pickle.dumps(Call(exec, written(marker)), 2),
    "popen": lambda marker: pickle.dumps(Call(subprocess.check_call, ["touch", str(marker)]), 4),
    "inst": lambda marker: b"(" + b"S" + repr(touch(marker)).encode() + b"\nios\nsystem\n.",
    "obj": lambda marker: protocol4(b"(" + named("os", "system") + long_text(touch(marker)) + b"o"),
    "path_touch": lambda marker: protocol4(
        named("pathlib", "Path.touch")
        + (named("pathlib", "Path") + long_text(str(marker)) + pickle.TUPLE1 + pickle.REDUCE)
        + pickle.TUPLE1
        + pickle.REDUCE
    ),
    "stored_bytes": lambda marker: pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, touch(marker)))), 2),
    "deep": lambda marker: pickle.dumps({"model": [{"a": (1, [Call(os.system, touch(marker))])}]}, 2),
    "as_key": lambda marker: pickle.dumps({1: 2, Call(os.system, touch(marker)): 3}, 2),
    "in_set": lambda marker: pickle.dumps({Call(os.system, touch(marker))}, 4),
    "dotted_operator": lambda marker: protocol4(
        named("os", "sys.modules.__class__")
        + pickle.POP
        + named("os", "system")
        + long_text(touch(marker))
        + pickle.TUPLE1
        + pickle.REDUCE
    ),
}
# Each would lead somewhere only in an unpickler that looks attributes up or sets them on live objects.
TRICKS = {
    "globals_of_a_stand_in": protocol4(named("fairseq.x", "a.__init__.__globals__")),
    "class_of_a_stand_in": protocol4(named("sklearn.x", "a.__class__.__base__.__subclasses__")),
    "subclasses_of_a_type": protocol4(named("numpy.random", "RandomState.__subclasses__")),
    "path_through_the_table": protocol4(named("collections", "OrderedDict.__init__.__globals__")),
    "path_through_torch": protocol4(named("torch._utils", "_rebuild_tensor_v2.__globals__")),
    "root_as_a_prefix": protocol4(named("fairseqx", "Dictionary")),
    "control_characters": protocol4(named("fairseq.\x1b[2J\n", "X")),
    "long_name": protocol4(named("fairseq", 200 * "a") + long_text("fairseq." + 300 * "a") + text("X") + b"\x93"),
    "no_identifier": protocol4(named("fairseq", "a b")),
    "names_that_are_no_text": protocol4(b"K\x01K\x02" + pickle.STACK_GLOBAL),
    "state_of_a_function": protocol4(
        named("collections", "OrderedDict") + pickle.NONE + b"}" + text("__code__") + b"N" + b"s" + pickle.TUPLE2 + b"b"
    ),
    "state_of_a_stand_in_class": protocol4(named("numpy.random", "X") + b"}" + text("__call__") + b"N" + b"s" + b"b"),
    "call_of_a_stand_in": protocol4(named("numpy.random", "X") + b")" + b"R" + b")" + b"R"),
    "call_of_text": protocol4(text("os.system") + b")" + b"R"),
    "call_without_arguments": protocol4(named("numpy.random", "X") + b"]" + b"R"),
    "extension": protocol4(pickle.EXT1 + b"\x01"),
    "persistent_text": b"Pos.system\n.",
    "persistent_value": protocol4(text("os.system") + pickle.BINPERSID),
    "persistent_module": protocol4(
        b"("
        + text("module")
        + named("numpy.random", "X")
        + text("/etc/x.py")
        + text("source")
        + b"t"
        + pickle.BINPERSID
    ),
    "persistent_of_five": protocol4(
        b"(" + text("module") + named("numpy.random", "X") + text("0") + text("cpu") + b"K\x00t" + pickle.BINPERSID
    ),
    "out_of_band_buffer": protocol4(pickle.NEXT_BUFFER),
    "loader_of_torch": protocol4(named("torch.storage", "_load_from_bytes") + b"C\x01N" + pickle.TUPLE1 + b"R"),
    "loader_of_numpy": protocol4(named("numpy", "load") + text("/etc/x.npy") + pickle.TUPLE1 + b"R"),
    "rebuild_of_any_type": protocol4(named("torch._utils", "_rebuild_from_type_v2") + b")" + b"R"),
    "old_reduction": protocol4(named("copyreg", "_reconstructor") + b")" + b"R"),
    "getattr": protocol4(named("builtins", "getattr") + b")" + b"R"),
    "import": protocol4(named("builtins", "__import__") + text("antigravity") + pickle.TUPLE1 + b"R"),
    "codec": protocol4(named("_codecs", "encode") + text("x") + text("zlib") + pickle.TUPLE2 + b"R"),
    "nested_key": protocol4(b"}" + b")" + pickle.TUPLE1 + pickle.TUPLE1 + b"N" + b"s"),
}


class TypeWithState:
    """Is pickled as a numpy float dtype with a state that turns it into another one."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np.dtype, ("f8", False, True), self.state


class Reference:
    """A reference to a storage in a checkpoint."""

    def __init__(self, count, key="0", kind=torch.FloatStorage, *more):
        self.parts = ("storage", kind, key, "cpu", count, *more)


class TensorOf:
    """A tensor in a checkpoint, as torch pickles it."""

    def __init__(self, storage, offset, size, stride):
        self.parts = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.parts if isinstance(value, Reference) else None


def pickled(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def zip_checkpoint(path, pickled, storages=(), extra=()):
    """Write an archive in the layout of torch.save around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in dict(extra).items():
            archive.writestr(name, data)
    return path


def legacy_checkpoint(path, pickled, keys=b"]."):
    """Write a file in the layout of torch before 1.6 around a pickle."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, machine)]
    path.write_bytes(b"".join(parts) + pickled + keys)
    return path


def places(path, pickled):
    """Write a pickle in every file format; yield pairs of a reader and a file."""
    yield TorchCheckpoint, zip_checkpoint(path / "a.pt", pickled)
    yield TorchCheckpoint, legacy_checkpoint(path / "b.pt", pickled)
    bare = path / "c.pt"  # where the magic number belongs: nothing is admitted at all
    bare.write_bytes(pickled)
    yield TorchCheckpoint, bare
    for name, pack in PACK.items():
        packed = path / f"{name}.bin"
        packed.write_bytes(pack(pickled))
        yield read_centroids, packed


def refusal(reader, path):
    """Check that a reader raises an error of one line that names the file; return the message."""
    with pytest.raises(ValueError) as caught:
        reader(path)
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 600
    return message
