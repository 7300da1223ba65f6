"""Native attention over packed pages against float64, on every instruction set that runs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from artifact_factory import random_quantizer, trellis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_factory import threads
from torch import Tensor

from kvq_calib.codec.native_reading import code_tables
from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.native.attend import DecodeStep, LayerKernel, Turns
from kvq_calib.native.dequantize import Dequantizer
from kvq_calib.native.loader import Library
from kvq_calib.runtime.native_pages import PageAddresses
from kvq_calib.runtime.native_steps import StepView
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import PackedTensor
from kvq_calib.runtime.torch_ops import append_blocks
from kvq_calib.runtime.visibility import Visibility
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import ScalarSpec, TrellisSpec

CPU = torch.device("cpu")
#: Of the largest value; scores are of unit spread.
TOLERANCE = 1e-5


def rope_of(kind: str, size: int) -> RopeSpec | None:
    """Half-split, interleaved, partial (and scaled), or none."""
    count = size // 4 if kind == "partial" else size // 2
    if kind == "none" or count == 0:
        return None
    first = range(0, 2 * count, 2) if kind == "interleaved" else range(count)
    return RopeSpec(
        pairs=tuple((i, i + (1 if kind == "interleaved" else count)) for i in first),
        inv_freq=tuple(10000.0 ** (-i / count) for i in range(count)),
        attention_scaling=1.2 if kind == "partial" else 1.0,
    )


@dataclass
class Layer:
    """Packed blocks, exact tokens and a query of one layer, all random."""

    key: Quantizer
    value: Quantizer
    packed: tuple[PackedTensor, PackedTensor]
    exact: list[tuple[Tensor, Tensor]]
    query: Tensor
    positions: Tensor  # int64 [B, 256 * pages + S]
    seen: Tensor  # bool, the same

    @property
    def places(self) -> int:
        return len(self.packed[0].pages) * PAGE_TOKENS

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values, float64 ``[B, H, places + S, D]``."""
        sides = []
        for number, (quantizer, packed) in enumerate(zip((self.key, self.value), self.packed, strict=True)):
            heads, size = quantizer.shape
            parts = [torch.empty(packed.batch, heads, 0, size, dtype=torch.float64)]
            if packed.pages:
                y = PageReader(quantizer).read(packed.pages).mT.double()
                parts.append(turned_back(y, quantizer))
            parts += [part[number].double() for part in self.exact]
            sides.append(torch.cat(parts, dim=2))
        return sides[0], sides[1]


def turned_back(y: Tensor, quantizer: Quantizer) -> Tensor:
    """``[B, H, S, D]`` with each pair turned by minus its own angle."""
    angles = quantizer.pair_angle
    if angles is None:
        return y
    assert quantizer.rope is not None
    first, second = torch.tensor(quantizer.rope.pairs).unbind(1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    out = y.clone()
    out[..., first] = cos * y[..., first] + sin * y[..., second]
    out[..., second] = cos * y[..., second] - sin * y[..., first]
    return out


def turned(keys: Tensor, positions: Tensor, rope: RopeSpec | None) -> Tensor:
    """Keys at their positions, with angles in float64."""
    if rope is None:
        return keys
    first, second = torch.tensor(rope.pairs).unbind(1)
    angle = positions[:, None, :, None].double() * torch.tensor(rope.inv_freq, dtype=torch.float64)
    cos, sin = angle.cos() * rope.attention_scaling, angle.sin() * rope.attention_scaling
    out = keys.clone()
    out[..., first] = cos * keys[..., first] - sin * keys[..., second]
    out[..., second] = sin * keys[..., first] + cos * keys[..., second]
    return out


def attention_float64(
    layer: Layer, scaling: float, softcap: float | None, logits: Tensor | None, first_token: int
) -> Tensor:
    keys, values = layer.stored()
    keys = turned(keys, layer.positions, layer.key.read_rope)
    group = layer.query.shape[1] // keys.shape[1]
    scores = (layer.query.double()[:, :, None] @ keys.repeat_interleave(group, 1).mT)[:, :, 0] * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    seen = layer.seen.clone()
    seen[:, : min(first_token, layer.places)] = False
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if logits is not None:
        scores = torch.cat((scores, logits.double().expand(len(scores), -1)[..., None]), dim=-1)
    weights = scores.softmax(-1).nan_to_num()[..., : keys.shape[2]]
    return (weights[:, :, None] @ values.repeat_interleave(group, 1))[:, :, 0]


def make_layer(
    key: Quantizer,
    value: Quantizer,
    seed: int,
    *,
    group: int = 1,
    batch: int = 1,
    blocks: int = 1,
    sinks: int = 0,
    tail: int = 0,
    hidden: float = 0.0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    heads, size = key.shape

    def tokens(quantizer: Quantizer, count: int) -> Tensor:
        noise = torch.randn(batch, heads, count, quantizer.shape.head_dim, generator=generator)
        return noise.to(quantizer.storage)

    packed = tuple(PackedTensor(quantizer, batch, CPU) for quantizer in (key, value))
    for quantizer, side in zip((key, value), packed, strict=True):
        if blocks:
            append_blocks(side, quantizer, tokens(quantizer, blocks * BLOCK_TOKENS))
    exact = [(tokens(key, count), tokens(value, count)) for count in (sinks, tail)]
    places, spread = len(packed[0].pages) * PAGE_TOKENS, blocks * BLOCK_TOKENS
    start = torch.randint(0, 100_000, (batch, 1), generator=generator)
    positions = start + torch.arange(spread + tail)
    positions = torch.cat(
        (
            positions[:, :spread],
            torch.zeros(batch, places - spread, dtype=torch.int64),
            torch.randint(0, 100, (batch, sinks), generator=generator),
            positions[:, spread:],
        ),
        dim=1,
    )
    seen = torch.rand(positions.shape, generator=generator) >= hidden
    seen[:, spread:places] = False
    if hidden and batch > 1:
        seen[0, : 9 * BLOCK_TOKENS] = False  # a page and more
    query = torch.randn(batch, heads * group, size, generator=generator)
    return Layer(key, value, packed, exact, query, positions, seen)


def step_of(layer: Layer, turns: Turns | None, first_token: int, spare: int) -> DecodeStep:
    """What the runtime would make of it, with tables that have pages to spare."""
    batch, places = len(layer.seen), layer.places
    pages = places // PAGE_TOKENS + spare
    bits = (layer.seen[:, :places].unflatten(1, (-1, BLOCK_TOKENS)).long() << torch.arange(32)).sum(-1)
    seen = torch.zeros(batch, pages * PAGE_BLOCKS, dtype=torch.int32)
    seen[:, : bits.shape[1]] = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    exact_seen = layer.seen[:, places:].contiguous()
    if turns is None:
        return DecodeStep(seen, exact_seen, None, None, first_token)
    table = torch.full((batch, pages, len(turns.pair), 2, PAGE_BLOCKS), torch.nan)
    for row in range(batch):
        first = layer.positions[row, :places:BLOCK_TOKENS].int().contiguous()
        turns.of_blocks(first, table[row, : places // PAGE_TOKENS])
    exact = turns.of_tokens(layer.positions[:, places:].int())
    return DecodeStep(seen, exact_seen, table, exact, first_token)


def attend(
    library: Library,
    layer: Layer,
    *,
    softcap: float | None = None,
    logits: Tensor | None = None,
    first_token: int = 0,
    spare: int = 0,
) -> Tensor:
    rope = layer.key.read_rope
    turns = None if rope is None else Turns(library, rope.pairs, rope.inv_freq, rope.attention_scaling)
    kernel = LayerKernel(
        library, code_tables(layer.key), code_tables(layer.value), turns, layer.key.pair_angle
    )
    keys, values = (
        PageAddresses(packed, tables).refresh()
        for packed, tables in zip(layer.packed, (kernel.key, kernel.value), strict=True)
    )
    return kernel.attend(
        layer.query,
        step_of(layer, turns, first_token, spare),
        (keys, values),
        layer.exact,
        scaling=layer.key.shape.head_dim**-0.5,
        softcap=softcap,
        sink_logits=logits,
    )


def check_dequantized(library: Library, layer: Layer) -> None:
    """Some blocks as ordinary tensors, from the middle of a page on, keys turned."""
    rope = layer.key.read_rope
    turns = None if rope is None else Turns(library, rope.pairs, rope.inv_freq, rope.attention_scaling)
    want = layer.stored()
    keys = turned(want[0], layer.positions, rope)
    blocks = layer.packed[0].blocks
    first = min(3, blocks)
    part = slice(first * BLOCK_TOKENS, blocks * BLOCK_TOKENS)
    angles = None
    if turns is not None:
        angle = layer.positions[:, part, None].double() * turns.frequency
        angles = angle.cos().float(), angle.sin().float()
    for quantizer, packed, exact, own, by in (
        (layer.key, layer.packed[0], keys, layer.key.pair_angle, turns),
        (layer.value, layer.packed[1], want[1], None, None),
    ):
        reader = Dequantizer(library, code_tables(quantizer), by, own)
        found = reader.read(PageAddresses(packed, reader.tables).refresh(), first, blocks - first, angles)
        wanted = exact[:, :, part]
        assert found.shape == wanted.shape
        if blocks > first:
            assert float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max())), (
                library.isa
            )
        angles = None


def check_layer(libraries: list[Library], layer: Layer, **options: Any) -> None:
    named = {"softcap": None, "logits": None, "first_token": 0, **options}
    named.pop("spare", None)
    want = attention_float64(layer, layer.key.shape.head_dim**-0.5, **named)
    for library in libraries:
        found = attend(library, layer, **options).double()
        assert found.isfinite().all()
        scale = max(float(want.abs().max()), 1e-3)
        assert float((found - want).abs().max()) <= TOLERANCE * scale, library.isa
        check_dequantized(library, layer)


def scalar(bits: int, thresholds: str, fraction: float) -> dict[str, Any]:
    return {"codec": "scalar", "bits": bits, "thresholds": thresholds, "outliers": {"fraction": fraction}}


def quantizer(words: dict[str, Any], heads: int, size: int, rope: RopeSpec | None, seed: int) -> Quantizer:
    spec = (TrellisSpec if words["codec"] == "trellis" else ScalarSpec)(**words)
    sample = torch.randn(1, heads, 64, size, generator=torch.Generator().manual_seed(seed))
    return random_quantizer(spec, HeadShape(heads, size), rope, seed=seed, sample=sample)


scalars = st.builds(
    scalar,
    st.integers(1, 8),
    st.sampled_from(["channel", "token", "token_normalized"]),
    st.sampled_from([0.0, 0.05]),
)


@st.composite
def codecs(draw: st.DrawFn, keys: bool, rope: bool) -> dict[str, Any]:
    if draw(st.booleans()):
        return draw(scalars) | ({"pre_rope": draw(st.booleans())} if keys else {})
    rotated = {"pair_rotation": draw(st.booleans())} if keys and rope else {}
    return trellis(draw(st.integers(1, 7)), states=draw(st.sampled_from([1, 4])), **rotated)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_attention_is_that_of_float64(libraries: list[Library], data: st.DataObject) -> None:
    draw = data.draw
    seed, heads = draw(st.integers(0, 2**31)), draw(st.integers(1, 3))
    size, value_size = (draw(st.sampled_from([16, 18, 20, 33, 48, 64])) for _ in range(2))
    rope = rope_of(draw(st.sampled_from(["half", "interleaved", "partial", "none"])), size)
    key = quantizer(draw(codecs(True, rope is not None)), heads, size, rope, seed)
    value = quantizer(draw(codecs(False, False)), heads, value_size, None, seed + 1)
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12]))
    layer = make_layer(
        key,
        value,
        seed,
        group=group,
        batch=draw(st.integers(1, 3)),
        blocks=draw(st.integers(0, 20)),
        sinks=draw(st.integers(0, 3)),
        tail=draw(st.integers(0, 70)),
        hidden=draw(st.sampled_from([0.0, 0.3])),
    )
    logits = torch.randn(heads * group, generator=torch.Generator().manual_seed(seed))
    with threads(draw(st.integers(1, 3))):
        check_layer(
            libraries,
            layer,
            softcap=draw(st.sampled_from([None, 0.7])),
            logits=draw(st.sampled_from([None, logits])),
            first_token=draw(st.integers(0, 300)),
            spare=draw(st.integers(0, 2)),
        )


@pytest.mark.parametrize("size", [16, 80, 128, 256])
@pytest.mark.parametrize("kind", ["scalar", "trellis"])
def test_head_sizes(libraries: list[Library], kind: str, size: int) -> None:
    words = scalar(4, "channel", 0.01) if kind == "scalar" else trellis(5, pair_rotation=True)
    value_words = scalar(4, "token", 0.01) if kind == "scalar" else trellis(4)
    key = quantizer(words, 1, size, rope_of("half", size), size)
    value = quantizer(value_words, 1, size, None, size + 1)
    check_layer(libraries, make_layer(key, value, size, group=3, blocks=19, sinks=1, tail=33))


@pytest.mark.parametrize("bits", range(1, 8))
def test_channels_of_one_width(libraries: list[Library], bits: int) -> None:
    """Every width by itself, none among them, for no channel decides for another how it is read."""
    spec = trellis(bits, pair_rotation=True)
    rope = rope_of("half", 16)
    key, value = quantizer(spec, 2, 16, rope, bits), quantizer(trellis(bits), 2, 16, None, bits)
    check_layer(libraries, make_layer(key, value, bits, group=2, blocks=9, tail=1))


def test_results_are_the_same_for_the_same_number_of_threads(libraries: list[Library]) -> None:
    key = quantizer(scalar(4, "channel", 0.01), 3, 32, rope_of("half", 32), 0)
    value = quantizer(scalar(4, "token", 0.01), 3, 32, None, 1)
    layer = make_layer(key, value, 2, group=3, batch=2, blocks=70, tail=5)
    for library in libraries:
        for count in (1, 2, 3):
            with threads(count):
                found = [attend(library, layer) for _ in range(3)]
            assert all(torch.equal(each, found[0]) for each in found)


def test_nothing_seen_is_zero(libraries: list[Library]) -> None:
    key = quantizer(scalar(4, "channel", 0.0), 1, 16, rope_of("half", 16), 0)
    value = quantizer(scalar(4, "token", 0.0), 1, 16, None, 1)
    layer = make_layer(key, value, 2, blocks=3, sinks=1, tail=5, hidden=1.0)
    for library in libraries:
        assert not attend(library, layer).any()


def test_addresses_follow_pages() -> None:
    """Also where a page that was full has been opened again and filled with others since."""
    value = quantizer(scalar(4, "channel", 0.05), 1, 16, None, 0)
    packed = PackedTensor(value, 1, CPU)
    tokens = 3 * torch.randn(1, 1, 20 * BLOCK_TOKENS, 16)
    append_blocks(packed, value, tokens[:, :, : 9 * BLOCK_TOKENS].half())
    addresses = PageAddresses(packed, code_tables(value))
    addresses.refresh()
    packed.truncate(2)
    append_blocks(packed, value, tokens[:, :, : 18 * BLOCK_TOKENS].half())
    rows = addresses.refresh()
    assert rows.count == len(packed.pages) == 3
    for row, page in zip(rows.tensor.tolist(), packed.pages, strict=False):
        assert page.outlier_index is not None
        assert page.outlier_residual is not None
        assert page.outlier_start is not None
        assert row[0] == page.codes.data_ptr()
        assert row[2:5] == [
            tensor.data_ptr() for tensor in (page.outlier_index, page.outlier_residual, page.outlier_start)
        ]
        assert row[5:] == [page.outlier_start.element_size(), page.entries, 1]
    assert addresses.refresh() is rows


def test_layers_that_see_different_tokens_take_turns(libraries: list[Library]) -> None:
    """A step with a mask that hides a page, and one without: tables of one are not those of the other."""
    view = StepView(libraries[0])
    rope = rope_of("half", 16)
    assert rope is not None
    turns = view.turns(rope)
    table = SlotTable(1, 0, 0, CPU)
    table.append(torch.arange(700)[None], None)
    plain = Visibility(None, 700, 1, None)
    mask = torch.ones(1, 1, 1, 700, dtype=torch.bool)
    mask[..., :300] = False
    masked = Visibility(mask, 700, 1, None)
    first = view.step(plain, table, turns)
    assert first is not None
    assert first.block_turns is not None
    before = first.block_turns.clone()
    second = view.step(masked, table, turns)
    assert second is not None
    assert not second.seen[0, :9].any()
    assert second.seen[0, 9] != -1
    assert view.step(plain, table, turns) is first
    assert view.step(masked, table, turns) is second
    pages = table.blocks // PAGE_BLOCKS
    assert torch.equal(first.block_turns[:, :pages], before[:, :pages])
    angle = 32 * torch.arange(8 * pages).double() * turns.turns.frequency[:, None]
    found = first.block_turns[0, :pages, :, 0].transpose(0, 1).flatten(1)
    assert float((found - angle.cos()).abs().max()) < 1e-6
