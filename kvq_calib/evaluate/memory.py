"""Bytes of a packed cache at any context, for an artifact or for nothing but a model's shape and a recipe.

The formula is that of :mod:`kvq_calib.codec.packing`; tests hold it against the bytes of filled caches. Sizes in GB are
2 ** 30 bytes, as in the KVQuant paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.packing import PAGE_TOKENS, PageLayout
from kvq_calib.codec.size import packed_tokens, shared_bytes, storage_bytes
from kvq_calib.codec.token_weighting import SIZE_CLASSES
from kvq_calib.errors import ConfigError
from kvq_calib.schema.geometry import LayerGeometry, cache_elements
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec, QuantSpec

__all__ = [
    "PAPER_GB",
    "SHAPES",
    "MemoryReport",
    "ModelShape",
    "artifact_report",
    "longest_context",
    "model_shape",
    "paper_comparison",
    "per_gpu_report",
    "shape_report",
]

GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a cache, and of the model beside it.

    Attributes:
        name: as users write it.
        layers: shapes of the attention layers.
        parameters: number of weights.
    """

    name: str
    layers: tuple[LayerGeometry, ...]
    parameters: float

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in 16 bits."""
        return 2 * self.parameters


def _shape(
    name: str,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    billions: float,
    window: int | None = None,
    full_every: int = 0,
) -> ModelShape:
    """A model of equal layers; with ``full_every`` only each such layer sees beyond ``window``."""

    def layer(index: int) -> LayerGeometry:
        full = window is None or (full_every > 0 and (index + 1) % full_every == 0)
        return LayerGeometry(
            num_query_heads=query_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            sliding_window=None if full else window,
        )

    return ModelShape(name, tuple(layer(index) for index in range(layers)), 1e9 * billions)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _shape("llama-7b", 32, 32, 32, 128, 6.738),
        _shape("llama-13b", 40, 40, 40, 128, 13.016),
        _shape("llama-30b", 60, 52, 52, 128, 32.529),
        _shape("llama-65b", 80, 64, 64, 128, 65.286),
        _shape("llama-2-7b", 32, 32, 32, 128, 6.738),
        _shape("llama-2-13b", 40, 40, 40, 128, 13.016),
        _shape("llama-2-70b", 80, 64, 8, 128, 68.977),
        _shape("llama-3-8b", 32, 32, 8, 128, 8.030),
        _shape("llama-3-70b", 80, 64, 8, 128, 70.554),
        _shape("mistral-7b", 32, 32, 8, 128, 7.242),  # without the window of its first release
        _shape("qwen3-8b", 36, 32, 8, 128, 8.191),
        _shape("gemma-3-27b", 62, 32, 16, 128, 27.009, window=1024, full_every=6),
        _shape("smollm2-135m", 30, 9, 3, 64, 0.1345),
    )
}
"""Published models by name."""


def model_shape(name: str) -> ModelShape:
    """A shape by name.

    Raises:
        ConfigError: no such shape; the message lists them.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise ConfigError(f"unknown shape {name!r}; use one of {', '.join(SHAPES)}")
    return shape


@dataclass(frozen=True)
class MemoryReport:
    """A cache in bytes.

    Attributes:
        context: tokens of each sequence.
        batch: sequences.
        by_kind: bytes by kind of buffer.
        elements: numbers an unquantized cache holds, of a layer with a sliding window those of the window.
    """

    context: int
    batch: int
    by_kind: Mapping[str, float]
    elements: int

    @property
    def total(self) -> float:
        """Bytes of the packed cache, everything counted."""
        return sum(self.by_kind.values())

    @property
    def fp16(self) -> int:
        """Bytes of an unquantized cache in 16 bits."""
        return 2 * self.elements

    @property
    def bits_per_element(self) -> float:
        """Everything stored, in bits, over the numbers it stands for."""
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
        }


def artifact_report(
    artifact: KVArtifact,
    context: int,
    batch: int = 1,
    outliers_per_token: Mapping[Kind, Sequence[float]] | None = None,
) -> MemoryReport:
    """The cache of an artifact; outliers as measured at calibration, or as given (per kind and layer)."""
    sizes = artifact.storage(context, batch, outliers_per_token=outliers_per_token)
    return MemoryReport(context, batch, sizes, artifact.elements(context, batch))


def _expected_outliers(spec: QuantSpec, channels: int) -> float:
    """Outliers of a token: exact for token thresholds, the stated share for channel thresholds."""
    if spec.granularity == "token":
        return float(min(2 * spec.outliers.per_side(channels), spec.outliers.cap("token", channels)))
    return min(spec.outliers.fraction * channels, float(spec.outliers.cap("channel", channels)))


def _parameter_bytes(spec: QuantSpec, geometry: LayerGeometry) -> int:
    """What the artifact holds for one layer's keys or values, all channels of one width with one codebook.

    Rotary pairs are taken to cover the head, which decides the number of phases.
    """
    channels = geometry.channels
    # Widths and codebook indices are bytes; where all are the same, one of each is held.
    size = 2 * channels if spec.variable_bits else 2
    size += (2 if spec.variable_bits else 4) * spec.level_count(spec.bits)
    if spec.static_channels:
        size += 2 * (2 if spec.variable_bits else 4) * channels
    if spec.phase:
        size += 2 * (channels // 2)
    if spec.rotation:
        size += 4 * channels * geometry.head_dim
    if spec.feedback:
        size += geometry.num_kv_heads * (spec.feedback_entries(geometry.head_dim) + 4)
    if spec.sweeps or spec.feedback_rank:
        size += 2 * channels
    if spec.importance:
        size += geometry.num_kv_heads * (2 * SIZE_CLASSES + 4)
    return size


def shape_report(shape: ModelShape, spec: KVCacheSpec, context: int, batch: int = 1) -> MemoryReport:
    """What a recipe would need for a model, no artifact at hand.

    Channels take the nominal width (with variable widths the true average is below it), outliers their nominal
    share. Static thresholds are fitted to other text, so what an artifact measures may differ a little.
    """
    total: dict[str, float] = {}
    resolved = spec.resolved(len(shape.layers))
    for layer, geometry in zip(resolved, shape.layers, strict=True):
        window = geometry.sliding_window
        first, stop = packed_tokens(context, spec.recent_tokens, window)
        for kind in KINDS:
            quant = layer.of(kind)
            layout = PageLayout(
                widths=(quant.bits,) * geometry.channels,
                heads=geometry.num_kv_heads,
                head_dim=geometry.head_dim,
                token_params=quant.granularity == "token",
                outlier_cap=quant.outliers.cap(quant.granularity, geometry.channels),
            )
            sizes = storage_bytes(
                layout,
                context=context,
                batch=batch,
                sink_tokens=spec.sink_tokens,
                recent_tokens=spec.recent_tokens,
                sliding_window=window,
                outliers=_expected_outliers(quant, geometry.channels) * (stop - first) * batch,
            )
            sizes["parameters"] = _parameter_bytes(quant, geometry)
            for name, size in sizes.items():
                total[name] = total.get(name, 0.0) + size
    total.update(shared_bytes(context, batch, spec.sink_tokens, spec.recent_tokens))
    return MemoryReport(context, batch, total, cache_elements(shape.layers, context, batch))


def stages(shape: ModelShape, gpus: int) -> tuple[int, list[ModelShape]]:
    """How engines divide a model over GPUs: heads over as many as they can, layers over the rest.

    Args:
        shape: of the whole model.
        gpus: to divide it over.

    Returns:
        GPUs that share each layer (tensor parallel: the largest divisor of ``gpus`` that divides the query heads
        and the key-value heads of every layer), and what one GPU holds in each stage of the pipeline: runs of
        layers as even as possible, the longer ones first.

    Raises:
        ConfigError: there are more stages than layers.
    """
    counts = {n for layer in shape.layers for n in (layer.num_kv_heads, layer.num_query_heads)}
    tensor = max(n for n in range(1, gpus + 1) if gpus % n == 0 and not any(count % n for count in counts))
    depth = gpus // tensor
    if depth > len(shape.layers):
        raise ConfigError(
            f"{gpus} GPUs cannot divide {len(shape.layers)} layers whose heads go to {tensor} GPUs at most; use fewer"
        )
    split = [
        layer.model_copy(
            update={
                "num_kv_heads": layer.num_kv_heads // tensor,
                "num_query_heads": layer.num_query_heads // tensor,
            }
        )
        for layer in shape.layers
    ]
    size, longer = divmod(len(split), depth)
    ends = [number * size + min(number, longer) for number in range(depth + 1)]
    parts = [
        ModelShape(shape.name, tuple(split[first:stop]), shape.parameters / gpus)
        for first, stop in pairwise(ends)
    ]
    return tensor, parts


def per_gpu_report(
    shape: ModelShape, spec: KVCacheSpec, context: int, batch: int = 1, gpus: int = 1
) -> MemoryReport:
    """The cache on the GPU that holds most of it; see :func:`stages` and :func:`shape_report`.

    Overrides of single layers count as in the whole model.
    """
    _, parts = stages(shape, gpus)
    resolved = iter(spec.resolved(len(shape.layers)))
    reports = []
    for part in parts:
        own = {number: next(resolved) for number in range(len(part.layers))}
        reports.append(shape_report(part, spec.model_copy(update={"layers": own}), context, batch))
    return max(reports, key=lambda report: report.total)


def longest_context(shape: ModelShape, spec: KVCacheSpec, gpus: int = 1, gpu_bytes: int = 80 * GIB) -> int:
    """Most tokens, in whole pages, of one sequence that fit beside the 16-bit weights; 0 if none do.

    With several GPUs the one that holds most of the cache decides, weights divided evenly. Activations and work
    space are left out, as in the paper's table.
    """
    room = gpu_bytes - shape.weight_bytes / gpus

    def fits(pages: int) -> bool:
        return per_gpu_report(shape, spec, pages * PAGE_TOKENS, gpus=gpus).total <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * PAGE_TOKENS


#: KVQuant (arXiv 2401.18079): GB of the cache of LLaMA-7B, by recipe and tokens of context.
PAPER_GB: dict[str, dict[int, float]] = {
    "fp16": {131_072: 64.0},
    "nuq4-1p": {131_072: 17.3},
    "nuq3-1p": {131_072: 13.3},
    "nuq2-1p": {131_072: 9.3},
    "nuq2": {1_048_576: 64.0, 10_000_000: 611.5},
}


def paper_comparison(
    specs: Mapping[str, KVCacheSpec], contexts: Sequence[int] = (131_072, 1_048_576, 10_000_000)
) -> list[dict[str, object]]:
    """LLaMA-7B beside the paper: one row per recipe and context.

    Args:
        specs: recipes by name; the names of :data:`PAPER_GB` find the paper's figures.
        contexts: tokens.

    Returns:
        Rows with ``recipe``, ``context``, ``gb``, ``paper_gb`` (``None`` where it gives none),
        ``bits_per_element``, ``gb_with_weights``, and whether that fits on 1 and on 8 GPUs of 80 GB
        (``fits_1_gpu``, ``fits_8_gpus``). The first rows are the unquantized cache.
    """
    shape = SHAPES["llama-7b"]
    rows = []
    for name in ("fp16", *specs):
        for context in contexts:
            if name == "fp16":
                size, bits = 2.0 * sum(2 * layer.channels for layer in shape.layers) * context, 16.0
            else:
                report = shape_report(shape, specs[name], context)
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
