"""Tables of a quantizer for the decode kernel, in the order in which it reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.computed_levels import level_counts
from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.runtime.cuda.kinds import KIND_ROOM, Arrangement, arrange_pairs, arrange_values
from kvq_calib.runtime.cuda.tables import QuantizerTables

__all__ = ["MAX_HEAD_DIM", "DecodeTables", "KernelTables", "unsupported"]

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class DecodeTables:
    """Tables for the keys or values of a layer.

    Attributes:
        bits: width of all channels, with levels from a table; 0: each channel has its own width, and levels are
            computed.
        paths: with computed levels, whether codes follow a trellis.
        channels: int32 ``[H, D, 2]``: word offset and ``coordinate | bits << 16``, in the kernel's order.
        levels: uint8 ``[H, D, n]``: tables, or the coefficients of polynomials.
        region: int32 ``[H, 2]``: first byte of a head's codes in a page of one sequence, and their number.
        kinds: uint8 ``[H, 16]``, see :class:`~kvq_calib.runtime.cuda.kinds.Arrangement`; or ``None``.
        angles: int32 ``[H, D / 2, 2]``, turns per token and at position 0, in the kernel's order.
        turns: float32 ``[H, 16, D / 2, 2]``: cosine and sine of the turns of the tokens of half a block.
        pair_scale: float32 ``[H, D / 2, 2]``: factor of the query for a pair, and the reciprocal of the factor of its
            levels.
        affine: float32 ``[H, D, 2]``: factor and offset of the result's channels.
        fits: whether the levels are in the range of float16.
    """

    bits: int
    paths: bool
    channels: Tensor
    levels: Tensor
    region: Tensor
    kinds: Tensor | None
    angles: Tensor
    turns: Tensor
    pair_scale: Tensor
    affine: Tensor
    fits: bool = True

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        found = (getattr(self, field.name) for field in fields(self))
        return [value for value in found if isinstance(value, Tensor)]


class KernelTables(QuantizerTables):
    """All tables of the kernels for keys or values."""

    @cached_property
    def decode(self) -> DecodeTables:
        """Tables of the decode kernel. Heads must have a multiple of 16 channels."""
        if isinstance(self.quantizer, TrellisQuantizer):
            return _computed(self, self.quantizer)
        return _looked_up(self)

    def tensors(self) -> list[Tensor]:
        """All tensors besides the quantizer's parameters."""
        return super().tensors() + (self.decode.tensors() if "decode" in vars(self) else [])


def unsupported(key: KernelTables, value: KernelTables) -> str:
    """Why there is no decode kernel for a layer, or an empty string."""
    if key.head_dim % 16 or key.head_dim > MAX_HEAD_DIM:
        return f"there is no kernel for heads of {key.head_dim} channels, only for multiples of 16 up to {MAX_HEAD_DIM}"
    if key.token:
        return "there is no kernel for keys with a scale per token"
    if not value.decode.fits:
        return "there is no kernel for value thresholds beyond the range of float16"
    return ""


def _channels(tables: QuantizerTables, order: Tensor) -> Tensor:
    channel = order + tables.head_dim * torch.arange(tables.heads, device=tables.device)[:, None]
    packed = order | tables.bits[channel].to(torch.int64) << 16
    return torch.stack((tables.word_offset[channel], packed.to(torch.int32)), dim=-1).contiguous()


def _region(tables: QuantizerTables) -> Tensor:
    """``[H, 2]``: where the codes of a head begin in a page of one sequence, and their size, in bytes."""
    first = tables.word_offset.view(tables.heads, -1)[:, 0]
    words = torch.stack((first, tables.bits.view(tables.heads, -1).sum(-1)), dim=-1)
    return (4 * PAGE_BLOCKS * words).to(torch.int32)


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """``[C, n]`` to ``[H, D, n]`` in the kernel's order."""
    by_head: Tensor = values.unflatten(0, tuple(order.shape))
    return by_head.gather(1, order[..., None].expand(-1, -1, by_head.shape[-1]))


def _pair_angles(tables: QuantizerTables, order: Tensor) -> Tensor:
    """The angles of pairs, with opposite sign if the second channel comes first."""
    number = torch.empty(tables.head_dim, dtype=torch.int64, device=tables.device)
    is_first = torch.zeros(tables.head_dim, dtype=torch.bool, device=tables.device)
    for index, (first, second) in enumerate(tables.rope_pairs[0]):
        number[first] = number[second] = index
        is_first[first] = True
    leading = order[:, ::2]
    angles = tables.angles.gather(1, number[leading][..., None].expand(-1, -1, 2))
    return torch.where(is_first[leading][..., None], angles, -angles).contiguous()


def _turns(angles: Tensor) -> Tensor:
    """Cosines and sines of the angles of pairs after 0 to 15 tokens."""
    tokens = torch.arange(BLOCK_TOKENS // 2, dtype=torch.float64, device=angles.device)
    radians = tokens[:, None] * (angles[:, None, :, 0] * (2 * math.pi / 2.0**32))
    return torch.stack((radians.cos(), radians.sin()), dim=-1).float().contiguous()


def _pair_scale(tables: QuantizerTables, angles: Tensor, norm: Tensor) -> Tensor:
    """Factors of pairs, given what their levels are divided by: float32 ``[H, D / 2]``."""
    factor = norm * torch.where(angles[..., 0] != 0, tables.rope_scaling, 1.0)
    return torch.stack((factor, 1.0 / norm), dim=-1).contiguous()


# ---- levels from tables ----------------------------------------------------------------------------------------------


def _looked_up(tables: QuantizerTables) -> DecodeTables:
    heads, size = tables.heads, tables.head_dim
    coordinates = torch.arange(size)
    if tables.kind == "key":
        coordinates = torch.tensor([coordinate for pair in tables.rope_pairs[0] for coordinate in pair])
    order = coordinates.to(tables.device).expand(heads, -1).contiguous()
    assert tables.levels is not None
    levels = tables.levels.expand(heads * size, -1)
    if not tables.token:
        assert tables.scale is not None
        assert tables.zero_point is not None
        levels = tables.zero_point[:, None] + tables.scale[:, None] * levels
    levels = _in_order(levels, order)
    fits = float(levels.abs().max()) <= torch.finfo(torch.float16).max
    angles, norm = _pair_angles(tables, order), torch.ones(heads, size // 2, device=tables.device)
    if tables.kind == "key":  # dividing by the largest level of a pair gives a table in [-1, 1]
        norm = levels.abs().amax(-1).unflatten(-1, (-1, 2)).amax(-1)
        norm = torch.where(norm > 0, norm, 1.0)
        levels = levels / norm.repeat_interleave(2, dim=-1)[..., None]
    affine = torch.tensor([1.0, 0.0], device=tables.device).repeat(heads * size, 1)
    if tables.channel_normalized:
        assert tables.scale is not None
        assert tables.zero_point is not None
        affine = torch.stack((tables.scale, tables.zero_point), dim=-1)
    bits = tables.quantizer.layout.widths[0]
    return DecodeTables(
        bits=bits,
        paths=False,
        channels=_channels(tables, order),
        levels=_planes(levels.to(torch.float16), max(8, 1 << bits)),
        region=_region(tables),
        kinds=None,
        angles=angles,
        turns=_turns(angles),
        pair_scale=_pair_scale(tables, angles, norm),
        affine=affine.view(heads, size, 2).contiguous(),
        fits=fits,
    )


def _planes(levels: Tensor, entries: int) -> Tensor:
    """Make the kernel's table, bytes ``[..., 2 * entries]``, from halves ``[..., L]``.

    Up to 32 entries, all low bytes come first, then all high bytes. Larger tables are stored as they are.
    """
    padded = torch.zeros(*levels.shape[:-1], entries, dtype=torch.float16, device=levels.device)
    padded[..., : levels.shape[-1]] = levels
    pairs: Tensor = padded.view(torch.uint8).unflatten(-1, (entries, 2))
    return (pairs.mT if entries <= 32 else pairs).flatten(-2).contiguous()


# ---- computed levels -------------------------------------------------------------------------------------------------


def _computed(tables: QuantizerTables, quantizer: TrellisQuantizer) -> DecodeTables:
    heads, size = tables.heads, tables.head_dim
    widths = quantizer.widths
    made = [_arrange(tables, widths[head * size : (head + 1) * size]) for head in range(heads)]
    order = torch.tensor([each.order for each in made], dtype=torch.int64, device=tables.device)
    kinds = torch.zeros(heads, KIND_ROOM, dtype=torch.uint8)
    for head, each in enumerate(made):
        kinds[head, : len(each.ends)] = torch.tensor(each.ends, dtype=torch.uint8)
    exact = _in_order(_about_lower_end(quantizer), order)
    angles = _pair_angles(tables, order)
    norm = torch.ones(heads, size // 2, device=tables.device)
    affine = torch.tensor([1.0, 0.0], device=tables.device).repeat(heads, size, 1)
    if tables.kind == "key":
        norm = _power_of_two(exact.abs().sum(-1).unflatten(-1, (-1, 2)).amax(-1))
        polynomial = exact / norm.repeat_interleave(2, dim=-1)[..., None]
    else:
        constant, polynomial = exact[..., 0], exact.clone()
        polynomial[..., 0] = 0.0
        factor = _power_of_two(polynomial.abs().sum(-1))
        polynomial /= factor[..., None]
        by_coordinate = torch.stack((factor, constant), dim=-1)
        affine = torch.empty_like(by_coordinate).scatter_(
            1, order[..., None].expand(-1, -1, 2), by_coordinate
        )
    return DecodeTables(
        bits=0,
        paths=tables.paths,
        channels=_channels(tables, order),
        levels=_channel_numbers(polynomial, made, tables),
        region=_region(tables),
        kinds=kinds.to(tables.device),
        angles=angles,
        turns=_turns(angles),
        pair_scale=_pair_scale(tables, angles, norm.float()),
        affine=affine.float().contiguous(),
    )


def _arrange(tables: QuantizerTables, widths: tuple[int, ...]) -> Arrangement:
    if tables.kind == "key":
        return arrange_pairs(widths, tables.rope_pairs[0])
    return arrange_values(widths)


def _channel_numbers(polynomial: Tensor, made: list[Arrangement], tables: QuantizerTables) -> Tensor:
    """Coefficients, each twice. If the kernel has code for it, a table of up to eight levels instead.

    Args:
        polynomial: float64 ``[H, D, 6]``.
        made: the order of each head's channels.
        tables: tables of the layer.

    Returns:
        uint8 ``[H, D, 32]``.
    """
    widths = torch.tensor([each.widths for each in made], device=polynomial.device)
    count = 1 << (widths + int(tables.paths)).clamp(0, 3)
    index = torch.arange(8, device=polynomial.device).minimum(count[..., None] - 1)
    v = 2 * index.double() / count[..., None] - 1
    levels = torch.zeros_like(v)
    for coefficient in reversed(polynomial.unbind(-1)):
        levels = levels * v + coefficient[..., None]
    table = _planes(levels.half(), 8)
    twice = polynomial.half().repeat_interleave(2, dim=-1).contiguous().view(torch.uint8)
    twice = torch.nn.functional.pad(twice, (0, 32 - twice.shape[-1]))
    table = torch.nn.functional.pad(table, (0, 32 - table.shape[-1]))
    has_table = (widths > 0) & (widths + int(tables.paths) <= 3)
    return torch.where(has_table[..., None], table, twice).contiguous()


def _about_lower_end(quantizer: TrellisQuantizer) -> Tensor:
    """Expand the polynomials in ``v = 2 i / L - 1`` instead of ``u = v + 1 / L``: float64 ``[C, 6]``."""
    coefficients = quantizer.coefficients.double()
    step = 1.0 / level_counts(quantizer.spec, quantizer.params.bits).double()
    count = coefficients.shape[1]
    moved = [
        sum(
            (math.comb(power, k) * step ** (power - k) * coefficients[:, power] for power in range(k, count)),
            torch.zeros_like(step),
        )
        for k in range(count)
    ]
    return torch.stack(moved, dim=-1)


def _power_of_two(size: Tensor) -> Tensor:
    """The smallest power of two not below ``size``, or 1 if that is 0."""
    mantissa, exponent = torch.frexp(size)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(size > 0, torch.ldexp(torch.ones_like(size), exponent), 1.0)
