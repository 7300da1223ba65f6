"""Reference quantization in torch: this file defines the numerics that every runtime and kernel must match.

One quantizer serves every recipe. An element ``y`` of channel ``c`` (after the channel's invertible transform)
is normalised, ``u = (y - zero_point) * (1 / scale)`` in float32, and coded by its nearest level::

    code = number of boundaries b with u > b,  boundaries = midpoints of the sorted codebook row
    y'   = zero_point + scale * level[code]

Outliers, ``|y - zero_point| > scale``, are coded like every other element (so by an end level) and keep
``y - y'`` beside it in the storage dtype. Decoding is therefore one dense pass plus a sparse addition, and nothing
is stored twice. Every token is quantized by itself: how tokens are grouped into calls, pages or batches never
changes a code (dynamic channel thresholds, an evaluation-only setting, are the exception; a trellis is another: with it
the tokens of a block, 32 from the start of what is given, are coded together).

With a trellis, ``code`` is not that of the nearest level but a step of the path of least error through the block
(:mod:`kvq_calib.codec.trellis`), and stands for the level ``level_index``.

With error feedback, what is normalised is not ``y`` but ``y`` plus a linear combination of the errors ``y - y'`` of the
coordinates before it in its head, and in further sweeps of all others. With importance, the error of a path is weighted by a
number for each token. Decoding knows nothing of either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.packing import PageLayout
from kvq_calib.codec.trellis import Subsets, best_path, level_index, lowest_bits_before, pair_index
from kvq_calib.schema.geometry import LayerGeometry, RopeSpec
from kvq_calib.schema.spec import (
    IMPORTANCE_CLASSES,
    MAX_BITS,
    MAX_CODEBOOKS,
    KVCacheSpec,
    QuantSpec,
    StorageDtype,
)

_LARGEST_HALF = torch.finfo(torch.float16).max
#: The smallest positive float16.
_SMALLEST_HALF = 2.0**-24
#: Edges between the classes of importance, in units: half octaves of the squared size from 2 ** -10 on.
_CLASS_EDGES = tuple(2.0 ** ((step - 20) / 2) for step in range(IMPORTANCE_CLASSES - 1))
STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class QuantParams:
    """The calibrated numbers of one layer's keys or values; ``C`` channels, ``H`` heads, ``P`` RoPE pairs.

    Attributes:
        bits: uint8 ``[C]``, width of each channel.
        codebook: with ``variable_bits`` float16 ``[N]``, else float32 ``[1, L]``, see
            :func:`kvq_calib.schema.spec.expected_tensors`; while it is fitted or trained float32 ``[G, L]`` for either. Readers take
            :func:`codebook_table`.
        codebook_index: uint8 ``[C]``, the row of each channel.
        scale, zero_point: ``[C]``, static thresholds ``zero_point -+ scale``; float32, or float16 with ``variable_bits``.
            Computed with in float32.
        phase: float16 ``[H, P]`` (float32 from an artifact of a version before 3), radians by which each RoPE pair is
            turned before quantization. Computed with in float32.
        rotation: float32 ``[H, D, D]``, orthogonal; head ``h`` of a value becomes ``v @ rotation[h]``.
        feedback: int8 ``[H, D (D - 1) / 2]``, or ``[H, D rank]``, see :func:`kvq_calib.schema.spec.expected_tensors`.
        feedback_scale: float32 ``[H]``.
        feedback_weight: float16 ``[H, D]``, not negative; only proportions within a head matter.
        importance: float16 ``[H, 32]``, not negative.
        importance_unit: float32 ``[H]``, positive: the mean sum of squares of a head's vector.
    """

    bits: Tensor
    codebook: Tensor
    codebook_index: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    phase: Tensor | None = None
    rotation: Tensor | None = None
    feedback: Tensor | None = None
    feedback_scale: Tensor | None = None
    feedback_weight: Tensor | None = None
    importance: Tensor | None = None
    importance_unit: Tensor | None = None

    @classmethod
    def uniform(
        cls, bits: int, channels: int, codebook: Tensor, scale: Tensor | None = None, **others: Tensor | None
    ) -> QuantParams:
        """One width and one codebook for all channels; the per-channel tensors are views of a single number."""
        return cls(
            torch.tensor([bits], dtype=torch.uint8, device=codebook.device).expand(channels),
            codebook,
            torch.zeros(1, dtype=torch.uint8, device=codebook.device).expand(channels),
            scale,
            **others,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def held_bytes(self) -> int:
        """Bytes these tensors take in memory; what a view repeats is held once."""
        return sum(
            tensor.element_size()
            * math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
            for tensor in self.tensors().values()
        )

    def to(self, device: torch.device | str) -> QuantParams:
        """The same on another device."""

        def move(tensor: Tensor) -> Tensor:
            repeated = tensor.ndim == 1 and tensor.stride(0) == 0
            return tensor[:1].to(device).expand(tensor.shape) if repeated else tensor.to(device)

        return replace(self, **{name: move(tensor) for name, tensor in self.tensors().items()})


def feedback_entries(feedback: Tensor, feedback_scale: Tensor, size: int) -> Tensor:
    """Matrices ``[H, D, D]``, float32, from the entries below their diagonals, int8 ``[H, D (D - 1) / 2]``, and steps ``[H]``."""
    row, column = torch.tril_indices(size, size, -1, device=feedback.device)
    matrix = feedback_scale.new_zeros(len(feedback), size, size)
    matrix[:, row, column] = feedback_scale[:, None] * feedback.float()
    return matrix


def error_weight(feedback: Tensor, feedback_scale: Tensor, feedback_weight: Tensor, rank: int) -> Tensor:
    """The weight ``W`` of the errors of each head, which cost ``e^T W e``, as feedback stores it: float64 ``[H, D, D]``.

    Args:
        feedback, feedback_scale, feedback_weight: as :class:`QuantParams` has them.
        rank: 0 where ``W = M^T D M``, with ``M`` the matrix of ``feedback`` with ones on its diagonal and ``D`` of
            ``feedback_weight``; otherwise the correlations are those of a factor ``F [D, rank]``, the square roots of
            ``feedback_weight`` their units: ``W = S (I - diag(F F^T) + F F^T) S``.
    """
    heads, size = feedback_weight.shape
    if rank == 0:
        unit = feedback_entries(feedback, feedback_scale, size).double()
        unit.diagonal(dim1=1, dim2=2).fill_(1.0)
        return unit.mT @ (feedback_weight.double()[..., None] * unit)
    factor = feedback_scale.double()[:, None, None] * feedback.view(heads, size, rank).double()
    correlation = factor @ factor.mT
    correlation.diagonal(dim1=1, dim2=2).fill_(1.0)
    root = feedback_weight.double().sqrt()
    return root[:, :, None] * correlation * root[:, None, :]


def triangular_factor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``M`` unit lower triangular and ``D`` of ``W = M^T diag(D) M``: ``[H, D, D]`` and ``[H, D]`` of ``[H, D, D]``."""
    # Coordinates in reverse turn Cholesky's W = C C^T into one with C upper triangular.
    upper = torch.linalg.cholesky(weight.flip(-1, -2)).flip(-1, -2)
    root = upper.diagonal(dim1=-2, dim2=-1)
    return (upper / root[:, None, :]).mT, root.square()


def codebook_table(spec: QuantSpec, params: QuantParams) -> Tensor:
    """Levels by codebook: float32 ``[G, L]``; a row of fewer than ``L`` levels repeats its last one."""
    if params.codebook.ndim == 2:
        return params.codebook
    index, device = params.codebook_index.to(torch.int64), params.codebook.device
    width = torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=device)
    width[index] = params.bits.to(torch.int64)  # one for all channels of a row
    count = torch.tensor([spec.level_count(bits) for bits in width.tolist()], device=device)
    stop = count.cumsum(0)[:, None]
    place = stop - count[:, None] + torch.arange(int(count.max()), device=device)
    return params.codebook[place.minimum(stop - 1)].float()


def pack_codebooks(spec: QuantSpec, bits: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks as they are stored with ``variable_bits``, the inverse of :func:`codebook_table`.

    Rows that no channel uses are left out; of a row that channels of several widths use, each width gets the part that it
    reads.

    Args:
        spec: of the tensor.
        bits: uint8 ``[C]``.
        table: float32 ``[G, L]``, levels representable in float16.
        index: integer ``[C]``, the row of each channel.

    Returns:
        ``codebook``, float16 ``[N]``, and ``codebook_index``, uint8 ``[C]``; int32 where the rows are more than
        :data:`kvq_calib.schema.spec.MAX_CODEBOOKS`, which no artifact can hold.

    Raises:
        ValueError: rounding to float16 would change a level.
    """
    rows, packed = torch.unique(index.to(torch.int64) * (MAX_BITS + 1) + bits, return_inverse=True)
    levels = torch.cat(
        [table[row // (MAX_BITS + 1), : spec.level_count(row % (MAX_BITS + 1))] for row in rows.tolist()]
    )
    rounded = levels.half()
    if not bool((rounded.float() == levels).all()):
        raise ValueError("has levels that are no float16 numbers")
    return rounded, packed.to(torch.uint8 if len(rows) <= MAX_CODEBOOKS else torch.int32)


def storable_thresholds(spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the channels as new artifacts hold them.

    With ``variable_bits`` float16, if it reaches that far, else float32.

    Args:
        spec: of the tensor.
        scale, zero_point: float ``[C]``, ``scale`` positive.
    """
    if not spec.variable_bits or float(torch.maximum(scale, zero_point.abs()).max()) > _LARGEST_HALF:
        return scale.float(), zero_point.float()
    return scale.half().clamp(min=_SMALLEST_HALF), zero_point.half()


@dataclass(frozen=True)
class Normalised:
    """Keys or values on the codebook's scale.

    Attributes:
        y: float32 ``[B, T, C]``, what is quantized: after the channel's transform and static normalisation, with the
            errors that are fed back.
        normalised: float32 ``[B, T, C]``, ``(y - zero_point) / scale``.
        scale, zero_point: float32, broadcast against ``y``.
        outliers: bool ``[B, T, C]``, or ``None`` where the spec has none.
        token: scale and zero point per token ``[B, T]`` as stored; only with granularity ``token``.
        importance: float32 ``[B, T, H]``, weights of the tokens of a path; ``None`` where they count alike.
        codes: uint8 ``[B, T, C]`` where error feedback had to find them already, else ``None``.
    """

    y: Tensor
    normalised: Tensor
    scale: Tensor
    zero_point: Tensor
    outliers: Tensor | None
    token: tuple[Tensor, Tensor] | None
    importance: Tensor | None = None
    codes: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """Codes of ``T`` tokens of ``B`` sequences, before packing.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        outliers: bool ``[B, T, C]``, or ``None`` where the spec has none.
        residual: storage dtype ``[B, T, C]``, zero where ``outliers`` is not set; ``None`` with it.
        token_scale, token_zero_point: storage dtype ``[B, T]``; only with granularity ``token``.
        channel_scale, channel_zero_point: float32 ``[B, 1, C]``; only with dynamic channel thresholds.
    """

    codes: Tensor
    outliers: Tensor | None = None
    residual: Tensor | None = None
    token_scale: Tensor | None = None
    token_zero_point: Tensor | None = None
    channel_scale: Tensor | None = None
    channel_zero_point: Tensor | None = None


def codebook_boundaries(codebook: Tensor, bits: Tensor) -> Tensor:
    """Decision boundaries per channel of ``codebook`` rows already gathered by channel.

    Args:
        codebook: float32 ``[C, L]``.
        bits: integer ``[C]``.

    Returns:
        float32 ``[C, L - 1]``: midpoints of the first ``2 ** bits`` levels, then ``+inf``.
    """
    middle = (codebook[:, :-1] + codebook[:, 1:]) * 0.5
    levels = (1 << bits.to(torch.int64))[:, None]
    unused = torch.arange(1, codebook.shape[1], device=codebook.device) >= levels
    return middle.masked_fill(unused, torch.inf)


def importance_edges(unit: Tensor) -> Tensor:
    """Sums of squares between the classes of importance, float32: ``[H]``, the units, to ``[H, 31]``."""
    return unit[:, None] * torch.tensor(_CLASS_EDGES, dtype=torch.float32, device=unit.device)


def squared_size(y: Tensor, heads: int) -> Tensor:
    """Sum of squares of each head, from its first coordinate on, every square and sum rounded.

    Args:
        y: float32 ``[..., C]``.
        heads: key-value heads ``H`` in ``C``.

    Returns:
        float32 ``[..., H]``.
    """
    square = y.unflatten(-1, (heads, -1)).square().movedim(-1, 0).contiguous()
    total: Tensor = square[0].clone()
    for term in square[1:]:
        total += term
    return total


def importance_classes(unit: Tensor, size: Tensor) -> Tensor:
    """The class of every token of a head: number of edges below its squared size.

    Args:
        unit: float32 ``[H]``.
        size: float32 ``[..., H]``, from :func:`squared_size`.

    Returns:
        int64 ``[..., H]``.
    """
    by_head = size.movedim(-1, 0).contiguous()
    place = torch.searchsorted(importance_edges(unit), by_head.flatten(1))
    classes: Tensor = place.view(by_head.shape).movedim(0, -1)
    return classes


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale`` in float32, 0 for a scale of 0 (all elements equal: each is coded by the level nearest 0)."""
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)


def cap_per_token(outliers: Tensor, magnitude: Tensor, cap: int) -> Tensor:
    """Keep at most ``cap`` outliers of each token: the largest ``magnitude``, ties to the lower channel.

    Args:
        outliers: bool ``[..., C]``.
        magnitude: float32 ``[..., C]``, ``|u|``.
        cap: most outliers to keep.
    """
    crowded = outliers.sum(-1) > cap
    if not bool(crowded.any()):
        return outliers
    ranked = magnitude[crowded].masked_fill(~outliers[crowded], -1.0)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :cap]
    kept = outliers.clone()
    kept[crowded] = torch.zeros_like(outliers[crowded]).scatter(-1, best, True)
    return kept


def token_thresholds(values: Tensor, per_side: int, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each token, leaving out its ``per_side`` largest and smallest elements.

    The zero point is the middle of what remains, rounded to the storage dtype; the scale is the largest distance
    from it, rounded up, so that no element that remains becomes an outlier through rounding.

    Args:
        values: float32 ``[..., C]``.
        per_side: elements left out at each end.
        storage: dtype the pair is stored in.

    Returns:
        ``(scale, zero_point)``, each ``[...]`` in the storage dtype.
    """
    channels = values.shape[-1]
    if 2 * per_side >= channels:
        raise ValueError(f"cannot trim {per_side} elements from both ends of {channels}")
    if per_side == 0:
        low, high = values.amin(-1), values.amax(-1)
    else:
        high = values.topk(per_side + 1, dim=-1).values[..., -1]
        low = values.topk(per_side + 1, dim=-1, largest=False).values[..., -1]
    zero_point = ((low + high) * 0.5).to(storage)
    exact = torch.maximum(high - zero_point.float(), zero_point.float() - low)
    scale = exact.to(storage)
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    return torch.where(scale.float() < exact, above, scale), zero_point


class Quantizer:
    """Quantizes and dequantizes one layer's keys or values.

    Keys are given as they are to be quantized: before RoPE where the spec says ``pre_rope``, else after it.

    Args:
        spec: what to do.
        params: the calibrated numbers; moved to the device of the data on first use there.
        geometry: shapes of the layer.
        rope: its rotary embedding; needed where there are phases.
        storage_dtype: of residuals and per-token scales.
    """

    def __init__(
        self,
        spec: QuantSpec,
        params: QuantParams,
        geometry: LayerGeometry,
        rope: RopeSpec | None = None,
        storage_dtype: StorageDtype = "float16",
    ) -> None:
        self.spec = spec
        self.params = params
        self.geometry = geometry
        self.rope = rope
        self.storage = STORAGE_DTYPES[storage_dtype]
        self.outlier_cap = spec.outliers.cap(spec.granularity, geometry.channels)

    @cached_property
    def layout(self) -> PageLayout:
        """Where the codes stand in a page."""
        return PageLayout(
            widths=tuple(self.params.bits.tolist()),
            heads=self.geometry.num_kv_heads,
            head_dim=self.geometry.head_dim,
            token_params=self.spec.granularity == "token",
            outlier_cap=self.outlier_cap,
        )

    def to(self, device: torch.device | str) -> Quantizer:
        """The same quantizer on another device."""
        if self.params.bits.device == torch.device(device):
            return self
        return Quantizer(
            self.spec,
            self.params.to(device),
            self.geometry,
            self.rope,
            "float16" if self.storage == torch.float16 else "bfloat16",
        )

    # What a reader of the codes asks, so that it need not know how they were made.

    @property
    def codes_in_blocks(self) -> bool:
        """Whether the tokens of a block are coded together, so that codes depend on where blocks begin."""
        return self.spec.trellis

    def level_count(self, width: int) -> int:
        """Levels of a channel of this width."""
        return self.spec.level_count(width)

    def level_index(self, codes: Tensor) -> Tensor:
        """Which level each code stands for: integers ``[..., T]``, tokens in order from the first of a block on."""
        return level_index(codes) if self.spec.trellis else codes

    def pair_index(self, width: int) -> Tensor:
        """Level indices of the two tokens whose codes share a byte, a nibble each.

        Args:
            width: of the codes, 1 to 4; bits of a nibble above are not looked at.

        Returns:
            int64 ``[256, 2]``, a row for each byte; ``[1024, 2]`` where levels depend on the codes before: row
            ``256 * before + byte`` with ``before`` of :meth:`before_pairs`.
        """
        if self.spec.trellis:
            return pair_index(width)
        byte = torch.arange(256)
        mask = (1 << width) - 1
        return torch.stack((byte & mask, byte >> 4 & mask), dim=-1)

    def before_pairs(self, data: Tensor) -> Tensor | None:
        """What of the codes before each pair decides its levels, or ``None`` where nothing does.

        Args:
            data: uint8 ``[..., 16]``, the bytes of blocks, tokens in order.
        """
        return lowest_bits_before(data) if self.spec.trellis else None

    # Properties, not cached: a runtime holds a quantizer per layer, and these are larger than what they come from.

    @property
    def scale(self) -> Tensor:
        """Static scale per channel, float32 ``[C]``; only where the spec has ``static_channels``."""
        assert self.params.scale is not None
        return self.params.scale.float()

    @property
    def zero_point(self) -> Tensor:
        """Static zero point per channel, float32 ``[C]``; as :attr:`scale`."""
        assert self.params.zero_point is not None
        return self.params.zero_point.float()

    @property
    def table(self) -> Tensor:
        """Levels per codebook, float32 ``[G, L]``: :func:`codebook_table`."""
        return codebook_table(self.spec, self.params)

    @property
    def levels(self) -> Tensor:
        """Levels per channel, float32 ``[C, L]``."""
        return self.table[self.params.codebook_index.to(torch.int64)]

    @property
    def boundaries(self) -> Tensor:
        """Decision boundaries per channel, float32 ``[C, L - 1]``."""
        return codebook_boundaries(self.levels, self.params.bits)

    @property
    def _phase_factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.params.phase is not None and self.rope is not None
        pairs = torch.tensor(self.rope.pairs, dtype=torch.int64, device=self.params.phase.device)
        phase = self.params.phase.float()[:, None, :]  # [H, 1, P]
        return pairs[:, 0], pairs[:, 1], phase.cos(), phase.sin()

    def _turn(self, x: Tensor, sign: float) -> Tensor:
        first, second, cos, sin = self._phase_factors
        x0, x1 = x[..., first], x[..., second]
        turned = x.clone()
        turned[..., first] = cos * x0 - sign * sin * x1
        turned[..., second] = sign * sin * x0 + cos * x1
        return turned

    def transform(self, x: Tensor) -> Tensor:
        """Heads to channels, with the spec's phases or rotation: ``[B, H, T, D]`` to float32 ``[B, T, C]``."""
        x = x.float()
        if self.params.phase is not None:
            x = self._turn(x, 1.0)
        if self.params.rotation is not None:
            x = x @ self.params.rotation
        return x.transpose(1, 2).flatten(2)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """Invert :meth:`transform`: ``[B, T, C]`` to float32 ``[B, H, T, D]``."""
        x: Tensor = y.unflatten(-1, (self.geometry.num_kv_heads, self.geometry.head_dim)).transpose(1, 2)
        if self.params.rotation is not None:
            x = x @ self.params.rotation.mT
        if self.params.phase is not None:
            x = self._turn(x, -1.0)
        return x

    def _dynamic_channels(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point per sequence and channel from ``y [B, T, C]`` itself, each ``[B, 1, C]``."""
        tail = self.spec.outliers.fraction / 2
        low, high = torch.quantile(y, torch.tensor([tail, 1 - tail], device=y.device, dtype=y.dtype), dim=1)
        return ((high - low) * 0.5)[:, None], ((high + low) * 0.5)[:, None]

    def _normalised_channels(self, y: Tensor) -> Tensor:
        """The static channel normalisation that precedes per-token thresholds, where the spec has one."""
        if not self.spec.channel_normalized:
            return y
        return (y - self.zero_point) * reciprocal(self.scale)

    def importance(self, y: Tensor) -> Tensor | None:
        """What errors of a token count in the choice of paths, or ``None`` where all count alike.

        Loss gradients of a token's keys, or of its values, differ by orders of magnitude from token to token, for much of the
        attention goes to few. Who is to be one of them is not known when a block is coded, but their sizes tell: tokens
        that take up attention for want of a better place have small values. (Which weights: ``docs/method.md``.)

        Args:
            y: float32 ``[B, T, C]``, from :meth:`transform`.

        Returns:
            float32 ``[B, T, H]``.
        """
        if self.params.importance is None:
            return None
        assert self.params.importance_unit is not None
        place = importance_classes(self.params.importance_unit, squared_size(y, self.geometry.num_kv_heads))
        return self.params.importance.float()[torch.arange(place.shape[-1], device=place.device), place]

    def _edges(self, levels: Tensor, bits: Tensor) -> Subsets | Tensor:
        """What decides the codes of some channels: of their levels ``[C, L]`` and widths ``[C]``."""
        return Subsets.of(levels, bits) if self.spec.trellis else codebook_boundaries(levels, bits)

    def _code(self, edges: Subsets | Tensor, u: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes of some channels, uint8, and indices of the levels they stand for, int64: of normalised elements and the weights
        of their tokens, all ``[C, B, T]``."""
        if isinstance(edges, Subsets):
            return best_path(edges, u, importance)
        index = torch.searchsorted(edges, u.flatten(1).contiguous()).view(u.shape)
        return index.to(torch.uint8), index

    def encode(self, normalised: Tensor, importance: Tensor | None = None) -> Tensor:
        """Codes of normalised elements: float32 ``[B, T, C]`` to uint8 ``[B, T, C]``.

        With a trellis, tokens are taken in blocks of 32 from the first on, weighted by ``importance``, float32 ``[B, T, H]``,
        where it is given.
        """
        if not self.spec.trellis and self._one_table:
            return torch.bucketize(normalised, self.boundaries[0]).to(torch.uint8)
        if importance is not None:
            importance = importance.permute(2, 0, 1).repeat_interleave(self.geometry.head_dim, 0)
        u = normalised.permute(2, 0, 1)
        edges = self._edges(self.levels, self.params.bits)
        return self._code(edges, u, importance)[0].permute(1, 2, 0)

    @property
    def _one_codebook(self) -> bool:
        return not bool(self.params.codebook_index.any())

    @property
    def _one_table(self) -> bool:
        return self._one_codebook and bool((self.params.bits == self.params.bits[0]).all())

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes: uint8 ``[B, T, C]`` to float32 ``[B, T, C]``; tokens as in :meth:`encode`."""
        if not self.spec.trellis and self._one_codebook:
            return self.table[0][codes.to(torch.int64)]
        codes = codes.permute(2, 0, 1)
        index = level_index(codes) if self.spec.trellis else codes
        seen = self.levels.gather(1, index.flatten(1).to(torch.int64))
        return seen.view(codes.shape).permute(1, 2, 0)

    @property
    def feedback(self) -> Tensor:
        """What share of an earlier coordinate's error a later one takes up, float32 ``[H, D, D]``; row ``i`` is coordinate
        ``i``'s, and zero from the diagonal on."""
        params = self.params
        assert params.feedback is not None and params.feedback_scale is not None
        if self.spec.feedback_rank == 0:
            return feedback_entries(params.feedback, params.feedback_scale, self.geometry.head_dim)
        return triangular_factor(self._error_weight)[0].tril(-1).float()

    @property
    def _error_weight(self) -> Tensor:
        params = self.params
        assert params.feedback is not None and params.feedback_scale is not None
        assert params.feedback_weight is not None
        return error_weight(
            params.feedback, params.feedback_scale, params.feedback_weight, self.spec.feedback_rank
        )

    @property
    def sweep_shares(self) -> Tensor:
        """What share of every other coordinate's error a coordinate takes up in a sweep, float32 ``[H, D, D]``; row ``i`` is
        coordinate ``i``'s, its diagonal zero.

        With the weight ``W`` of an error of the head (:func:`error_weight`), ``W[i, j] / W[i, i]``: what the other errors
        ``e[j]`` cost together with ``e[i]`` is least where ``e[i]`` makes good for this sum of theirs.
        """
        weight = self._error_weight
        diagonal = weight.diagonal(dim1=1, dim2=2)[..., None]
        shares = torch.where(diagonal > 0, weight / diagonal, 0.0)
        shares.diagonal(dim1=1, dim2=2).zero_()
        return shares.float()

    def with_feedback(self, y: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add to each coordinate its share of the errors that others in the head are quantized with.

        Coordinate ``i`` is coded as ``t[i] = y[i] + sum over j < i of feedback[i, j] (y[j] - y'[j])``. With
        ``feedback = M - I`` and the weight of an error ``e`` of a head ``e^T W e = e^T M^T D M e``, ``M`` unit lower triangular and
        ``D`` diagonal, what is left to weigh are the rounding errors ``t - y' = M e`` alone, by ``D``. (The rounding of
        GPTQ, arXiv 2210.17323, and QuIP, arXiv 2307.13304, applied to the cache.) The coordinates coded first know nothing of
        the errors to come. So ``sweeps`` more times each is coded again, as ``y[i]`` plus its :attr:`sweep_shares` of the
        errors that all others have by then: coordinate descent on the same weight.

        Sums run from ``j = 0`` on, products and sums rounded one by one; in a sweep that of the coordinates after ``i`` comes
        first and is added to ``y[i]`` as a whole.

        Args:
            y: float32 ``[B, T, C]``.
            importance: float32 ``[B, T, H]``, or ``None``.

        Returns:
            ``t`` of the last time, float32 ``[B, T, C]``, and its codes, uint8 ``[B, T, C]``.
        """
        heads, size = self.geometry.num_kv_heads, self.geometry.head_dim

        def by_coordinate(parameter: Tensor) -> Tensor:  # [C, ...] to [D, H, ...], contiguous
            split: Tensor = parameter.unflatten(0, (heads, size))
            return split.transpose(0, 1).contiguous()

        def by_source(shares: Tensor) -> Tensor:  # [H, to, from] to [from, to, H, 1, 1]
            return shares.permute(2, 1, 0)[..., None, None].contiguous()

        levels, bits = by_coordinate(self.levels), by_coordinate(self.params.bits)
        scale, zero_point = (by_coordinate(p)[..., None, None] for p in (self.scale, self.zero_point))
        inverse = reciprocal(scale)
        edges = self._edges(levels.flatten(0, 1), bits.flatten()).split(heads)
        exact = by_coordinate(y.permute(2, 0, 1))
        error = torch.zeros_like(exact)
        codes = torch.empty(exact.shape, dtype=torch.uint8, device=y.device)
        weight = None if importance is None else importance.permute(2, 0, 1).contiguous()

        def code(fed: Tensor, shares: Tensor) -> Tensor:
            for i in range(size):
                codes[i], index = self._code(edges[i], (fed[i] - zero_point[i]) * inverse[i], weight)
                seen = levels[i].gather(1, index.flatten(1)).view(index.shape)
                error[i] = exact[i] - (zero_point[i] + scale[i] * seen)
                fed[i + 1 :] += shares[i, i + 1 :] * error[i]
            return fed

        fed = code(exact.clone(), by_source(self.feedback))
        shares = by_source(self.sweep_shares) if self.spec.sweeps else None
        for _ in range(self.spec.sweeps):
            assert shares is not None
            later = torch.zeros_like(exact)
            for j in range(1, size):
                later[:j] += shares[j, :j] * error[j]
            fed = code(exact + later, shares)

        def by_channel(x: Tensor) -> Tensor:  # [D, H, B, T] to [B, T, C]
            return x.transpose(0, 1).flatten(0, 1).permute(1, 2, 0).contiguous()

        return by_channel(fed), by_channel(codes)

    def normalise(self, x: Tensor) -> Normalised:
        """Bring ``[B, H, T, D]`` keys or values into the codebook's range and mark the outliers."""
        y = self._normalised_channels(self.transform(x))
        codes, importance = None, self.importance(y)
        if self.params.feedback is not None:
            y, codes = self.with_feedback(y, importance)
        token = None
        if self.spec.granularity == "token":
            token = token_thresholds(y, self.spec.outliers.per_side(y.shape[-1]), self.storage)
            scale, zero_point = (part.float()[..., None] for part in token)
        elif self.spec.dynamic:
            scale, zero_point = self._dynamic_channels(y)
        else:
            scale, zero_point = self.scale, self.zero_point
        distance = y - zero_point
        normalised = distance * reciprocal(scale)
        outliers = None
        if self.outlier_cap:
            outliers = cap_per_token(distance.abs() > scale, normalised.abs(), self.outlier_cap)
        return Normalised(y, normalised, scale, zero_point, outliers, token, importance, codes)

    def quantize(self, x: Tensor) -> Quantized:
        """Quantize ``[B, H, T, D]`` keys or values."""
        n = self.normalise(x)
        codes = self.encode(n.normalised, n.importance) if n.codes is None else n.codes
        residual = None
        if n.outliers is not None:
            dense = n.zero_point + n.scale * self.decode(codes)
            residual = torch.where(n.outliers, n.y - dense, 0.0).to(self.storage)
        token_scale, token_zero_point = n.token or (None, None)
        dynamic_channels = self.spec.granularity == "channel" and self.spec.dynamic
        return Quantized(
            codes,
            n.outliers,
            residual,
            token_scale,
            token_zero_point,
            n.scale if dynamic_channels else None,
            n.zero_point if dynamic_channels else None,
        )

    def dequantize(self, q: Quantized) -> Tensor:
        """Keys or values from codes: float32 ``[B, H, T, D]``."""
        y = self.decode(q.codes)
        if q.token_scale is not None and q.token_zero_point is not None:
            y = q.token_zero_point.float()[..., None] + q.token_scale.float()[..., None] * y
        elif q.channel_scale is not None and q.channel_zero_point is not None:
            y = q.channel_zero_point + q.channel_scale * y
        else:
            y = self.zero_point + self.scale * y
        if q.residual is not None:
            y = y + q.residual.float()
        if self.spec.channel_normalized:
            y = self.zero_point + self.scale * y
        return self.inverse_transform(y)

    def __call__(self, x: Tensor) -> Tensor:
        """What a reader of the cache sees of ``x``: float32 ``[B, H, T, D]``."""
        return self.dequantize(self.quantize(x))


def roundtrip_storage(x: Tensor, spec: KVCacheSpec) -> Tensor:
    """What a reader sees of a token that is kept exact: ``x`` rounded to the storage dtype."""
    return x.to(STORAGE_DTYPES[spec.storage_dtype]).to(x.dtype)
