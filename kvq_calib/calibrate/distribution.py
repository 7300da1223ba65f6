"""Streaming statistics of channels: moments, covariances of RoPE pairs, and weighted distributions.

Widths and levels of channels are fitted to them. Their size depends on channels and bins, not on tokens, and two states
can be added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.errors import CalibrationError
from kvq_calib.schema.geometry import RopeSpec

#: Number of bins of a channel's weighted distribution.
WEIGHTED_BINS = 512
#: The outermost bins begin this many standard deviations from the mean.
_REACH = 64.0
_LARGEST = torch.finfo(torch.float32).max


def pair_channels(rope: RopeSpec | None, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """First and second channels of all RoPE pairs, each int64 ``[H, P]`` (``P`` is 0 without RoPE)."""
    pairs = torch.tensor(rope.pairs if rope is not None else (), dtype=torch.int64).view(-1, 2)
    head = torch.arange(heads)[:, None] * head_dim
    return head + pairs[:, 0], head + pairs[:, 1]


def _asinh(x: Tensor) -> Tensor:
    """``asinh`` within an absolute error of 1e-15, which takes a quarter of the time of :func:`torch.asinh`."""
    size = x.abs()
    return size.square().add_(1).sqrt_().add_(size).log_().copysign_(x)


class ChannelMoments(Statistics):
    """Count, mean and variance of every channel, and the covariance of RoPE pairs.

    Args:
        channels: number of channels ``C``.
        first, second: channels of the pairs, int64 ``[H, P]``; see :func:`pair_channels`.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"count": "sum", "sums": "sum", "cross": "sum"}
    not_negative = frozenset({"count"})

    def __init__(self, channels: int, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second
        self.count = torch.zeros(1, dtype=torch.float64)
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.cross = torch.zeros(first.shape, dtype=torch.float64)

    def update(self, y: Tensor) -> None:
        """Add values.

        Args:
            y: float32 ``[N, C]`` on the CPU.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        y = y.double()
        total = y.sum(0)
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError("activations are not finite")
        self.count += y.shape[0]
        self.sums[0] += total
        self.sums[1] += y.square().sum(0)
        self.cross += (y[:, self.first] * y[:, self.second]).sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 ``[C]``."""
        return self.sums[0] / self.count.clamp(min=1)

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, float64 ``[C]``."""
        return (self.sums[1] / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)

    def squared_size(self, heads: int) -> Tensor:
        """Mean over tokens of the sum of squares of each head, float32 ``[heads]``; 1 for a head of zeros."""
        mean = self.sums[1].view(heads, -1).sum(1) / self.count.clamp(min=1)
        size = mean.float()
        return torch.where(size > 0, size, 1.0)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the two channels of each pair, float64 ``[H, P]``."""
        return self.cross / self.count.clamp(min=1) - self.mean[self.first] * self.mean[self.second]

    def principal_angle(self) -> Tensor:
        """Angle that rotates each pair to its principal axes, so that its two coordinates are uncorrelated.

        Returns:
            float16 ``[H, P]`` in radians, as stored, so that fits use the rounded angle.
        """
        spread = self.variance[self.first] - self.variance[self.second]
        return (-0.5 * torch.atan2(2 * self.covariance, spread)).half()

    def turned(self, angle: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel after rotating each pair by ``angle``.

        Args:
            angle: float ``[H, P]``, or ``None`` for no rotation.

        Returns:
            Two float64 ``[C]``; a constant channel has a deviation of 1.
        """
        mean, variance = self.mean.clone(), self.variance.clone()
        if angle is not None and angle.numel():
            cos, sin = angle.double().cos(), angle.double().sin()
            a, b = self.first, self.second
            va, vb, cov = self.variance[a], self.variance[b], self.covariance
            mean[a], mean[b] = (
                cos * self.mean[a] - sin * self.mean[b],
                sin * self.mean[a] + cos * self.mean[b],
            )
            variance[a] = cos * cos * va + sin * sin * vb - 2 * sin * cos * cov
            variance[b] = sin * sin * va + cos * cos * vb + 2 * sin * cos * cov
        deviation = variance.clamp(min=0).sqrt()
        return mean, torch.where(deviation > 1e-12, deviation, 1.0)


class WeightedHistogram(Statistics):
    """Weighted distribution of every channel.

    Bins are equal steps of ``asinh((y - mean) / deviation)``: fine where values are dense, and wide enough far out that
    no value is lost. Each bin has its weight and the weighted sum of its values, so that the centre of any run of bins
    is exact; and the same without weights.

    Args:
        channels: number of channels ``C``.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"sums": "sum", "count": "sum"}
    not_negative = frozenset({"count"})

    def __init__(self, channels: int) -> None:
        # Sums of weights and of weighted values, then numbers and sums of values.
        self.sums = torch.zeros(4, channels, WEIGHTED_BINS, dtype=torch.float64)
        self.count = torch.zeros(1, dtype=torch.float64)

    def is_possible(self, state: Mapping[str, Tensor]) -> bool:
        """See :class:`Statistics`. Also, no weight is negative, and no mean of values is outside float32's range."""
        if not super().is_possible(state):
            return False
        weights, values = state["sums"][0::2], state["sums"][1::2]
        return bool(((weights >= 0) & (values.abs() <= weights * _LARGEST)).all())

    def update(self, y: Tensor, weights: Tensor | None, mean: Tensor, deviation: Tensor) -> None:
        """Add values.

        Args:
            y: float32 ``[N, C]`` on the CPU.
            weights: float ``[N, C]``, not negative: squared gradients of the loss with respect to ``y``; or ``None``
                for weights of 1.
            mean, deviation: float ``[C]``, the same in every call; they define the bins.
        """
        y = y.double()
        reach = math.asinh(_REACH)
        place = _asinh((y - mean).div_(deviation)).div_(reach)  # -1 .. 1 within reach
        bins = place.add_(1).mul_(WEIGHTED_BINS / 2).clamp_(0, WEIGHTED_BINS - 1).to(torch.int64)
        flat = bins.add_(torch.arange(y.shape[1]) * WEIGHTED_BINS).flatten()

        def sums(values: Tensor | None) -> Tensor:
            each = None if values is None else values.flatten()
            found = torch.bincount(flat, weights=each, minlength=y.shape[1] * WEIGHTED_BINS)
            return found.view(y.shape[1], -1)

        plain = torch.stack((sums(None).double(), sums(y)))
        self.sums[2:] += plain
        if weights is None:
            self.sums[:2] += plain
        else:
            weights = weights.double()
            self.sums[0] += sums(weights)
            self.sums[1] += sums(weights * y)
        self.count += y.shape[0]

    def distribution(
        self,
        mean: Tensor,
        deviation: Tensor,
        shrinkage: float = 0.0,
        vocabulary: WeightedHistogram | None = None,
        share: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The weighted distribution of one token.

        Args:
            mean, deviation: as in :meth:`update`.
            shrinkage: how far every weight is moved towards the mean of its channel, 0 to 1.
            vocabulary: distribution of the same channels for vocabulary samples, in the same bins.
            share: share of the vocabulary samples in the part without weights, 0 to 1.

        Returns:
            ``points`` float64 ``[C, bins]``, sorted in each row, and their ``weights``, float64 ``[C, bins]``.
        """
        mean, deviation = mean[:, None], deviation[:, None]
        edges = torch.linspace(-1, 1, WEIGHTED_BINS + 1, dtype=torch.float64)
        edges = mean + deviation * torch.sinh(edges * torch.asinh(torch.tensor(_REACH, dtype=torch.float64)))
        common = self.sums[0].sum(1, keepdim=True) / self.count.clamp(min=1)
        plain = self.sums[2:]
        if vocabulary is not None:
            per_token = self.count / vocabulary.count.clamp(min=1)
            plain = plain * (1 - share) + vocabulary.sums[2:] * per_token * share
        weight, moment = self.sums[:2] * (1 - shrinkage) + plain * common * shrinkage
        middle = (edges[:, 1:] + edges[:, :-1]) / 2
        points = torch.where(weight > 0, moment / weight.clamp(min=torch.finfo(torch.float64).tiny), middle)
        # Rounding must not move a mean out of its bin, so that points stay sorted. The outer bins are open.
        points[:, 1:] = torch.maximum(points[:, 1:], edges[:, 1:-1])
        points[:, :-1] = torch.minimum(points[:, :-1], edges[:, 1:-1])
        return points, weight / self.count.clamp(min=1)
