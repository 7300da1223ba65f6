"""What is quantized, and how: the declarative half of every artifact.

The types here are frozen and strict: an illegal combination cannot be constructed, and an unknown key is an error. A
:class:`QuantSpec` names a *codec*, the way numbers become bits. Each codec has a subclass with its settings. The codec
decides which tensors it stores for a spec (:mod:`kvq_calib.codec`).

Vocabulary (KVQuant, arXiv 2401.18079): a *channel* is one coordinate of one key-value head, numbered
``head * head_dim + coordinate`` within a layer. *Thresholds* are the ends of the quantized range, stored as a scale
and a zero point. *Levels* are the values that codes stand for, in the normalised range ``[-1, 1]``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from kvq_calib.schema.frozen import Frozen
from kvq_calib.schema.geometry import KINDS, MAX_HEAD_DIM, Kind

__all__ = [
    "KINDS",
    "MAX_BITS",
    "ErrorCompensationSpec",
    "KVCacheSpec",
    "Kind",
    "LayerSpec",
    "Levels",
    "OutlierSpec",
    "QuantSpec",
    "ScalarSpec",
    "StorageDtype",
    "Thresholds",
    "TrellisSpec",
    "register_spec",
]

#: Where scale and zero point come from. ``channel``: per channel, from calibration. ``token``: per token, over all
#: channels of the layer. ``token_normalized``: per token, after each channel is normalised by its thresholds from
#: calibration. ``channel_online``: per channel, from the text itself; for evaluation only, since a stream has no such
#: statistics.
Thresholds = Literal["channel", "token", "token_normalized", "channel_online"]
#: How a table of levels is chosen.
Levels = Literal["uniform", "normal_float", "kmeans"]
StorageDtype = Literal["float16", "bfloat16"]

#: Widest code of any codec.
MAX_BITS = 8


class OutlierSpec(Frozen):
    """Which elements keep an exact residual: dense-and-sparse storage (KVQuant section 3.4).

    An element is an outlier when ``|x - zero_point| > scale``. At most ``max_per_token`` outliers of a token are kept,
    those with the largest ``|x - zero_point| / scale`` (ties: the lower channel). The others are clamped.

    Attributes:
        fraction: share of elements meant to be outliers. Thresholds are the ``fraction / 2`` and ``1 - fraction / 2``
            quantiles of a channel, or of a token.
        max_per_token: largest number of outliers kept for a token in a layer; ``None`` derives it from the geometry
            (:meth:`cap`).
    """

    fraction: Annotated[float, Field(ge=0.0, le=0.05)] = 0.0
    max_per_token: Annotated[int, Field(ge=1)] | None = None

    def per_side(self, channels: int) -> int:
        """Elements trimmed at each end of a token of ``channels`` elements, for thresholds per token."""
        if self.fraction == 0.0:
            return 0
        return max(1, round(self.fraction * channels / 2))

    def cap(self, per_token: bool, channels: int) -> int:
        """Largest number of outliers that are kept for one token.

        Thresholds per token trim exactly ``2 * per_side`` elements. With thresholds per channel the number varies from
        token to token, so the derived cap leaves room: a quarter of the channels. Tokens with many outliers are rare
        but matter: with a cap of four times the mean, the KL divergence at 4 bits is an eighth higher.

        Args:
            per_token: whether the thresholds are per token.
            channels: number of channels of the layer.
        """
        if self.fraction == 0.0:
            return 0
        derived = 2 * self.per_side(channels) if per_token else max(1, channels // 4)
        return min(channels, derived if self.max_per_token is None else self.max_per_token)


class QuantSpec(Frozen):
    """How the keys or the values of one layer are quantized: the settings that all codecs have.

    Attributes:
        codec: name of the codec.
        pre_rope: whether keys are quantized before the rotary embedding; for keys only.
    """

    codec: str
    pre_rope: bool = True

    @property
    def max_width(self) -> int:
        """Width of the widest code, in bits."""
        raise NotImplementedError

    @property
    def width_words(self) -> str:
        """The widths, for people."""
        raise NotImplementedError

    def features(self) -> list[str]:
        """What it has beyond uniform levels with one scale for all, in a few words each, for people."""
        raise NotImplementedError


class ScalarSpec(QuantSpec):
    """One table of levels for the keys or the values of a layer: KVQuant and its baselines.

    Attributes:
        bits: width of every code, in bits.
        levels: how the table of levels is chosen.
        thresholds: where scale and zero point come from; see :data:`Thresholds`.
        outliers: which elements stay exact.
        q_norm: whether levels are corrected for the shift of mean and standard deviation (KVQuant section 3.5).
    """

    codec: Literal["scalar"] = "scalar"
    bits: Annotated[int, Field(ge=1, le=MAX_BITS)]
    levels: Levels = "kmeans"
    thresholds: Thresholds = "channel"
    outliers: OutlierSpec = OutlierSpec()
    q_norm: bool = False

    @property
    def max_width(self) -> int:
        """Width of every code, in bits."""
        return self.bits

    @property
    def per_token(self) -> bool:
        """Whether a scale and a zero point are stored for each token."""
        return self.thresholds in ("token", "token_normalized")

    @property
    def calibrated_thresholds(self) -> bool:
        """Whether the artifact has a scale and a zero point for each channel."""
        return self.thresholds in ("channel", "token_normalized")

    @property
    def width_words(self) -> str:
        """The widths, for people."""
        return f"{self.bits} bits per element"

    def features(self) -> list[str]:
        """What it has beyond uniform levels with one scale for all, in a few words each, for people."""
        where = {
            "channel": "thresholds for each channel",
            "token": "thresholds for each token",
            "token_normalized": "thresholds for each token after those for each channel",
            "channel_online": "thresholds for each channel from the text itself",
        }
        words = [] if self.levels == "uniform" else [f"{self.levels} levels"]
        words.append(where[self.thresholds])
        if self.q_norm:
            words.append("Q-Norm")
        if self.outliers.fraction:
            words.append(f"{self.outliers.fraction:.1%} exact outliers")
        return words


class ErrorCompensationSpec(Frozen):
    """How later coordinates of a head make up for the rounding errors of earlier ones.

    Attributes:
        rank: how the compensation matrix is stored: 0 stores every entry, another number a factor with this many
            columns.
        refinement_passes: how often all coordinates of a head are coded again, each with the errors of the others
            known.
    """

    rank: Annotated[int, Field(ge=0, le=MAX_HEAD_DIM)] = 0
    refinement_passes: Annotated[int, Field(ge=0, le=8)] = 0

    def entries(self, head_dim: int) -> int:
        """Numbers stored for a head, without its scale and weights."""
        return head_dim * self.rank if self.rank else head_dim * (head_dim - 1) // 2

    @property
    def needs_error_weight(self) -> bool:
        """Whether the weight of each coordinate's error is stored too."""
        return self.refinement_passes > 0 or self.rank > 0


class TrellisSpec(QuantSpec):
    """A width for each channel, computed levels, and the path of least error through a block of tokens.

    Attributes:
        max_bits: width of the widest channel, in bits. Calibration finds the width of each channel.
        states: number of states of the trellis. With 1 there is no trellis: a code is the nearest level.
        pair_rotation: whether each RoPE pair is rotated by a calibrated angle before quantization; for keys only.
        error_compensation: error compensation between the coordinates of a head; ``None`` for none.
        token_weighting: whether the error of each token is weighted by what errors of tokens of its size cost.
        noise_shaping: whether each token adds a share of the rounding error of the token before it.
    """

    codec: Literal["trellis"] = "trellis"
    pre_rope: Literal[True] = True
    max_bits: Annotated[int, Field(ge=1, le=MAX_BITS - 1)]
    states: Literal[1, 4] = 4
    pair_rotation: bool = False
    error_compensation: ErrorCompensationSpec | None = None
    token_weighting: bool = False
    noise_shaping: bool = False

    @field_validator("pre_rope", mode="before")
    @classmethod
    def _check_pre_rope(cls, value: Any) -> Any:
        if value is not True:
            raise ValueError(
                "the trellis codec quantizes keys before the rotary embedding only: true, or leave it out"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> TrellisSpec:
        if self.token_weighting and self.states == 1:
            raise ValueError("token_weighting weighs the tokens of a path: it needs states: 4")
        if self.noise_shaping and self.states == 1:
            raise ValueError("noise_shaping follows the errors along a path: it needs states: 4")
        if self.noise_shaping and self.error_compensation is not None:
            raise ValueError("noise_shaping and error_compensation exclude each other: leave one out")
        return self

    @property
    def max_width(self) -> int:
        """Width of the widest channel, in bits."""
        return self.max_bits

    def level_count(self, bits: int) -> int:
        """Number of levels of a channel of width ``bits``. With more than one state there are two for each code."""
        return 1 << (bits + (self.states > 1) if bits else 0)

    @property
    def width_words(self) -> str:
        """The widths, for people."""
        return f"up to {self.max_bits} bits per element"

    def features(self) -> list[str]:
        """What it has beyond uniform levels with one scale for all, in a few words each, for people."""
        words = ["a width for each channel", "computed levels for each channel"]
        if self.states > 1:
            words.append("trellis codes")
        if self.pair_rotation:
            words.append("turned RoPE pairs")
        if self.error_compensation is not None:
            words.append("error compensation")
        if self.token_weighting:
            words.append("token weighting")
        if self.noise_shaping:
            words.append("noise shaping")
        return words


#: Spec classes by the name of the codec.
_SPECS: dict[str, type[QuantSpec]] = {"scalar": ScalarSpec, "trellis": TrellisSpec}


def register_spec(spec: type[QuantSpec]) -> type[QuantSpec]:
    """Register the spec class of a codec; a decorator. The default of its field ``codec`` must be the codec's name."""
    _SPECS[spec.model_fields["codec"].default] = spec
    return spec


def _of_codec(value: Any) -> Any:
    """Build the spec that ``value`` describes, of its codec's class. Without a codec's name it is ``scalar``."""
    if not isinstance(value, dict):
        return value
    name = value.get("codec", "scalar")
    spec = _SPECS.get(name) if isinstance(name, str) else None
    if spec is None:
        raise ValueError(f"unknown codec {name!r}; use one of {', '.join(sorted(_SPECS))}")
    return spec.model_validate(value)


AnySpec = Annotated[SerializeAsAny[QuantSpec], BeforeValidator(_of_codec)]


class LayerSpec(Frozen):
    """Keys and values of one layer."""

    key: AnySpec
    value: AnySpec

    @model_validator(mode="after")
    def _check(self) -> LayerSpec:
        if isinstance(self.value, TrellisSpec) and self.value.pair_rotation:
            raise ValueError("value.pair_rotation: values have no RoPE pairs; it is for keys")
        return self

    def of(self, kind: Kind) -> QuantSpec:
        """The spec of the keys or of the values."""
        return self.key if kind == "key" else self.value


class KVCacheSpec(Frozen):
    """How the keys and values of all layers are quantized.

    Attributes:
        key: how keys are quantized.
        value: how values are quantized.
        layers: overrides for single layers, by number. Negative numbers count from the end, as in Python.
        sink_tokens: number of first tokens of a sequence that stay exact (attention sinks, KVQuant section 3.6).
        recent_tokens: number of newest tokens that stay exact.
        storage_dtype: dtype of exact tokens, outlier residuals and scales of tokens.
    """

    key: AnySpec
    value: AnySpec
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

    def specs(self) -> list[QuantSpec]:
        """All specs in use, of keys and of values, including the overrides of layers."""
        layers = [LayerSpec(key=self.key, value=self.value), *self.layers.values()]
        return [layer.of(kind) for layer in layers for kind in KINDS]
