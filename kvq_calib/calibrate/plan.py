"""Typed keys of statistics, and the plan that lists what a calibration collects.

A recipe requests statistics by keys. A key is frozen and fully defines its statistics: which tensors of the model (a
:class:`View`), which windows of text, and how they are accumulated. Recipes with equal keys share the statistics, and
keys with equal views share the work of reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from kvq_calib.calibrate.self_generated import SelfGeneratedText
from kvq_calib.calibrate.statistics import Magnitude, Statistics
from kvq_calib.calibrate.texts import Source, Text, text_of, united
from kvq_calib.errors import CalibrationError
from kvq_calib.model.capture import LayerKV
from kvq_calib.schema.cached import CachedTensor, cached_tensors
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.spec import Kind

S = TypeVar("S", bound=Statistics)
X = TypeVar("X")


class Stage(Enum):
    """Passes over text, in order. A stage may depend on the statistics of earlier stages.

    The values are their names for the user.
    """

    THRESHOLDS = "thresholds"
    VOCABULARY = "vocabulary samples"
    CODEBOOKS = "codebooks"


class Captured:
    """The tensors of one layer in one window.

    Args:
        kv: keys and values of the layer.
        gradients: gradients of the loss with respect to the keys before RoPE and to the values, each ``[B, H, T, D]``;
            only in a backward pass.
    """

    def __init__(self, kv: LayerKV, gradients: tuple[Tensor, Tensor] | None = None) -> None:
        self.kv = kv
        self._gradients = gradients

    def values_of(self, kind: Kind, pre_rope: bool = True) -> Tensor:
        """Values, or keys before or after RoPE: ``[B, H, T, D]``."""
        if kind == "value":
            return self.kv.values
        return self.kv.keys if pre_rope else self.kv.rotated_keys

    def gradient_of(self, kind: Kind, pre_rope: bool = True) -> Tensor | None:
        """Gradient of the loss with respect to them, ``[B, H, T, D]``."""
        if self._gradients is None:
            return None
        keys, values = self._gradients
        if kind == "value":
            return values
        return keys if pre_rope else self._rotated_gradient

    @cached_property
    def _rotated_gradient(self) -> Tensor:
        assert self._gradients is not None
        return self.kv.rotation.rotate(self._gradients[0])


class Key(ABC, Generic[S]):
    """A request for statistics of type ``S``. Equal keys have the same statistics."""

    @abstractmethod
    def empty(self, geometry: KVGeometry) -> S:
        """Empty statistics."""


class Table:
    """Statistics by key."""

    def __init__(self) -> None:
        self._found: dict[Key[Any], Statistics] = {}

    def put(self, key: Key[S], statistics: S) -> None:
        """Set the statistics of a key."""
        self._found[key] = statistics

    def get(self, key: Key[S]) -> S:
        """The statistics of a key in the table."""
        return cast(S, self._found[key])

    def __contains__(self, key: Key[Any]) -> bool:
        return key in self._found

    def items(self) -> Iterator[tuple[Key[Any], Statistics]]:
        """Keys and statistics, in the order in which they were set."""
        return iter(self._found.items())


@dataclass(frozen=True)
class View(ABC, Generic[X]):
    """The part of the model that statistics use; they get an ``X`` for each window.

    Attributes:
        tensor: the keys or values of one layer.
        text: the windows.
    """

    tensor: CachedTensor
    text: Text

    @property
    def needs_gradients(self) -> bool:
        """Whether it needs a backward pass."""
        return False

    @abstractmethod
    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], X]:
        """A function that makes ``X`` from a captured layer.

        Args:
            geometry: geometry of the model.
            totals: statistics of earlier stages.
        """


@dataclass(frozen=True)
class ObservedKey(Key[S], Generic[S, X]):
    """A request for statistics over a view.

    Attributes:
        view: the view.
    """

    view: View[X]

    @abstractmethod
    def add(self, statistics: S, seen: X) -> None:
        """Add the view's ``X`` of one window."""


def not_finite(tensor: CachedTensor) -> CalibrationError:
    """The error for keys or values with NaN or infinity."""
    return CalibrationError(
        f"layer {tensor.layer} gives {tensor.kind}s that are not finite; try --dtype float32 or bfloat16, or check "
        "the checkpoint"
    )


@dataclass(frozen=True)
class CachedView(View[Tensor]):
    """Rotated keys, or values, unchanged: ``[B, H, T, D]``."""

    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], Tensor]:
        """The tensor itself."""
        return lambda captured: captured.values_of(self.tensor.kind, pre_rope=False)


@dataclass(frozen=True)
class ChannelView(View[Tensor]):
    """Values, or keys before or after RoPE, as channels: float32 ``[N, C]`` on the CPU.

    Attributes:
        sinks: number of first tokens of each window to leave out.
        pre_rope: whether keys are taken before RoPE; true for values.
    """

    sinks: int
    pre_rope: bool

    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], Tensor]:
        """See :class:`View`."""

        def read(captured: Captured) -> Tensor:
            x = captured.values_of(self.tensor.kind, self.pre_rope)[:, :, self.sinks :]
            return x.float().transpose(1, 2).flatten(2).flatten(0, 1).cpu()

        return read


@dataclass(frozen=True)
class MagnitudeKey(ObservedKey[Magnitude, Tensor]):
    """Key of the largest magnitude of rotated keys, or of values.

    Every pass over the calibration text collects it first. So if activations are not finite, the message names the
    first layer with the problem.
    """

    def empty(self, geometry: KVGeometry) -> Magnitude:
        """See :class:`Key`."""
        return Magnitude()

    def add(self, statistics: Magnitude, seen: Tensor) -> None:
        """See :class:`ObservedKey`.

        Raises:
            CalibrationError: a number is not finite; the message names the layer.
        """
        if not statistics.update(seen):
            raise not_finite(self.view.tensor)


@dataclass(frozen=True)
class SelfGeneratedKey(Key[SelfGeneratedText]):
    """Key of self-generated text. The fields are the arguments of :class:`SelfGeneratedText`."""

    plain: int
    repeating: int
    seqlen: int
    prefix: tuple[int, ...]
    vocabulary: int
    seed: int

    def empty(self, geometry: KVGeometry) -> SelfGeneratedText:
        """See :class:`Key`."""
        return SelfGeneratedText(
            self.plain,
            self.repeating,
            self.seqlen,
            prefix=self.prefix,
            vocabulary=self.vocabulary,
            seed=self.seed,
        )


def magnitude_keys(layers: int, windows: int) -> list[MagnitudeKey]:
    """Keys of the magnitudes of all layers, over so many windows of calibration text."""
    text = text_of({Source.CALIBRATION: windows})
    return [MagnitudeKey(CachedView(tensor, text)) for tensor in cached_tensors(layers)]


@dataclass(frozen=True)
class Plan:
    """The statistics that each stage collects.

    Attributes:
        stages: distinct keys by stage, in the order of the requests; stages without keys are left out.
    """

    stages: Mapping[Stage, tuple[ObservedKey[Any, Any], ...]]

    @property
    def keys(self) -> tuple[ObservedKey[Any, Any], ...]:
        """All distinct keys, in an order that depends only on the requests."""
        return tuple(dict.fromkeys(key for stage in Stage for key in self.stages.get(stage, ())))

    @property
    def text(self) -> Text:
        """All windows that any key uses."""
        return united(key.view.text for key in self.keys)


def make_plan(asked: Callable[[Stage], Iterable[ObservedKey[Any, Any]]], layers: int) -> Plan:
    """Make the plan for all requests.

    Args:
        asked: keys by stage, with repetitions.
        layers: number of layers. The keys of their magnitudes come first in every stage over the calibration text that
            has other keys.
    """
    stages = {}
    for stage in Stage:
        wanted = tuple(dict.fromkeys(asked(stage)))
        if not wanted:
            continue
        windows = united(key.view.text for key in wanted).count(Source.CALIBRATION)
        stages[stage] = (*magnitude_keys(layers, windows), *wanted) if windows else wanted
    return Plan(stages)
