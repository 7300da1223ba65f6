"""Pickles that try to run code, fill the memory, or run forever, for robustness.py.

Each is a valid ``quantizers.pickle`` with an attack inside, or only an attack. An attack that succeeds leaves a file,
the marker, or calls something that robustness.py detects.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import random
import warnings
from typing import Any

import numpy as np
import torch
from hostile_files import Case

Call = tuple[str, str, tuple[Any, ...]]


def quantizers(layers: int, channels: int, bits: int = 3) -> dict[str, Any]:
    """The content that KVQuant's code pickles: thresholds of every channel, and centroids of normalised values."""
    draw = np.random.default_rng(0)
    content = {}
    for layer in range(layers):
        for projection in ("k_proj", "v_proj"):
            upper, lower = (torch.tensor(sign * (1 + draw.random(channels)))[None] for sign in (1, -1))
            centroids = [np.sort(draw.uniform(-1, 1, 1 << bits)).astype(np.float32)[:, None]]
            content[f"model.layers.{layer}.self_attn.{projection}"] = (upper, lower, centroids)
    return content


def _ops(value: Any) -> bytes:
    """Opcodes that put a value on the stack, without memo entries."""
    return pickletools.optimize(pickle.dumps(value, protocol=2))[2:-1]


def _name(module: str, name: str, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return _ops(module) + _ops(name) + b"\x93"  # STACK_GLOBAL
    return b"c" + f"{module}\n{name}\n".encode()


def _called(call: Call, draw: random.Random) -> bytes:
    """A call, in one of the ways that pickles can make it."""
    module, name, arguments = call
    function, values = _name(module, name, draw), b"".join(map(_ops, arguments))
    return draw.choice((
        function + _ops(arguments) + b"R",
        b"(" + values + b"i" + f"{module}\n{name}\n".encode(),
        b"(" + function + values + b"o",
        function + _ops(arguments) + b"\x81",
        function + _ops(arguments) + b"}\x92",
        function + b")R" + _ops({"x": arguments}) + b"b",
        function,
    ))  # fmt: skip


def _programs(marker: str) -> tuple[Call, ...]:
    """Calls that would leave the marker, or could lead to such a call."""
    code = f"open({marker!r}, 'w')"
    return (
        ("os", "system", (f"touch {marker}",)), ("posix", "system", (f"touch {marker}",)),
        ("nt", "system", (code,)), ("os", "popen", (f"touch {marker}",)), ("os", "mkdir", (marker,)),
        ("os", "remove", (marker,)), ("builtins", "eval", (code,)), ("builtins", "exec", (code,)),
        ("__builtin__", "eval", (code,)), ("builtins", "open", (marker, "w")), ("io", "open", (marker, "w")),
        ("_io", "FileIO", (marker, "w")), ("builtins", "__import__", ("antigravity",)),
        ("builtins", "getattr", ("text", "upper")), ("builtins", "compile", (code, "", "exec")),
        ("importlib", "import_module", ("this",)), ("runpy", "run_path", (marker,)),
        ("runpy", "run_module", ("this",)), ("subprocess", "call", (["touch", marker],)),
        ("subprocess", "Popen", (["touch", marker],)), ("subprocess", "check_output", (["touch", marker],)),
        ("pty", "spawn", (["touch", marker],)), ("shutil", "copyfile", ("/etc/hostname", marker)),
        ("shutil", "rmtree", (marker,)), ("pathlib", "Path.touch", (marker,)), ("timeit", "timeit", (code,)),
        ("cProfile", "run", (code,)), ("pdb", "run", (code,)), ("bdb", "Bdb", ()), ("code", "interact", ()),
        ("operator", "attrgetter", ("x",)), ("functools", "partial", (print, 1)), ("types", "FunctionType", ()),
        ("marshal", "loads", (b"x",)), ("pickle", "loads", (pickle.dumps(1),)), ("_pickle", "loads", (b".",)),
        ("ctypes", "CDLL", (marker,)), ("socket", "create_connection", ()),
        ("urllib.request", "urlopen", ("file:///etc/hostname",)), ("webbrowser", "open", (marker,)),
        ("logging", "FileHandler", (marker,)), ("numpy", "load", (marker,)), ("numpy", "save", (marker, [1])),
        ("numpy", "savetxt", (marker, [1])), ("numpy", "memmap", (marker,)), ("numpy", "fromfile", ("/dev/zero",)),
        ("numpy", "ndarray.tofile", (marker,)), ("numpy.testing", "rundocs", (marker,)),
        ("torch", "load", (marker,)), ("torch", "save", (1, marker)), ("torch.serialization", "load", (marker,)),
        ("torch.hub", "load_state_dict_from_url", ("file:///x",)),
        ("torch.utils.cpp_extension", "load_inline", ("x",)), ("torch.jit", "load", (marker,)),
        ("torch.package", "PackageImporter", (marker,)), ("torch.storage", "torch.load", (marker,)),
        ("collections", "OrderedDict.__class__", ()), ("collections", "namedtuple", ("a", "b")),
        ("numpy", "dtype.__init__", ()), ("torch._utils", "_rebuild_tensor_v2.__globals__", ()),
        ("numpy.core.multiarray", "scalar", ()), ("_codecs", "encode", ("x", "zip")), ("_codecs", "lookup", ("x",)),
        ("copyreg", "_reconstructor", (object, object, None)),
        ("transformers", "AutoModel.from_pretrained", (marker,)),
    )  # fmt: skip


@functools.cache
def _storage(values: int) -> bytes:
    """Opcodes that call torch's loader of storages, as in pickles of tensors."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its old storages
        torch.save(torch.zeros(values).storage(), file, _use_new_zipfile_serialization=False)
    return b"ctorch.storage\n_load_from_bytes\n" + _bytes(file.getvalue()) + b"\x85R"


def _bytes(data: bytes) -> bytes:
    return b"B" + len(data).to_bytes(4, "little") + data


def _tensor(draw: random.Random) -> bytes:
    """A tensor whose shape, stride or offset does not fit its storage."""
    size = draw.choice((2**28, 2**31, 2**40, 2**62, -1))
    shape = draw.choice(((size,), (size, size), (1, size), (size, 0)))
    stride = draw.choice(((0,), (1,), (2**40,), (-1,))) * len(shape)
    arguments = b"(" + _storage(4) + _ops(draw.choice((0, 1, 2**40, -1))) + _ops(shape) + _ops(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"\x89" + b"ccollections\nOrderedDict\n)RtR"


def _array(draw: random.Random) -> bytes:
    """An array that is larger than the file, or whose elements are not numbers."""
    size = draw.choice((2**28, 2**31, 2**34, 2**62, -1))
    kind = draw.choice(
        ("u1", "f8", "O", "V1000000000", "S100000000", "U5", "M8[s]", "(100000,100000)f8", "f8,O")
    )
    dtype = b"cnumpy\ndtype\n" + _ops((kind,)) + b"R"
    core = draw.choice((b"numpy.core", b"numpy._core"))
    return draw.choice((
        b"cnumpy\nndarray\n(" + _ops((size,)) + dtype + b"tR",
        b"c" + core + b".multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _ops((size,)) + _bytes(b"b") + b"tR",
        b"c" + core + b".numeric\n_frombuffer\n(" + _bytes(b"\1" * 64) + dtype + _ops((size,)) + _ops("C") + b"tR",
        b"cnumpy\nndarray\n(" + _ops((1,)) + dtype + b"tR(" + _ops((1, (size,))) + dtype + b"\x89" + _bytes(b"\0" * 8) + b"tb",
    ))  # fmt: skip


def _nested(draw: random.Random) -> bytes:
    """Few opcodes for structures that take forever to walk: pairs of pairs, lists of lists, a list in itself."""
    depth = draw.choice((20, 40, 60, 1000, 100_000))
    return draw.choice((
        b"K\1" + b"2\x86" * depth,  # DUP, TUPLE2
        b"K\1" + b"\x85" * depth,
        b"]q\xfah\xfaa",  # a list that contains itself
        b"}q\xfb" + _ops("x") + b"h\xfbs",
        b"(" * min(depth, 1000) + b"l" * min(depth, 1000),
    ))  # fmt: skip


def _lies(draw: random.Random) -> bytes:
    """Opcodes with false lengths, indices or counts."""
    huge = draw.choice((2**31 - 1, 2**40, 2**62)).to_bytes(8, "little")
    return draw.choice((
        b"\x8d" + huge + b"x", b"\x8e" + huge + b"x", b"\x96" + huge + b"x", b"\x95" + huge, b"X\xff\xff\xff\x7fx",
        b"\x8b\xff\xff\xff\x7f1", b"\x8b\xff\xff\xff\xff1", b"L" + b"9" * 100_000 + b"L\n",
        b"I" + b"9" * 100_000 + b"\n", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"h\xf0", b"t", b"a", b"0" * 50,
        b"\x82\1", b"\x84\xff\xff\xff\x7f", b"Pname\n", _ops("id") + b"Q", b"S'\\x'\n", b"V\\ud800\n", b"F1e999\n",
        b"\x98", b"\x97", b"\xff", b"\x80\x63", b".",
    ))  # fmt: skip


def _inside_a_tensor(call: Call, draw: random.Random) -> bytes:
    """The attack inside the bytes for torch's loader."""
    inner = b"\x80\x02" + _called(call, draw) + b"."
    return (
        b"ctorch.storage\n_load_from_bytes\n"
        + _bytes(draw.choice((inner, inner * 4, _legacy(inner))))
        + b"\x85R"
    )


def _legacy(program: bytes) -> bytes:
    """The header of torch's format before zip files: a magic number, a version, the system; then a pickle."""
    beginning = (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
    )
    return (
        b"".join(pickle.dumps(part, protocol=2) for part in beginning)
        + program
        + pickle.dumps([], protocol=2)
    )


def hostile_pickle(content: dict[str, Any], draw: random.Random, marker: str) -> Case:
    """Make a pickle with an attack.

    Args:
        content: content of a valid pickle.
        draw: random generator.
        marker: path of the file that a successful attack creates.
    """
    program = draw.choice(_programs(marker))
    name, attack = draw.choice((
        ("program", _called(program, draw)), ("program", _called(program, draw)),
        ("program inside a tensor", _inside_a_tensor(program, draw)), ("tensor", _tensor(draw)),
        ("array", _array(draw)), ("nested", _nested(draw)), ("lying lengths", _lies(draw)),
    ))  # fmt: skip
    good = pickle.dumps(content, protocol=2)[2:-1]
    known = _ops(draw.choice(list(content)))
    data = draw.choice((
        attack + b"0" + good,
        good + attack + b"0",
        good + _ops("more") + attack + b"s",
        good + known + attack + b"s",
        good + known + b"(" + attack * 3 + b"ts",
        good + known + b"(" + attack * 2 + b"](" + attack + b"ets",
        good + attack + _ops(1) + b"s",
        attack,
    ))  # fmt: skip
    return Case(name, b"\x80\x04" + data + b".")
