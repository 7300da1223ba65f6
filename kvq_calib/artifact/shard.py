"""Shards of an artifact, for runtimes that divide key-value heads over ranks (tensor parallelism).

Rank ``r`` of ``n`` holds the heads ``r H / n`` to ``(r + 1) H / n - 1`` of every layer. With more ranks than heads, ``n
/ H`` ranks hold the same head, as inference engines do. With thresholds per channel, a shard gives the same bits for
its heads as the whole artifact. With thresholds per token, a rank sees only its heads, so the numbers differ, but are
never coarser. The same holds for the cap on the outliers of a token.
"""

from __future__ import annotations

from dataclasses import replace

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.params import LayerParams
from kvq_calib.errors import ConfigError
from kvq_calib.schema.geometry import KINDS, LayerGeometry

__all__ = ["shard"]


def shard(artifact: KVArtifact, rank: int, ranks: int) -> KVArtifact:
    """The shard of one rank.

    Args:
        artifact: the artifact of the whole model.
        rank: 0 to ``ranks - 1``.
        ranks: number of ranks that divide the heads.

    Raises:
        ConfigError: the heads of a layer cannot be divided evenly, or there is no such rank.
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
        # Outliers are counted per layer at calibration, so every head is assumed to have the same number.
        outliers_per_token={
            kind: [rate * share for rate, share in zip(rates, shares, strict=True)]
            for kind, rates in artifact.outliers_per_token.items()
        },
    )


def _heads(number: int, geometry: LayerGeometry, rank: int, ranks: int) -> tuple[int, int]:
    """The first head of a rank, and its number of heads."""
    heads, queries = geometry.num_kv_heads, geometry.num_query_heads
    if queries % ranks or (heads % ranks and ranks % heads):
        raise ConfigError(
            f"layer {number} has {queries} query heads and {heads} key-value heads, which {ranks} ranks cannot "
            "divide evenly; use another number of ranks"
        )
    return rank * heads // ranks, max(1, heads // ranks)
