"""The protocol of fitters, which fit recipes, and their registry.

To add a fitter, write a class with the methods of :class:`Fitter` in a new file, and name it with :func:`register`; see
``fit_scalar.py`` and ``fit_trellis.py``. Passes, checkpoints and assembly need no change.
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
        name: name of the recipe, for readers.
        config: settings of the recipe.
        geometry: geometry of the model.
        windows: number of windows of calibration text.
    """

    name: str
    config: CalibrationConfig
    geometry: KVGeometry
    windows: int

    @cached_property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The specs of keys and values, by layer.

        Raises:
            ConfigError: an override names a layer that does not exist.
        """
        try:
            return self.config.cache.resolved(len(self.geometry.layers))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def tensors(self) -> dict[CachedTensor, QuantSpec]:
        """The keys and values of all layers in order, with their specs."""
        return {
            tensor: self.specs[tensor.layer].of(tensor.kind) for tensor in cached_tensors(len(self.specs))
        }


@dataclass(frozen=True)
class Materials:
    """What a fit may use.

    Attributes:
        model: causal language model in eval mode.
        library: the windows of text.
        totals: the collected statistics.
        progress: called after steps that take long.
        clock: measures parts that are listed separately.
    """

    model: Any
    library: TextLibrary
    totals: Table
    progress: Progress
    clock: Clock


@dataclass(frozen=True)
class Fitted:
    """Result of a fit.

    Attributes:
        spec: the spec, with what was decided for this model.
        layers: parameters of each layer.
        facts: additions to the artifact's record of its calibration.
        outliers_per_token: expected outliers of a token; none by default.
    """

    spec: KVCacheSpec
    layers: tuple[LayerParams, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    outliers_per_token: Mapping[CachedTensor, float] = field(default_factory=dict)

    def outlier_rates(self, kind: Kind) -> list[float]:
        """Expected outliers of a token in the keys or the values of each layer."""
        return [
            self.outliers_per_token.get(CachedTensor(layer, kind), 0.0) for layer in range(len(self.layers))
        ]


class Fitter(Protocol):
    """Fits one recipe; constructed from a :class:`Recipe`."""

    def keys(self, stage: Stage) -> Iterable[ObservedKey[Any, Any]]:
        """The statistics that it needs from a stage."""

    def fit(self, materials: Materials) -> Fitted:
        """Fit the parameters from the statistics of all stages.

        Raises:
            ConfigError: this model cannot have the recipe.
        """


F = TypeVar("F", bound=Callable[[Recipe], Fitter])

_FITTERS: dict[str, Callable[[Recipe], Fitter]] = {}


def register(name: str) -> Callable[[F], F]:
    """Class decorator: register a fitter by the name of its codec."""

    def known(fitter: F) -> F:
        _FITTERS[name] = fitter
        return fitter

    return known


def make_fitter(recipe: Recipe) -> Fitter:
    """Make the fitter for a recipe's codec.

    Raises:
        ConfigError: the codec has no fitter.
    """
    codec = recipe.config.codec
    if codec not in _FITTERS:
        raise ConfigError(
            f"nothing fits the codec {codec!r}; calibration knows {', '.join(sorted(_FITTERS))}"
        )
    return _FITTERS[codec](recipe)


def layer_params(params: Mapping[CachedTensor, Params]) -> tuple[LayerParams, ...]:
    """The parameters of each layer, from those of all keys and values."""
    layers: Sequence[int] = sorted({tensor.layer for tensor in params})
    return tuple(
        LayerParams(params[CachedTensor(n, "key")], params[CachedTensor(n, "value")]) for n in layers
    )
