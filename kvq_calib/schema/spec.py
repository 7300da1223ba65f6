"""What is quantized, and how: the declarative half of every artifact.

The types here are frozen and strict: an illegal combination cannot be constructed and an unknown key is an error. A
:class:`QuantSpec` names a *codec*, the way numbers become bits; each codec has a class of its own with the settings
that mean something to it. What a codec stores for a spec is the codec's affair (:mod:`kvq_calib.codec`).

Vocabulary (KVQuant, arXiv 2401.18079): *channel* is one coordinate of one key-value head, numbered
``head * head_dim + coordinate`` over the channels of a layer; *thresholds* are the ends of what is coded, as a
scale and a zero point; *levels* are the values that codes stand for, in the normalised range ``[-1, 1]``.
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

#: Where scale and zero point come from. ``channel``: of each channel, from calibration. ``token``: of each token, over
#: all channels of the layer. ``token_normalized``: of each token, after a normalisation of each channel from
#: calibration. ``channel_online``: of each channel, from the text itself; for evaluation only, since a stream has no
#: such statistics.
Thresholds = Literal["channel", "token", "token_normalized", "channel_online"]
#: How a table of levels is chosen.
Levels = Literal["uniform", "normal_float", "kmeans"]
StorageDtype = Literal["float16", "bfloat16"]

#: Widest code of any codec.
MAX_BITS = 8


class OutlierSpec(Frozen):
    """Which elements keep an exact residual: dense-and-sparse storage (KVQuant section 3.4).

    An element is an outlier when ``|x - zero_point| > scale``; of one token's outliers at most the
    ``max_per_token`` largest in ``|x - zero_point| / scale`` are kept (ties: the lower channel), the others are
    clamped.

    Attributes:
        fraction: share of elements meant to be outliers. Thresholds are the ``fraction / 2`` and ``1 - fraction / 2``
            quantiles of a channel, or of a token.
        max_per_token: most outliers of a token in a layer; ``None`` derives it from the geometry (:meth:`cap`).
    """

    fraction: Annotated[float, Field(ge=0.0, le=0.05)] = 0.0
    max_per_token: Annotated[int, Field(ge=1)] | None = None

    def per_side(self, channels: int) -> int:
        """Elements trimmed from each end of a token of ``channels`` elements (thresholds per token)."""
        if self.fraction == 0.0:
            return 0
        return max(1, round(self.fraction * channels / 2))

    def cap(self, per_token: bool, channels: int) -> int:
        """Most outliers one token may keep.

        Thresholds per token trim exactly ``2 * per_side`` elements. Thresholds per channel select a number that varies
        from token to token, so the derived cap leaves room: a quarter of the channels. (Tokens with many outliers
        are few, and matter: a cap of four times the mean costs an eighth of the KL divergence at 4 bits.)

        Args:
            per_token: whether thresholds are a token's own.
            channels: of the layer.
        """
        if self.fraction == 0.0:
            return 0
        derived = 2 * self.per_side(channels) if per_token else max(1, channels // 4)
        return min(channels, derived if self.max_per_token is None else self.max_per_token)


class QuantSpec(Frozen):
    """How the keys or the values of one layer are quantized: what all codecs have in common.

    Attributes:
        codec: name of the codec.
        pre_rope: keys only: whether they are quantized before the rotary embedding.
    """

    codec: str
    pre_rope: bool = True

    @property
    def max_width(self) -> int:
        """Bits of the widest code."""
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
        bits: bits of every code.
        levels: how the table of levels is chosen.
        thresholds: where scale and zero point come from: each ``channel`` at calibration; each ``token``, over all
            channels of the layer; ``token_normalized`` is the second after the first; ``channel_online`` takes each
            channel from the text itself, for evaluation only.
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
        """Bits of every code."""
        return self.bits

    @property
    def per_token(self) -> bool:
        """Whether a scale and a zero point of each token are stored."""
        return self.thresholds in ("token", "token_normalized")

    @property
    def calibrated_thresholds(self) -> bool:
        """Whether a scale and a zero point of each channel are stored."""
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
        rank: what is stored of the matrix: 0 is every entry, another number a factor of so many columns.
        refinement_passes: how often all coordinates of a head are coded again, each given the errors of the others.
    """

    rank: Annotated[int, Field(ge=0, le=MAX_HEAD_DIM)] = 0
    refinement_passes: Annotated[int, Field(ge=0, le=8)] = 0

    def entries(self, head_dim: int) -> int:
        """Numbers that are stored for a head, but for its scale and weights."""
        return head_dim * self.rank if self.rank else head_dim * (head_dim - 1) // 2

    @property
    def needs_error_weight(self) -> bool:
        """Whether the weight of each coordinate's error is stored too."""
        return self.refinement_passes > 0 or self.rank > 0


class TrellisSpec(QuantSpec):
    """A width for each channel, computed levels, and the path of least error through a block of tokens.

    Attributes:
        max_bits: bits of the widest channel. The widths themselves are found by calibration.
        states: states of the trellis. 1 is no trellis: a code means the nearest level.
        pair_rotation: keys only: whether each RoPE pair is turned by an angle of its own before quantization.
        error_compensation: how errors of a head's coordinates are compensated; ``None`` is not at all.
        token_weighting: whether a path weighs the error of each token by what tokens of its size cost.
        noise_shaping: whether a token takes up a share of the error of the token before it.
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
        """Bits of the widest channel."""
        return self.max_bits

    def level_count(self, bits: int) -> int:
        """Levels of a channel of width ``bits``: with more than one state two for each code."""
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


#: Spec classes by the name of their codec.
_SPECS: dict[str, type[QuantSpec]] = {"scalar": ScalarSpec, "trellis": TrellisSpec}


def register_spec(spec: type[QuantSpec]) -> type[QuantSpec]:
    """Make the spec of a further codec known; a decorator. Its ``codec`` must have a default, the codec's name."""
    _SPECS[spec.model_fields["codec"].default] = spec
    return spec


def _of_codec(value: Any) -> Any:
    """The spec that ``value`` describes, of the class of its codec; of ``scalar`` where it names none."""
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
        """The spec of ``kind``."""
        return self.key if kind == "key" else self.value


class KVCacheSpec(Frozen):
    """How the keys and values of all layers are quantized.

    Attributes:
        key: how keys are quantized.
        value: how values are quantized.
        layers: layers that differ, by number; negative numbers count from the end, as in Python.
        sink_tokens: how many first tokens of a sequence stay exact (KVQuant section 3.6, attention sink).
        recent_tokens: how many newest tokens stay exact.
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
        """All that layers may have: of keys and of values, overrides included."""
        layers = [LayerSpec(key=self.key, value=self.value), *self.layers.values()]
        return [layer.of(kind) for layer in layers for kind in KINDS]
