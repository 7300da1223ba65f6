"""Pages of 16 tokens hold what our own pages hold, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_factory import RECIPES, artifact_for, random_artifact, recipe
from models_zoo import tiny_model, token_ids
from test_runtime_storage import GEOMETRY, HEADS, SIZE, tokens

from kvq_calib import KVQCache
from kvq_calib.codec.quantizer import Quantized, Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.paged import TOKENS, PagedLayout, codes_of, packed_tensor
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import attached
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.storage import PackedTensor
from kvq_calib.runtime.torch_ops import append_blocks
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import KINDS

CPU = torch.device("cpu")
PAGE = Path(__file__).parent.parent / "docs" / "guides" / "integrations.md"
PAIRS = [(name, kind) for name in RECIPES for kind in KINDS]


def stored(name: str, kind: str, count: int = 320, batch: int = 2) -> tuple[PackedTensor, Quantizer]:
    quantizer = random_artifact(GEOMETRY, RECIPES[name]).quantizers()[0][kind]
    packed = PackedTensor(quantizer, batch, CPU)
    append_blocks(packed, quantizer, tokens(count, batch, seed=4)[0].to(quantizer.storage))
    return packed, quantizer


def roomy(quantizer: Quantizer) -> PagedLayout:
    return PagedLayout(quantizer, TOKENS * quantizer.outlier_cap)


def assert_same(ours: Quantized, theirs: Quantized) -> None:
    assert vars(ours).keys() == vars(theirs).keys()
    for name, tensor in vars(ours).items():
        other = getattr(theirs, name)
        assert (tensor is None) == (other is None), name
        assert tensor is None or (tensor.dtype == other.dtype and torch.equal(tensor, other)), name


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_round_trip_through_scattered_pages_is_equal_bit_for_bit(name, kind):
    packed, quantizer = stored(name, kind)
    layout = roomy(quantizer)
    pages = layout.pack(codes_of(packed))
    table = torch.randperm(64, generator=torch.Generator().manual_seed(0))[: 2 * 20].view(2, 20)
    pool = layout.pool(64)
    pool[table] = pages
    back = packed_tensor(layout.unpack(pool[table]), quantizer)
    assert back.blocks == packed.blocks == 10
    assert len(back.pages) == len(packed.pages) == 2
    for page, expected in zip(back.pages, packed.pages, strict=True):
        assert page.tensors().keys() == expected.tensors().keys()
        for part, tensor in page.tensors().items():
            assert torch.equal(tensor, expected.tensors()[part]), part


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_pages_are_packed_and_read_by_themselves_or_with_the_other_of_their_block(name, kind):
    packed, quantizer = stored(name, kind)
    layout = roomy(quantizer)
    pages = layout.pack(codes_of(packed))
    x = tokens(320, 2, seed=4)[0].to(quantizer.storage)
    reference = (
        PageReader(quantizer).read(packed.pages)[..., :320].flatten(1, 2).mT
    )  # [B, T, C], with outliers
    together = (
        2 if quantizer.codes_in_blocks else 1
    )  # the pages of a block, where its tokens are coded as one
    for number in (0, 1, 7, 19):
        first = number // together * together
        of_pages = slice(first, first + together)
        here = slice(TOKENS * first, TOKENS * (first + together))
        direct = quantizer.quantize(x[:, :, here])
        assert torch.equal(layout.pack(direct), pages[:, of_pages])
        read = layout.unpack(pages[:, of_pages])
        assert_same(read, direct)
        y = quantizer.transform(quantizer.dequantize(read))
        torch.testing.assert_close(y, reference[:, here], atol=2e-5, rtol=2e-5)


def unit(words: np.ndarray, width: int, token: int) -> int:
    """A code from the words of a channel, by the documented layout alone."""
    if width > 4:
        return unit(words[:4], 4, token) | unit(words[4:], width - 4, token) << 4
    piece, place = divmod(token, 4)

    def nibble(word):
        return int(words[word]) >> 4 * place & 15

    if width == 3:
        return nibble(piece) & 7 if piece < 3 else sum((nibble(p) >> 3) << p for p in range(3))
    return {
        4: lambda: nibble(piece),
        2: lambda: nibble(piece // 2) >> 2 * (piece % 2) & 3,
        1: lambda: nibble(0) >> piece & 1,
    }[width]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["trellis-one-state", "nuq4-1p"])
def test_the_documented_layout_read_with_numpy_alone(name, kind):
    packed, quantizer = stored(name, kind, count=32, batch=1)
    layout, codes = roomy(quantizer), codes_of(packed)
    page = layout.pack(codes)[0, 1].numpy().view(np.uint16)
    place = 0
    for channel, width in enumerate(quantizer.layout.widths):
        words, place = page[place : place + width], place + width
        got = [unit(words, width, token) if width else 0 for token in range(TOKENS)]
        assert got == codes.codes[0, TOKENS:, channel].tolist()
    if name == "trellis-one-state":
        assert codes.token_scale is None  # the codes are all there is
        assert codes.outliers is None
        return
    if kind == "value":
        pairs = page[place : place + 2 * TOKENS].view(np.float16).reshape(TOKENS, 2)
        place += 2 * TOKENS
        assert pairs[:, 0].tolist() == codes.token_scale[0, TOKENS:].tolist()
        assert pairs[:, 1].tolist() == codes.token_zero_point[0, TOKENS:].tolist()
    starts = page[place : place + HEADS + 1]
    index = page[place + HEADS + 1 :][: layout.outlier_slots]
    residual = page[place + HEADS + 1 + layout.outlier_slots :][: layout.outlier_slots].view(np.float16)
    found = {}
    for head in range(HEADS):
        for entry in range(starts[head], starts[head + 1]):
            token, coordinate = index[entry] >> 11, index[entry] & 0x7FF
            found[int(token), head * SIZE + int(coordinate)] = float(residual[entry])
    where = codes.outliers[0, TOKENS:].nonzero().tolist()
    assert where
    assert found == {(t, c): float(codes.residual[0, TOKENS + t, c]) for t, c in where}


def test_a_page_has_one_size_and_says_when_outliers_do_not_fit():
    packed, quantizer = stored("nuq4-1p", "value")
    codes = codes_of(packed)
    most = int(roomy(quantizer).outliers_of_pages(codes).max())
    exact = PagedLayout(quantizer, most)
    assert exact.pack(codes).shape == (2, 20, exact.page_bytes // 2)
    words = quantizer.layout.words_per_block + 2 * TOKENS + HEADS + 1 + 2 * most
    assert 2 * words <= exact.page_bytes < 2 * words + 16
    assert exact.page_bytes % 16 == 0
    with pytest.raises(RuntimeMismatchError, match=f"has {most} outliers and room for {most - 1}"):
        PagedLayout(quantizer, most - 1).pack(codes)
    with pytest.raises(RuntimeMismatchError, match="outlier slots"):
        PagedLayout(quantizer, TOKENS * quantizer.outlier_cap + 1)


def test_tokens_that_fill_no_page_are_refused():
    packed, quantizer = stored("dense2", "key", count=32)
    codes = codes_of(packed)
    layout = PagedLayout(quantizer)
    assert layout.outliers_of_pages(codes).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(RuntimeMismatchError, match="20 tokens do not fill"):
        layout.pack(Quantized(codes.codes[:, :20]))
    with pytest.raises(RuntimeMismatchError, match="16 tokens do not fill whole blocks of 32"):
        packed_tensor(layout.unpack(layout.pack(codes)[:, :1]), quantizer)
    with pytest.raises(RuntimeMismatchError, match="nothing is packed"):
        codes_of(PackedTensor(quantizer, 1, CPU))


@pytest.mark.model
def test_the_code_on_the_page_runs():
    (code,) = re.findall(
        r"```python\n(from kvq_calib.integrations.paged.*?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    model = tiny_model("llama")
    with attached(model), torch.no_grad():
        cache = KVQCache(artifact_for(model, RECIPES["dense2"]), model)
        model(input_ids=token_ids(2, 300), **with_cache(cache))
    names = {"cache": cache, "block_table": torch.randperm(1024)[:36].view(2, 18)}
    exec(compile(code, str(PAGE), "exec"), names)
    assert_same(codes_of(names["again"]), codes_of(names["packed"]))
    assert names["again"].blocks == 9


def test_the_page_sizes_on_the_page():
    shape = LayerGeometry(num_query_heads=32, num_kv_heads=8, head_dim=128)
    spec = recipe(key={"bits": 3, "outliers": {}}, value={"bits": 3, "outliers": {}})
    pair = random_artifact(KVGeometry(layers=(shape,)), spec).quantizers()[0]
    assert [PagedLayout(pair[kind]).page_bytes for kind in KINDS] == [6144, 6208]


@pytest.mark.model
def test_a_model_goes_on_from_a_cache_that_went_through_a_pool():
    model = tiny_model("mistral")  # a sliding window: dropped pages stay dropped
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    ids = token_ids(2, 330)
    with attached(model), torch.no_grad():
        cache, expected = KVQCache(artifact, model), KVQCache(artifact, model)
        for each in (cache, expected):
            model(input_ids=ids[:, :290], **with_cache(each))
            model(input_ids=ids[:, 290:300], **with_cache(each))
        for layer in cache.layers:
            for kind in KINDS:
                packed = getattr(layer.storage, kind)
                assert packed.dropped_pages == 1
                quantizer = cache.quantizers[layer.index][kind]
                layout = roomy(quantizer)
                moved = packed_tensor(layout.unpack(layout.pack(codes_of(packed))), quantizer)
                moved.dropped_pages, moved.blocks = packed.dropped_pages, packed.blocks
                setattr(layer.storage, kind, moved)
        got = model(input_ids=ids[:, 300:], **with_cache(cache)).logits
        want = model(input_ids=ids[:, 300:], **with_cache(expected)).logits
    assert torch.equal(got, want)
