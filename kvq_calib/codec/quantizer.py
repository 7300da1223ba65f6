"""The protocol of a codec: one layer's keys or values to codes and back.

Codecs define the numbers that every runtime and kernel must match. A codec is a subclass of :class:`Quantizer`. An
element ``y`` of channel ``c`` (after the channel's invertible transform) is coded and read as::

    y' = level[index]
    y' = zero_point + scale * level[index]    with a scale and a zero point of the channel or token

where ``index`` follows from the codes of the channel (:meth:`Quantizer.level_index`). In the second case the coded
number is ``u = (y - zero_point) * (1 / scale)`` in float32. Outliers keep ``y - y'`` in the storage dtype, beside their
code. So decoding is one dense pass plus a sparse addition, and nothing is stored twice. Every token is quantized
independently, and codes do not depend on how tokens are grouped into calls, pages or batches. Codecs declare exceptions
from this (:attr:`Quantizer.codes_in_blocks`, :meth:`Quantizer.cannot_stream`).

:mod:`kvq_calib.codec.registry` has the codecs by name. ``tests/test_codec_protocol.py`` checks that each follows this
protocol. ``tests/toy_codec.py`` is a minimal codec.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvq_calib.codec.packing import PageLayout
from kvq_calib.codec.params import Params, StoredTensor
from kvq_calib.codec.thresholds import reciprocal
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import QuantSpec, StorageDtype

__all__ = ["STORAGE_DTYPES", "Normalised", "Quantized", "Quantizer", "roundtrip_storage"]

STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Normalised:
    """Keys or values, normalised to the range of the levels.

    Attributes:
        y: float32 ``[B, T, C]``, the numbers to quantize: after the channel's transform, the calibrated normalisation
            of channels (if any), and error compensation (if any).
        normalised: float32 ``[B, T, C]``, ``(y - zero_point) / scale``.
        scale, zero_point: float32, broadcast against ``y``.
        outliers: bool ``[B, T, C]``, or ``None`` if the spec has none.
        token: scale and zero point per token, ``[B, T]`` each, as stored; ``None`` without thresholds per token.
    """

    y: Tensor
    normalised: Tensor
    scale: Tensor
    zero_point: Tensor
    outliers: Tensor | None = None
    token: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, y: Tensor, scale: Tensor, zero_point: Tensor) -> Normalised:
        """Normalise ``y`` by these thresholds."""
        return cls(y, (y - zero_point) * reciprocal(scale), scale, zero_point)


@dataclass(frozen=True)
class Quantized:
    """Codes of ``T`` tokens of ``B`` sequences, before packing.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        outliers: bool ``[B, T, C]``, or ``None`` if the spec has none.
        residual: storage dtype ``[B, T, C]``, zero where ``outliers`` is not set; ``None`` if ``outliers`` is.
        token_scale, token_zero_point: storage dtype ``[B, T]``; only with thresholds per token.
        channel_scale, channel_zero_point: float32 ``[B, 1, C]``; only with online thresholds per channel.
    """

    codes: Tensor
    outliers: Tensor | None = None
    residual: Tensor | None = None
    token_scale: Tensor | None = None
    token_zero_point: Tensor | None = None
    channel_scale: Tensor | None = None
    channel_zero_point: Tensor | None = None


class Quantizer(ABC):
    """Quantizes and dequantizes one layer's keys or values: a codec with the parameters of an artifact.

    Keys are given before RoPE if the spec says ``pre_rope``, else after it.

    Args:
        spec: a spec of this codec.
        params: the calibrated parameters, of class :attr:`params_type`.
        shape: heads and head size.
        rope: for keys, the layer's rotary embedding; needed for pair rotation.
        storage_dtype: dtype of residuals and of scales per token.
    """

    #: The codec's name, spec class and parameter class.
    codec: ClassVar[str]
    spec_type: ClassVar[type[QuantSpec]]
    params_type: ClassVar[type[Params]]
    #: Whether :meth:`channel_range` follows from the levels, because the codec has no calibrated thresholds.
    range_is_estimated: ClassVar[bool] = False

    def __init__(
        self,
        spec: QuantSpec,
        params: Params,
        shape: HeadShape,
        rope: RopeSpec | None = None,
        storage_dtype: StorageDtype = "float16",
    ) -> None:
        self.spec = spec
        self.params = params
        self.shape = shape
        self.rope = rope
        self.storage_dtype = storage_dtype
        self.storage = STORAGE_DTYPES[storage_dtype]

    def to(self, device: torch.device | str) -> Self:
        """The same quantizer on another device."""
        if self.device == torch.device(device):
            return self
        return self.with_params(self.params.to(device))

    def with_params(self, params: Params) -> Self:
        """The same quantizer with other parameters."""
        return type(self)(self.spec, params, self.shape, self.rope, self.storage_dtype)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.params.tensors().values())).device

    # ------------------------------------------------------------ the tensors in an artifact

    @classmethod
    @abstractmethod
    def stored_tensors(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> dict[str, StoredTensor]:
        """Name, shape and dtype of every tensor that is stored.

        Args:
            spec: a spec of this codec.
            shape: heads and head size.
            pairs: number of RoPE pairs of a head; 0 for values, and without rotary embedding.
        """

    @classmethod
    @abstractmethod
    def check_values(cls, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
        """Refuse invalid values. Names, shapes and dtypes have been checked.

        Raises:
            TensorProblem: a tensor is invalid; the message says why.
        """

    @classmethod
    def nominal_layout(cls, spec: QuantSpec, shape: HeadShape) -> PageLayout:
        """The page layout before calibration: every channel has the largest width."""
        return PageLayout((spec.max_width,) * shape.channels, shape.heads, shape.head_dim, False, 0)

    @classmethod
    def nominal_outliers(cls, spec: QuantSpec, shape: HeadShape) -> float:
        """The intended number of outliers of a token."""
        return 0.0

    @classmethod
    def nominal_bytes(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> int:
        """Bytes of the parameters before calibration, without tensors whose shape depends on it."""
        return sum(
            math.prod(0 if size is None else size for size in tensor.shape)
            * getattr(torch, tensor.dtypes[0]).itemsize
            for tensor in cls.stored_tensors(spec, shape, pairs).values()
        )

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """The width of each channel in bits, ``C`` numbers."""

    @property
    def per_token(self) -> bool:
        """Whether a scale and a zero point are stored for each token."""
        return False

    @property
    def outlier_cap(self) -> int:
        """Largest number of outliers of a token."""
        return 0

    @cached_property
    def layout(self) -> PageLayout:
        """The layout of pages."""
        return PageLayout(
            self.widths, self.shape.heads, self.shape.head_dim, self.per_token, self.outlier_cap
        )

    def derived(self) -> list[Tensor]:
        """Tensors that are computed once from the stored ones, and kept."""
        return []

    # ------------------------------------------------------------ properties for readers of the codes

    @property
    def read_rope(self) -> RopeSpec | None:
        """The rotary embedding that readers apply; ``None`` if keys are stored as attention uses them."""
        return self.rope if self.spec.pre_rope else None

    @property
    @abstractmethod
    def levels(self) -> Tensor:
        """Levels per channel, float32 ``[C, L]``. A channel with fewer levels repeats its last one."""

    @property
    def shared_levels(self) -> Tensor | None:
        """The levels, float32 ``[L]``, if all channels share them, else ``None``."""
        return None

    def level_count(self, width: int) -> int:
        """Number of levels of a channel with this width."""
        return 1 << width

    @property
    def has_channel_thresholds(self) -> bool:
        """Whether a calibrated scale and zero point per channel are stored."""
        return False

    @property
    def scale(self) -> Tensor:
        """Calibrated scale per channel, float32 ``[C]``; only with :attr:`has_channel_thresholds`."""
        raise NotImplementedError

    @property
    def zero_point(self) -> Tensor:
        """Calibrated zero point per channel, float32 ``[C]``; only with :attr:`has_channel_thresholds`."""
        raise NotImplementedError

    @property
    def channel_normalised(self) -> bool:
        """Whether readers apply the channels' scale and zero point after the token's and after residuals."""
        return False

    @property
    def pair_angle(self) -> Tensor | None:
        """Angle in radians by which each RoPE pair is rotated before quantization, float32 ``[H, P]``, or ``None``."""
        return None

    @property
    def codes_in_blocks(self) -> bool:
        """Whether the tokens of a block are coded together, so that codes depend on block boundaries."""
        return False

    @property
    def compensates(self) -> bool:
        """Whether the codec has error compensation."""
        return False

    def level_index(self, codes: Tensor) -> Tensor:
        """Index of the level of each code: integers ``[..., T]``, tokens in order from the first of a block."""
        return codes

    def cannot_stream(self) -> str | None:
        """Why a cache cannot be filled token by token with this codec, and what to do; ``None`` if it can."""
        if (held := self.channel_range()) is not None:
            centre, half = held
            largest = float((centre.abs() + half).max())
            if largest > torch.finfo(self.storage).max:
                return (
                    f"channels reach {largest:.3g}, more than {self.storage_dtype} holds; "
                    "calibrate with --set cache.storage_dtype=bfloat16"
                )
        return None

    def channel_range(self) -> tuple[Tensor, Tensor] | None:
        """Centre and half width of the range of each channel: outside it, elements are outliers or clamped.

        Returns:
            Two float32 ``[C]``; ``None`` if the artifact does not determine them.
        """
        return (self.zero_point, self.scale) if self.has_channel_thresholds else None

    # ------------------------------------------------------------ coding and decoding

    def transform(self, x: Tensor) -> Tensor:
        """Apply the codec's invertible transform: ``[B, H, T, D]`` to float32 ``[B, T, C]``."""
        return x.float().transpose(1, 2).flatten(2)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """Invert :meth:`transform`: ``[B, T, C]`` to float32 ``[B, H, T, D]``."""
        split: Tensor = y.unflatten(-1, tuple(self.shape))
        return split.transpose(1, 2)

    @abstractmethod
    def normalise(self, x: Tensor) -> Normalised:
        """Normalise keys or values ``[B, H, T, D]`` to the range of the levels, and mark outliers."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Quantized:
        """Quantize keys or values ``[B, H, T, D]``."""

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes: uint8 ``[B, T, C]``, tokens starting with the first of a block, to float32 ``[B, T, C]``."""
        codes = codes.permute(2, 0, 1)
        index = self.level_index(codes)
        seen = self.levels.gather(1, index.flatten(1).to(torch.int64))
        return seen.view(codes.shape).permute(1, 2, 0)

    @abstractmethod
    def dequantize(self, q: Quantized) -> Tensor:
        """Keys or values from codes: float32 ``[B, H, T, D]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``: float32 ``[B, H, T, D]``."""
        return self.dequantize(self.quantize(x))


def roundtrip_storage(x: Tensor, dtype: StorageDtype) -> Tensor:
    """What a reader gets for an exact token: ``x`` rounded to the storage dtype."""
    return x.to(STORAGE_DTYPES[dtype]).to(x.dtype)
