"""Parts of an artifact for runtimes that divide key-value heads over ranks (tensor parallelism).

Rank ``r`` of ``n`` holds the heads ``r H / n`` to ``(r + 1) H / n - 1`` of every layer, and with more ranks than heads
each head is held by ``n / H`` ranks, as the engines do. With thresholds per channel a shard gives bit for bit what
the whole gives for its heads. With thresholds per token a rank takes them from its own heads, since a token's other
heads are elsewhere: never coarser, but not the same numbers. So it is with the cap on a token's outliers.
"""

from __future__ import annotations

from dataclasses import replace

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.params import LayerParams
from kvq_calib.errors import ConfigError
from kvq_calib.schema.geometry import KINDS, LayerGeometry

__all__ = ["shard"]


def shard(artifact: KVArtifact, rank: int, ranks: int) -> KVArtifact:
    """One rank's part of an artifact.

    Args:
        artifact: of the whole model.
        rank: 0 to ``ranks - 1``.
        ranks: ranks that divide the heads.

    Raises:
        ConfigError: a layer's heads cannot be divided so, or there is no such rank.
    """
    if not 0 <= rank < ranks:
        raise ConfigError(f"there is no rank {rank} of {ranks}; ranks are counted from 0")
    if "shard" in artifact.calibration:
        raise ConfigError("the artifact is a shard already; divide the whole one")
    specs = artifact.spec.resolved(len(artifact.layers))
    shapes, layers, shares = [], [], []
    for number, (geometry, params) in enumerate(zip(artifact.geometry.layers, artifact.layers, strict=True)):
        first, count = _heads(number, geometry, rank, ranks)
        part = geometry.model_copy(
            update={"num_kv_heads": count, "num_query_heads": geometry.num_query_heads // ranks}
        )
        shapes.append(part)
        shares.append(count / geometry.num_kv_heads)
        own = {
            kind: params.of(kind).of_heads(specs[number].of(kind), geometry.shape(kind), first, count)
            for kind in KINDS
        }
        layers.append(LayerParams(own["key"], own["value"]))
    return replace(
        artifact,
        geometry=artifact.geometry.model_copy(update={"layers": tuple(shapes)}),
        layers=tuple(layers),
        calibration={**artifact.calibration, "shard": {"rank": rank, "ranks": ranks}},
        # Counted per layer at calibration, so heads are taken to have equal parts.
        outliers_per_token={
            kind: [rate * share for rate, share in zip(rates, shares, strict=True)]
            for kind, rates in artifact.outliers_per_token.items()
        },
    )


def _heads(number: int, geometry: LayerGeometry, rank: int, ranks: int) -> tuple[int, int]:
    """First head of a rank, and how many it has."""
    heads, queries = geometry.num_kv_heads, geometry.num_query_heads
    if queries % ranks or (heads % ranks and ranks % heads):
        raise ConfigError(
            f"layer {number} has {queries} query heads and {heads} key-value heads, which {ranks} ranks cannot "
            "divide evenly; use another number of ranks"
        )
    return rank * heads // ranks, max(1, heads // ranks)
