"""Bytes of a packed cache at any context, for an artifact, or for a model's shape and a recipe.

:func:`stored_bytes` is the only formula; it builds on :mod:`kvq_calib.codec.packing`. Tests compare it with the bytes
of filled caches. Sizes in GB are 2 ** 30 bytes, as in the KVQuant paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.packing import PAGE_TOKENS
from kvq_calib.codec.registry import codec_of
from kvq_calib.codec.size import CacheShape, TensorShape, cache_bytes
from kvq_calib.evaluate.shapes import SHAPES, ModelShape, stages
from kvq_calib.schema.geometry import LayerGeometry, cache_elements
from kvq_calib.schema.recipe import AllocationConfig, CalibrationConfig
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec, QuantSpec

__all__ = [
    "PAPER_GB",
    "MemoryReport",
    "artifact_report",
    "layer_bits",
    "longest_context",
    "paper_comparison",
    "per_gpu_report",
    "shape_report",
]

GIB = 2**30


@dataclass(frozen=True)
class MemoryReport:
    """The size of a cache.

    Attributes:
        context: tokens of each sequence.
        batch: sequences.
        by_kind: bytes by kind of buffer.
        elements: numbers in an unquantized cache. For a layer with a sliding window, only those of the window.
        state_bytes: bytes that layers keep beside keys and values. They are not quantized, and not in the other fields.
    """

    context: int
    batch: int
    by_kind: Mapping[str, float]
    elements: int
    state_bytes: int = 0

    @property
    def total(self) -> float:
        """All bytes of the packed cache."""
        return sum(self.by_kind.values())

    @property
    def fp16(self) -> int:
        """Bytes of an unquantized cache in 16 bits."""
        return 2 * self.elements

    @property
    def bits_per_element(self) -> float:
        """All stored bits, divided by ``elements``."""
        return 8 * self.total / self.elements

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "context": self.context,
            "batch": self.batch,
            "bytes": self.total,
            "by_kind": dict(self.by_kind),
            "fp16_bytes": self.fp16,
            "bits_per_element": self.bits_per_element,
            "state_bytes": self.state_bytes,
        }


# ------------------------------------------------------------------------------------------- an artifact


def artifact_report(
    artifact: KVArtifact,
    context: int,
    batch: int = 1,
    outliers_per_token: Mapping[Kind, Sequence[float]] | None = None,
) -> MemoryReport:
    """The size of an artifact's cache, with the outliers measured at calibration, or as given per kind and layer."""
    sizes = artifact.storage(context, batch, outliers_per_token=outliers_per_token)
    elements = artifact.elements(context, batch)
    return MemoryReport(context, batch, sizes, elements, batch * artifact.geometry.held_state(context))


def layer_bits(artifact: KVArtifact, context: int) -> dict[Kind, list[float]]:
    """Bits per element of the keys and of the values of each layer, without what layers share.

    Args:
        artifact: the artifact, with the outliers measured at calibration.
        context: tokens of one sequence.
    """
    bits: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    cache = artifact.cache_shape(context)
    for geometry, layer in zip(artifact.geometry.layers, artifact.sizes(), strict=True):
        for kind, tensor in layer.items():
            numbers = geometry.shape(kind).channels * geometry.held_tokens(context)
            bits[kind].append(8 * sum(tensor.bytes(cache).values()) / numbers)
    return bits


# ------------------------------------------------------------------------------------- a shape and a recipe


def _nominal(spec: QuantSpec, geometry: LayerGeometry, kind: Kind) -> TensorShape:
    """Keys or values from a recipe without an artifact. RoPE pairs are assumed to cover the head."""
    codec, shape = codec_of(spec), geometry.shape(kind)
    pairs = shape.head_dim // 2 if kind == "key" else 0
    return TensorShape(
        codec.nominal_layout(spec, shape),
        geometry.sliding_window,
        codec.nominal_outliers(spec, shape),
        codec.nominal_bytes(spec, shape, pairs),
    )


def shape_report(
    shape: ModelShape,
    spec: KVCacheSpec,
    context: int,
    batch: int = 1,
    allocation: AllocationConfig | None = None,
) -> MemoryReport:
    """The size of a cache for a model and a recipe, without an artifact.

    Outliers have their nominal share. An artifact may measure slightly different numbers, because its thresholds were
    fitted to another text. Channels have the width of the spec. If the recipe has a budget, codes take what the budget
    leaves for them at its context.
    """
    return _report(shape, spec, context, batch, _share_of_codes(shape, spec, allocation))


def _share_of_codes(shape: ModelShape, spec: KVCacheSpec, allocation: AllocationConfig | None) -> float:
    """Bytes of the codes under a budget, divided by their bytes if every channel had the largest width."""
    if allocation is None or allocation.scope == "uniform":
        return 1.0
    widest = _report(shape, spec, allocation.context, 1, 1.0)
    codes = widest.by_kind["codes"]
    left = allocation.bits_per_element * widest.elements / 8 - (widest.total - codes)
    return min(1.0, max(0.0, left / codes))


def _report(
    shape: ModelShape, spec: KVCacheSpec, context: int, batch: int, share_of_codes: float
) -> MemoryReport:
    tensors = [
        _nominal(layer.of(kind), geometry, kind)
        for layer, geometry in zip(spec.resolved(len(shape.layers)), shape.layers, strict=True)
        for kind in KINDS
    ]
    sizes = dict(cache_bytes(tensors, CacheShape(context, batch, spec.sink_tokens, spec.recent_tokens)))
    sizes["codes"] *= share_of_codes
    return MemoryReport(context, batch, sizes, cache_elements(shape.layers, context, batch))


def per_gpu_report(
    shape: ModelShape,
    spec: KVCacheSpec,
    context: int,
    batch: int = 1,
    gpus: int = 1,
    allocation: AllocationConfig | None = None,
) -> MemoryReport:
    """The size of the cache on the GPU with the largest part of it.

    See :func:`shape_report` and :func:`~kvq_calib.evaluate.shapes.stages`. Overrides of layers refer to the layers of
    the whole model.
    """
    _, parts = stages(shape, gpus)
    share = _share_of_codes(shape, spec, allocation)
    resolved = iter(spec.resolved(len(shape.layers)))
    reports = []
    for part in parts:
        own = {number: next(resolved) for number in range(len(part.layers))}
        reports.append(_report(part, spec.model_copy(update={"layers": own}), context, batch, share))
    return max(reports, key=lambda report: report.total)


def longest_context(
    shape: ModelShape,
    spec: KVCacheSpec,
    gpus: int = 1,
    gpu_bytes: int = 80 * GIB,
    allocation: AllocationConfig | None = None,
) -> int:
    """The largest number of tokens of one sequence, in whole pages, that fit beside the 16-bit weights; 0 if none do.

    With several GPUs, the weights are divided evenly and the GPU with most of the cache decides. Activations and
    workspace do not count, as in the paper's table.
    """
    room = gpu_bytes - shape.weight_bytes / gpus

    def fits(pages: int) -> bool:
        report = per_gpu_report(shape, spec, pages * PAGE_TOKENS, gpus=gpus, allocation=allocation)
        return report.total <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * PAGE_TOKENS


#: Cache of LLaMA-7B in GB, by recipe and tokens of context, from KVQuant (arXiv 2401.18079).
PAPER_GB: dict[str, dict[int, float]] = {
    "fp16": {131_072: 64.0},
    "nuq4-1p": {131_072: 17.3},
    "nuq3-1p": {131_072: 13.3},
    "nuq2-1p": {131_072: 9.3},
    "nuq2": {1_048_576: 64.0, 10_000_000: 611.5},
}


def paper_comparison(
    recipes: Mapping[str, CalibrationConfig], contexts: Sequence[int] = (131_072, 1_048_576, 10_000_000)
) -> list[dict[str, object]]:
    """Compare LLaMA-7B with the paper: one row per recipe and context.

    Args:
        recipes: recipes by name. The paper's figures are found by the names in :data:`PAPER_GB`.
        contexts: tokens.

    Returns:
        Rows with ``recipe``, ``context``, ``gb``, ``paper_gb`` (``None`` if the paper gives none),
        ``bits_per_element``, ``gb_with_weights``, and whether that fits on 1 and on 8 GPUs of 80 GB (``fits_1_gpu``,
        ``fits_8_gpus``). The first rows are the unquantized cache.
    """
    shape = SHAPES["llama-7b"]
    rows = []
    for name in ("fp16", *recipes):
        for context in contexts:
            if name == "fp16":
                size, bits = 2.0 * cache_elements(shape.layers, context), 16.0
            else:
                recipe = recipes[name]
                report = shape_report(shape, recipe.cache, context, allocation=recipe.allocation)
                size, bits = report.total, report.bits_per_element
            with_weights = (size + shape.weight_bytes) / GIB
            row: dict[str, object] = {
                "recipe": name,
                "context": context,
                "gb": size / GIB,
                "paper_gb": PAPER_GB.get(name, {}).get(context),
                "bits_per_element": bits,
                "gb_with_weights": with_weights,
                "fits_1_gpu": with_weights <= 80,
                "fits_8_gpus": with_weights <= 8 * 80,
            }
            rows.append(row)
    return rows
