"""A minimal codec: two bits for every element, a table of levels for every head, thresholds for every channel.

A codec consists of a spec, parameters and a quantizer. After registration, everything that uses only the protocol works
with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from artifact_factory import RANDOM_PARAMS, Draw
from torch import Tensor

from kvq_calib.codec import registry
from kvq_calib.codec.params import Params, StoredTensor, TensorProblem
from kvq_calib.codec.quantizer import Normalised, Quantized, Quantizer
from kvq_calib.schema import spec as specs
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import QuantSpec


class ToySpec(QuantSpec):
    """Two bits for every element."""

    codec: Literal["toy"] = "toy"

    @property
    def max_width(self) -> int:
        return 2

    @property
    def width_words(self) -> str:
        return "2 bits per element"

    def features(self) -> list[str]:
        return ["levels for each head", "thresholds for each channel"]


@dataclass(frozen=True)
class ToyParams(Params):
    """Levels float16 ``[H, 4]``; scale and zero point float32 ``[C]``."""

    head_levels: Tensor
    scale: Tensor
    zero_point: Tensor


class ToyQuantizer(Quantizer):
    """The nearest of a head's four levels."""

    codec = "toy"
    spec_type = ToySpec
    params_type = ToyParams
    params: ToyParams

    @classmethod
    def stored_tensors(cls, spec: QuantSpec, shape: HeadShape, pairs: int) -> dict[str, StoredTensor]:
        by_channel = StoredTensor((shape.channels,), ("float32",))
        levels = StoredTensor((shape.heads, 4), ("float16",))
        return {"head_levels": levels, "scale": by_channel, "zero_point": by_channel}

    @classmethod
    def check_values(cls, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TensorProblem(name, "has values that are not finite")

    @property
    def widths(self) -> tuple[int, ...]:
        return (2,) * self.shape.channels

    @property
    def levels(self) -> Tensor:
        return self.params.head_levels.float().repeat_interleave(self.shape.head_dim, 0)

    @property
    def has_channel_thresholds(self) -> bool:
        return True

    @property
    def scale(self) -> Tensor:
        return self.params.scale

    @property
    def zero_point(self) -> Tensor:
        return self.params.zero_point

    def normalise(self, x: Tensor) -> Normalised:
        return Normalised.of(self.transform(x), self.scale, self.zero_point)

    def quantize(self, x: Tensor) -> Quantized:
        distance = (self.normalise(x).normalised[..., None] - self.levels).abs()
        return Quantized(distance.argmin(-1).to(torch.uint8))

    def dequantize(self, q: Quantized) -> Tensor:
        return self.inverse_transform(self.zero_point + self.scale * self.decode(q.codes))


def toy_params(spec: QuantSpec, draw: Draw) -> ToyParams:
    levels = torch.stack([draw.levels(4).half() for _ in range(draw.shape.heads)])
    return ToyParams(levels, *draw.thresholds())


@contextmanager
def registered() -> Iterator[None]:
    """The toy codec is known, and the random artifacts of tests may have it."""
    registry.register(ToyQuantizer)
    RANDOM_PARAMS["toy"] = toy_params
    try:
        yield
    finally:
        del registry._CODECS["toy"], specs._SPECS["toy"], RANDOM_PARAMS["toy"]
