"""Plans of statistics: sharing between recipes, the data of a pass, and an external fitter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models_zoo import tiny_model, token_ids

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate import checkpoint as checkpoints
from kvq_calib.calibrate import fitter as fitters
from kvq_calib.calibrate.fit_scalar import SketchKey
from kvq_calib.calibrate.fitter import Fitted, Recipe, layer_params, make_fitter
from kvq_calib.calibrate.plan import ChannelView, ObservedKey, Stage, Table, magnitude_keys, make_plan
from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.calibrate.texts import Source, TextLibrary, Window, text_of, united
from kvq_calib.codec.scalar import ScalarParams
from kvq_calib.data import TokenWindows
from kvq_calib.fit.levels import uniform_levels
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.cached import CachedTensor, cached_tensors
from kvq_calib.schema.recipe import calibration_config

pytestmark = pytest.mark.model

WINDOWS = TokenWindows(token_ids(4, 24, 0), {"dataset": "random", "seqlen": 24})


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def plan(model, *configs):
    geometry = inspect_model(model)
    made = [make_fitter(Recipe(str(n), config, geometry, 4)) for n, config in enumerate(configs)]
    return make_plan(
        lambda stage: [key for fitter in made for key in fitter.keys(stage)], len(geometry.layers)
    )


def recipe(name, *assignments):
    return calibration_config(name, assignments=assignments)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (recipe("nuq4-1p"), recipe("nuq2-1p")),
        (recipe("kvq4"), recipe("kvq3")),
        (recipe("kvq3"), recipe("kvq3", "allocation.min_value_bits=0", "cache.key.max_bits=6")),
    ],
)
def test_recipes_that_ask_for_the_same_share_it(model, one, other):
    alone, both = plan(model, one), plan(model, one, other)
    assert both == alone
    assert len({id(key) for key in both.keys}) == len(both.keys)


@pytest.mark.parametrize(
    "changes",
    [
        ("cache.sink_tokens=4",),
        ("cache.key.pair_rotation=false",),
        ("fit.weights=uniform", "cache.key.error_compensation=null",
         "cache.key.token_weighting=false", "cache.value.token_weighting=false", "cache.value.noise_shaping=false"),
        ("allocation.self_generated=1",),
        ("allocation.repeats=false",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_differs_is_collected_apart(model, changes):
    one, other = recipe("kvq3"), recipe("kvq3", *changes)
    keys = [set(plan(model, config).stages[Stage.CODEBOOKS]) for config in (one, other)]
    distinct = keys[0] ^ keys[1]
    assert {key.view.tensor.kind for key in distinct} >= {"key"}
    assert set(plan(model, one, other).keys) == {*plan(model, one).keys, *plan(model, other).keys}


def test_part_of_what_another_recipe_asks_for_costs_nothing_more(model):
    less = recipe(
        "kvq3",
        "cache.key.token_weighting=false",
        "cache.key.error_compensation=null",
    )
    assert set(plan(model, less).keys) < set(plan(model, recipe("kvq3")).keys)


def test_the_order_of_keys_depends_on_what_is_asked_for_alone(model):
    configs = [recipe("kvq3"), recipe("nuq3-1p")]
    assert plan(model, *configs).keys == plan(model, *configs).keys
    # Their text is part of a checkpoint's identity.
    assert repr(plan(model, *configs).keys) == repr(plan(model, *configs).keys)


def test_every_stage_over_the_calibration_text_looks_at_magnitudes_first(model):
    stages = plan(model, recipe("kvq3")).stages
    # Moments use a quarter of the four windows.
    assert stages[Stage.THRESHOLDS][:4] == tuple(magnitude_keys(2, 1))
    assert stages[Stage.CODEBOOKS][:4] == tuple(magnitude_keys(2, 4))
    assert not {type(key) for key in stages[Stage.VOCABULARY]} & {type(key) for key in magnitude_keys(2, 1)}
    assert [key.view.tensor for key in magnitude_keys(2, 4)] == cached_tensors(2)
    nothing = recipe("uniform3", "cache.key.thresholds=token")
    assert plan(model, nothing).keys == ()


def test_texts_take_the_first_windows_of_their_sources(model):
    library = TextLibrary(WINDOWS, model, 0)
    short = text_of({Source.VOCABULARY_SAMPLES: 1, Source.CALIBRATION: 2, Source.SELF_GENERATED: 0})
    assert short.parts == ((Source.CALIBRATION, 2), (Source.VOCABULARY_SAMPLES, 1))
    long = text_of({Source.CALIBRATION: 3})
    assert united([short, long]) == text_of({Source.CALIBRATION: 3, Source.VOCABULARY_SAMPLES: 1})
    rows = library.windows(united([short, long]))
    assert [(window.source, window.number) for window in rows] == [
        *((Source.CALIBRATION, number) for number in range(3)),
        (Source.VOCABULARY_SAMPLES, 0),
    ]
    assert [short.takes(window) for window in rows] == [True, True, False, True]
    assert not short.takes(Window(Source.SELF_GENERATED, 0, rows[0].ids))
    assert torch.equal(library.rows(short)[:2], WINDOWS.ids[:2])
    assert torch.equal(library.rows(short)[2, ::2], WINDOWS.ids[0, ::2])
    with pytest.raises(ValueError, match="not written"):
        library.rows(text_of({Source.SELF_GENERATED: 1}))


# ------------------------------------------------------------- a fitter that the package does not know


class Largest(Statistics):
    """The largest magnitude of each channel."""

    reductions: ClassVar[Mapping[str, Reduction]] = {"largest": "max"}

    def __init__(self, channels):
        self.largest = torch.zeros(channels)


@dataclass(frozen=True)
class LargestKey(ObservedKey[Largest, torch.Tensor]):
    def empty(self, geometry):
        return Largest(self.view.tensor.shape_in(geometry).channels)

    def add(self, statistics, seen):
        statistics.largest = torch.maximum(statistics.largest, seen.abs().amax(0))


class SymmetricFitter:
    """Uniform levels from minus to plus the largest magnitude of each channel."""

    def __init__(self, recipe):
        self.recipe = recipe
        text = text_of({Source.CALIBRATION: recipe.windows})
        self.asked = {at: LargestKey(ChannelView(at, text, 1, True)) for at in recipe.tensors}

    def keys(self, stage):
        return self.asked.values() if stage is Stage.THRESHOLDS else ()

    def fit(self, materials):
        params = {}
        for at, key in self.asked.items():
            scale = materials.totals.get(key).largest
            levels = torch.tensor(uniform_levels(self.recipe.tensors[at].bits)[None], dtype=torch.float32)
            params[at] = ScalarParams(levels, scale, torch.zeros_like(scale))
        return Fitted(self.recipe.config.cache, layer_params(params), {"fitted": "symmetrically"})


class Interrupted(Exception):
    pass


def test_a_fitter_from_outside_runs_from_the_text_to_the_artifact(model, tmp_path, monkeypatch):
    """Passes, checkpoints and assembly know nothing of the fitters."""
    known = fitters._FITTERS["scalar"]
    monkeypatch.setitem(
        fitters._FITTERS,
        "scalar",
        lambda recipe: (SymmetricFitter if recipe.config.description == "toy" else known)(recipe),
    )
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    values = ("cache.value.thresholds=channel",)
    configs = {
        "toy": recipe("uniform3", "description=toy", *values),
        "beside": recipe("uniform3", *values),
    }

    def run(**options):
        return calibrate(model, WINDOWS, configs, model_id="", model_config={}, **options).artifacts

    def stop(part, done, total):
        if (part, done) == ("thresholds", 3):
            raise Interrupted

    whole = run()
    with pytest.raises(Interrupted):
        run(checkpoint=tmp_path / "kept", progress=stop)
    resumed = run(checkpoint=tmp_path / "kept", resume=True)
    assert {name: each.to_bytes() for name, each in resumed.items()} == {
        name: each.to_bytes() for name, each in whole.items()
    }
    toy = KVArtifact.from_bytes(whole["toy"].to_bytes())
    assert toy.calibration["fitted"] == "symmetrically"
    assert toy.calibration["amax"] == whole["beside"].calibration["amax"]
    for layer, beside in zip(toy.layers, whole["beside"].layers, strict=True):
        for kind in ("key", "value"):
            one, other = layer.of(kind), beside.of(kind)
            assert bool((one.zero_point == 0).all())
            # The range of a channel is within plus and minus its largest magnitude, and reaches it on one side.
            reach = other.zero_point.abs() + other.scale
            torch.testing.assert_close(one.scale, reach)


def test_a_table_gives_what_was_put_there_and_nothing_else(model):
    geometry = inspect_model(model)
    text = text_of({Source.CALIBRATION: 2})
    view = ChannelView(CachedTensor(0, "key"), text, 1, True)
    table, sketch = Table(), SketchKey(view).empty(geometry)
    table.put(SketchKey(view), sketch)
    assert table.get(SketchKey(ChannelView(CachedTensor(0, "key"), text, 1, True))) is sketch
    for other in (LargestKey(view), SketchKey(ChannelView(CachedTensor(1, "key"), text, 1, True))):
        assert other not in table
        with pytest.raises(KeyError):
            table.get(other)
