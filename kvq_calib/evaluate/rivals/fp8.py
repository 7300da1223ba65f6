"""FP8 (e4m3) with one scale, as in inference engines."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvq_calib.evaluate.rivals.base import QuantizerRival
from kvq_calib.schema.geometry import LayerGeometry
from kvq_calib.schema.spec import Kind

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class FP8(QuantizerRival):
    """e4m3 with a scale from the largest magnitude, per layer (``tensor``) or per key-value head (``head``).

    It needs no calibration: the scale is taken from the measured text itself, which is the best case.
    """

    origin = "reference"
    source = "OCP FP8 e4m3, as in vLLM, TensorRT-LLM and SGLang"

    def __init__(self, scope: Literal["tensor", "head"]) -> None:
        self.scope = scope
        self.name = f"fp8-{scope}"
        self.settings = f"e4m3, a float32 scale per {scope} from the largest magnitude of the text itself"

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says."""
        largest = x.abs().amax() if self.scope == "tensor" else x.abs().amax((0, 2, 3), keepdim=True)
        scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        return (x / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float() * scale

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """As :class:`Rival` says."""
        return 8.0 * layer.shape(kind).channels

    def constant_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """The scales."""
        return 32.0 * (1 if self.scope == "tensor" else layer.num_kv_heads)
