"""Import of KVQuant's pickles: the numbers are the same, and no pickle can run anything."""

import os
import pickle
import pickletools
import resource
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models_zoo import tiny_model

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.errors import ArtifactFileError
from kvq_calib.artifact.import_kvquant import import_kvquant, load_pickle
from kvq_calib.cli.artifact import artifact_group
from kvq_calib.errors import ConfigError
from kvq_calib.model.configuration import geometry_of_configuration
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

pytestmark = pytest.mark.model

HEADS, DIM, LAYERS, BITS = 2, 16, 2, 3
CHANNELS = HEADS * DIM
SHAPE = LayerGeometry(num_query_heads=4, num_kv_heads=HEADS, head_dim=DIM, rope=0)
GEOMETRY = KVGeometry(
    layers=(SHAPE,) * LAYERS,
    ropes=(RopeSpec(pairs=tuple((i, i + 8) for i in range(8)), inv_freq=(0.5,) * 8),),
)


def quantizers(norm=False, seed=0):
    """In the form KVQuant's code pickles: float64 thresholds [1, C], k-means centres [k, 1] as numpy has them."""
    generator = np.random.default_rng(seed)
    content = {}
    for layer in range(LAYERS):
        for projection in ("k_proj", "v_proj"):
            upper = torch.tensor(1 + generator.random(CHANNELS)).unsqueeze(0)
            lower = torch.tensor(-1 - generator.random(CHANNELS)).unsqueeze(0)
            centres = [
                generator.permutation(np.linspace(-0.9, 0.9, 1 << BITS) ** 3).astype(np.float32)[:, None]
            ]
            extra = (torch.tensor(1.05), torch.tensor(0.01)) if norm else ()
            content[f"model.layers.{layer}.self_attn.{projection}"] = (upper, lower, centres, *extra)
    return content


def write(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def imported(path, **options):
    return import_kvquant(path, GEOMETRY, {"id": "m", "config": {}}, **{"outliers": 0.0, **options})


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_keys_are_quantized_as_the_original_simulates(tmp_path, protocol):
    content = quantizers()
    file = write(tmp_path / "quantizers.pickle", content, protocol)
    artifact = KVArtifact.from_bytes(imported(file).to_bytes())
    x = torch.randn(1, HEADS, 40, DIM, generator=torch.Generator().manual_seed(0))
    for layer, pair in enumerate(artifact.quantizers()):
        upper, lower, (centres,) = content[f"model.layers.{layer}.self_attn.k_proj"]
        offset, half = (upper + lower) / 2, (upper - lower) / 2
        y = x[0].transpose(0, 1).flatten(1).double()
        poles = torch.from_numpy(centres).flatten().double()
        nearest = ((y - offset) / half)[..., None].sub(poles).abs().argmin(-1)
        want = (poles[nearest] * half + offset).unflatten(1, (HEADS, DIM)).transpose(0, 1)
        got = pair["key"](x)[0].double()
        gap = (got - want).abs()  # levels are stored in float16, which may decide otherwise at a boundary
        assert float(gap.median()) < 1e-3
        assert float((gap > 2e-3).double().mean()) < 0.01


def test_values_take_their_range_from_each_token(tmp_path):
    content = quantizers()
    artifact = imported(write(tmp_path / "q.pickle", content))
    x = torch.randn(1, HEADS, 20, DIM, generator=torch.Generator().manual_seed(1))
    y = x[0].transpose(0, 1).flatten(1).double()
    high, low = y.amax(1, keepdim=True), y.amin(1, keepdim=True)
    poles = torch.from_numpy(content["model.layers.0.self_attn.v_proj"][2][0]).flatten().double()
    offset, half = (high + low) / 2, (high - low) / 2
    want = poles[((y - offset) / half)[..., None].sub(poles).abs().argmin(-1)] * half + offset
    got = artifact.quantizers()[0]["value"](x)[0].transpose(0, 1).flatten(1).double()
    gap = (got - want).abs()
    assert float(gap.median()) < 2e-3
    assert float((gap > 5e-3).double().mean()) < 0.02  # at a boundary, scales in float16 may decide otherwise


def test_outliers_sinks_and_q_norm_are_kept(tmp_path):
    artifact = imported(write(tmp_path / "q.pickle", quantizers(norm=True)), outliers=0.02, sink_tokens=3)
    assert artifact.spec.key.outliers.fraction == artifact.spec.value.outliers.fraction == 0.02
    assert artifact.spec.sink_tokens == 3
    assert artifact.spec.key.q_norm
    plain = imported(write(tmp_path / "p.pickle", quantizers()))
    want = plain.layers[0].key.codebook * 1.05 + 0.01
    torch.testing.assert_close(artifact.layers[0].key.codebook, want, atol=1e-3, rtol=1e-3)


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch OWNED",)),
        (eval, ("open('OWNED', 'w')",)),
        (getattr, ("text", "upper")),
        (np.load, ("OWNED",)),
        (torch.load, ("OWNED",)),
    ],
)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "q.pickle", {**quantizers(), "x": Hostile(*call)}, 4)
    with pytest.raises(ArtifactFileError, match="refused"):
        load_pickle(file)
    assert not (tmp_path / "OWNED").exists()


def test_a_pickle_inside_a_tensor_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Hostile(os.system, ("touch OWNED",)))
    file = write(tmp_path / "q.pickle", Hostile(torch.storage._load_from_bytes, (inner,)), 4)
    with pytest.raises(ArtifactFileError):
        load_pickle(file)
    assert not (tmp_path / "OWNED").exists()


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x05.", pickle.dumps({"a": 1})[:-3]])
def test_what_is_no_pickle_is_one_error(tmp_path, data):
    (tmp_path / "q.pickle").write_bytes(data)
    with pytest.raises(ArtifactFileError, match=r"q\.pickle"):
        imported(tmp_path / "q.pickle")


def contents(path):
    """Arrays and tensors of a file as lists, beside their dtypes."""
    return {name: (str(part.dtype), part.tolist()) for name, part in load_pickle(path).items()}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_tensors_of_every_kind_are_read_as_they_are(tmp_path, protocol):
    base = np.arange(6).reshape(2, 3)
    content = {
        "columns first": np.asfortranarray(base.astype(np.float32)),
        "big endian": base.astype(">f8"),
        "bytes": base.astype(np.uint8),
        "part": base[:, 1].astype(np.int16),
        "number": np.array(2.5),
        "tensor": torch.arange(6.0).reshape(2, 3),
        "turned": torch.arange(6, dtype=torch.int32).reshape(2, 3).T,
        "view": torch.arange(9, dtype=torch.float16)[2:9:3],
        "bfloat16": torch.tensor([0.5, -3.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(1.25, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
    }
    file = write(tmp_path / "q.pickle", content, protocol)
    expected = {name: (str(part.dtype), part.tolist()) for name, part in content.items()}
    assert contents(file) == expected
    plain = {"a": ([1.5, 2, True], (None, "text")), "b": -(10**30)}
    assert load_pickle(write(file, plain, protocol)) == plain


def program(*parts):
    """A pickle of these opcodes."""
    return b"\x80\x04" + b"".join(parts) + b"."


def op(value):
    """Opcodes that put a value on the stack."""
    return pickletools.optimize(pickle.dumps(value, protocol=2))[2:-1]


def storage_op(tensor, **replaced):
    """Opcodes of a storage as torch pickles it, with parts of its bytes replaced."""
    data = next(value for _, value, _ in pickletools.genops(pickle.dumps(tensor)) if isinstance(value, bytes))
    for old, new in replaced.values():
        assert old in data
        data = data.replace(old, new)
    return b"ctorch.storage\n_load_from_bytes\n" + b"B" + len(data).to_bytes(4, "little") + data + b"\x85R"


def tensor_op(storage, offset, size, stride):
    arguments = b"(" + storage + op(offset) + op(size) + op(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments


def array_op(kind, shape, data=b"\0" * 8):
    dtype = b"cnumpy\ndtype\n" + op((kind,)) + b"R"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
    return made + b"(K\1" + op(shape) + dtype + b"\x89" + b"C" + bytes([len(data)]) + data + b"tb"


FOUR = storage_op(torch.zeros(4))
KEYED = b"}" + op("x")
HUGE_COUNT = (b"K\x04N", b"\x8a\x05" + (2**34).to_bytes(5, "little") + b"N")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (program(b"}", op(1), op(2), b"s"), "a key that is not text but int"),
        (program(b"}K\1", b"2\x86" * 60, op(1), b"s"), "has DUP, which no array"),
        (program(b"}", b"K\1" + b"q\0h\0\x86" * 60, op(1), b"s"), "a key that is not text but tuple"),
        (program(KEYED, tensor_op(FOUR, 0, (2**40,), (0,)), b"s"), "larger than the file"),
        (program(KEYED, tensor_op(FOUR, 0, (2**31, 2**31, 0), (2**40, 1)), b"s"), "strides do not fit"),
        (program(KEYED, tensor_op(FOUR, 0, (5,), (1,)), b"s"), "larger than its storage"),
        (program(KEYED, tensor_op(FOUR, 4, (1,), (1,)), b"s"), "larger than its storage"),
        (program(KEYED, tensor_op(FOUR, -1, (1,), (1,)), b"s"), "an impossible shape"),
        (program(KEYED, tensor_op(FOUR, 0, (2,), (-1,)), b"s"), "an impossible shape"),
        (program(KEYED, tensor_op(FOUR, 0, (True,), (1,)), b"s"), "an impossible shape"),
        (
            program(KEYED, storage_op(torch.zeros(4), count=HUGE_COUNT), b"s"),
            "content does not fit its size",
        ),
        (program(KEYED, array_op("f8", (2**28,)), b"s"), "larger than the file"),
        (program(KEYED, array_op("f8", (2**62,)), b"s"), "an impossible shape"),
        (program(KEYED, array_op("f8", (2,)), b"s"), "content does not fit its shape"),
        (program(KEYED, array_op("f8", (-1,)), b"s"), "an impossible shape"),
        (program(KEYED, array_op("O", (1,)), b"s"), "an array of 'O', which are not numbers"),
        (program(KEYED, array_op("V1000000000", (1,)), b"s"), "which are not numbers"),
        (program(KEYED, array_op("(100000,100000)f8", (1,)), b"s"), "which are not numbers"),
        (program(b"cnumpy\nndarray\nJ\0\0\0\x7f\x85R"), "an array without content"),
        (program(b"cnumpy\nndarray\n}b"), "changes something that is neither"),
        (
            program(b"ctorch._utils\n_rebuild_tensor_v2\nN}" + op("__defaults__") + b")s\x86b"),
            "changes something",
        ),
        (program(b"}r\xff\xff\xff\x7f\x8e" + (2**40).to_bytes(8, "little") + b"x"), "not a readable pickle"),
        (program(op("id"), b"Q"), "refers to data outside itself"),
        (program(b"\x8c\3a\nb\x8c\4\xed\x95\x9c1\x93"), r"names a b\.\\ud55c1, which is neither"),
        (program(b"K\1)R"), "calls something that is neither"),
        (program(b"cos\nsystem\n"), "names os.system, which is neither"),
        (program(b"t"), "not a readable pickle"),
    ],
)
def test_what_is_no_plain_array_is_refused_at_once_in_one_line(tmp_path, data, message):
    (tmp_path / "q.pickle").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(ArtifactFileError, match=message) as caught:
        load_pickle(tmp_path / "q.pickle")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB on Linux


def test_a_memo_that_declares_much_takes_little(tmp_path):
    (tmp_path / "q.pickle").write_bytes(program(b"}r\xff\xff\xff\x7f"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_pickle(tmp_path / "q.pickle") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_copies_of_one_text_are_no_more_than_the_file(tmp_path):
    encode = b"c_codecs\nencode\n(" + op("x" * 10_000) + b"q\0" + op("latin1") + b"tR0"
    again = b"c_codecs\nencode\n(h\0" + op("latin1") + b"tR0"
    (tmp_path / "q.pickle").write_bytes(program(encode, b"}"))
    assert load_pickle(tmp_path / "q.pickle") == {}
    (tmp_path / "q.pickle").write_bytes(program(encode, again * 100, b"}"))
    with pytest.raises(ArtifactFileError, match="larger than the file"):
        load_pickle(tmp_path / "q.pickle")


def test_lists_of_one_list_are_walked_once(tmp_path):
    inner = b"](" + b"K\1" * 20_000 + b"eq\0"
    middle = b"](" + b"h\0" * 20_000 + b"eq\1"
    outer = KEYED + b"](" + b"h\1" * 20_000 + b"es"
    (tmp_path / "q.pickle").write_bytes(program(inner, b"0", middle, b"0", outer))
    began = time.process_time()
    found = load_pickle(tmp_path / "q.pickle")["x"]
    assert (len(found), len(found[0]), len(found[0][0])) == (20_000,) * 3
    assert time.process_time() - began < 5


def test_more_opcodes_than_quantizers_need_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kvq_calib.artifact.number_pickle._MAX_OPCODES", 100)
    (tmp_path / "q.pickle").write_bytes(program(b"]" * 200))
    with pytest.raises(ArtifactFileError, match="too many parts"):
        load_pickle(tmp_path / "q.pickle")


def changed(change):
    content = quantizers()
    change(content)
    return content


KEY = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([1, 2], ArtifactFileError, "no quantizers by name"),
        (changed(lambda c: c.pop(KEY)), ConfigError, "no quantizer"),
        (changed(lambda c: c.update({KEY: c[KEY][:2]})), ArtifactFileError, "no centroids"),
        (
            changed(lambda c: c.update({KEY: (c[KEY][1], c[KEY][0], c[KEY][2])})),
            ArtifactFileError,
            "below the lower",
        ),
        (changed(lambda c: c.update({KEY: (c[KEY][0][:, 1:], *c[KEY][1:])})), ConfigError, "channels"),
        (
            changed(lambda c: c.update({KEY: (c[KEY][0] * float("nan"), *c[KEY][1:])})),
            ArtifactFileError,
            "not finite",
        ),
        (
            changed(lambda c: c.update({KEY: (*c[KEY][:2], [c[KEY][2][0][:5]])})),
            ArtifactFileError,
            "5 centroids",
        ),
        (changed(lambda c: c.update({KEY: (*c[KEY][:2], ["text"])})), ArtifactFileError, "not an array"),
        (
            changed(lambda c: c.update({KEY: (*c[KEY][:2], [[[0.0, 1.0]]])})),
            ArtifactFileError,
            "not an array",
        ),
        (
            changed(lambda c: c.update({KEY: ([[1.0] * CHANNELS], *c[KEY][1:])})),
            ArtifactFileError,
            "not an array",
        ),
        (changed(lambda c: c.update({KEY: (*c[KEY][:2], [[0.0, 10**400]])})), ArtifactFileError, "too large"),
        (
            changed(lambda c: c.update({KEY: (np.zeros(2**20 + 1, np.uint8), *c[KEY][1:])})),
            ArtifactFileError,
            "holds 1048577 numbers where 1048576 are the most",
        ),
        (
            changed(lambda c: c.update({"model.layers.2.self_attn.k_proj": c[KEY]})),
            ConfigError,
            "more layers",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, error, message):
    with pytest.raises(error, match=message):
        imported(write(tmp_path / "q.pickle", content))


def test_flat_lists_of_numbers_mean_what_arrays_mean(tmp_path):
    content = quantizers(norm=True)
    lists = {
        name: (up.flatten().tolist(), tuple(low.flatten().tolist()), [c.flatten().tolist()], 1.05, [0.01])
        for name, (up, low, (c,), *_) in content.items()
    }
    exact = changed(lambda c: c.clear())
    for name, (up, low, centres, *_) in content.items():
        exact[name] = (up, low, centres, np.array(1.05), np.array([0.01]))
    assert imported(write(tmp_path / "q.pickle", lists)).to_bytes() == (
        imported(write(tmp_path / "q.pickle", exact)).to_bytes()
    )


def test_command_reads_the_configuration_alone(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path / "model")
    geometry, fingerprint = geometry_of_configuration(str(tmp_path / "model"))
    assert geometry == inspect_model(model)
    assert fingerprint == model_fingerprint(model)
    shape = geometry.layers[0]
    content = {}
    for layer in range(len(geometry.layers)):
        for projection in ("k_proj", "v_proj"):
            ones = torch.ones(1, shape.shape("key").channels, dtype=torch.float64)
            content[f"model.layers.{layer}.self_attn.{projection}"] = (
                ones,
                -ones,
                [np.linspace(-1, 1, 4)[:, None]],
            )
    file = write(tmp_path / "q.pickle", content)
    output = tmp_path / "a.kvq.safetensors"
    arguments = ["import-kvquant", str(file), "-o", str(output), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(artifact_group, arguments)
    assert result.exit_code == 0, result.output
    loaded = KVArtifact.load(output)
    loaded.check_model(model_fingerprint(model))
    assert loaded.spec.key.bits == 2
