"""Streaming statistics. Their size depends on channels and bins, not on tokens, and two of them can be added.

:class:`ChannelHistogram` has the distribution of every channel, for thresholds. :class:`LevelHistogram` has the
weighted distribution of normalised values, for levels. Both accumulate exact integer counts or float64 sums, so
splitting the text over ranks, or resuming a run, makes no relevant difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from kvq_calib.errors import CalibrationError

CHANNEL_BINS = 1024
LEVEL_BINS = 4096
#: Exponent of the narrowest bins, 2 ** -140. With it, a channel of zeros needs no special case.
_SMALLEST_EXPONENT = -140
#: Above the sum of squares of float32 numbers over any text.
_LARGEST_SUM = 1e100

Reduction = Literal["sum", "min", "max"]


class Statistics:
    """Statistics whose state is a few tensors, which are attributes.

    Attributes:
        reductions: the names of these tensors, and the operation that combines two states.
        not_negative: the names of tensors that cannot be negative: counts, and sums of squares or weights.
    """

    reductions: ClassVar[Mapping[str, Reduction]]
    not_negative: ClassVar[frozenset[str]] = frozenset()

    def state(self) -> dict[str, Tensor]:
        """The tensors of the state, by name."""
        return {name: getattr(self, name) for name in self.reductions}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load tensors from :meth:`state`."""
        for name in self.reductions:
            setattr(self, name, state[name])

    def is_possible(self, state: Mapping[str, Tensor]) -> bool:
        """Whether some text could give this state, judging by its numbers. Called on empty statistics.

        Args:
            state: tensors of the right shapes and dtypes.
        """
        if any(bool((state[name] < 0).any()) for name in self.not_negative):
            return False
        # Comparisons with NaN are false. A bound may be infinite if no value was seen, as in the beginning.
        return all(
            bool(((state[name].abs() <= _largest(empty.dtype)) | (state[name] == empty)).all())
            for name, empty in self.state().items()
            if empty.is_floating_point()
        )

    def copied(self) -> Self:
        """A copy, with copied tensors."""
        other = copy.copy(self)
        other.load({name: tensor.clone() for name, tensor in self.state().items()})
        return other

    def align(self, largest: Callable[[Tensor], Tensor]) -> None:
        """Convert the state to a form in which it can be added to others.

        Args:
            largest: gives the elementwise maximum of a tensor over all states to be added.
        """


def _largest(dtype: torch.dtype) -> float:
    return min(_LARGEST_SUM, torch.finfo(dtype).max)


class ChannelHistogram(Statistics):
    """Distribution of each channel in equal bins. Bins widen by powers of two as larger values arrive.

    Bin edges are multiples of ``2 ** exponent[c]`` around 0, and widening joins neighbouring bins, so the result does
    not depend on the order of values. Counts are exact. Quantiles are interpolated within a bin, whose width is below
    1/256 of the channel's largest magnitude.

    Args:
        channels: number of channels ``C``.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {
        "counts": "sum",
        "exponent": "max",
        "low": "min",
        "high": "max",
    }
    not_negative = frozenset({"counts"})

    def __init__(self, channels: int) -> None:
        self.counts = torch.zeros(channels, CHANNEL_BINS, dtype=torch.int64)
        self.exponent = torch.full((channels,), _SMALLEST_EXPONENT, dtype=torch.int32)
        self.low = torch.full((channels,), torch.inf)
        self.high = torch.full((channels,), -torch.inf)

    def align(self, largest: Callable[[Tensor], Tensor]) -> None:
        """Widen the bins of each channel to the widest of all states to be added."""
        self._widen(largest(self.exponent))

    def _widen(self, exponent: Tensor) -> None:
        """Widen the bins of each channel to at least ``exponent``."""
        shift = (exponent - self.exponent).clamp(min=0)
        if not bool(shift.any()):
            return
        half = CHANNEL_BINS // 2
        bins = torch.arange(CHANNEL_BINS) - half
        target = (bins >> shift[:, None].clamp(max=31).to(torch.int64)) + half
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, target, self.counts)
        self.exponent = torch.maximum(self.exponent, exponent)

    def _exponent_for(self, low: Tensor, high: Tensor) -> Tensor:
        largest = torch.maximum(low.abs(), high.abs()).double()
        _, exponent = torch.frexp(largest)  # largest < 2 ** exponent
        needed = exponent - (CHANNEL_BINS // 2).bit_length() + 1
        return (
            torch.where(largest > 0, needed, _SMALLEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT).to(torch.int32)
        )

    def update(self, y: Tensor) -> None:
        """Add values.

        Args:
            y: float32 ``[N, C]`` on the CPU, finite.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        if y.shape[0] == 0:
            return
        low, high = y.amin(0), y.amax(0)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise CalibrationError("activations are not finite")
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._widen(self._exponent_for(low, high))
        # Exact, because float64 represents every float32 times a power of two.
        step = torch.exp2(-self.exponent.double())
        first = torch.arange(y.shape[1]) * CHANNEL_BINS + CHANNEL_BINS // 2
        flat = (y.double() * step).floor_().to(torch.int64) + first
        self.counts += torch.bincount(flat.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def quantile(self, q: float) -> Tensor:
        """The ``q``-quantile of each channel, float32 ``[C]``; 0 and 1 give the exact minimum and maximum."""
        if q <= 0:
            return self.low.clone()
        if q >= 1:
            return self.high.clone()
        total = self.counts.sum(1, dtype=torch.float64)
        rank = q * total
        cumulative = self.counts.cumsum(1).double()
        bin_ = torch.searchsorted(cumulative, rank[:, None]).clamp(max=CHANNEL_BINS - 1)
        inside = self.counts.gather(1, bin_).double()[:, 0]
        before = cumulative.gather(1, bin_)[:, 0] - inside
        part = torch.where(inside > 0, (rank - before) / inside.clamp(min=1), 0.5)
        value = torch.ldexp(bin_[:, 0] - CHANNEL_BINS // 2 + part, self.exponent.double()).float()
        return torch.minimum(torch.maximum(value, self.low), self.high)


class Magnitude(Statistics):
    """Largest magnitude of a tensor over all tokens."""

    reductions: ClassVar[Mapping[str, Reduction]] = {"largest": "max"}
    not_negative = frozenset({"largest"})

    def __init__(self) -> None:
        self.largest = torch.zeros(1)

    def update(self, x: Tensor) -> bool:
        """Add values of any shape. Return whether all are finite."""
        # The maximum of numbers with a NaN is NaN.
        low, high = x.detach().aminmax()
        self.largest = torch.maximum(self.largest, torch.maximum(-low, high).to(self.largest))
        return bool(torch.isfinite(self.largest))


class LevelHistogram(Statistics):
    """Distribution of normalised values over ``[-1, 1]`` in equal bins: the number of values in each, and their weight.

    A bin is represented by its middle, an error of at most 1/4096 of the scale, which is below the resolution of
    float16 levels. Tokens and outliers are counted. Outliers are not in the bins.

    Args:
        weighted: whether values have weights; if not, counts are used as weights.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"sums": "sum", "seen": "sum"}
    not_negative = frozenset({"sums", "seen"})

    def __init__(self, weighted: bool) -> None:
        self.sums = torch.zeros(2 if weighted else 1, LEVEL_BINS, dtype=torch.float64)
        self.seen = torch.zeros(2, dtype=torch.float64)

    def update(self, normalised: Tensor, outliers: Tensor | None, weights: Tensor | None) -> None:
        """Add the tokens of a layer.

        Args:
            normalised: float32 ``[N, C]``.
            outliers: bool ``[N, C]``, values that are not coded by levels; or ``None``.
            weights: float ``[N, C]``, not negative; ``None`` if the histogram has no weights.
        """
        tokens = normalised.shape[0]
        found = 0 if outliers is None else int(outliers.sum())
        self.seen += torch.tensor([tokens, found], dtype=torch.float64)
        # Values beyond the cap of outliers are clamped, as in the quantizer.
        half = LEVEL_BINS // 2
        # Narrow integers are faster, because memory bandwidth limits the speed.
        bins = (normalised * half).floor_().clamp_(-half, half - 1).add_(half).to(torch.int16)
        if outliers is not None:
            bins.masked_fill_(outliers, LEVEL_BINS)  # an additional bin, dropped below
        bins = bins.flatten()
        counts = torch.bincount(bins, minlength=LEVEL_BINS)[:LEVEL_BINS]
        self.sums[0] += counts.cpu()
        if weights is not None:
            sums = torch.bincount(bins, weights=weights.flatten(), minlength=LEVEL_BINS)[:LEVEL_BINS]
            self.sums[1] += sums.cpu()

    @property
    def points(self) -> Tensor:
        """Middle of each bin, float64 ``[bins]``."""
        bins = torch.arange(LEVEL_BINS, dtype=torch.float64)
        return (bins + 0.5) * (2 / LEVEL_BINS) - 1

    @property
    def counts(self) -> Tensor:
        """Number of values in each bin, float64 ``[bins]``."""
        return self.sums[0]

    @property
    def weights(self) -> Tensor:
        """Weight of each bin, float64 ``[bins]``."""
        return self.sums[-1]

    @property
    def outliers_per_token(self) -> float:
        """Mean number of outliers of a token."""
        return float(self.seen[1] / self.seen[0].clamp(min=1))
