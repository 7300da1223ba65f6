"""The CUDA kernels against the quantizer and float64 attention.

Without a GPU the sources run as C++ (``shim/``); with one the compiled kernels run the same tests.
"""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
from artifact_factory import RECIPES, random_artifact, recipe, trellis
from shim.host import HostLauncher, compiler
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda import structs
from kvq_calib.runtime.cuda.append import append_blocks
from kvq_calib.runtime.cuda.decode import DecodeKernel, DecodeStep, DecodeVariant, PagePool
from kvq_calib.runtime.cuda.decode import _divide as divide
from kvq_calib.runtime.cuda.decode_tables import KernelTables
from kvq_calib.runtime.cuda.dequantize import dequantize
from kvq_calib.runtime.cuda.kinds import KEY_KINDS, VALUE_KINDS, Widths
from kvq_calib.runtime.cuda.launcher import Launcher, launcher_for
from kvq_calib.runtime.cuda.ops import CudaOps, ops_with
from kvq_calib.runtime.cuda.pages import PageTable
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.slot_view import DecodeContext, SlotView
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, PackedTensor
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.torch_ops import append_blocks as append_in_torch
from kvq_calib.runtime.visibility import AttentionRequest, Visibility
from kvq_calib.schema.geometry import Kind, KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KVCacheSpec, QuantSpec, ScalarSpec, Thresholds, TrellisSpec

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

#: Of ``||out - want|| / ||want||``, queries and keys of unit spread: rounding of keys, angles, queries and
#: probabilities to half precision.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2.5e-3}  # bfloat16 results alone are rounded by 1.7e-3


@dataclasses.dataclass
class Machine:
    launcher: Launcher
    device: torch.device


def machines():
    yield pytest.param("host", id="host")
    if torch.cuda.is_available():
        yield pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=list(machines()), scope="module")
def machine(request) -> Machine:
    device = torch.device(request.param if request.param == "cuda" else "cpu")
    return Machine(HostLauncher() if device.type == "cpu" else launcher_for(device), device)


def geometry(size: int, heads: int, group: int, rope: str = "half", window: int | None = None) -> KVGeometry:
    """One layer. ``rope``: half-split, interleaved, partial (and scaled), or none."""
    count = size // 4 if rope == "partial" else size // 2
    first = range(0, 2 * count, 2) if rope == "interleaved" else range(count)
    pairs = tuple((i, i + (1 if rope == "interleaved" else count)) for i in first)
    spec = RopeSpec(
        pairs=pairs,
        inv_freq=tuple(10000.0 ** (-i / count) for i in range(count)),
        attention_scaling=1.2 if rope == "partial" else 1.0,
    )
    layer = LayerGeometry(
        num_query_heads=heads * group,
        num_kv_heads=heads,
        head_dim=size,
        rope=None if rope == "none" else 0,
        sliding_window=window,
    )
    return KVGeometry(layers=(layer,), ropes=() if rope == "none" else (spec,))


class Layer:
    """Quantizers, tables and random tokens of one layer."""

    def __init__(
        self,
        machine: Machine,
        spec: KVCacheSpec,
        shape: KVGeometry,
        seed: int = 0,
        widths: dict[str, Tensor] | None = None,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.machine, self.generator, self.geometry = machine, generator, shape.layers[0]
        heads, size = self.geometry.num_kv_heads, self.geometry.head_dim
        spread = 0.3 + torch.rand(2, 1, heads, 1, size, generator=generator)
        center = 0.3 * torch.randn(2, 1, heads, 1, size, generator=generator)
        self._spread, self._center = spread, center
        # Artifacts are made on the CPU, whatever device their quantizers go to.
        samples = [{kind: self.tokens(kind, 1, 256).float().cpu() for kind in ("key", "value")}]
        artifact = random_artifact(shape, spec, seed, samples, widths=widths)
        quantizers = artifact.quantizers(machine.device)[0]
        self.key, self.value = quantizers["key"], quantizers["value"]
        self.torch = TorchOps(self.key, self.value)
        self.tables = KernelTables(self.key, "key"), KernelTables(self.value, "value")
        self.storage_dtype = self.key.storage

    def tokens(self, kind: str, batch: int, count: int, dtype: torch.dtype = torch.float16) -> Tensor:
        side = ("key", "value").index(kind)
        shape = (batch, self.geometry.num_kv_heads, count, self.geometry.head_dim)
        noise = torch.randn(shape, generator=self.generator)
        return (self._center[side] + self._spread[side] * noise).to(self.machine.device, dtype)

    def storage(self, batch: int, sinks: int = 0) -> LayerStorage:
        return LayerStorage(self.key, self.value, batch, sinks, self.machine.device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_pages(ours: PackedTensor, theirs: PackedTensor) -> None:
    assert ours.blocks == theirs.blocks
    assert len(ours.pages) == len(theirs.pages)
    for mine, other in zip(ours.pages, theirs.pages, strict=True):
        assert mine.tensors().keys() == other.tensors().keys()
        for name, tensor in mine.tensors().items():
            assert same_bits(tensor, other.tensors()[name]), name


# ---- append --------------------------------------------------------------------------------------------------


APPEND = {
    **RECIPES,
    "crowded": recipe(
        key={"bits": 3, "outliers": {"fraction": 0.05, "max_per_token": 3}},
        value={"bits": 2, "outliers": {"fraction": 0.05, "max_per_token": 2}},
    ),
    "token-no-outliers": recipe(value={"bits": 3, "outliers": {}}, storage_dtype="bfloat16"),
    "wide": recipe(key={"bits": 8}, value={"bits": 7}),
    "odd": recipe(key=trellis(5, states=1), value={"bits": 6}),
    **{
        f"trellis{bits}": recipe(
            key=trellis(
                bits,
                error_compensation=None if bits % 3 else {"refinement_passes": bits // 3},
                token_weighting=bits > 4,
            ),
            value=trellis(
                8 - bits,
                error_compensation={"rank": 2} if bits % 3 == 1 else None,
                token_weighting=bits % 2 == 0,
                noise_shaping=bits % 3 != 1,
            ),
        )
        for bits in range(1, 8)
    },
}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (name, size)
        for name in APPEND
        for size in (64, 80)
        if not name[-1].isdigit() or "trellis" not in name or size == 64
    ],
)
def test_append_is_bit_equal(machine: Machine, name: str, size: int) -> None:
    """Codes, token scales, outlier lists and starts; also of pages filled in several calls."""
    layer = Layer(
        machine,
        APPEND[name],
        geometry(size, 2, 1),
    )
    ours, theirs = layer.storage(2), layer.storage(2)
    for blocks in (3, 1, 14, 1):
        keys = layer.tokens("key", 2, blocks * BLOCK_TOKENS, layer.storage_dtype)
        values = layer.tokens("value", 2, blocks * BLOCK_TOKENS, layer.storage_dtype)
        append_blocks(machine.launcher, *layer.tables, ours, keys, values)
        layer.torch.pack(theirs, keys, values)
    assert_same_pages(ours.key, theirs.key)
    assert_same_pages(ours.value, theirs.value)
    if theirs.key.layout.outlier_cap:
        assert theirs.key.outlier_entries > 0


def test_outliers_of_many_sequences(machine: Machine) -> None:
    """More lists of a page than threads of the block that finds their places."""
    layer = Layer(machine, APPEND["crowded"], geometry(16, 8, 1))
    batch = 24
    ours, theirs = layer.storage(batch), layer.storage(batch)
    for blocks in (1, 3):
        keys = layer.tokens("key", batch, blocks * BLOCK_TOKENS, layer.storage_dtype)
        values = layer.tokens("value", batch, blocks * BLOCK_TOKENS, layer.storage_dtype)
        append_blocks(machine.launcher, *layer.tables, ours, keys, values)
        layer.torch.pack(theirs, keys, values)
    assert_same_pages(ours.key, theirs.key)
    assert_same_pages(ours.value, theirs.value)


def test_error_compensation_takes_heads_in_turn_where_shared_memory_is_small() -> None:
    machine = Machine(HostLauncher(), torch.device("cpu"))
    machine.launcher.shared_limit = 25_000  # two heads of 64 channels
    layer = Layer(
        machine, recipe(key=trellis(2, error_compensation={}), value=trellis(3)), geometry(64, 3, 1)
    )
    ours, theirs = layer.storage(1), layer.storage(1)
    tokens = [layer.tokens(kind, 1, BLOCK_TOKENS, layer.storage_dtype) for kind in ("key", "value")]
    append_blocks(machine.launcher, *layer.tables, ours, *tokens)
    layer.torch.pack(theirs, *tokens)
    assert_same_pages(ours.key, theirs.key)
    assert_same_pages(ours.value, theirs.value)


def test_ties_at_the_cap_go_to_the_lower_channel(machine: Machine) -> None:
    spec = recipe(key={"bits": 2, "outliers": {"fraction": 0.05, "max_per_token": 5}})
    layer = Layer(machine, spec, geometry(64, 2, 1))
    params = layer.key.params
    layer.key = layer.key.with_params(
        dataclasses.replace(
            params, scale=torch.ones_like(params.scale), zero_point=torch.zeros_like(params.scale)
        )
    )
    layer.tables = KernelTables(layer.key, "key"), layer.tables[1]
    keys = torch.full((1, 2, BLOCK_TOKENS, 64), 2.0, dtype=torch.float16, device=machine.device)
    keys[:, :, ::2, 7] = 3.0
    keys[:, 1, 5:9, 40:] = 0.25
    ours, theirs = layer.storage(1), layer.storage(1)
    values = torch.zeros_like(keys)  # constant tokens: a scale of zero
    append_blocks(machine.launcher, *layer.tables, ours, keys, values)
    TorchOps(layer.key, layer.value).pack(theirs, keys, values)
    assert_same_pages(ours.key, theirs.key)
    assert_same_pages(ours.value, theirs.value)
    assert theirs.key.outlier_entries == 5 * BLOCK_TOKENS


# ---- decode and dequantize -----------------------------------------------------------------------------------


def quant(bits: int, outliers: float = 0.01, **options: object) -> QuantSpec:
    return ScalarSpec(bits=bits, outliers={"fraction": outliers}, **options)


def paths(bits: int, **options: object) -> QuantSpec:
    return TrellisSpec(max_bits=bits, **options)


def token(bits: int, outliers: float = 0.01, thresholds: Thresholds = "token") -> QuantSpec:
    return quant(bits, outliers, thresholds=thresholds)


@dataclasses.dataclass
class Case:
    size: int
    group: int
    key: QuantSpec
    value: QuantSpec
    rope: str = "half"
    dtype: torch.dtype = torch.float16
    storage: str = "float16"
    softcap: float | None = None
    sink_logits: bool = False
    tail: int = 5
    heads: int = 2
    seed: int = 0
    grouped: bool = False

    def layer(self, machine: Machine) -> Layer:
        """Its quantizers and tables."""
        spec = KVCacheSpec(key=self.key, value=self.value, storage_dtype=self.storage)
        shape = geometry(self.size, self.heads, self.group, self.rope)
        return Layer(machine, spec, shape, self.seed, grouped_widths() if self.grouped else None)


def grouped_widths() -> dict[str, Tensor]:
    """For four heads of 64: channels in groups of one width, every kind of step and tile with code of its own."""
    steps = [kind for kind in KEY_KINDS if min(kind) >= 0]
    first, second = torch.tensor([steps[number % len(steps)] for number in range(32)], dtype=torch.uint8).T
    keys = torch.stack((first.view(4, 8), second.view(4, 8)), dim=1).repeat_interleave(4, dim=2)
    # Of each head's tiles no two have an eight in common that the others would rather go with.
    tiles = (
        *((0, 0), (1, 2), (3, 5), (6, 6)),
        *((1, 1), (2, 4), (5, 5), (3, 3)),
        *((2, 3), (4, 5), (2, 2), (6, 6)),
        *((3, 4), (5, 6), (4, 4), (0, 0)),
    )
    values = torch.tensor(tiles, dtype=torch.uint8).flatten().repeat_interleave(8)
    return {"key": keys.flatten(), "value": values}


# Widths 1 to 8, head sizes 64 to 256, group sizes 1 to 8 and every flag, each at least once in each company that
# matters: levels from tables take byte permutes over 8 (to 3 bits), 16 or 32 levels, or a plain table, the others are
# computed. All kinds of steps and tiles are among them: see test_the_cases_have_every_kind.
CASES = {
    "1bit-64-mha": Case(64, 1, quant(1), token(1)),
    "2bit-96-g8-dense": Case(96, 8, quant(2, 0.0), token(2, 0.0), "interleaved"),
    "3bit-128-g4": Case(128, 4, quant(3), token(3)),
    "3bit-128-g3-bfloat16": Case(128, 3, quant(3), token(3), dtype=torch.bfloat16, storage="bfloat16"),
    "4bit-256-g3": Case(256, 3, quant(4), token(4, thresholds="token_normalized"), heads=1),
    "4bit-64-g8-channel-values": Case(64, 8, quant(4, 0.05), quant(4, 0.05), "partial"),
    "5bit-64-g4": Case(64, 4, quant(5), token(5, 0.0)),
    "6bit-96-mha": Case(96, 1, quant(6, 0.0), token(6), "none"),
    "7bit-128-g8": Case(128, 8, quant(7), quant(7, 0.0)),
    "8bit-256-g4": Case(256, 4, quant(8), token(8), heads=1),
    "mixed4-64-g3-pair-rotation": Case(
        64,
        3,
        paths(4, states=1, pair_rotation=True),
        paths(3, states=1),
    ),
    "mixed6-96-g4-softcap-sink": Case(
        96,
        4,
        paths(6, states=1),
        token(5),
        softcap=3.0,
        sink_logits=True,
        tail=100,
    ),
    "trellis1-64-mha": Case(64, 1, paths(1), paths(2)),
    "trellis3-128-g4": Case(128, 4, paths(3), paths(4)),
    "trellis4-64-g3-bfloat16": Case(
        64, 3, paths(4), paths(3), "interleaved", dtype=torch.bfloat16, storage="bfloat16"
    ),
    "trellis7-64-g2": Case(64, 2, paths(7), paths(6), "none"),
    "trellis5-256-g5": Case(256, 5, paths(5), paths(5), seed=10),
    "trellis-mixed4-128-g4-pair-rotation": Case(
        128,
        4,
        paths(4, pair_rotation=True),
        paths(3),
    ),
    "trellis6-64-g2-grouped": Case(64, 2, paths(6), paths(6), heads=4, grouped=True),
    "trellis-mixed6-64-g4-token-values": Case(64, 4, paths(6), token(2)),
    "3bit-80-g12-post-rope": Case(80, 12, quant(3, pre_rope=False), token(2), tail=0),
}


def attention_float64(
    case: Case, query: Tensor, keys: Tensor, values: Tensor, keep: Tensor, sinks: Tensor | None
):
    """``[B, Hq, D]`` from keys and values ``[B, H, S, D]`` as attention uses them."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("bhd,bhsd->bhs", query.double(), keys) * case.size**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~keep[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().expand(len(scores), -1)[..., None]), dim=-1)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.einsum("bhs,bhsd->bhd", weights, values)


def turned(x: Tensor, positions: Tensor, rope: RopeSpec | None) -> Tensor:
    """``[B, H, S, D]`` rotated to ``positions [B, S]`` in float64."""
    x = x.double().clone()
    if rope is None:
        return x
    first, second = torch.tensor(rope.pairs, device=x.device).unbind(1)
    frequency = torch.tensor(rope.inv_freq, dtype=torch.float64, device=x.device)
    angle = positions.double()[:, None, :, None] * frequency
    a, b = x[..., first], x[..., second]
    x[..., first] = rope.attention_scaling * (angle.cos() * a - angle.sin() * b)
    x[..., second] = rope.attention_scaling * (angle.sin() * a + angle.cos() * b)
    return x


def decoded(packed: PackedTensor, quantizer: Quantizer) -> Tensor:
    """What is packed, in float64 and with pairs turned back: ``[B, H, 256 * pages, D]``."""
    y = PageReader(quantizer).read(packed.pages).mT.double()
    angles = quantizer.pair_angle
    if angles is not None:
        y = turned_back(y, angles, quantizer.rope)
    return y


def turned_back(y: Tensor, angles: Tensor, rope: RopeSpec) -> Tensor:
    """``[B, H, S, D]`` with each pair turned by minus its angle, ``[H, P]``."""
    first, second = torch.tensor(rope.pairs, device=y.device).unbind(1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    a, b = y[..., first], y[..., second]
    out = y.clone()
    out[..., first], out[..., second] = cos * a + sin * b, cos * b - sin * a
    return out


def as_words(keep: Tensor) -> Tensor:
    bits = (keep.unflatten(1, (-1, BLOCK_TOKENS)).long() << torch.arange(32, device=keep.device)).sum(-1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits)


@pytest.mark.parametrize("name", CASES)
def test_decode_and_dequantize(machine: Machine, name: str) -> None:
    """An odd number of tokens at positions of their own, a tenth of them hidden, against float64."""
    case, device, batch, blocks = CASES[name], machine.device, 2, 11
    layer = case.layer(machine)
    storage = layer.storage(batch)
    packed = blocks * BLOCK_TOKENS
    for side, quantizer, kind in ((storage.key, layer.key, "key"), (storage.value, layer.value, "value")):
        append_in_torch(side, quantizer, layer.tokens(kind, batch, packed, layer.storage_dtype))
    places = len(storage.key.pages) * PAGE_TOKENS
    tail = [layer.tokens(kind, batch, case.tail, layer.storage_dtype) for kind in ("key", "value")]
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, 100_000, (batch, 1), generator=generator).to(device)
    positions = start + torch.arange(packed + case.tail, device=device)
    positions = torch.cat(
        (positions[:, :packed], positions.new_zeros(batch, places - packed), positions[:, packed:]), dim=1
    )
    keep = (torch.rand(batch, places + case.tail, generator=generator) > 0.1).to(device)
    keep[:, packed:places] = False
    keep[1, :96] = False  # whole blocks

    query_heads = layer.geometry.num_query_heads
    query = torch.randn(batch, query_heads, case.size, generator=generator).to(device, case.dtype)
    sinks = torch.randn(query_heads, generator=generator).to(device) if case.sink_logits else None
    rope = layer.key.rope if case.key.pre_rope else None
    stored = decoded(storage.key, layer.key), decoded(storage.value, layer.value)
    keys = turned(torch.cat((stored[0], tail[0].double()), dim=2), positions, rope)
    values = torch.cat((stored[1], tail[1].double()), dim=2)
    want = attention_float64(case, query, keys, values, keep, sinks)

    blocks_table = torch.stack((positions[:, :places:BLOCK_TOKENS], as_words(keep[:, :places])), dim=-1)
    exact_positions = torch.where(keep[:, places:], positions[:, places:], -(2**31))
    context = DecodeContext(blocks_table.int().contiguous(), exact_positions.int().contiguous())
    pages = PageTable(storage.key).refresh(), PageTable(storage.value).refresh()
    none = tail[0][:, :, :0]
    step = DecodeStep(
        query,
        *pages,
        exact=[(none, none), (tail[0], tail[1])],
        context=context,
        scaling=case.size**-0.5,
        softcap=case.softcap,
        sink_logits=sinks,
    )
    out = DecodeKernel(machine.launcher, *layer.tables).attend(step)
    assert out.dtype == case.dtype
    assert (out.double() - want).norm() <= TOLERANCE[case.dtype] * want.norm()
    worst = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert worst.max() <= 4 * TOLERANCE[case.dtype]

    first, count = 3, 7  # a part of the blocks, over the end of a page
    part = slice(first * BLOCK_TOKENS, (first + count) * BLOCK_TOKENS)
    where = positions[:, part].int().contiguous()
    turn = where if rope is not None or layer.key.pair_angle is not None else None
    wanted = range(first, first + count)
    got = dequantize(machine.launcher, layer.tables[0], pages[0], batch, wanted, torch.float32, turn)
    torch.testing.assert_close(got.double(), keys[:, :, part], rtol=1e-5, atol=2e-4 * float(keys.abs().max()))
    got = dequantize(machine.launcher, layer.tables[1], pages[1], batch, wanted, torch.float32)
    torch.testing.assert_close(got.double(), values[:, :, part], rtol=1e-5, atol=1e-5)
    half = dequantize(machine.launcher, layer.tables[1], pages[1], batch, wanted, case.dtype)
    assert half.dtype == case.dtype


@pytest.mark.parametrize("name", ["2bit-96-g8-dense", "trellis3-128-g4"])
def test_pages_of_a_pool(machine: Machine, name: str) -> None:
    """The same pages, scattered over a pool full of other things, give the same numbers."""
    case, device, batch, sinks = CASES[name], machine.device, 2, 3
    layer = case.layer(machine)
    storage = layer.storage(batch)
    layer.torch.pack(storage, layer.tokens("key", batch, 352), layer.tokens("value", batch, 352))
    count = len(storage.key.pages)
    blocks = torch.zeros(batch, count * PAGE_BLOCKS, 2, dtype=torch.int32)
    blocks[0, :11], blocks[1, :8] = torch.tensor([0, -1]), torch.tensor([0, -1])  # the second is shorter
    blocks[:, :, 0] = 32 * torch.arange(count * PAGE_BLOCKS)
    positions = torch.arange(360, 360 + sinks + case.tail, dtype=torch.int32).repeat(batch, 1)
    positions[1, -2:] = -(2**31)
    context = DecodeContext(blocks.to(device), positions.to(device))
    exact = [(layer.tokens("key", batch, t), layer.tokens("value", batch, t)) for t in (sinks, case.tail)]
    query = torch.randn(batch, layer.geometry.num_query_heads, case.size, generator=layer.generator)
    query = query.to(device, case.dtype)
    kernel = DecodeKernel(machine.launcher, *layer.tables)
    pages = PageTable(storage.key).refresh(), PageTable(storage.value).refresh()
    want = kernel.attend(DecodeStep(query, *pages, exact, context, scaling=0.1))

    def as_bytes(x: Tensor) -> Tensor:
        return x.contiguous().view(torch.uint8).flatten()

    key_bytes, value_bytes = (4 * table.words for table in layer.tables)
    offsets = [16, 16 + key_bytes, 16 + key_bytes + value_bytes]
    pool = torch.randint(0, 256, (7, offsets[2] + 1024 + 32), dtype=torch.uint8).to(device)
    table = torch.tensor([[5, 2], [3, -1]], dtype=torch.int32)  # of the second's last page no token is seen
    for row, page in ((0, 0), (0, 1), (1, 0)):
        held = pool[int(table[row, page])]
        held[offsets[0] : offsets[1]] = as_bytes(storage.key.pages[page].codes[row])
        held[offsets[1] : offsets[2]] = as_bytes(storage.value.pages[page].codes[row])
        if layer.tables[1].token:
            held[offsets[2] : offsets[2] + 1024] = as_bytes(storage.value.pages[page].token_params[row])
    order = [exact[side][kind] for kind in (0, 1) for side in (0, 1)]  # keys of both, then values
    addresses = torch.tensor([[x[row].data_ptr() for x in order] for row in range(batch)])
    paged = PagePool(pool, table.to(device), *offsets, addresses.to(device), (sinks, case.tail))
    none = layer.tokens("key", batch, 0)
    step = DecodeStep(query, None, None, [(none, none)] * 2, context, scaling=0.1, pool=paged)
    assert torch.equal(kernel.attend(step), want)
    for change, message in (
        ({"pages": pool[:, :100]}, "do not fit"),
        ({"key_codes": 8}, "aligned"),
        ({"table": table.to(device).long()}, "int64"),
        ({"exact": addresses.to(device)[:1]}, "shape"),
    ):
        with pytest.raises(RuntimeMismatchError, match=message):
            kernel.attend(dataclasses.replace(step, pool=dataclasses.replace(paged, **change)))


def test_the_cases_have_every_kind() -> None:
    """Steps of keys and tiles of values of all kinds that the kernel has code for, read by the cases above."""
    machine = Machine(HostLauncher(), torch.device("cpu"))
    seen: dict[Kind, set[Widths]] = {"key": set(), "value": set()}
    for case in CASES.values():
        layer = case.layer(machine)
        for table, names in zip(layer.tables, (KEY_KINDS, VALUE_KINDS), strict=True):
            if table.decode.kinds is None:
                continue
            for ends in table.decode.kinds.int():
                steps = ends[: len(names)].diff(prepend=ends.new_zeros(1))
                seen[table.kind] |= {name for name, count in zip(names, steps, strict=True) if count > 0}
    assert seen == {"key": set(KEY_KINDS), "value": set(VALUE_KINDS)}


def test_coefficients_of_any_size(machine: Machine) -> None:
    """A power of two in the coefficients of keys meets its reciprocal in the scores, one of values is in the result."""
    layer = Layer(machine, KVCacheSpec(key=paths(7), value=paths(5)), geometry(64, 2, 2, "none"))
    storage = layer.storage(1)
    layer.torch.pack(storage, layer.tokens("key", 1, 256), layer.tokens("value", 1, 256))
    pages = PageTable(storage.key).refresh(), PageTable(storage.value).refresh()
    blocks = torch.tensor([[[32 * block, -1] for block in range(PAGE_BLOCKS)]], dtype=torch.int32)
    context = DecodeContext(
        blocks.to(machine.device), torch.empty(1, 0, dtype=torch.int32, device=machine.device)
    )
    query = torch.randn(1, 4, 64, generator=layer.generator).to(machine.device).half()
    none = layer.tokens("key", 1, 0)

    def attend(key_power: float, value_power: float) -> Tensor:
        tables = []
        for quantizer, kind, power in ((layer.key, "key", key_power), (layer.value, "value", value_power)):
            scaled = dataclasses.replace(quantizer.params, coefficients=quantizer.coefficients * power)
            tables.append(KernelTables(quantizer.with_params(scaled), kind))
        step = DecodeStep(query, *pages, [(none, none)] * 2, context, scaling=0.125 / key_power)
        return DecodeKernel(machine.launcher, *tables).attend(step)

    plain = attend(1.0, 1.0)
    assert plain.abs().max() > 0.1
    assert torch.equal(attend(2.0**40, 2.0**12), plain * 2.0**12)
    assert torch.equal(attend(2.0**-40, 1.0), plain)


def test_nothing_visible_is_zero(machine: Machine) -> None:
    layer = Layer(machine, RECIPES["nuq4-1p"], geometry(64, 1, 1))
    storage = layer.storage(1)
    layer.torch.pack(storage, layer.tokens("key", 1, 64), layer.tokens("value", 1, 64))
    pages = PageTable(storage.key).refresh(), PageTable(storage.value).refresh()
    blocks = torch.zeros(1, PAGE_BLOCKS, 2, dtype=torch.int32, device=machine.device)
    context = DecodeContext(blocks, torch.empty(1, 0, dtype=torch.int32, device=machine.device))
    query = torch.randn(1, 1, 64, device=machine.device).half()
    none = layer.tokens("key", 1, 0)
    exact = [(none, none), (none, none)]
    step = DecodeStep(query, *pages, exact, context, scaling=1.0)
    out = DecodeKernel(machine.launcher, *layer.tables).attend(step)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("where", ["everywhere", "one element"])
@pytest.mark.parametrize("tail", [0, 5])
def test_what_is_not_a_number_is_not_hidden(machine: Machine, where: str, tail: int) -> None:
    """A query with a NaN gives NaN; its neighbours are as they were."""
    layer = Layer(machine, RECIPES["nuq4-1p"], geometry(64, 2, 2))
    storage = layer.storage(1)
    layer.torch.pack(storage, layer.tokens("key", 1, 64), layer.tokens("value", 1, 64))
    pages = PageTable(storage.key).refresh(), PageTable(storage.value).refresh()
    blocks = torch.tensor([[[32 * i, -1 if i < 2 else 0] for i in range(PAGE_BLOCKS)]], dtype=torch.int32)
    exact = torch.arange(64, 64 + tail, dtype=torch.int32)[None]
    context = DecodeContext(blocks.to(machine.device), exact.to(machine.device))
    held = layer.tokens("key", 1, tail), layer.tokens("value", 1, tail)
    none = layer.tokens("key", 1, 0)
    query = torch.randn(1, 4, 64, generator=layer.generator).to(machine.device).half()
    kernel = DecodeKernel(machine.launcher, *layer.tables)

    def attend(query: Tensor) -> Tensor:
        return kernel.attend(DecodeStep(query, *pages, [(none, none), held], context, scaling=0.125))

    plain = attend(query)
    assert plain.isfinite().all()
    query[0, 1, slice(None) if where == "everywhere" else 7] = torch.nan
    out = attend(query)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, 2:], plain[0, 2:])


def test_work_is_divided_so_that_all_of_it_runs_at_once() -> None:
    """Those for exact tokens are counted."""
    for heads, batch, pages, exact in [(8, 1, 512, 40), (8, 1, 512, 0), (8, 8, 512, 130), (32, 1, 64, 33)]:
        made = divide(2 * 132, heads, batch, 32, pages, exact)
        assert made.exact == -(-exact // 64)
        assert heads * batch * made.splits <= 2 * 132
        assert heads * batch * (made.splits + 1) > 2 * 132 or made.packed == -(-pages // 4)
    assert divide(2 * 132, 32, 64, 32, 512, 40).packed == 1


# ---- the operations of a cache -------------------------------------------------------------------------------


class Cache:
    """One layer of a cache, twice: the kernels and torch over one storage each."""

    def __init__(self, machine: Machine, spec: KVCacheSpec, shape: KVGeometry, batch: int):
        self.layer = Layer(machine, spec, shape)
        self.machine, self.spec, self.batch = machine, spec, batch
        self.table = SlotTable(batch, spec.sink_tokens, spec.recent_tokens, machine.device)
        self.storages = [self.layer.storage(batch, spec.sink_tokens) for _ in range(2)]
        view = SlotView()
        self.ours = CudaOps(self.layer.key, self.layer.value, machine.launcher, view)
        self.theirs = TorchOps(self.layer.key, self.layer.value)

    def step(
        self, tokens: int, mask: Tensor | None = None, window: int | None = None, positions=None
    ) -> None:
        """Append and attend with both; what they find must agree."""
        layer, batch = self.layer, self.batch
        visibility = Visibility(mask, self.table.length + tokens, tokens, window)
        if positions is None:
            positions = torch.arange(self.table.length, self.table.length + tokens)[None]
        self.table.append(positions, visibility.real())
        keys, values = layer.tokens("key", batch, tokens), layer.tokens("value", batch, tokens)
        heads, size = layer.geometry.num_query_heads, layer.geometry.head_dim
        query = (
            torch.randn(batch, heads, tokens, size, generator=layer.generator).to(self.machine.device).half()
        )
        found = []
        for ops, storage in zip((self.ours, self.theirs), self.storages, strict=True):
            storage.append(keys, values, self.table, ops.pack)
            request = AttentionRequest(query.float() if ops is self.theirs else query, visibility, size**-0.5)
            found.append(ops.attend(request, storage, self.table).double())
        for side in ("key", "value"):
            assert_same_pages(getattr(self.storages[0], side), getattr(self.storages[1], side))
        shown = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else visibility.real()
        ours, theirs = (out[shown.to(out.device)] for out in found)
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()

    def crop(self, length: int) -> None:
        self.table.crop(length)
        for storage in self.storages:
            storage.crop(self.table)

    def select(self, rows: list[int]) -> None:
        self.batch = len(rows)
        index = torch.tensor(rows, device=self.machine.device)
        self.table.select(index)
        for storage in self.storages:
            storage.select(index)


SMALL = recipe(key={"bits": 3}, value={"bits": 3}, sink_tokens=2, recent_tokens=7)


def test_a_cache_in_many_steps(machine: Machine) -> None:
    """A prompt, single tokens over block and page ends, several tokens at once, a crop, other sequences."""
    cache = Cache(machine, SMALL, geometry(64, 2, 3), 2)
    cache.step(230)
    for _ in range(3):
        cache.step(1)
    cache.step(60)
    cache.step(1)
    cache.crop(150)  # into a block: it stays ragged
    cache.step(1)
    cache.step(90)
    cache.step(1)
    cache.select([1, 1, 0])
    cache.step(1)
    launches = getattr(machine.launcher, "launches", ["decode_attention"])
    assert "decode_attention" in launches


def test_a_cache_with_error_compensation_and_a_trellis(machine: Machine) -> None:
    """Written, read by a step of one token, and as ordinary tensors for several; also what a crop left of a block."""
    spec = recipe(
        key=trellis(3, error_compensation={}, pair_rotation=True),
        value=trellis(4),
        sink_tokens=2,
        recent_tokens=7,
    )
    cache = Cache(machine, spec, geometry(64, 2, 3), 2)
    cache.step(110)
    cache.step(1)
    cache.step(40)
    cache.crop(75)
    cache.step(50)
    cache.step(1)
    assert "decode_attention" in getattr(machine.launcher, "launches", ["decode_attention"])


def test_masks(machine: Machine) -> None:
    """Left padding as a two-dimensional and as an additive mask; a mask per head goes to torch."""
    cache = Cache(machine, SMALL, geometry(64, 2, 4), 2)
    device, padding = machine.device, torch.tensor([0, 75], device=machine.device)
    slots = torch.arange(400, device=device)
    real = slots >= padding[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=1)

    def at(start: int, stop: int) -> Tensor:
        return positions[:, start:stop]

    cache.step(300, real[:, :300].long(), positions=at(0, 300))
    cache.step(1, real[:, :301].long(), positions=at(300, 301))
    hidden = torch.finfo(torch.float16).min
    additive = torch.zeros(2, 1, 1, 302, device=device).half().masked_fill(~real[:, None, None, :302], hidden)
    cache.step(1, additive, positions=at(301, 302))
    boolean = real[:, None, None, :303].clone()
    boolean[..., 40:90] = False
    cache.step(1, boolean, positions=at(302, 303))
    per_head = real[:, None, None, :304].expand(2, 8, 1, 304).clone()
    per_head[:, 3, :, 100:200] = False
    cache.step(1, per_head, positions=at(303, 304))


def test_sliding_window(machine: Machine) -> None:
    cache = Cache(machine, SMALL, geometry(64, 1, 2, window=300), 1)
    cache.step(640, window=300)
    for _ in range(2):
        for storage in cache.storages:
            storage.drop_before(cache.table.length + 1 - 300, cache.table)
        assert cache.storages[0].key.dropped_pages == 1
        cache.step(1, window=300)


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.fixture
def call():
    """A launcher, tables, and a step that would work."""
    machine = Machine(HostLauncher(), torch.device("cpu"))
    layer = Layer(machine, SMALL, geometry(64, 2, 2))
    storage = layer.storage(1)
    layer.torch.pack(storage, layer.tokens("key", 1, 64), layer.tokens("value", 1, 64))
    blocks = torch.zeros(1, PAGE_BLOCKS, 2, dtype=torch.int32)
    none = layer.tokens("key", 1, 0)
    step = DecodeStep(
        query=torch.randn(1, 4, 64).half(),
        key_pages=PageTable(storage.key).refresh(),
        value_pages=PageTable(storage.value).refresh(),
        exact=[(none, none), (none, none)],
        context=DecodeContext(blocks, torch.empty(1, 0, dtype=torch.int32)),
        scaling=1.0,
    )
    return machine.launcher, layer.tables, step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"query": s.query.float()}, "float32"),
        (lambda s: {"query": s.query.transpose(0, 1).expand(4, 4, 64).transpose(0, 1)}, "strides|shape"),
        (lambda s: {"query": s.query.to("meta")}, "meta"),
        (lambda s: {"query": torch.zeros(1, 3, 64).half()}, "not a multiple"),
        (lambda s: {"query": torch.zeros(1, 4, 32).half()}, "shape"),
        (lambda s: {"key_pages": s.key_pages.int()}, "int32"),
        (lambda s: {"first_page": 1}, "block table"),
        (
            lambda s: {"exact": [s.exact[0], (torch.zeros(1, 2, 0, 64), torch.zeros(1, 2, 0, 64))]},
            "exact keys",
        ),
        (
            lambda s: {
                "exact": [s.exact[0], (torch.zeros(1, 2, 64, 3).half().mT,) * 2],
                "context": DecodeContext(s.context.blocks, torch.zeros(1, 3, dtype=torch.int32)),
            },
            "strides",
        ),
        (
            lambda s: {"context": DecodeContext(s.context.blocks, torch.zeros(1, 4, dtype=torch.int32))},
            "exact_positions",
        ),
    ],
)
def test_wrong_tensors_are_refused_before_a_launch(call, change, message) -> None:
    launcher, tables, step = call
    with pytest.raises(RuntimeMismatchError, match=message) as caught:
        DecodeKernel(launcher, *tables).attend(dataclasses.replace(step, **change(step)))
    assert "\n" not in str(caught.value)
    assert launcher.launches == []


def test_what_would_work_does(call) -> None:
    launcher, tables, step = call
    assert DecodeKernel(launcher, *tables).attend(step).shape == step.query.shape
    assert launcher.launches == ["decode_attention"]


def test_layers_without_a_kernel_say_so_once() -> None:
    machine = Machine(HostLauncher(), torch.device("cpu"))
    layers = [
        Layer(machine, RECIPES["post-rope-token"], geometry(64, 2, 1)),
        Layer(machine, RECIPES["post-rope-token"], geometry(64, 2, 1)),
        Layer(machine, SMALL, geometry(72, 1, 1)),
    ]
    pairs = [{"key": layer.key, "value": layer.value} for layer in layers]
    with pytest.warns(RuntimeWarning) as caught:
        ops = ops_with(pairs, machine.launcher)
    assert sorted(str(w.message) for w in caught) == [
        "layer 0: there is no kernel for keys with a scale per token; torch decodes it",
        "layer 2: there is no kernel for heads of 72 channels, only for multiples of 16 up to 256; torch decodes it",
    ]
    assert all(isinstance(op, CudaOps) and op.reason for op in ops)


def test_without_a_kernel_torch_decodes() -> None:
    machine = Machine(HostLauncher(), torch.device("cpu"))
    spec = recipe(key={"bits": 3, "thresholds": "token"}, value={"bits": 3}, sink_tokens=0)
    cache = Cache(machine, spec, geometry(64, 2, 2), 1)
    cache.step(70)
    cache.step(1)
    assert "decode_attention" not in machine.launcher.launches
    assert "append_blocks" in machine.launcher.launches


def test_positions_that_jump_within_a_block_go_to_torch() -> None:
    machine = Machine(HostLauncher(), torch.device("cpu"))
    cache = Cache(machine, SMALL, geometry(64, 2, 2), 1)
    cache.step(100, positions=torch.arange(100)[None] * 2)
    cache.step(1, positions=torch.tensor([[200]]))
    assert "decode_attention" not in machine.launcher.launches


@pytest.mark.parametrize("fault", ["compiler", "shared memory"])
def test_a_decode_kernel_that_cannot_run_is_given_up_once(fault, monkeypatch) -> None:
    machine = Machine(HostLauncher(), torch.device("cpu"))
    cache = Cache(machine, SMALL, geometry(64, 2, 2), 1)
    cache.step(70)
    if fault == "compiler":

        def constant(*arguments):
            raise RuntimeMismatchError("nvcc could not compile decode.cu")

        monkeypatch.setattr(machine.launcher, "constant", constant)
    else:
        machine.launcher.shared_limit = 12_000
    with pytest.warns(RuntimeWarning, match=f"{fault if fault != 'compiler' else 'nvcc'}.*; torch decodes"):
        cache.step(1)
    cache.step(1)  # a second warning would be an error
    assert "decode_attention" not in machine.launcher.launches


def test_parameter_structures_match_the_sources() -> None:
    from shim.host import KERNELS, build

    variant = DecodeVariant(64, 4, 3, 3, outliers=False)
    for source, kernels in KERNELS.items():
        library = build(source, variant.defines if source == "decode.cu" else ())
        for kernel, name in kernels.items():
            assert getattr(library, f"size_{kernel}")() == ctypes.sizeof(getattr(structs, name))
