"""The trellis codec: a width for each channel, and the path of least error through a block of tokens.

A channel's levels are computed from its coefficients (:mod:`kvq_calib.codec.computed_levels`); elements have no other
scale or zero point. The codes of a block are the path of least error through the trellis
(:mod:`kvq_calib.codec.paths`), not the nearest levels, and ``level_index`` gives the level of a code. So the tokens of
a block are coded together; blocks have 32 tokens, starting with the first token given. With one state there is no
trellis: a code is the index of its level, and every token is coded independently.

With error compensation, the coded number is ``y`` plus a linear combination of the errors of other coordinates of the
head (:mod:`kvq_calib.codec.error_compensation`). With token weighting, the error of a token in a path is weighted by
the token's size (:mod:`kvq_calib.codec.token_weighting`). Decoding needs neither. On the CPU the native encoder
(:mod:`kvq_calib.native.encode`), if installed, finds the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.computed_levels import (
    SHAPE_STEPS,
    StoredLevels,
    computed_levels,
    level_places,
    shape_counts,
    stored_coefficients,
)
from kvq_calib.codec.error_compensation import Compensation
from kvq_calib.codec.native_encoding import encoding_library, trellis_tables
from kvq_calib.codec.noise_shaping import feedback_gains, shaped_path
from kvq_calib.codec.pair_rotation import turn_pairs
from kvq_calib.codec.params import StoredTensor, TensorProblem
from kvq_calib.codec.paths import Subsets, best_path, level_index
from kvq_calib.codec.quantizer import Normalised, Quantized, Quantizer
from kvq_calib.codec.token_weighting import SIZE_CLASSES, token_weights
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.native.encode import Encoded, TrellisTables, encode_trellis
from kvq_calib.native.loader import library
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import QuantSpec, TrellisSpec

__all__ = ["TrellisQuantizer", "nearest_boundaries"]


def nearest_boundaries(levels: Tensor, bits: Tensor) -> Tensor:
    """Decision boundaries of channels that are coded by the nearest level.

    Args:
        levels: float32 ``[C, L]``; the first ``2 ** bits`` are used.
        bits: integer ``[C]``.

    Returns:
        float32 ``[C, L - 1]``: midpoints of the used levels, then ``+inf``.
    """
    middle = (levels[:, :-1] + levels[:, 1:]) * 0.5
    count = (1 << bits.to(torch.int64))[:, None]
    unused = torch.arange(1, levels.shape[1], device=levels.device) >= count
    return middle.masked_fill(unused, torch.inf)


class TrellisQuantizer(Quantizer):
    """See :class:`kvq_calib.codec.quantizer.Quantizer`."""

    codec = "trellis"
    spec_type = TrellisSpec
    params_type = TrellisParams
    range_is_estimated = True
    spec: TrellisSpec
    params: TrellisParams

    # ------------------------------------------------------------ the tensors in an artifact

    @classmethod
    def stored_tensors(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> dict[str, StoredTensor]:
        """See :class:`TrellisParams`."""
        assert isinstance(spec, TrellisSpec)
        heads, size = shape
        by_channel, float32 = (shape.channels,), ("float32",)
        tensors = {
            "bits": StoredTensor(by_channel, ("uint8",)),
            "level_offset": StoredTensor(by_channel, ("float16", "float32")),
            "level_scale": StoredTensor(by_channel, ("float16", "float32")),
            "level_shape": StoredTensor((None,), ("int8",)),
        }
        if spec.pair_rotation and pairs:
            tensors["pair_angle"] = StoredTensor((heads, pairs), ("float16",))
        compensation = spec.error_compensation
        if compensation is not None:
            tensors["compensation"] = StoredTensor((heads, compensation.entries(size)), ("int8",))
            tensors["compensation_scale"] = StoredTensor((heads,), float32)
            if compensation.needs_error_weight:
                tensors["error_weight"] = StoredTensor((heads, size), ("float16",))
        if spec.token_weighting:
            tensors["token_weight"] = StoredTensor((heads, SIZE_CLASSES), ("float16",))
            tensors["token_size_unit"] = StoredTensor((heads,), float32)
        if spec.noise_shaping:
            tensors["error_feedback"] = StoredTensor((heads,), ("float16",))
        return tensors

    @classmethod
    def check_values(cls, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
        """Check that widths are in range, levels do not decrease, and numbers are finite and of the right sign."""
        assert isinstance(spec, TrellisSpec)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TensorProblem(name, "has values that are not finite")
        if "token_size_unit" in tensors and bool((tensors["token_size_unit"] <= 0).any()):
            raise TensorProblem("token_size_unit", "must be positive")
        for name in ("level_scale", "compensation_scale", "error_weight", "token_weight"):
            if name in tensors and bool((tensors[name] < 0).any()):
                raise TensorProblem(name, "must not be negative")
        stored = StoredLevels(*(tensors[f"level_{name}"] for name in StoredLevels._fields))
        _check_levels(spec, tensors["bits"], stored)
        if "error_feedback" in tensors and bool((tensors["error_feedback"].abs() >= 1).any()):
            raise TensorProblem("error_feedback", "must be between -1 and 1")
        rank = 0 if spec.error_compensation is None else spec.error_compensation.rank
        if rank:
            if bool((tensors["error_weight"] == 0).any()):
                raise TensorProblem("error_weight", "must be positive with a rank")
            step, entries = tensors["compensation_scale"].double(), tensors["compensation"].double()
            factor = (step[:, None] * entries).unflatten(1, (-1, rank))
            if bool((factor.square().sum(-1) >= 1).any()):
                raise TensorProblem("compensation", "leaves a coordinate nothing of its own")

    @classmethod
    def nominal_bytes(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> int:
        """Bytes of the parameters before calibration, if all channels had the largest width."""
        assert isinstance(spec, TrellisSpec)
        each = int(shape_counts(spec, torch.tensor(spec.max_bits)))
        return super().nominal_bytes(spec, shape, pairs) + torch.int8.itemsize * each * shape.channels

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The width of each channel in bits."""
        return tuple(self.params.bits.tolist())

    def derived(self) -> list[Tensor]:
        """The matrices of error compensation, and the tables of the native encoder if it is used."""
        found = [] if self.compensation is None else self.compensation.tensors()
        if self.device.type == "cpu" and library() is not None:
            found += self.native_tables.tensors()
        return found

    # ------------------------------------------------------------ properties for readers of the codes

    # These properties are not cached: a runtime has a quantizer per layer, and they are larger than the parameters.

    @property
    def coefficients(self) -> Tensor:
        """Coefficients of the levels, float32 ``[C, 6]``, zero for coefficients that a channel does not have."""
        return self.params.level_coefficients(self.spec)

    @property
    def levels(self) -> Tensor:
        """Levels per channel, float32 ``[C, L]``. A channel with fewer levels repeats its last one."""
        return computed_levels(self.coefficients, level_places(self.spec, self.params.bits))

    def level_count(self, width: int) -> int:
        """Number of levels of a channel with this width."""
        return self.spec.level_count(width)

    @property
    def pair_angle(self) -> Tensor | None:
        """Angle in radians by which each RoPE pair is rotated, float32 ``[H, P]``, or ``None``."""
        return None if self.params.pair_angle is None else self.params.pair_angle.float()

    @property
    def codes_in_blocks(self) -> bool:
        """True if the trellis has more than one state."""
        return self.spec.states > 1

    @property
    def compensates(self) -> bool:
        """Whether the spec has error compensation."""
        return self.spec.error_compensation is not None

    def level_index(self, codes: Tensor) -> Tensor:
        """Index of the level of each code: integers ``[..., T]``, tokens in order from the first of a block."""
        return level_index(codes) if self.codes_in_blocks else codes

    def channel_range(self) -> tuple[Tensor, Tensor]:
        """The range from the levels: it ends half a gap beyond the outermost levels."""
        rows = self.levels
        low, high = rows[:, :1], rows[:, -1:]  # sorted, with the last level repeated to the end of the row
        below = torch.where(rows > low, rows, torch.inf).amin(1, keepdim=True) - low
        above = high - torch.where(rows < high, rows, -torch.inf).amax(1, keepdim=True)
        single = low == high
        low = (low - below.masked_fill(single, 0.0) / 2)[:, 0]
        high = (high + above.masked_fill(single, 0.0) / 2)[:, 0]
        return (low + high) / 2, (high - low) / 2

    # ------------------------------------------------------------ coding and decoding

    def transform(self, x: Tensor) -> Tensor:
        """Rotate RoPE pairs if the spec says so, and join heads: ``[B, H, T, D]`` to float32 ``[B, T, C]``."""
        x = x.float()
        if self.params.pair_angle is not None:
            assert self.rope is not None
            x = turn_pairs(x, self.params.pair_angle, self.rope)
        return super().transform(x)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """Invert :meth:`transform`: ``[B, T, C]`` to float32 ``[B, H, T, D]``."""
        x = super().inverse_transform(y)
        if self.params.pair_angle is None:
            return x
        assert self.rope is not None
        return turn_pairs(x, self.params.pair_angle, self.rope, -1.0)

    @cached_property
    def compensation(self) -> Compensation | None:
        """The matrices of error compensation, or ``None``."""
        spec, params = self.spec.error_compensation, self.params
        if spec is None:
            return None
        assert params.compensation is not None and params.compensation_scale is not None
        return Compensation.of(
            params.compensation,
            params.compensation_scale,
            params.error_weight,
            rank=spec.rank,
            refinement_passes=spec.refinement_passes,
            size=self.shape.head_dim,
        )

    def token_weights(self, y: Tensor) -> Tensor | None:
        """Weights of the tokens' errors: float32 ``[B, T, C]`` to ``[B, T, H]``; ``None`` without token weighting."""
        if self.params.token_weight is None:
            return None
        assert self.params.token_size_unit is not None
        return token_weights(y, self.params.token_weight, self.params.token_size_unit)

    def _deciders(self, levels: Tensor, bits: Tensor) -> Subsets | Tensor:
        """Tables to code some channels, from levels ``[C, L]`` and widths ``[C]``: subsets, or boundaries."""
        return Subsets.of(levels, bits) if self.codes_in_blocks else nearest_boundaries(levels, bits)

    @staticmethod
    def _code(deciders: Subsets | Tensor, u: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes of some channels, uint8, and the indices of their levels, int64.

        Args:
            deciders: see :meth:`_deciders`, for these channels.
            u: numbers to code, float32 ``[C, B, T]``.
            weight: weights of the tokens, float32 ``[C, B, T]``, or ``None``.
        """
        if isinstance(deciders, Subsets):
            return best_path(deciders, u, weight)
        index = torch.searchsorted(deciders, u.flatten(1).contiguous()).view(u.shape)
        return index.to(torch.uint8), index

    @cached_property
    def native_tables(self) -> TrellisTables:
        """Tables for the native encoder. The parameters must be on the CPU."""
        return trellis_tables(self, self.params, self.spec.states, self.compensation)

    def _encode_natively(
        self, x: Tensor, weight: Tensor | None = None, *, compensated: bool = True, by_size: bool = False
    ) -> Encoded | None:
        """See :func:`kvq_calib.native.encode.encode_trellis`; ``None`` if torch must code."""
        if (native := encoding_library(x, self.params)) is None:
            return None
        return encode_trellis(native, self.native_tables, x, weight, compensated=compensated, by_size=by_size)

    def encode(self, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Code without error compensation, with noise shaping if the quantizer has it.

        Args:
            y: float32 ``[B, T, C]``; blocks have 32 tokens, starting with the first.
            weight: weights of the tokens, float32 ``[B, T, H]``, or ``None``.

        Returns:
            uint8 ``[B, T, C]``.
        """
        if (found := self._encode_natively(y, weight, compensated=False)) is not None:
            return found.codes
        u, feedback = y.permute(2, 0, 1), self.params.error_feedback

        def by_channel(x: Tensor | None) -> Tensor | None:  # [B, T, H] to [C, B, T]
            return None if x is None else x.permute(2, 0, 1).repeat_interleave(self.shape.head_dim, 0)

        deciders = self._deciders(self.levels, self.params.bits)
        if feedback is not None and isinstance(deciders, Subsets):
            gain = by_channel(feedback_gains(feedback.float(), weight, *y.shape[:2]))
            assert gain is not None
            return shaped_path(deciders, u, gain, by_channel(weight))[0].permute(1, 2, 0)
        return self._code(deciders, u, by_channel(weight))[0].permute(1, 2, 0)

    def compensate(self, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Code with error compensation.

        Args:
            y: float32 ``[B, T, C]``.
            weight: weights of the tokens, float32 ``[B, T, H]``, or ``None``.

        Returns:
            The numbers that the last pass coded, float32 ``[B, T, C]``, and their codes, uint8 ``[B, T, C]``.
        """
        assert self.compensation is not None
        if (found := self._encode_natively(y, weight)) is not None and found.coded is not None:
            return found.coded, found.codes
        heads, size = self.shape

        def by_coordinate(parameter: Tensor) -> Tensor:  # [C, ...] to [D, H, ...], contiguous
            split: Tensor = parameter.unflatten(0, (heads, size))
            return split.transpose(0, 1).contiguous()

        levels, bits = by_coordinate(self.levels), by_coordinate(self.params.bits)
        deciders = self._deciders(levels.flatten(0, 1), bits.flatten()).split(heads)
        exact = by_coordinate(y.permute(2, 0, 1))
        codes = torch.empty(exact.shape, dtype=torch.uint8, device=y.device)
        weight = None if weight is None else weight.permute(2, 0, 1).contiguous()

        def code(i: int, wanted: Tensor) -> Tensor:
            codes[i], index = self._code(deciders[i], wanted, weight)
            return levels[i].gather(1, index.flatten(1)).view(index.shape)

        coded = self.compensation.apply(exact, code)

        def by_channel(x: Tensor) -> Tensor:  # [D, H, B, T] to [B, T, C]
            return x.transpose(0, 1).flatten(0, 1).permute(1, 2, 0).contiguous()

        return by_channel(coded), by_channel(codes)

    def normalise(self, x: Tensor) -> Normalised:
        """Keys or values ``[B, H, T, D]`` as the codes see them, with error compensation."""
        if self.compensation is None:
            y = self.transform(x)
        elif (
            found := self._encode_natively(x.float(), by_size=self.spec.token_weighting)
        ) and found.coded is not None:
            y = found.coded
        else:
            y = self.transform(x)
            y, _ = self.compensate(y, self.token_weights(y))
        return Normalised(y, y, torch.ones((), device=y.device), torch.zeros((), device=y.device))

    def quantize(self, x: Tensor) -> Quantized:
        """Quantize keys or values ``[B, H, T, D]``."""
        if found := self._encode_natively(x.float(), by_size=self.spec.token_weighting):
            return Quantized(found.codes)
        y = self.transform(x)
        weight = self.token_weights(y)
        if self.compensation is not None:
            return Quantized(self.compensate(y, weight)[1])
        return Quantized(self.encode(y, weight))

    def dequantize(self, q: Quantized) -> Tensor:
        """Keys or values from codes: float32 ``[B, H, T, D]``."""
        return self.inverse_transform(self.decode(q.codes))


def _check_levels(spec: TrellisSpec, bits: Tensor, stored: StoredLevels) -> None:
    """Check the widths, the shapes, and that levels are finite and sorted."""
    if int(bits.max()) > spec.max_bits:
        raise TensorProblem("bits", f"has widths over {spec.max_bits}")
    needed = int(shape_counts(spec, bits).sum())
    if len(stored.shape) != needed:
        raise TensorProblem("level_shape", f"has {len(stored.shape)} numbers, its channels need {needed}")
    coefficients = stored_coefficients(spec, bits, stored)
    levels = computed_levels(coefficients, level_places(spec, bits))
    if not bool(torch.isfinite(levels).all()):
        raise TensorProblem("level_scale", "gives levels that are not finite")
    if bool((coefficients[:, 1] < 0).any()):
        raise TensorProblem("level_shape", f"has a channel whose magnitudes sum to over {SHAPE_STEPS}")
    if bool((levels.diff(dim=1) < 0).any()):
        raise TensorProblem("level_shape", "gives levels that fall")
