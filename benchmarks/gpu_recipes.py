"""Random quantizers with the shapes of the recipes. Speed does not depend on the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.computed_levels import has_coefficient, store_levels
from kvq_calib.codec.params import Params
from kvq_calib.codec.scalar import ScalarParams
from kvq_calib.codec.token_weighting import SIZE_CLASSES
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import ErrorCompensationSpec, Kind, OutlierSpec, QuantSpec, ScalarSpec, TrellisSpec

OUTLIERS = 0.01
#: Thresholds for unit normal numbers, with 1% outliers.
_REACH = 2.576


@dataclass(frozen=True)
class Recipe:
    """Widths and features of a recipe.

    Attributes:
        shares: by kind, the share of channels with each width, from width 0.
        trellis: whether the recipe is like ``kvq*``, with widths per channel, trellis codes, token weighting, pair
            rotation and error compensation. Otherwise it is like ``nuq*-1p``, with one width, 1% outliers, and
            thresholds of values per token.
    """

    shares: Mapping[Kind, tuple[float, ...]]
    trellis: bool

    @property
    def bits(self) -> float:
        """Mean width of a code."""
        means = [sum(width * share for width, share in enumerate(row)) for row in self.shares.values()]
        return sum(means) / len(means)

    def specs(self) -> dict[Kind, QuantSpec]:
        """Settings of keys and of values."""
        bits = {kind: len(row) - 1 for kind, row in self.shares.items()}
        if not self.trellis:
            outliers = OutlierSpec(fraction=OUTLIERS)
            return {
                "key": ScalarSpec(bits=bits["key"], outliers=outliers),
                "value": ScalarSpec(bits=bits["key"], thresholds="token", outliers=outliers),
            }
        return {
            "key": TrellisSpec(
                max_bits=bits["key"],
                pair_rotation=True,
                error_compensation=ErrorCompensationSpec(refinement_passes=1),
                token_weighting=True,
            ),
            "value": TrellisSpec(max_bits=bits["value"], token_weighting=True),
        }

    def params(self, kind: Kind, shape: HeadShape, rope: RopeSpec | None) -> Params:
        """Parameters for unit normal keys or values of one layer. Every call gives the same."""
        spec = self.specs()[kind]
        thresholds = torch.full((shape.channels,), _REACH), torch.zeros(shape.channels)
        if isinstance(spec, ScalarSpec):
            levels = _levels(1 << spec.bits, 1 << spec.bits)[None]
            return ScalarParams(levels, *(thresholds if spec.calibrated_thresholds else (None, None)))
        assert isinstance(spec, TrellisSpec)
        return self._trellis_params(spec, shape, rope, self.shares[kind])

    @staticmethod
    def _trellis_params(
        spec: TrellisSpec, shape: HeadShape, rope: RopeSpec | None, shares: tuple[float, ...]
    ) -> TrellisParams:
        (heads, size), channels = shape, shape.channels
        generator = torch.Generator().manual_seed(0)
        widths = _widths(shares, channels, generator)
        extra: dict[str, Tensor] = {}
        if spec.pair_rotation and rope is not None:
            extra["pair_angle"] = (torch.rand(heads, len(rope.pairs), generator=generator) - 0.5).half()
        if spec.error_compensation is not None:
            count = (heads, spec.error_compensation.entries(size))
            extra["compensation"] = torch.randint(-20, 21, count, generator=generator).to(torch.int8)
            extra["compensation_scale"] = torch.full((heads,), 1e-3)
            extra["error_weight"] = (0.5 + 0.5 * torch.rand(heads, size, generator=generator)).half()
        classes = torch.rand(heads, SIZE_CLASSES, generator=generator)
        extra["token_weight"] = (0.25 + classes).half()
        extra["token_size_unit"] = torch.full((heads,), float(size))
        bend = 0.3 * torch.rand(channels, generator=generator)
        skew = 0.1 * torch.randn(channels, generator=generator).clamp(-2, 2) * bend
        parts = (-skew, 1 - bend, skew, bend / 2, 0 * bend, bend / 2)
        exact = _REACH * torch.stack(parts, dim=-1)
        exact *= has_coefficient(spec, widths)
        return TrellisParams(widths.to(torch.uint8), **extra).with_levels(store_levels(spec, widths, exact))


def _widths(shares: tuple[float, ...], channels: int, generator: torch.Generator) -> Tensor:
    """Widths in random order, int64 ``[C]``. Each width occurs according to its share."""
    ends = (torch.tensor(shares).cumsum(0) / sum(shares) * channels).round().to(torch.int64)
    counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    widths = torch.arange(len(shares)).repeat_interleave(counts)
    return widths[torch.randperm(channels, generator=generator)]


def _levels(count: int, size: int) -> Tensor:
    """Quantiles of a normal distribution in ``[-1, 1]``, the last one repeated up to ``size``."""
    levels = torch.special.ndtri((torch.arange(count) + 0.5) / count)
    levels = levels / levels.abs().max().clamp(min=1.0)
    return torch.cat([levels, levels[-1:].expand(size - count)])


def _plain(bits: int) -> Recipe:
    shares = (0.0,) * bits + (1.0,)
    return Recipe({"key": shares, "value": shares}, trellis=False)


#: Shares of the ``kvq`` recipes are from a calibration of SmolLM2-135M on Wikitext-2.
RECIPES: dict[str, Recipe] = {
    "nuq4-1p": _plain(4),
    "nuq3-1p": _plain(3),
    "nuq2-1p": _plain(2),
    "kvq4": Recipe(
        {
            "key": (0.0, 0.024, 0.056, 0.228, 0.434, 0.182, 0.076),
            "value": (0.0, 0.0, 0.007, 0.026, 0.365, 0.493, 0.109),
        },
        trellis=True,
    ),
    "kvq3": Recipe(
        {"key": (0.0, 0.085, 0.227, 0.425, 0.183, 0.08), "value": (0.0, 0.005, 0.028, 0.362, 0.484, 0.121)},
        trellis=True,
    ),
    "kvq2": Recipe(
        {"key": (0.0, 0.349, 0.387, 0.182, 0.082), "value": (0.0, 0.041, 0.38, 0.464, 0.116)},
        trellis=True,
    ),
}
