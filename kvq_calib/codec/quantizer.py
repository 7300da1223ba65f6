"""The protocol of a codec: one layer's keys or values to codes and back.

What codecs compute defines the numbers that every runtime and kernel must match. A codec is a subclass of
:class:`Quantizer`. An element ``y`` of channel ``c`` (after the channel's invertible transform) is coded and read as::

    y' = level[index]
    y' = zero_point + scale * level[index]    with a scale and a zero point of the channel or token

where ``index`` follows from the codes of the channel (:meth:`Quantizer.level_index`). In the second case what is coded
is ``u = (y - zero_point) * (1 / scale)`` in float32. Outliers keep ``y - y'`` beside
their code in the storage dtype. Decoding is therefore one dense pass plus a sparse addition, and nothing is stored
twice. Unless a codec says otherwise (:attr:`Quantizer.codes_in_blocks`, :meth:`Quantizer.cannot_stream`), every token
is quantized by itself: how tokens are grouped into calls, pages or batches never changes a code.

:mod:`kvq_calib.codec.registry` has the codecs by name. ``tests/test_codec_protocol.py`` holds each of them to what is
promised here; ``tests/toy_codec.py`` is the smallest there can be.
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
    """Keys or values on the scale of the levels.

    Attributes:
        y: float32 ``[B, T, C]``, what is quantized: after the channel's transform and, where there are such, after the
            calibrated normalisation of channels and with what makes good for the errors of other coordinates.
        normalised: float32 ``[B, T, C]``, ``(y - zero_point) / scale``.
        scale, zero_point: float32, broadcast against ``y``.
        outliers: bool ``[B, T, C]``, or ``None`` where the spec has none.
        token: scale and zero point per token ``[B, T]`` as stored, where there are such.
    """

    y: Tensor
    normalised: Tensor
    scale: Tensor
    zero_point: Tensor
    outliers: Tensor | None = None
    token: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, y: Tensor, scale: Tensor, zero_point: Tensor) -> Normalised:
        """``y`` by these thresholds."""
        return cls(y, (y - zero_point) * reciprocal(scale), scale, zero_point)


@dataclass(frozen=True)
class Quantized:
    """Codes of ``T`` tokens of ``B`` sequences, before packing.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        outliers: bool ``[B, T, C]``, or ``None`` where the spec has none.
        residual: storage dtype ``[B, T, C]``, zero where ``outliers`` is not set; ``None`` with it.
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
    """Quantizes and dequantizes one layer's keys or values: a codec, with the numbers of an artifact.

    Keys are given as they are to be quantized: before RoPE where the spec says ``pre_rope``, else after it.

    Args:
        spec: of this codec.
        params: the calibrated numbers, of the codec's :attr:`params_type`.
        shape: heads and head size.
        rope: of keys, the layer's rotary embedding; needed where RoPE pairs are turned.
        storage_dtype: of residuals and scales per token.
    """

    #: Of the codec: its name, its spec, and the class of its numbers.
    codec: ClassVar[str]
    spec_type: ClassVar[type[QuantSpec]]
    params_type: ClassVar[type[Params]]
    #: Whether :meth:`channel_range` follows from the levels, since thresholds are free parameters of a fit.
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
        """The same quantizer with other numbers."""
        return type(self)(self.spec, params, self.shape, self.rope, self.storage_dtype)

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return next(iter(self.params.tensors().values())).device

    # ------------------------------------------------------------ what an artifact holds of it

    @classmethod
    @abstractmethod
    def stored_tensors(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> dict[str, StoredTensor]:
        """Name, shape and dtype of every tensor that is stored.

        Args:
            spec: of this codec.
            shape: heads and head size.
            pairs: RoPE pairs of a head; 0 for values, and where there is no rotary embedding.
        """

    @classmethod
    @abstractmethod
    def check_values(cls, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
        """Refuse values that no quantizer of this spec has; names, shapes and dtypes are right already.

        Raises:
            TensorProblem: names the tensor and what is wrong with it.
        """

    @classmethod
    def nominal_layout(cls, spec: QuantSpec, shape: HeadShape) -> PageLayout:
        """The page of an artifact that is not there yet: every channel has the widest code."""
        return PageLayout((spec.max_width,) * shape.channels, shape.heads, shape.head_dim, False, 0)

    @classmethod
    def nominal_outliers(cls, spec: QuantSpec, shape: HeadShape) -> float:
        """Outliers of a token that are meant."""
        return 0.0

    @classmethod
    def nominal_bytes(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> int:
        """Bytes of the numbers of an artifact that is not there yet; what has no shape of its own is left out."""
        return sum(
            math.prod(0 if size is None else size for size in tensor.shape)
            * getattr(torch, tensor.dtypes[0]).itemsize
            for tensor in cls.stored_tensors(spec, shape, pairs).values()
        )

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Bits of each channel's codes, ``C`` numbers."""

    @property
    def per_token(self) -> bool:
        """Whether a scale and a zero point of each token are stored."""
        return False

    @property
    def outlier_cap(self) -> int:
        """Most outliers of one token."""
        return 0

    @cached_property
    def layout(self) -> PageLayout:
        """Where the codes stand in a page."""
        return PageLayout(
            self.widths, self.shape.heads, self.shape.head_dim, self.per_token, self.outlier_cap
        )

    def derived(self) -> list[Tensor]:
        """Tensors that are made of the stored ones once and kept."""
        return []

    # ------------------------------------------------------------ what a reader of the codes asks

    @property
    def read_rope(self) -> RopeSpec | None:
        """The rotary embedding that readers apply; ``None`` where keys are stored as attention uses them."""
        return self.rope if self.spec.pre_rope else None

    @property
    @abstractmethod
    def levels(self) -> Tensor:
        """Levels per channel, float32 ``[C, L]``; a row of fewer than ``L`` levels repeats its last one."""

    @property
    def shared_levels(self) -> Tensor | None:
        """The levels, float32 ``[L]``, where all channels have the same ones."""
        return None

    def level_count(self, width: int) -> int:
        """Levels of a channel of this width."""
        return 1 << width

    @property
    def has_channel_thresholds(self) -> bool:
        """Whether a calibrated scale and zero point per channel are stored."""
        return False

    @property
    def scale(self) -> Tensor:
        """Calibrated scale per channel, float32 ``[C]``; only where :attr:`has_channel_thresholds`."""
        raise NotImplementedError

    @property
    def zero_point(self) -> Tensor:
        """Calibrated zero point per channel, float32 ``[C]``; as :attr:`scale`."""
        raise NotImplementedError

    @property
    def channel_normalised(self) -> bool:
        """Whether the channels' scale and zero point act after a token's, and after the residuals of outliers."""
        return False

    @property
    def pair_angle(self) -> Tensor | None:
        """Angle by which each RoPE pair is turned before quantization, float32 ``[H, P]``, or ``None``."""
        return None

    @property
    def codes_in_blocks(self) -> bool:
        """Whether the tokens of a block are coded together, so that codes depend on where blocks begin."""
        return False

    @property
    def compensates(self) -> bool:
        """Whether what is coded makes good for the errors of other coordinates."""
        return False

    def level_index(self, codes: Tensor) -> Tensor:
        """Which level each code stands for: integers ``[..., T]``, tokens in order from the first of a block on."""
        return codes

    def cannot_stream(self) -> str | None:
        """Why a cache cannot be filled with this codec token by token, and what to do; ``None`` where it can."""
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
        """Centre and half width of what each channel holds that is neither an outlier nor clamped.

        Returns:
            Two float32 ``[C]``; ``None`` where the artifact does not say.
        """
        return (self.zero_point, self.scale) if self.has_channel_thresholds else None

    # ------------------------------------------------------------ numbers to codes and back

    def transform(self, x: Tensor) -> Tensor:
        """Heads to channels, ``[B, H, T, D]`` to float32 ``[B, T, C]``, by the codec's invertible map."""
        return x.float().transpose(1, 2).flatten(2)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """Invert :meth:`transform`: ``[B, T, C]`` to float32 ``[B, H, T, D]``."""
        split: Tensor = y.unflatten(-1, tuple(self.shape))
        return split.transpose(1, 2)

    @abstractmethod
    def normalise(self, x: Tensor) -> Normalised:
        """Bring ``[B, H, T, D]`` keys or values into the range of the levels and mark the outliers."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Quantized:
        """Quantize ``[B, H, T, D]`` keys or values."""

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes: uint8 ``[B, T, C]``, tokens from the first of a block on, to float32 ``[B, T, C]``."""
        codes = codes.permute(2, 0, 1)
        index = self.level_index(codes)
        seen = self.levels.gather(1, index.flatten(1).to(torch.int64))
        return seen.view(codes.shape).permute(1, 2, 0)

    @abstractmethod
    def dequantize(self, q: Quantized) -> Tensor:
        """Keys or values from codes: float32 ``[B, H, T, D]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """What a reader of the cache sees of ``x``: float32 ``[B, H, T, D]``."""
        return self.dequantize(self.quantize(x))


def roundtrip_storage(x: Tensor, dtype: StorageDtype) -> Tensor:
    """What a reader sees of a token that is kept exact: ``x`` rounded to the storage dtype."""
    return x.to(STORAGE_DTYPES[dtype]).to(x.dtype)
