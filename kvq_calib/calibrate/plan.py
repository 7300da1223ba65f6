"""What a calibration collects: typed keys of statistics, and the plan that lists them.

A recipe asks for statistics by keys. A key is frozen and says everything that decides its statistics: what of the
model is looked at (a :class:`View`), on which windows of text, and how it is accumulated. Recipes that ask for equal
keys share one accumulator, and keys of equal views share the work of reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Passes over text, in order; what a later one looks at may depend on what earlier ones found.

    The values are what a user sees of them.
    """

    THRESHOLDS = "thresholds"
    VOCABULARY = "vocabulary samples"
    CODEBOOKS = "codebooks"


class Captured:
    """What a pass sees of one layer in one window.

    Args:
        kv: keys and values of the layer.
        gradients: of the loss with respect to the keys before RoPE and to the values, each ``[B, H, T, D]``, where the
            pass runs backward.
    """

    def __init__(self, kv: LayerKV, gradients: tuple[Tensor, Tensor] | None = None) -> None:
        self.kv = kv
        self._gradients = gradients

    def values_of(self, kind: Kind, pre_rope: bool = True) -> Tensor:
        """Keys, before RoPE or after it, or values, ``[B, H, T, D]``."""
        if kind == "value":
            return self.kv.values
        return self.kv.keys if pre_rope else self.kv.rotated_keys

    def gradient_of(self, kind: Kind, pre_rope: bool = True) -> Tensor | None:
        """The gradient of the loss with respect to them, ``[B, H, T, D]``."""
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
    """Asks for statistics ``S``; equal keys mean the same ones."""

    @abstractmethod
    def empty(self, geometry: KVGeometry) -> S:
        """An accumulator that has seen nothing."""


class Table:
    """Statistics by key."""

    def __init__(self) -> None:
        self._found: dict[Key[Any], Statistics] = {}

    def put(self, key: Key[S], statistics: S) -> None:
        """Keep the statistics of a key."""
        self._found[key] = statistics

    def get(self, key: Key[S]) -> S:
        """The statistics of a key that is there."""
        return cast(S, self._found[key])

    def __contains__(self, key: Key[Any]) -> bool:
        return key in self._found

    def items(self) -> Iterator[tuple[Key[Any], Statistics]]:
        """Keys and statistics in the order in which they were put there."""
        return iter(self._found.items())


@dataclass(frozen=True)
class View(ABC, Generic[X]):
    """What statistics look at; ``X`` is what they are given of each window.

    Attributes:
        tensor: keys or values of which layer.
        text: on which windows.
    """

    tensor: CachedTensor
    text: Text

    @property
    def needs_gradients(self) -> bool:
        """Whether the pass must run backward for it."""
        return False

    @abstractmethod
    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], X]:
        """What makes ``X`` of a captured layer.

        Args:
            geometry: of the model.
            totals: statistics of earlier stages.
        """


@dataclass(frozen=True)
class ObservedKey(Key[S], Generic[S, X]):
    """Asks for statistics of what a view gives.

    Attributes:
        view: what is looked at.
    """

    view: View[X]

    @abstractmethod
    def add(self, statistics: S, seen: X) -> None:
        """Add what the view gave of one window."""


def not_finite(tensor: CachedTensor) -> CalibrationError:
    """The error for keys or values that are no numbers."""
    return CalibrationError(
        f"layer {tensor.layer} gives {tensor.kind}s that are not finite; try --dtype float32 or bfloat16, or check "
        "the checkpoint"
    )


@dataclass(frozen=True)
class CachedView(View[Tensor]):
    """Rotated keys, or values, as they are, ``[B, H, T, D]``."""

    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], Tensor]:
        """The tensor itself."""
        return lambda captured: captured.values_of(self.tensor.kind, pre_rope=False)


@dataclass(frozen=True)
class ChannelView(View[Tensor]):
    """Keys, before RoPE or after it, or values, as channels: float32 ``[N, C]`` on the CPU.

    Attributes:
        sinks: first tokens of each window that are left out.
        pre_rope: keys before RoPE; true for values.
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
    """The largest magnitude of rotated keys, or of values.

    Whatever is calibrated, every pass over the calibration text looks at these first, so that the first layer that
    gives something else than numbers is named; later ones only follow it.
    """

    def empty(self, geometry: KVGeometry) -> Magnitude:
        """See :class:`Key`."""
        return Magnitude()

    def add(self, statistics: Magnitude, seen: Tensor) -> None:
        """See :class:`ObservedKey`.

        Raises:
            CalibrationError: names the layer.
        """
        if not statistics.update(seen):
            raise not_finite(self.view.tensor)


@dataclass(frozen=True)
class SelfGeneratedKey(Key[SelfGeneratedText]):
    """Text that the model writes itself; the fields are the arguments of :class:`SelfGeneratedText`."""

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
    """Keys of the magnitudes of all layers over so many windows of the calibration text."""
    text = text_of({Source.CALIBRATION: windows})
    return [MagnitudeKey(CachedView(tensor, text)) for tensor in cached_tensors(layers)]


@dataclass(frozen=True)
class Plan:
    """Which statistics each stage collects.

    Attributes:
        stages: distinct keys by stage, in the order in which they were first asked for; a stage that nobody asked for
            is left out.
    """

    stages: Mapping[Stage, tuple[ObservedKey[Any, Any], ...]]

    @property
    def keys(self) -> tuple[ObservedKey[Any, Any], ...]:
        """All distinct keys, in an order that depends on what was asked for alone."""
        return tuple(dict.fromkeys(key for stage in Stage for key in self.stages.get(stage, ())))

    @property
    def text(self) -> Text:
        """All windows that any key looks at."""
        return united(key.view.text for key in self.keys)


def make_plan(
    asked: Callable[[Stage], Iterable[ObservedKey[Any, Any]]], magnitudes: Sequence[MagnitudeKey]
) -> Plan:
    """The plan for all that is asked for.

    Args:
        asked: keys by stage, with repetitions.
        magnitudes: looked at first in every stage over the calibration text that anything is asked of.
    """
    stages = {}
    for stage in Stage:
        wanted = tuple(dict.fromkeys(asked(stage)))
        if not wanted:
            continue
        given = any(key.view.text.count(Source.CALIBRATION) for key in wanted)
        stages[stage] = (*magnitudes, *wanted) if given else wanted
    return Plan(stages)
