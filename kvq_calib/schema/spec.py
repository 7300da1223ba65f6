"""What is quantized, and how: the declarative half of every artifact.

The types here are frozen and strict: an illegal combination cannot be constructed and an unknown key is an
error. The expected name, shape and dtype of every stored tensor is a pure function of them
(:func:`expected_tensors`), so a file can be checked before it is used.

Vocabulary (KVQuant, arXiv 2401.18079): *channel* is one coordinate of one key-value head, numbered
``head * head_dim + coordinate`` over the ``C = num_kv_heads * head_dim`` channels of a layer; *static* thresholds
come from calibration and *dynamic* ones from the data being quantized; a *codebook* is the sorted list of levels
in the normalised range ``[-1, 1]``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvq_calib.schema.frozen import Frozen
from kvq_calib.schema.geometry import MAX_HEAD_DIM, LayerGeometry, RopeSpec

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")

Granularity = Literal["channel", "token"]
Datatype = Literal["uniform", "normal_float", "kmeans", "learned"]
StorageDtype = Literal["float16", "bfloat16"]

MAX_BITS = 8
#: Most codebooks of one layer's keys or values that a ``codebook_index`` can name.
MAX_CODEBOOKS = 256
#: Classes of a token's size that importance tells apart (see ``quantizer.py``).
IMPORTANCE_CLASSES = 32


class OutlierSpec(Frozen):
    """Dense-and-sparse storage (KVQuant section 3.4): which elements keep an exact residual.

    An element is an outlier when ``|x - zero_point| > scale``; of one token's outliers at most the
    ``max_per_token`` largest in ``|x - zero_point| / scale`` are kept (ties: the lower channel), the others are
    clamped.

    Attributes:
        fraction: share of elements meant to be outliers, 0 to 0.05. Thresholds are the ``fraction / 2`` and
            ``1 - fraction / 2`` quantiles of a channel, or of a token.
        max_per_token: cap per token and layer; ``None`` derives it from the geometry (:meth:`cap`).
    """

    fraction: Annotated[float, Field(ge=0.0, le=0.05)] = 0.0
    max_per_token: Annotated[int, Field(ge=1)] | None = None

    def per_side(self, channels: int) -> int:
        """Elements trimmed from each end of a token of ``channels`` elements (dynamic token thresholds)."""
        if self.fraction == 0.0:
            return 0
        return max(1, round(self.fraction * channels / 2))

    def cap(self, granularity: Granularity, channels: int) -> int:
        """Most outliers one token may keep.

        Token thresholds trim exactly ``2 * per_side`` elements. Channel thresholds select a number that varies
        from token to token, so the derived cap leaves room: a quarter of the channels. (Tokens with many outliers
        are few, and matter: a cap of four times the mean costs an eighth of the divergence at 4 bits.)
        """
        if self.fraction == 0.0:
            return 0
        derived = 2 * self.per_side(channels) if granularity == "token" else max(1, channels // 4)
        return min(channels, derived if self.max_per_token is None else self.max_per_token)


class QuantSpec(Frozen):
    """How the keys or the values of one layer are quantized.

    Attributes:
        bits: nominal bits per element, 1 to 8. With ``variable_bits`` the widths of the single channels, 0 to 8,
            stand in the artifact and ``bits`` is the widest one allowed.
        variable_bits: channels have widths, and rows of the codebook, of their own.
        granularity: one scale and zero point per ``channel``, or per ``token`` (over all channels of the layer).
        dynamic: thresholds from the data being quantized rather than from calibration. Always true per token.
            Per channel it is an evaluation-only setting, since a stream has no such statistics in advance.
        channel_normalized: only per token: a static scale and zero point per channel is applied first.
        datatype: how the levels were chosen. It is a fact about the codebook, not a different code path.
        pre_rope: keys only: quantized before the rotary embedding.
        phase: keys only: each RoPE pair is turned by an angle of its own before quantization.
        rotation: values only: each head is multiplied by an orthogonal matrix of its own before quantization.
        feedback: the errors of a head's earlier coordinates are fed into its later ones before those are coded, so
            that they partly cancel where the model looks (:meth:`kvq_calib.codec.quantizer.Quantizer.with_feedback`).
        feedback_rank: of what is stored for that: a factor of so many columns, or with 0 every entry of the matrix.
        sweeps: times that the coordinates of a head are coded anew after that, each given the errors of all others.
        trellis: twice as many levels as codes; which half a code means depends on the codes before it in its block
            (:mod:`kvq_calib.codec.trellis`). Widths are then at most 7.
        importance: a path weighs the error of each of its tokens by what errors of tokens of this size cost
            (:meth:`kvq_calib.codec.quantizer.Quantizer.importance`).
        outliers: dense-and-sparse storage.
        q_norm: levels were corrected for the shift of mean and standard deviation (KVQuant section 3.5).
    """

    bits: Annotated[int, Field(ge=1, le=MAX_BITS)]
    variable_bits: bool = False
    granularity: Granularity = "channel"
    dynamic: bool = False
    channel_normalized: bool = False
    datatype: Datatype = "kmeans"
    pre_rope: bool = True
    phase: bool = False
    rotation: bool = False
    feedback: bool = False
    feedback_rank: Annotated[int, Field(ge=0, le=MAX_HEAD_DIM)] = 0
    sweeps: Annotated[int, Field(ge=0, le=8)] = 0
    trellis: bool = False
    importance: bool = False
    outliers: OutlierSpec = OutlierSpec()
    q_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> QuantSpec:
        if self.granularity == "token" and not self.dynamic:
            raise ValueError(
                "granularity 'token' needs dynamic: true (a token's scale is only known with the token)"
            )
        if self.granularity == "channel" and self.channel_normalized:
            raise ValueError("channel_normalized is only meaningful with granularity 'token'")
        if self.phase and self.rotation:
            raise ValueError("phase is for keys and rotation for values: one tensor cannot have both")
        if self.phase and not self.pre_rope:
            raise ValueError("phase needs pre_rope: true")
        for name in ("feedback", "trellis"):
            if getattr(self, name) and (
                self.granularity == "token" or self.dynamic or self.outliers.fraction > 0
            ):
                raise ValueError(f"{name} needs static thresholds per channel and no outliers")
        if self.sweeps and not self.feedback:
            raise ValueError("sweeps repeat what feedback does: they need feedback: true")
        if self.feedback_rank and not self.feedback:
            raise ValueError("feedback_rank says how feedback is stored: it needs feedback: true")
        if self.importance and not self.trellis:
            raise ValueError("importance weighs the tokens of a path: it needs trellis: true")
        if self.trellis and self.bits == MAX_BITS:
            raise ValueError(f"trellis doubles the levels: bits can be at most {MAX_BITS - 1}")
        return self

    def level_count(self, bits: int) -> int:
        """Levels of a channel of width ``bits``: a trellis has two for each code."""
        return 1 << (bits + self.trellis if bits else 0)

    def feedback_entries(self, head_dim: int) -> int:
        """Numbers that feedback stores for a head, but for its scale and weights."""
        return head_dim * self.feedback_rank if self.feedback_rank else head_dim * (head_dim - 1) // 2

    @property
    def static_channels(self) -> bool:
        """Whether a calibrated scale and zero point per channel is stored."""
        return (self.granularity == "channel" and not self.dynamic) or self.channel_normalized


class LayerSpec(Frozen):
    """Keys and values of one layer."""

    key: QuantSpec
    value: QuantSpec

    @model_validator(mode="after")
    def _check(self) -> LayerSpec:
        if self.key.rotation:
            raise ValueError("rotation is for values only")
        if self.value.phase:
            raise ValueError("phase is for keys only")
        return self

    def of(self, kind: Kind) -> QuantSpec:
        """The spec of ``kind``."""
        return self.key if kind == "key" else self.value


class KVCacheSpec(Frozen):
    """The whole cache.

    Attributes:
        key, value: what holds for every layer.
        layers: overrides by layer number; negative numbers count from the end, as in Python.
        sink_tokens: this many first tokens of a sequence stay exact (KVQuant section 3.6, attention sink).
        recent_tokens: this many newest tokens stay exact.
        storage_dtype: of exact tokens, outlier residuals and per-token scales.
    """

    key: QuantSpec
    value: QuantSpec
    layers: dict[int, LayerSpec] = Field(default_factory=dict)
    sink_tokens: Annotated[int, Field(ge=0, le=1024)] = 1
    recent_tokens: Annotated[int, Field(ge=0, le=65536)] = 0
    storage_dtype: StorageDtype = "float16"

    @model_validator(mode="after")
    def _check(self) -> KVCacheSpec:
        LayerSpec(key=self.key, value=self.value)
        return self

    def resolved(self, num_layers: int) -> tuple[LayerSpec, ...]:
        """One :class:`LayerSpec` per layer.

        Raises:
            ValueError: an override names a layer that does not exist, or one layer twice.
        """
        default = LayerSpec(key=self.key, value=self.value)
        layers = [default] * num_layers
        seen: set[int] = set()
        for number, layer in self.layers.items():
            if not -num_layers <= number < num_layers:
                raise ValueError(f"layer override {number}: the model has {num_layers} layers")
            index = number % num_layers
            if index in seen:
                raise ValueError(f"layer {index} is overridden twice")
            seen.add(index)
            layers[index] = layer
        return tuple(layers)


#: Shape (``None`` is "any, at least 1") and dtype names of one stored tensor, that of new artifacts first.
TensorShape = tuple[tuple[int | None, ...], tuple[str, ...]]


def expected_tensors(
    spec: QuantSpec, geometry: LayerGeometry, rope: RopeSpec | None
) -> dict[str, TensorShape]:
    """Names, shapes and dtypes of the tensors that describe one layer's keys or values.

    ``codebook`` is ``[1, 2 ** bits]`` (``2 ** (bits + 1)`` with a trellis), non-decreasing. With ``variable_bits`` it is
    ``[N]``: the non-decreasing rows ``0 .. G - 1`` one after the other, without padding. Row ``g`` holds the
    ``level_count(width)`` levels of the channels whose ``codebook_index`` is ``g``; they are there, and of one width.

    ``phase`` is float16, float32 where it was read from a file of a version before 3. With ``variable_bits`` ``scale`` and
    ``zero_point`` are float16; float32 from a version before 4, or where numbers are beyond float16.

    ``feedback`` holds the entries below the diagonal of one matrix ``[D, D]`` per head, row by row, in steps of the
    head's ``feedback_scale``. ``feedback_weight`` is what a rounding error of each coordinate costs beside those of the others of
    its head. With a ``feedback_rank`` both say what errors cost in the first place: ``feedback`` is a factor of their correlations
    ``[D, rank]``, row by row, and ``feedback_weight`` what the error of each coordinate costs by itself.

    ``importance`` is the weight of a token by the class of its size, ``importance_unit`` the size that classes are counted from.
    """
    channels = geometry.channels
    heads, size, float32 = geometry.num_kv_heads, geometry.head_dim, ("float32",)
    tensors: dict[str, TensorShape] = {"codebook": ((1, spec.level_count(spec.bits)), float32)}
    if spec.variable_bits:
        tensors["codebook"] = ((None,), ("float16",))
        tensors["bits"] = ((channels,), ("uint8",))
        tensors["codebook_index"] = ((channels,), ("uint8",))
    if spec.static_channels:
        of_channels = ("float16", "float32") if spec.variable_bits else float32
        tensors["scale"] = ((channels,), of_channels)
        tensors["zero_point"] = ((channels,), of_channels)
    if spec.phase and rope is not None:
        tensors["phase"] = ((heads, len(rope.pairs)), ("float16", "float32"))
    if spec.rotation:
        tensors["rotation"] = ((heads, size, size), float32)
    if spec.feedback:
        tensors["feedback"] = ((heads, spec.feedback_entries(size)), ("int8",))
        tensors["feedback_scale"] = ((heads,), float32)
    if spec.sweeps or spec.feedback_rank:
        tensors["feedback_weight"] = ((heads, size), ("float16",))
    if spec.importance:
        tensors["importance"] = ((heads, IMPORTANCE_CLASSES), ("float16",))
        tensors["importance_unit"] = ((heads,), float32)
    return tensors
