"""Plausible artifacts without a calibration run: random levels, thresholds around given samples.

It suffices for tests that work with any codec. :func:`recipe` and :data:`RECIPES` are specs, :func:`random_artifact`
and :func:`random_quantizer` make artifacts and quantizers, and :func:`with_tensors` changes single tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.computed_levels import StoredLevels, has_coefficient, store_levels
from kvq_calib.codec.params import LayerParams, Params
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.registry import codec_of
from kvq_calib.codec.scalar import ScalarParams
from kvq_calib.codec.token_weighting import SIZE_CLASSES
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.geometry import KINDS, HeadShape, Kind, KVGeometry, RopeSpec
from kvq_calib.schema.spec import ErrorCompensationSpec, KVCacheSpec, QuantSpec, ScalarSpec, TrellisSpec

#: One layer's keys (before RoPE where the spec says so) or values, ``[B, H, T, D]``.
Samples = Mapping[Kind, Tensor]


def random_artifact(
    geometry: KVGeometry,
    spec: KVCacheSpec,
    seed: int = 0,
    samples: Sequence[Samples] | None = None,
    model: Mapping[str, object] | None = None,
    widths: Samples | None = None,
) -> KVArtifact:
    """An artifact that quantizes sensibly but was never calibrated.

    Args:
        geometry, spec: what to make it for. Widths of the trellis codec are random from 0 to ``max_bits``.
        seed: of everything random.
        samples: per layer, keys and values that thresholds should fit; normally distributed ones by default.
        model: the artifact's ``model`` section.
        widths: of the channels of keys and of values, uint8 ``[C]``, where they are not random.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, layer_spec in enumerate(spec.resolved(len(geometry.layers))):
        params = {}
        for kind in KINDS:
            shape, rope = geometry.layers[index].shape(kind), geometry.rope_of(index)
            sample = None if samples is None else samples[index][kind]
            draw = Draw(shape, rope, sample, generator, None if widths is None else widths[kind])
            params[kind] = _random_params(layer_spec.of(kind), draw)
        layers.append(LayerParams(**params))
    rates = {kind: [0.0] * len(layers) for kind in KINDS}
    return KVArtifact(spec, geometry, tuple(layers), dict(model or {}), {}, rates)


def artifact_for(model: torch.nn.Module, spec: KVCacheSpec, seed: int = 0) -> KVArtifact:
    """A random artifact whose thresholds fit what ``model`` caches for random tokens."""
    geometry = inspect_model(model)
    resolved = spec.resolved(len(geometry.layers))
    samples: list[dict[Kind, Tensor]] = [{} for _ in geometry.layers]

    def collect(kv: LayerKV) -> None:
        pre_rope = resolved[kv.layer].key.pre_rope
        keys = kv.keys if pre_rope else kv.rotated_keys
        samples[kv.layer] = {"key": keys.detach().float(), "value": kv.values.detach().float()}

    ids = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed))
    with intercept(model, collect), torch.no_grad():
        model(ids.to(model.device), use_cache=False)
    section = {"id": model.config.model_type, "config": model_fingerprint(model)}
    return random_artifact(geometry, spec, seed, samples, section)


def random_quantizer(
    spec: QuantSpec,
    shape: HeadShape,
    rope: RopeSpec | None = None,
    *,
    seed: int = 0,
    sample: Tensor | None = None,
) -> Quantizer:
    """A quantizer of any codec with random numbers, see :func:`random_artifact`."""
    draw = Draw(shape, rope, sample, torch.Generator().manual_seed(seed))
    return codec_of(spec)(spec, _random_params(spec, draw), shape, rope)


def with_tensors(artifact: KVArtifact, layer: int, kind: Kind, **tensors: Tensor | None) -> KVArtifact:
    """The artifact with some tensors of one layer's keys or values replaced, or taken out by ``None``."""
    layers = list(artifact.layers)
    changed = replace(layers[layer].of(kind), **tensors)
    layers[layer] = replace(layers[layer], **{kind: changed})
    return replace(artifact, layers=tuple(layers))


def recipe(**options: object) -> KVCacheSpec:
    """A cache spec from a few words.

    Args:
        options: ``key`` and ``value`` as mappings of a spec's fields, of the scalar codec where they name none (then by
            default 4 bits and 1% outliers, thresholds per channel for keys and per token for values); the rest as
            fields of :class:`KVCacheSpec`.
    """
    scalar = {"bits": 4, "outliers": {"fraction": 0.01}}
    key, value = dict(options.pop("key", {})), dict(options.pop("value", {}))
    if key.get("codec", "scalar") == "scalar":
        key = {**scalar, **key}
    if value.get("codec", "scalar") == "scalar":
        value = {**scalar, "thresholds": "token", **value}
    return KVCacheSpec(key=key, value=value, **options)


def trellis(max_bits: int, **options: object) -> dict[str, object]:
    """A spec of the trellis codec as :func:`recipe` takes it."""
    return {"codec": "trellis", "max_bits": max_bits, **options}


RECIPES: dict[str, KVCacheSpec] = {
    "nuq4-1p": recipe(),
    "nuq3-exact": recipe(key={"bits": 3}, value={"bits": 3}, sink_tokens=4, recent_tokens=20),
    "dense2": recipe(key={"bits": 2, "outliers": {}}, value={"bits": 2, "outliers": {}}, sink_tokens=0),
    "trellis": recipe(
        key=trellis(5, pair_rotation=True, error_compensation={"refinement_passes": 1}, token_weighting=True),
        value=trellis(2, token_weighting=True, noise_shaping=True),
        sink_tokens=2,
        recent_tokens=3,
    ),
    "shaped": recipe(key=trellis(3, noise_shaping=True), value=trellis(4, noise_shaping=True), sink_tokens=0),
    "trellis-one-state": recipe(
        key=trellis(6, states=1, pair_rotation=True), value=trellis(5, states=1), sink_tokens=2
    ),
    "compensation": recipe(
        key=trellis(4, states=1, pair_rotation=True, error_compensation={}),
        value=trellis(3, states=1, error_compensation={"rank": 3, "refinement_passes": 2}),
    ),
    "post-rope-token": recipe(
        key={"bits": 4, "thresholds": "token_normalized", "pre_rope": False},
        value={"bits": 1, "thresholds": "token_normalized"},
        storage_dtype="bfloat16",
    ),
}
"""Recipes that between them use every feature of the codecs that a stream of tokens allows."""


@dataclass(frozen=True)
class Draw:
    """What random numbers are drawn for.

    Attributes:
        shape, rope: of the layer's keys or values.
        sample: ``[B, H, T, D]`` that thresholds should fit, or ``None``.
        generator: of the numbers.
        widths: of the channels, uint8 ``[C]``, or ``None`` for any.
    """

    shape: HeadShape
    rope: RopeSpec | None
    sample: Tensor | None
    generator: torch.Generator
    widths: Tensor | None = None

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(*shape, generator=self.generator)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Evenly distributed numbers."""
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from ``low`` to ``high``."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def levels(self, count: int) -> Tensor:
        """``count`` sorted levels over [-1, 1], unevenly spaced."""
        return (2 * torch.arange(count) + 1 + self.between(-0.5, 0.5, count)) / count - 1

    def thresholds(self, turned: bool = False) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel that leave out a hundredth of the sample at either end.

        Args:
            turned: a pair of channels may be turned, and so reach its radius on either axis.
        """
        heads, size = self.shape
        y = self.sample
        if y is None:
            spread, middle = 0.2 + self.normal(heads, 1, size).abs(), self.normal(heads, 1, size)
            y = self.normal(1, heads, 64, size) * spread + middle
        if turned:
            y = torch.cat((y, y.abs().amax(-1, keepdim=True).expand_as(y)), dim=2)
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)
        low, high = y.quantile(0.01, dim=0), y.quantile(0.99, dim=0)
        return (high - low) / 2 + 1e-3, (low + high) / 2


def _random_params(spec: QuantSpec, draw: Draw) -> Params:
    return RANDOM_PARAMS[spec.codec](spec, draw)


def _scalar_params(spec: ScalarSpec, draw: Draw) -> ScalarParams:
    codebook = draw.levels(1 << spec.bits)[None]
    return ScalarParams(codebook, *(draw.thresholds() if spec.calibrated_thresholds else ()))


def _trellis_params(spec: TrellisSpec, draw: Draw) -> TrellisParams:
    heads, _ = draw.shape
    bits = draw.widths
    if bits is None:
        bits = draw.integers(0, spec.max_bits, draw.shape.channels).to(torch.uint8)
    pair_angle = None
    if spec.pair_rotation and draw.rope is not None:
        pair_angle = (3.0 * draw.normal(heads, len(draw.rope.pairs))).half()
    levels = _levels(spec, bits, *draw.thresholds(turned=pair_angle is not None), draw)
    beside: dict[str, Tensor] = {}
    if spec.error_compensation is not None:
        beside |= _compensation(spec.error_compensation, draw)
    if spec.token_weighting:
        beside["token_weight"] = draw.between(0.0, 1.0, heads, SIZE_CLASSES).half()
        beside["token_size_unit"] = draw.shape.head_dim * draw.between(0.5, 1.5, heads)
    if spec.noise_shaping:
        beside["error_feedback"] = draw.between(-0.9, 0.9, heads).half()
    return TrellisParams(bits, pair_angle=pair_angle, **beside).with_levels(levels)


def _levels(spec: TrellisSpec, bits: Tensor, scale: Tensor, zero_point: Tensor, draw: Draw) -> StoredLevels:
    """Rising levels over ``zero_point -+ scale``, denser on one side than on the other and in the middle."""
    skew, bend = draw.between(-0.2, 0.2, len(bits)), draw.between(0.0, 0.3, len(bits))
    most = torch.stack(
        (
            zero_point - scale * skew,
            scale * (1 - bend),
            scale * skew,
            scale * bend / 2,
            0 * bend,
            scale * bend / 2,
        ),
        dim=-1,
    )
    return store_levels(spec, bits, most * has_coefficient(spec, bits))


def _compensation(spec: ErrorCompensationSpec, draw: Draw) -> dict[str, Tensor]:
    heads, size = draw.shape
    # Entries of a matrix small enough that errors stay small; rows of a factor shorter than one.
    largest = 0.45 / spec.rank**0.5 if spec.rank else 0.3 / size
    found = {
        "compensation": draw.integers(-127, 127, heads, spec.entries(size)).to(torch.int8),
        "compensation_scale": largest * draw.between(1.0, 2.0, heads) / 127,
    }
    if spec.needs_error_weight:
        found["error_weight"] = draw.between(0.01, 1.01, heads, size).half()
    return found


#: What makes the numbers of a codec; a test adds here those of a codec of its own.
RANDOM_PARAMS: dict[str, Callable[[QuantSpec, Draw], Params]] = {
    "scalar": _scalar_params,
    "trellis": _trellis_params,
}
