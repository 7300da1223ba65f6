"""The bit layout: exact round trips and the documented places."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.codec.packing import (
    BLOCK_TOKENS,
    PAGE_BLOCKS,
    PAGE_TOKENS,
    PageLayout,
    pack_outliers,
    pack_units,
    unpack_outliers,
    unpack_units,
)


def random_codes(bits, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(9))
def test_units_round_trip_in_exactly_their_bits(bits):
    codes = random_codes(bits, 3, 5, BLOCK_TOKENS)
    words = pack_units(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, 5, bits)
    assert torch.equal(unpack_units(words, bits), codes)


def place(bits, token):
    """The documented place of a token: [(word, bit of the word, bit of the code)], written from the table."""
    nibble = 4 * (token % 8)
    if bits == 4:
        return [(token // 8, nibble + b, b) for b in range(4)]
    if bits == 3 and token < 24:
        return [(token // 8, nibble + b, b) for b in range(3)]
    if bits == 3:
        return [(b, nibble + 3, b) for b in range(3)]
    if bits == 2:
        return [(token // 16, nibble + (0 if token % 16 < 8 else 2) + b, b) for b in range(2)]
    if bits == 1:
        return [(0, nibble + token // 8, 0)]
    low = place(4, token)
    return low + [(4 + word, bit, 4 + code) for word, bit, code in place(bits - 4, token)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_bit_stands_where_the_table_says(bits):
    codes = random_codes(bits, BLOCK_TOKENS, seed=bits)
    expected = np.zeros(bits, dtype=np.uint32)
    for token in range(BLOCK_TOKENS):
        for word, bit, code_bit in place(bits, token):
            expected[word] |= np.uint32((int(codes[token]) >> code_bit & 1) << bit)
    assert pack_units(codes, bits).numpy().view(np.uint32).tolist() == expected.tolist()


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(0, 8), min_size=6, max_size=6),
    first=st.integers(0, PAGE_BLOCKS),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_pages_hold_mixed_widths_whatever_the_appends(widths, first, batch, seed):
    layout = PageLayout(tuple(widths), heads=2, head_dim=3, token_params=False, outlier_cap=0)
    codes = torch.stack(
        [random_codes(w, batch, PAGE_TOKENS, seed=seed + i) for i, w in enumerate(widths)], -1
    )
    page = layout.new_page(batch)
    assert page.nbytes == layout.page_bytes(batch)["codes"] == batch * PAGE_TOKENS * sum(widths) // 8
    split = first * BLOCK_TOKENS
    layout.write(page, codes[:, :split], 0)
    before = layout.read(page)[..., :split]
    layout.write(page, codes[:, split:], first)
    assert torch.equal(layout.read(page).transpose(1, 2), codes)
    assert torch.equal(layout.read(page)[..., :split], before)
    assert torch.equal(layout.read(page, blocks=3).transpose(1, 2), codes[:, : 3 * BLOCK_TOKENS])


def test_a_channels_region_starts_at_eight_times_its_offset():
    layout = PageLayout((3, 0, 5, 2), heads=1, head_dim=4, token_params=False, outlier_cap=0)
    codes = torch.zeros(1, PAGE_TOKENS, 4, dtype=torch.uint8)
    codes[..., 3] = random_codes(2, 1, PAGE_TOKENS)
    page = layout.new_page(1)
    layout.write(page, codes, 0)
    assert layout.word_offsets == (0, 3, 3, 8)
    region = page[0, 8 * 8 : 8 * 10].view(PAGE_BLOCKS, 2)
    assert torch.equal(region, pack_units(codes[0, :, 3].view(PAGE_BLOCKS, BLOCK_TOKENS), 2))
    assert not page[0, : 8 * 8].any()


def test_writes_beyond_a_page_are_refused():
    layout = PageLayout((4,), heads=1, head_dim=1, token_params=False, outlier_cap=0)
    with pytest.raises(ValueError, match="whole blocks of one page"):
        layout.write(layout.new_page(1), torch.zeros(1, 64, 1, dtype=torch.uint8), 7)
    with pytest.raises(ValueError, match="whole blocks of one page"):
        layout.write(layout.new_page(1), torch.zeros(1, 33, 1, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="widths"):
        PageLayout((4, 4), heads=1, head_dim=1, token_params=False, outlier_cap=0)


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.integers(1, 3),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_outlier_lists_round_trip(blocks, batch, heads, density, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, blocks * BLOCK_TOKENS, heads * 5)
    mask = torch.rand(shape, generator=generator) < density
    residual = torch.randn(shape, generator=generator).half()
    lists = pack_outliers(mask, residual, heads)
    assert lists.counts.shape == (blocks, batch, heads)
    assert int(lists.counts.sum()) == int(mask.sum()) == len(lists.index) == len(lists.residual)
    flat, values = unpack_outliers(lists, head_dim=5)
    dense = torch.zeros(shape, dtype=torch.half).flatten()
    dense[flat] = values
    assert torch.equal(dense.view(shape), torch.where(mask, residual, 0))


def test_outlier_lists_are_sorted_by_block_sequence_head_token():
    mask = torch.zeros(2, 2 * BLOCK_TOKENS, 2 * 3, dtype=torch.bool)
    order = [(0, 1, 2), (0, 5, 0), (0, 2, 4), (1, 0, 0), (0, 40, 1)]  # (row, token, channel), in list order
    for row, token, channel in order:
        mask[row, token, channel] = True
    lists = pack_outliers(mask, torch.zeros(mask.shape, dtype=torch.half), heads=2)
    expected = [(token % BLOCK_TOKENS) << 11 | channel % 3 for _, token, channel in order]
    assert (lists.index.to(torch.int64) & 0xFFFF).tolist() == expected
    assert lists.counts.flatten().tolist() == [2, 1, 1, 0, 1, 0, 0, 0]


def test_starts_are_as_narrow_as_a_full_page_allows():
    layout = PageLayout((3,) * 192, heads=3, head_dim=64, token_params=False, outlier_cap=48)
    assert [layout.start_dtype(batch) for batch in (1, 2, 3)] == [torch.int16, torch.int16, torch.int32]
    sizes = [layout.page_bytes(batch)["outlier_starts"] for batch in (2, 3)]
    assert sizes == [2 * (8 * 2 * 3 + 1), 4 * (8 * 3 * 3 + 1)]
