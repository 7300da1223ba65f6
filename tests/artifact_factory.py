"""Plausible artifacts without a calibration run: random codebooks, thresholds around given samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact, LayerParams
from kvq_calib.codec.quantizer import QuantParams, pack_codebooks, storable_thresholds
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import IMPORTANCE_CLASSES, KINDS, Kind, KVCacheSpec, QuantSpec

#: One layer's keys (before RoPE where the spec says so) or values, ``[B, H, T, D]``.
Samples = Mapping[Kind, Tensor]


def random_artifact(
    geometry: KVGeometry,
    spec: KVCacheSpec,
    seed: int = 0,
    samples: Sequence[Samples] | None = None,
    codebooks: int = 1,
    model: Mapping[str, object] | None = None,
) -> KVArtifact:
    """An artifact that quantizes sensibly but was never calibrated.

    Args:
        geometry, spec: what to make it for. With ``variable_bits`` the widths are random from 0 to ``bits``.
        seed: of everything random.
        samples: per layer, keys and values that thresholds should fit; normally distributed ones by default.
        codebooks: rows of each codebook; channels take them in turn.
        model: the artifact's ``model`` section.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, layer_spec in enumerate(spec.resolved(len(geometry.layers))):
        shape, rope = geometry.layers[index], geometry.rope_of(index)
        params = {}
        for kind in KINDS:
            sample = None if samples is None else samples[index][kind]
            params[kind] = _params(layer_spec.of(kind), shape, rope, sample, codebooks, generator)
        layers.append(LayerParams(**params))
    rates = {kind: [0.0] * len(layers) for kind in KINDS}
    return KVArtifact(spec, geometry, tuple(layers), dict(model or {}), {}, rates)


def artifact_for(model: torch.nn.Module, spec: KVCacheSpec, seed: int = 0, codebooks: int = 1) -> KVArtifact:
    """A random artifact whose thresholds fit what ``model`` caches for random tokens."""
    geometry = inspect_model(model).geometry
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
    return random_artifact(geometry, spec, seed, samples, codebooks, section)


def recipe(**options: object) -> KVCacheSpec:
    """A cache spec from a few words.

    Args:
        options: ``key`` and ``value`` as mappings of :class:`QuantSpec` fields (static 4-bit channels and
            dynamic 4-bit tokens by default, 1% outliers), the rest as :class:`KVCacheSpec` fields.
    """
    key = {"bits": 4, "outliers": {"fraction": 0.01}, **options.pop("key", {})}
    value = {"bits": 4, "granularity": "token", "dynamic": True, "outliers": {"fraction": 0.01}}
    value.update(options.pop("value", {}))
    return KVCacheSpec(key=QuantSpec(**key), value=QuantSpec(**value), **options)


RECIPES: dict[str, KVCacheSpec] = {
    "nuq4-1p": recipe(),
    "nuq3-exact": recipe(key={"bits": 3}, value={"bits": 3}, sink_tokens=4, recent_tokens=20),
    "dense2": recipe(key={"bits": 2, "outliers": {}}, value={"bits": 2, "outliers": {}}, sink_tokens=0),
    "mixed-phase-rotation": recipe(
        key={"bits": 6, "variable_bits": True, "phase": True},
        value={
            "bits": 5,
            "variable_bits": True,
            "granularity": "channel",
            "dynamic": False,
            "rotation": True,
        },
        sink_tokens=2,
    ),
    "feedback": recipe(
        key={"bits": 4, "variable_bits": True, "phase": True, "feedback": True, "outliers": {}},
        value={
            "bits": 3,
            "granularity": "channel",
            "dynamic": False,
            "feedback": True,
            "feedback_rank": 3,
            "sweeps": 2,
            "outliers": {},
        },
    ),
    "trellis": recipe(
        key={
            "bits": 5,
            "variable_bits": True,
            "phase": True,
            "feedback": True,
            "sweeps": 1,
            "trellis": True,
            "importance": True,
            "outliers": {},
        },
        value={
            "bits": 2,
            "granularity": "channel",
            "dynamic": False,
            "trellis": True,
            "importance": True,
            "rotation": True,
            "outliers": {},
        },
        sink_tokens=2,
        recent_tokens=3,
    ),
    "post-rope-token": recipe(
        key={
            "bits": 4,
            "granularity": "token",
            "dynamic": True,
            "channel_normalized": True,
            "pre_rope": False,
        },
        value={"bits": 1, "channel_normalized": True},
        storage_dtype="bfloat16",
    ),
}
"""Recipes that between them use every feature of the spec that a stream of tokens allows."""


def _params(
    spec: QuantSpec,
    geometry: LayerGeometry,
    rope: RopeSpec | None,
    sample: Tensor | None,
    codebooks: int,
    generator: torch.Generator,
) -> QuantParams:
    heads, size, channels = geometry.num_kv_heads, geometry.head_dim, geometry.channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bits = torch.full((channels,), spec.bits, dtype=torch.uint8)
    if spec.variable_bits:
        bits = torch.randint(0, spec.bits + 1, (channels,), generator=generator).to(torch.uint8)
    columns = spec.level_count(int(bits.max()))
    rows, row_of = [], {}
    codebook_index = torch.empty(channels, dtype=torch.uint8)
    for channel, width in enumerate(bits.tolist()):
        variant = (width, channel % codebooks)
        if variant not in row_of:
            row_of[variant] = len(rows)
            rows.append(_levels(spec.level_count(width), columns, generator))
        codebook_index[channel] = row_of[variant]
    phase = rotation = scale = zero_point = None
    if spec.phase and rope is not None:
        phase = (3.0 * normal(heads, len(rope.pairs))).half()
    if spec.rotation:
        rotation = torch.linalg.qr(normal(heads, size, size)).Q.contiguous()
    if sample is None:
        sample = normal(1, heads, 64, size) * (0.2 + normal(heads, 1, size).abs()) + normal(heads, 1, size)
    if spec.static_channels:
        y = sample
        if rotation is not None:
            y = y @ rotation
        if phase is not None:  # a turned pair may reach its radius on either axis
            y = torch.cat((y, y.abs().amax(-1, keepdim=True).expand_as(y)), dim=2)
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)
        low, high = y.quantile(0.01, dim=0), y.quantile(0.99, dim=0)
        scale, zero_point = storable_thresholds(spec, (high - low) / 2 + 1e-3, (low + high) / 2)
    codebook = torch.stack(rows)
    beside: dict[str, Tensor] = {}
    if spec.feedback:
        entries = spec.feedback_entries(size)
        beside["feedback"] = torch.randint(-127, 128, (heads, entries), generator=generator).to(torch.int8)
        # Entries of a matrix small enough that errors stay small; rows of a factor shorter than one.
        largest = 0.45 / spec.feedback_rank**0.5 if spec.feedback_rank else 0.3 / size
        beside["feedback_scale"] = largest * (1 + torch.rand(heads, generator=generator)) / 127
    if spec.sweeps or spec.feedback_rank:
        beside["feedback_weight"] = (0.01 + torch.rand(heads, size, generator=generator)).half()
    if spec.importance:
        beside["importance"] = torch.rand(heads, IMPORTANCE_CLASSES, generator=generator).half()
        beside["importance_unit"] = size * (0.5 + torch.rand(heads, generator=generator))
    if spec.variable_bits:
        codebook, codebook_index = pack_codebooks(spec, bits, codebook.half().float(), codebook_index)
    elif codebooks == 1:
        return QuantParams.uniform(
            spec.bits,
            channels,
            codebook,
            scale,
            zero_point=zero_point,
            phase=phase,
            rotation=rotation,
            **beside,
        )
    return QuantParams(bits, codebook, codebook_index, scale, zero_point, phase, rotation, **beside)


def _levels(count: int, columns: int, generator: torch.Generator) -> Tensor:
    """``count`` sorted levels over [-1, 1], unevenly spaced; the last one repeated up to ``columns``."""
    jitter = torch.rand(count, generator=generator) - 0.5
    levels = (2 * torch.arange(count) + 1 + jitter) / count - 1
    return torch.cat((levels, levels[-1:].expand(columns - count)))
