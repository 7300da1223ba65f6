"""The codecs by name, and the quantizers of a whole cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.scalar import ScalarQuantizer
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.schema.geometry import KINDS, Kind, KVGeometry
from kvq_calib.schema.spec import KVCacheSpec, QuantSpec, register_spec

__all__ = ["codec_of", "make_quantizers", "register"]

_CODECS: dict[str, type[Quantizer]] = {codec.codec: codec for codec in (ScalarQuantizer, TrellisQuantizer)}


def register(codec: type[Quantizer]) -> type[Quantizer]:
    """Register a codec and its spec; a decorator."""
    register_spec(codec.spec_type)
    _CODECS[codec.codec] = codec
    return codec


def codec_of(spec: QuantSpec) -> type[Quantizer]:
    """The codec of a spec."""
    return _CODECS[spec.codec]


def make_quantizers(
    spec: KVCacheSpec,
    geometry: KVGeometry,
    layers: Sequence[LayerParams],
    device: torch.device | str = "cpu",
) -> list[dict[Kind, Quantizer]]:
    """Make one quantizer per layer and kind, from the contents of an artifact."""
    return [
        {
            kind: codec_of(own.of(kind))(
                own.of(kind),
                params.of(kind),
                geometry.layers[number].shape(kind),
                geometry.rope_of(number) if kind == "key" else None,
                spec.storage_dtype,
            ).to(device)
            for kind in KINDS
        }
        for number, (own, params) in enumerate(zip(spec.resolved(len(layers)), layers, strict=True))
    ]
