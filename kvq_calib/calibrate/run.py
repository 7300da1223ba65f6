"""Calibration, from a model and windows of text to artifacts: plan, passes, assembly.

Each recipe requests statistics by keys (:mod:`kvq_calib.calibrate.plan`). Passes over the text collect them
(:mod:`kvq_calib.calibrate.passes`); statistics that several recipes need are collected once. Then each recipe is fitted
(:mod:`kvq_calib.calibrate.fitter`), and its artifact assembled (:mod:`kvq_calib.calibrate.assemble`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate import fit_scalar, fit_trellis
from kvq_calib.calibrate.assemble import assemble, largest_magnitudes
from kvq_calib.calibrate.budget_search import BudgetSearch
from kvq_calib.calibrate.checkpoint import VERSION, Checkpoint, RunState, file_of_rank
from kvq_calib.calibrate.clock import Clock, Progress
from kvq_calib.calibrate.distributed import check_agreement, world
from kvq_calib.calibrate.fitter import Fitter, Materials, Recipe, make_fitter
from kvq_calib.calibrate.passes import Passes, observe_window
from kvq_calib.calibrate.plan import (
    Key,
    ObservedKey,
    Plan,
    SelfGeneratedKey,
    Stage,
    Table,
    magnitude_keys,
    make_plan,
)
from kvq_calib.calibrate.self_generated import SelfGeneratedText
from kvq_calib.calibrate.suited import suited, warn_of_range
from kvq_calib.calibrate.texts import Source, Text, TextLibrary, text_of, united
from kvq_calib.data import TokenWindows
from kvq_calib.errors import CalibrationError, ConfigError
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.model.load import check_tokens
from kvq_calib.model.placement import is_offloaded
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.recipe import CalibrationConfig

__all__ = ["FITTERS", "Calibrated", "calibrate", "shared_setting"]

#: Modules that register fitters.
FITTERS = (fit_scalar, fit_trellis)


@dataclass(frozen=True)
class Calibrated:
    """Result of a run.

    Attributes:
        artifacts: artifacts by the name of their recipe; with a search, the one that it found.
        seconds: wall time of each part of the run.
        statistics_seconds: the share of that for statistics, without the model's passes.
        statistics_bytes: size of the statistics of this rank; it does not depend on the amount of text.
        peak_bytes: peak resident memory of the process up to the end of each part.
    """

    artifacts: dict[str, KVArtifact]
    seconds: dict[str, float]
    statistics_seconds: dict[str, float]
    statistics_bytes: int
    peak_bytes: dict[str, int]


def calibrate(
    model: Any,
    windows: TokenWindows,
    configs: Mapping[str, CalibrationConfig],
    *,
    model_id: str,
    model_config: Mapping[str, Any],
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    deliver: Callable[[Mapping[str, KVArtifact]], None] | None = None,
    search: BudgetSearch | None = None,
) -> Calibrated:
    """Calibrate one model for one or several recipes.

    Args:
        model: a causal language model in eval mode.
        windows: token ids int64 ``[N, T]``, and where they come from.
        configs: recipes by name. Their settings of the run (data, seed, recompute) must agree.
        model_id, model_config: recorded in the artifacts; see :func:`kvq_calib.model.fingerprint.model_fingerprint`.
        checkpoint: file for the statistics of the run; removed at the end.
        resume: continue from ``checkpoint`` if it exists. The result is the same as without interruption.
        progress: called after every window.
        deliver: called with the artifacts on rank 0, before the checkpoint is removed. So no work is lost if the disk
            is full.
        search: finds the budget of the only artifact by measurement; ``configs`` are its :func:`planned_recipes`.

    Raises:
        CalibrationError: activations that are not finite, or a checkpoint of another run.
        ConfigError: settings that contradict each other or the model.
        ModelError: the model cannot be captured, a packed cache cannot serve it, or the text has tokens outside its
            vocabulary.
    """
    job = _prepared(model, windows, configs)
    keeper = _checkpoint(job, checkpoint, model, model_config)
    state = keeper.load(job.geometry) if resume else RunState()
    progress = progress or (lambda part, done, total: None)
    passes = Passes(model, job.geometry, state, Table(), keeper, Clock(), progress, job.recompute)
    if job.generated is not None:
        job.library.generated = _generate(job.generated, job, passes)
    for stage, keys in job.plan.stages.items():
        text = united(key.view.text for key in keys)
        passes.observe(stage.value, keys, job.library.windows(text))
    artifacts = _artifacts(job, passes, {"id": model_id, "config": dict(model_config)}, search)
    if deliver is not None and world()[0] == 0:
        deliver(artifacts)
    keeper.remove()
    held = sum(t.nbytes for _, each in state.statistics.items() for t in each.state().values())
    clock = passes.clock
    return Calibrated(artifacts, clock.seconds, clock.statistics_seconds, held, clock.peak_bytes)


def shared_setting(configs: Mapping[str, CalibrationConfig], name: str) -> Any:
    """The value of a setting of the run, on which all recipes must agree."""
    values = {config_name: getattr(config, name) for config_name, config in configs.items()}
    if len(set(values.values())) > 1:
        raise ConfigError(f"recipes calibrated together must agree on {name}, not {values}")
    return next(iter(values.values()))


@dataclass(frozen=True)
class _Job:
    """The work of a run.

    Attributes:
        geometry: geometry of the model.
        library: the windows of text.
        fitters: fitters by recipe.
        plan: the statistics to collect.
        generated: key of the self-generated text, if a recipe needs any.
        recompute: whether to recompute layers in backward passes.
    """

    geometry: KVGeometry
    library: TextLibrary
    fitters: tuple[tuple[Recipe, Fitter], ...]
    plan: Plan
    generated: SelfGeneratedKey | None
    recompute: bool

    @property
    def keys(self) -> tuple[Key[Any], ...]:
        """All keys, in a fixed order."""
        return (*(() if self.generated is None else (self.generated,)), *self.plan.keys)


def _prepared(model: Any, windows: TokenWindows, configs: Mapping[str, CalibrationConfig]) -> _Job:
    """Prepare the work of a run.

    Raises:
        ConfigError: settings that contradict each other or the model.
        ModelError: the model cannot be captured, or a packed cache cannot serve it.
    """
    if not configs:
        raise ConfigError("nothing to calibrate: name at least one recipe")
    check_tokens(model, windows.ids)
    geometry, count = inspect_model(model), len(windows.ids)
    check_generation(model, geometry)
    recompute, seed = shared_setting(configs, "recompute"), shared_setting(configs, "seed")
    library = TextLibrary(windows, model, seed)
    recipes = [Recipe(name, config, geometry, count) for name, config in configs.items()]
    recipes = suited(model, recipes, windows.ids)
    fitters = tuple((recipe, make_fitter(recipe)) for recipe in recipes)

    def asked(stage: Stage) -> Iterator[ObservedKey[Any, Any]]:
        for _, fitter in fitters:
            yield from fitter.keys(stage)

    plan = make_plan(asked, len(geometry.layers))
    return _Job(geometry, library, fitters, plan, _generated_key(plan.text, library), recompute)


def _generated_key(text: Text, library: TextLibrary) -> SelfGeneratedKey | None:
    """The key of the self-generated text."""
    plain = text.count(Source.SELF_GENERATED)
    repeating = text.count(Source.SELF_GENERATED_REPEATING)
    if not plain and not repeating:
        return None
    bos = library.source.get("bos")
    return SelfGeneratedKey(
        plain,
        repeating,
        library.calibration.shape[1],
        prefix=() if bos is None else (bos,),
        vocabulary=library.vocabulary,
        seed=library.seed,
    )


def _checkpoint(job: _Job, file: Path | None, model: Any, model_config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of this rank, after a check that all ranks agree."""
    rank, ranks = world()
    facts = {
        "version": VERSION,
        "configs": {recipe.name: recipe.config.model_dump(mode="json") for recipe, _ in job.fitters},
        "plan": [repr(key) for key in job.keys],
        "data": job.library.source,
        "model": dict(model_config),
        "dtype": str(model.dtype),
        "ranks": ranks,
    }
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    check_agreement(identity, len(job.library.calibration))
    return Checkpoint(None if file is None else file_of_rank(file, rank, ranks), identity, job.keys)


def _generate(key: SelfGeneratedKey, job: _Job, passes: Passes) -> SelfGeneratedText:
    """Let the model generate text.

    Raises:
        CalibrationError: its predictions are not finite; the message names the first layer with such keys or values.
        ConfigError: the model is offloaded.
    """
    if is_offloaded(passes.model):
        raise ConfigError(
            "generating text would read all weights from disk or CPU memory for every token; "
            "leave it out with --set allocation.self_generated=0"
        )
    passes.prepare([key])
    text = passes.state.statistics.get(key)

    def step(batch: int) -> None:
        try:
            text.generate(passes.model, batch)
        except CalibrationError:
            (window,) = job.library.windows(text_of({Source.CALIBRATION: 1}))
            magnitudes = magnitude_keys(len(job.geometry.layers), 1)
            observe_window(
                passes.model, job.geometry, magnitudes, window
            )  # raises an error that names the layer
            raise

    passes.steps("generating text", len(text.beginnings), step, [key])
    return passes.totals.get(key)


def _artifacts(
    job: _Job, passes: Passes, model: Mapping[str, Any], search: BudgetSearch | None
) -> dict[str, KVArtifact]:
    """Fit every recipe, or the one of the budget that is found, and assemble the artifacts."""
    started, clock = time.monotonic(), passes.clock
    materials = Materials(passes.model, job.library, passes.totals, passes.progress, clock)
    keys = magnitude_keys(len(job.geometry.layers), len(job.library.calibration))
    amax = largest_magnitudes(keys, passes.totals)
    warn_of_range([recipe for recipe, _ in job.fitters], amax)

    def fit(recipe: Recipe, fitter: Fitter) -> KVArtifact:
        fitted = fitter.fit(materials)
        return assemble(recipe, fitted, model=model, data=job.library.source, amax=amax)

    def fit_budget(name: str, config: CalibrationConfig) -> KVArtifact:
        windows = job.library.calibration
        (recipe,) = suited(passes.model, [Recipe(name, config, job.geometry, len(windows))], windows)
        return fit(recipe, make_fitter(recipe))

    if search is None:
        artifacts = {recipe.name: fit(recipe, fitter) for recipe, fitter in job.fitters}
    else:
        found, facts = search.run(fit_budget)
        found = replace(found, calibration={**found.calibration, "budget_search": facts})
        artifacts = {str(found.calibration["recipe"]): found}
    # Training is a separate part.
    clock.finished("fit", started + clock.seconds.get("learning", 0.0))
    return artifacts
