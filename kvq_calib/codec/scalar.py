"""The scalar codec: one table of levels for a layer's keys or values, nearest level, exact outliers (KVQuant).

::

    code = number of boundaries b with u > b,  boundaries = midpoints of the sorted levels

Every token is quantized independently, except with online thresholds per channel, which are for evaluation only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kvq_calib.codec.native_encoding import encoding_library, scalar_tables
from kvq_calib.codec.outliers import cap_per_token
from kvq_calib.codec.packing import PageLayout
from kvq_calib.codec.params import Params, StoredTensor, TensorProblem
from kvq_calib.codec.quantizer import Normalised, Quantized, Quantizer
from kvq_calib.codec.thresholds import online_thresholds, reciprocal, token_thresholds
from kvq_calib.native.encode_scalar import EncodedTokens, ScalarTables, encode_scalar
from kvq_calib.native.loader import library
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import QuantSpec, ScalarSpec

__all__ = ["ScalarParams", "ScalarQuantizer"]


@dataclass(frozen=True)
class ScalarParams(Params):
    """Parameters of the scalar codec, for ``C`` channels.

    Attributes:
        codebook: float32 ``[1, 2 ** bits]``, the sorted levels.
        scale, zero_point: float32 ``[C]``, calibrated thresholds ``zero_point -+ scale``, or ``None``.
    """

    codebook: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    shared: ClassVar[frozenset[str]] = frozenset({"codebook"})


class ScalarQuantizer(Quantizer):
    """See :class:`kvq_calib.codec.quantizer.Quantizer`."""

    codec = "scalar"
    spec_type = ScalarSpec
    params_type = ScalarParams
    spec: ScalarSpec
    params: ScalarParams

    @classmethod
    def stored_tensors(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> dict[str, StoredTensor]:
        """A table of levels, and thresholds if they are calibrated."""
        assert isinstance(spec, ScalarSpec)
        tensors = {"codebook": StoredTensor((1, 1 << spec.bits), ("float32",))}
        if spec.calibrated_thresholds:
            tensors["scale"] = StoredTensor((shape.channels,), ("float32",))
            tensors["zero_point"] = StoredTensor((shape.channels,), ("float32",))
        return tensors

    @classmethod
    def check_values(cls, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
        """Check that levels are sorted, scales are positive, and all numbers are finite."""
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TensorProblem(name, "has values that are not finite")
        codebook = tensors["codebook"]
        if bool((codebook[:, 1:] < codebook[:, :-1]).any()):
            raise TensorProblem("codebook", "has unsorted levels")
        if "scale" in tensors and bool((tensors["scale"] <= 0).any()):
            raise TensorProblem("scale", "must be positive")

    @classmethod
    def nominal_layout(cls, spec: QuantSpec, shape: HeadShape) -> PageLayout:
        """The exact layout, because every channel has the same width."""
        assert isinstance(spec, ScalarSpec)
        cap = spec.outliers.cap(spec.per_token, shape.channels)
        return PageLayout((spec.bits,) * shape.channels, shape.heads, shape.head_dim, spec.per_token, cap)

    @classmethod
    def nominal_outliers(cls, spec: QuantSpec, shape: HeadShape) -> float:
        """The exact number with thresholds per token; the stated share with thresholds per channel."""
        assert isinstance(spec, ScalarSpec)
        outliers, channels = spec.outliers, shape.channels
        meant = 2 * outliers.per_side(channels) if spec.per_token else outliers.fraction * channels
        return float(min(meant, outliers.cap(spec.per_token, channels)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each channel in bits, the same for all."""
        return (self.spec.bits,) * self.shape.channels

    @property
    def per_token(self) -> bool:
        """Whether a scale and a zero point are stored for each token."""
        return self.spec.per_token

    @property
    def outlier_cap(self) -> int:
        """Largest number of outliers of a token."""
        return self.spec.outliers.cap(self.spec.per_token, self.shape.channels)

    @property
    def levels(self) -> Tensor:
        """The same levels for all channels: float32 ``[C, L]``."""
        return self.params.codebook.expand(self.shape.channels, -1)

    @property
    def shared_levels(self) -> Tensor:
        """The levels, float32 ``[L]``."""
        return self.params.codebook[0]

    @property
    def scale(self) -> Tensor:
        """Calibrated scale per channel, float32 ``[C]``."""
        assert self.params.scale is not None
        return self.params.scale

    @property
    def zero_point(self) -> Tensor:
        """Calibrated zero point per channel, float32 ``[C]``."""
        assert self.params.zero_point is not None
        return self.params.zero_point

    @property
    def has_channel_thresholds(self) -> bool:
        """Whether a calibrated scale and zero point per channel are stored."""
        return self.spec.calibrated_thresholds

    @property
    def channel_normalised(self) -> bool:
        """Whether channels are normalised before the thresholds of tokens are computed."""
        return self.spec.thresholds == "token_normalized"

    @property
    def _online(self) -> bool:
        """Whether the thresholds of channels come from the text itself."""
        return self.spec.thresholds == "channel_online"

    def cannot_stream(self) -> str | None:
        """A reason for online thresholds per channel, and for thresholds outside the range of the storage dtype."""
        if self._online:
            return (
                "online thresholds per channel need the whole text at once and serve evaluation only; "
                "calibrate with thresholds: channel, as in --set cache.key.thresholds=channel"
            )
        return super().cannot_stream()

    @property
    def boundaries(self) -> Tensor:
        """Decision boundaries, midpoints of neighbouring levels: float32 ``[L - 1]``."""
        levels = self.params.codebook[0]
        return (levels[:-1] + levels[1:]) * 0.5

    def normalise(self, x: Tensor) -> Normalised:
        """Normalise keys or values ``[B, H, T, D]`` to the range of the levels, and mark outliers."""
        y, token = self.transform(x), None
        if self.channel_normalised:
            y = (y - self.zero_point) * reciprocal(self.scale)
        if self.per_token:
            token = token_thresholds(y, self.spec.outliers.per_side(y.shape[-1]), self.storage)
            scale, zero_point = (part.float()[..., None] for part in token)
        elif self._online:
            scale, zero_point = online_thresholds(y, self.spec.outliers.fraction)
        else:
            scale, zero_point = self.scale, self.zero_point
        found = replace(Normalised.of(y, scale, zero_point), token=token)
        if not self.outlier_cap:
            return found
        outside = (y - zero_point).abs() > scale
        return replace(found, outliers=cap_per_token(outside, found.normalised.abs(), self.outlier_cap))

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes: uint8 ``[B, T, C]`` to float32 ``[B, T, C]``."""
        return self.params.codebook[0][codes.to(torch.int64)]

    def quantize(self, x: Tensor) -> Quantized:
        """Quantize keys or values ``[B, H, T, D]``, with the native library if there is one."""
        if found := self._encode_natively(x.float()):
            token_scale, token_zero_point = found.token or (None, None)
            return Quantized(
                found.codes, found.outliers, found.residual, token_scale, token_zero_point, None, None
            )
        n = self.normalise(x)
        codes = torch.bucketize(n.normalised.contiguous(), self.boundaries).to(torch.uint8)
        residual = None
        if n.outliers is not None:
            dense = n.zero_point + n.scale * self.decode(codes)
            residual = torch.where(n.outliers, n.y - dense, 0.0).to(self.storage)
        token_scale, token_zero_point = n.token or (None, None)
        return Quantized(
            codes,
            n.outliers,
            residual,
            token_scale,
            token_zero_point,
            n.scale if self._online else None,
            n.zero_point if self._online else None,
        )

    def derived(self) -> list[Tensor]:
        """Tensors for the native encoder beside the parameters, if it is used."""
        if self._online or self.device.type != "cpu" or library() is None:
            return []
        found = (self.native_tables.boundaries, self.native_tables.inverse)
        return [tensor for tensor in found if tensor is not None]

    @cached_property
    def native_tables(self) -> ScalarTables:
        """Tables for the native encoder. The parameters must be on the CPU."""
        outliers = self.spec.outliers
        per_side = outliers.per_side(self.shape.channels) if self.per_token else 0
        return scalar_tables(self, self.boundaries, per_side)

    def _encode_natively(self, x: Tensor) -> EncodedTokens | None:
        """See :func:`kvq_calib.native.encode_scalar.encode_scalar`; ``None`` if torch must code."""
        if self._online or (native := encoding_library(x, self.params)) is None:
            return None
        return encode_scalar(native, self.native_tables, x)

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
        if self.channel_normalised:
            y = self.zero_point + self.scale * y
        return self.inverse_transform(y)
