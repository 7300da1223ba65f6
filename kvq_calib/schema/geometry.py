"""Shapes of a model's attention layers, and its rotary embeddings as numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kvq_calib.schema.frozen import Frozen

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")

#: Largest head dimension an outlier index can address (see ``codec/packing.py``).
MAX_HEAD_DIM = 2048


class RopeSpec(Frozen):
    """A rotary embedding as plain numbers, so that no model code is needed.

    Pair ``p`` of a head, ``(x0, x1) = (x[pairs[p][0]], x[pairs[p][1]])``, at ``position`` becomes
    ``scaling * (cos a * x0 - sin a * x1, sin a * x0 + cos a * x1)`` with ``a = position * inv_freq[p]``.
    Channels in no pair are not rotated (partial rotary) and are not scaled.

    Attributes:
        pairs: channel numbers within a head, ``[P][2]``.
        inv_freq: radians per token, ``[P]``.
        attention_scaling: the factor on cos and sin (YaRN, LongRoPE), usually 1.
        length_dependent: whether the model changes ``inv_freq`` with the length of the text (dynamic NTK, LongRoPE).
            The numbers here are those for the length at calibration.
    """

    pairs: tuple[tuple[int, int], ...]
    inv_freq: tuple[float, ...]
    attention_scaling: Annotated[float, Field(gt=0)] = 1.0
    length_dependent: bool = False

    @model_validator(mode="after")
    def _check(self) -> RopeSpec:
        if len(self.pairs) != len(self.inv_freq):
            raise ValueError("a RopeSpec needs one inv_freq for each pair")
        channels = [channel for pair in self.pairs for channel in pair]
        if len(set(channels)) != len(channels) or any(channel < 0 for channel in channels):
            raise ValueError("RoPE pairs must name distinct channels")
        return self


def channel_pairs(rope: RopeSpec | None, head_dim: int) -> list[tuple[int, int]]:
    """The channels of a head in pairs: RoPE pairs first, then the others in order. An odd last channel is left out."""
    pairs = [] if rope is None else list(rope.pairs)
    rotated = {channel for pair in pairs for channel in pair}
    rest = [channel for channel in range(head_dim) if channel not in rotated]
    return pairs + list(zip(rest[::2], rest[1::2], strict=False))


class HeadShape(NamedTuple):
    """Shape of one token of a layer's keys, or of its values.

    Attributes:
        heads: key-value heads ``H``.
        head_dim: coordinates ``D`` of a head.
    """

    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        """``C = heads * head_dim``."""
        return self.heads * self.head_dim


class LayerGeometry(Frozen):
    """Shapes of one attention layer.

    Attributes:
        num_query_heads, num_kv_heads, head_dim: as in transformers. The number of query heads is a multiple of the
            number of key-value heads.
        value_head_dim: head dimension of values where it differs from that of keys, else ``None``.
        sliding_window: tokens a query can see, or ``None`` for all.
        rope: index into :attr:`KVGeometry.ropes`, or ``None`` for a layer without rotary embedding.
        swapped: whether the first of the two tensors that the model caches is called values here, and the second keys.
            With multi-head latent attention the first is the latent and the second the rotated part.
    """

    num_query_heads: Annotated[int, Field(ge=1)]
    num_kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
    value_head_dim: Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)] | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    rope: Annotated[int, Field(ge=0)] | None = None
    swapped: bool = False

    @model_serializer(mode="wrap")
    def _without_swapped(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``swapped`` out of the file where it is false, as for nearly all models."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "swapped" or value}

    @model_validator(mode="after")
    def _check(self) -> LayerGeometry:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_query_heads} query heads are not a multiple of {self.num_kv_heads} key-value heads"
            )
        return self

    def shape(self, kind: Kind) -> HeadShape:
        """Shape of one token of the keys, or of the values."""
        own = self.value_head_dim if kind == "value" else None
        return HeadShape(self.num_kv_heads, own or self.head_dim)

    def held_tokens(self, context: int) -> int:
        """Tokens that an unquantized cache holds after ``context`` tokens: those a query can see."""
        return min(context, self.sliding_window or context)


def cache_elements(layers: Iterable[LayerGeometry], context: int, batch: int = 1) -> int:
    """Numbers in an unquantized cache for ``batch`` texts of ``context`` tokens: keys and values of all layers."""
    return batch * sum(
        layer.shape(kind).channels * layer.held_tokens(context) for layer in layers for kind in KINDS
    )


class KVGeometry(Frozen):
    """Shapes of all layers that cache keys and values, and their rotary embeddings.

    Attributes:
        layers: in the order of the model.
        ropes: the rotary embeddings; :attr:`LayerGeometry.rope` is an index into them.
        attends_to: for each layer of the model, the index in ``layers`` of the keys and values it attends to; ``None``
            for a layer without any (linear attention, convolution). If several layers attend to the same keys and
            values, the first of them caches them. Empty where layer ``i`` of the model is ``layers[i]``.
        state_bytes: bytes that layers keep for a sequence beside keys and values, at any length of the sequence, in the
            dtypes of the calibrated model.
        state_bytes_per_token: further bytes that they keep for each token (the keys of an indexer).
    """

    layers: tuple[LayerGeometry, ...] = Field(min_length=1)
    ropes: tuple[RopeSpec, ...] = ()
    attends_to: tuple[Annotated[int, Field(ge=0)] | None, ...] = ()
    state_bytes: Annotated[int, Field(ge=0)] = 0
    state_bytes_per_token: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> KVGeometry:
        for index, layer in enumerate(self.layers):
            if layer.rope is None:
                continue
            if layer.rope >= len(self.ropes):
                raise ValueError(
                    f"layer {index} names rotary embedding {layer.rope}, there are {len(self.ropes)}"
                )
            if any(channel >= layer.head_dim for pair in self.ropes[layer.rope].pairs for channel in pair):
                raise ValueError(f"layer {index}: a RoPE pair lies outside the head of {layer.head_dim}")
        if self.attends_to and list(dict.fromkeys(i for i in self.attends_to if i is not None)) != list(
            range(len(self.layers))
        ):
            raise ValueError("attends_to must name every layer, each first where the model comes to it")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave fields with their default out of the file."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name in ("layers", "ropes") or value}

    def held_state(self, context: int) -> int:
        """Bytes that layers keep beside keys and values for a text of ``context`` tokens."""
        return self.state_bytes + context * self.state_bytes_per_token

    @property
    def model_layers(self) -> int:
        """Number of layers of the model, including those that cache no keys and values."""
        return len(self.attends_to) or len(self.layers)

    def index_of(self, number: int) -> int | None:
        """Index in ``layers`` of the keys and values that layer ``number`` of the model attends to."""
        return self.attends_to[number] if self.attends_to else number

    def is_shared(self, index: int) -> bool:
        """Whether more than one layer of the model attends to ``layers[index]``."""
        return self.attends_to.count(index) > 1

    @property
    def last_number(self) -> int:
        """Number of the last layer of the model that attends to keys and values."""
        return max(
            (n for n, index in enumerate(self.attends_to) if index is not None), default=len(self.layers) - 1
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """For each of ``layers``, its number in the model."""
        if not self.attends_to:
            return tuple(range(len(self.layers)))
        return tuple(self.attends_to.index(index) for index in range(len(self.layers)))

    def rope_of(self, layer: int) -> RopeSpec | None:
        """The rotary embedding of ``layer``."""
        index = self.layers[layer].rope
        return None if index is None else self.ropes[index]
