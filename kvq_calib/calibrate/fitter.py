"""The protocol of what fits a recipe, and the registry of ways to do it.

To add one, write a class with the methods of :class:`Fitter` in a file of its own and give it a name with
:func:`register`; see ``fit_scalar.py`` and ``fit_trellis.py``. Passes, checkpoints and assembly need nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

from kvq_calib.calibrate.clock import Clock, Progress
from kvq_calib.calibrate.plan import ObservedKey, Stage, Table
from kvq_calib.calibrate.texts import TextLibrary
from kvq_calib.codec.params import LayerParams, Params
from kvq_calib.errors import ConfigError
from kvq_calib.schema.cached import CachedTensor, cached_tensors
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.recipe import CalibrationConfig
from kvq_calib.schema.spec import Kind, KVCacheSpec, LayerSpec, QuantSpec

__all__ = ["Fitted", "Fitter", "Materials", "Recipe", "layer_params", "make_fitter", "register"]


@dataclass(frozen=True)
class Recipe:
    """One recipe on one model.

    Attributes:
        name: of the recipe, for people.
        config: its settings.
        geometry: of the model.
        windows: of the calibration text.
    """

    name: str
    config: CalibrationConfig
    geometry: KVGeometry
    windows: int

    @cached_property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What is quantized how, by layer.

        Raises:
            ConfigError: an override names a layer that does not exist.
        """
        try:
            return self.config.cache.resolved(len(self.geometry.layers))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def tensors(self) -> dict[CachedTensor, QuantSpec]:
        """Keys and values of all layers in order, with their specs."""
        return {
            tensor: self.specs[tensor.layer].of(tensor.kind) for tensor in cached_tensors(len(self.specs))
        }


@dataclass(frozen=True)
class Materials:
    """What a fit can work with.

    Attributes:
        model: causal language model in eval mode.
        library: the windows of text.
        totals: the statistics that were asked for.
        progress: told of steps that take long.
        clock: told of parts that are to be listed by themselves.
    """

    model: Any
    library: TextLibrary
    totals: Table
    progress: Progress
    clock: Clock


@dataclass(frozen=True)
class Fitted:
    """What a fit gives.

    Attributes:
        spec: what is quantized how, with what was decided for this model.
        layers: the numbers of each layer.
        facts: for the artifact's record of its calibration, beside what every recipe records.
        outliers_per_token: expected outliers of one token; none by default.
    """

    spec: KVCacheSpec
    layers: tuple[LayerParams, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    outliers_per_token: Mapping[CachedTensor, float] = field(default_factory=dict)

    def outlier_rates(self, kind: Kind) -> list[float]:
        """Expected outliers of one token in the keys or values of each layer."""
        return [
            self.outliers_per_token.get(CachedTensor(layer, kind), 0.0) for layer in range(len(self.layers))
        ]


class Fitter(Protocol):
    """Fits one recipe; made from a :class:`Recipe` alone."""

    def keys(self, stage: Stage) -> Iterable[ObservedKey[Any, Any]]:
        """The statistics that it wants from a stage."""

    def fit(self, materials: Materials) -> Fitted:
        """What is stored, from the statistics of all stages.

        Raises:
            ConfigError: the recipe cannot be met on this model.
        """


F = TypeVar("F", bound=Callable[[Recipe], Fitter])

_FITTERS: dict[str, Callable[[Recipe], Fitter]] = {}


def register(name: str) -> Callable[[F], F]:
    """Class decorator: make a fitter known by the name of its codec."""

    def known(fitter: F) -> F:
        _FITTERS[name] = fitter
        return fitter

    return known


def make_fitter(recipe: Recipe) -> Fitter:
    """The fitter of a recipe's codec.

    Raises:
        ConfigError: the codec has none.
    """
    codec = recipe.config.codec
    if codec not in _FITTERS:
        raise ConfigError(
            f"nothing fits the codec {codec!r}; calibration knows {', '.join(sorted(_FITTERS))}"
        )
    return _FITTERS[codec](recipe)


def layer_params(params: Mapping[CachedTensor, Params]) -> tuple[LayerParams, ...]:
    """The numbers of each layer from those of all keys and values."""
    layers: Sequence[int] = sorted({tensor.layer for tensor in params})
    return tuple(
        LayerParams(params[CachedTensor(n, "key")], params[CachedTensor(n, "value")]) for n in layers
    )
