"""The ``QuantizedCache`` of transformers, with its two libraries: hqq and optimum-quanto."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from transformers import QuantizedCache

from kvq_calib.evaluate.decode import logits_through
from kvq_calib.evaluate.rivals.base import HALF, Rival
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import Kind

_PACKAGES = {"hqq": ("hqq", "hqq"), "quanto": ("optimum-quanto", "optimum.quanto")}
#: The axis that transformers' documentation recommends. Both make groups along the channels of a token.
_AXES = {"hqq": 1, "quanto": 0}


class TransformersCache(Rival):
    """``QuantizedCache`` with its defaults: groups of 64 channels, and a residual of 128 exact tokens.

    The first call of a ``QuantizedCache`` returns exact keys and values, and each time the residual is emptied, the
    whole history is quantized again. Both happen here as in use, because the text comes in chunks.
    """

    origin = "library"
    group = 64
    recent = 128

    def __init__(self, backend: Literal["hqq", "quanto"], bits: int) -> None:
        self.backend, self.bits = backend, bits
        self.name = f"{backend}-{bits}bit"
        self.package = _PACKAGES[backend]
        self.source = f"transformers QuantizedCache, backend {backend}"
        self.settings = (
            f"{bits} bits, groups of 64 channels of a token (axis {_AXES[backend]}), 16-bit scale and zero point, "
            "residual of 128 exact tokens"
        )

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """``QuantizedCache`` does not support sliding windows."""
        if any(layer.sliding_window for layer in geometry.layers):
            return "QuantizedCache supports no sliding windows"
        return super().obstacle(geometry, has_text)

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """As :class:`Rival` says."""
        axis = _AXES[self.backend]
        cache = QuantizedCache(
            self.backend,
            model.config,
            nbits=self.bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=self.group,
            residual_length=self.recent,
        )
        return logits_through(model, cache, ids)

    def exact_tokens(self, kind: Kind, context: int) -> float:
        """The mean of 0 to 127 tokens in the residual."""
        return min((self.recent - 1) / 2, float(context))

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Codes, and a scale and a zero point per group."""
        return layer.shape(kind).channels * (self.bits + 2 * HALF / self.group)
