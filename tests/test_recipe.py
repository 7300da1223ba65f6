"""Recipes and settings: strict, merged in one order, wrong keys named in one line."""

import pytest
from pydantic import ValidationError

from kvq_calib.errors import ConfigError
from kvq_calib.schema.recipe import (
    CalibrationConfig,
    budget_recipe,
    calibration_config,
    read_recipe,
    recipe_names,
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name):
    config = calibration_config(name)
    assert config.description
    assert config.cache.resolved(4)
    assert config.codec in ("scalar", "trellis")


def test_the_recipes_of_the_paper_are_there():
    names = set(recipe_names())
    for bits in (4, 3, 2):
        assert {f"nuq{bits}-1p", f"nuq{bits}", f"uniform{bits}", f"nf{bits}"} <= names
        spec = calibration_config(f"nuq{bits}-1p").cache
        assert spec.key.bits == spec.value.bits == bits
        assert (spec.key.thresholds, spec.value.thresholds) == ("channel", "token")
        assert spec.key.outliers.fraction == spec.value.outliers.fraction == 0.01
        assert spec.sink_tokens == 1
        assert calibration_config(f"nuq{bits}").cache.key.outliers.fraction == 0


@pytest.mark.parametrize(("name", "budget"), [("kvq4", 4.4), ("kvq3", 3.4), ("kvq2", 2.4)])
def test_the_recipes_of_this_project_keep_their_budgets(name, budget):
    config = calibration_config(name)
    assert config.codec == "trellis"
    assert config.allocation.bits_per_element == budget


@pytest.mark.parametrize(
    ("name", "max_bits", "learns"),
    [("kvq-1.5", 3, True), ("kvq-3", 5, False), ("kvq-4.25", 6, False), ("kvq-6", 7, False)],
)
def test_a_recipe_of_any_budget(name, max_bits, learns):
    config = calibration_config(name)
    bits = float(name.removeprefix("kvq-"))
    assert budget_recipe(bits) == name
    assert config.allocation.bits_per_element == bits
    assert (config.cache.key.max_bits, config.cache.value.max_bits) == (max_bits, max_bits)
    assert (config.learn is not None) == learns
    assert config.description.startswith(f"{bits:g} bits per element in all")


@pytest.mark.parametrize("shipped", ["kvq4", "kvq3", "kvq2"])
def test_of_a_shipped_budget_it_is_the_shipped_recipe(shipped):
    config = calibration_config(shipped)
    assert calibration_config(budget_recipe(config.allocation.bits_per_element)) == config


@pytest.mark.parametrize("name", ["kvq-1.49", "kvq-9"])
def test_a_budget_out_of_range_is_refused(name):
    with pytest.raises(ConfigError, match=r"a budget is 1\.5 to 6 bits per element"):
        calibration_config(name)


def test_file_then_command_line_then_set(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("samples: 3\nseed: 7\ncache:\n  key: {bits: 4}\n  value: {bits: 2, thresholds: token}\n")
    config = calibration_config(
        str(file),
        command_line={"samples": 5, "seqlen": None},
        assignments=[
            "samples=6",
            "cache.value.outliers.fraction=0.02",
            "cache.layers={0: {key: {bits: 8}, value: {bits: 8}}}",
        ],
    )
    assert (config.samples, config.seed, config.seqlen) == (6, 7, 2048)
    assert config.cache.value.outliers.fraction == 0.02
    assert config.cache.layers[0].key.bits == 8


def test_an_override_of_a_layer_says_what_differs_and_leaves_the_rest(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "cache:\n  key: {bits: 3, outliers: {fraction: 0.01}}\n  value: {bits: 3, thresholds: token}\n"
        "  layers:\n    0: {value: {bits: 8}}\n"
    )
    assignments = ["cache.layers.0.key.bits=4", "cache.layers.-1.key.outliers.max_per_token=2"]
    cache = calibration_config(str(file), assignments=assignments).cache
    assert cache.layers[0].key == cache.key.model_copy(update={"bits": 4})
    assert cache.layers[0].value == cache.value.model_copy(update={"bits": 8})
    assert cache.layers[-1].value == cache.value
    assert cache.layers[-1].key.outliers.fraction == 0.01
    assert cache.layers[-1].key.outliers.max_per_token == 2
    with pytest.raises(ConfigError, match=r"cache\.layers\.0\.key\.bits: .*less than or equal to 8"):
        calibration_config(str(file), assignments=["cache.layers.0.key.bits=9"])
    with pytest.raises(ConfigError, match=r"cache\.layers"):
        calibration_config(str(file), assignments=["cache.layers.first.key.bits=4"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("cache.key.bits=17", "cache.key.bits: Input should be less than or equal to 8"),
        ("cache.key.colour=red", "cache.key.colour: no such key"),
        ("cache.key.codec=magic", "cache.key: unknown codec 'magic'; use one of scalar, trellis"),
        ("cache.value={codec: trellis, max_bits: 3}", "one codec for the keys and values of all layers, not"),
        ("samples=0", "samples: "),
        ("allocation.context=0", "allocation.context: "),
        ("nonsense", "write it as KEY=VALUE"),
        ("=3", "write it as KEY=VALUE"),
        ("cache.key.bits=[", "not a YAML value"),
    ],
)
def test_wrong_assignments_are_named(assignment, message):
    with pytest.raises(ConfigError) as caught:
        calibration_config("nuq3-1p", assignments=[assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_assignment_inside_a_value_is_refused():
    with pytest.raises(ConfigError, match="samples is a value, not a section"):
        calibration_config("nuq3-1p", command_line={"samples": 3}, assignments=["samples.deep=1"])


@pytest.mark.parametrize(
    ("recipe", "assignment", "place", "now"),
    [
        ("nuq3-1p", "cache.key.granularity=channel", "cache.key.granularity", "thresholds: channel, token"),
        ("nuq3-1p", "cache.value.dynamic=true", "cache.value.dynamic", "thresholds: channel, token"),
        (
            "nuq3-1p",
            "cache.value.channel_normalized=true",
            "channel_normalized",
            "thresholds: token_normalized",
        ),
        ("nuq3-1p", "cache.key.datatype=kmeans", "cache.key.datatype", "levels: uniform, normal_float"),
        ("nuq3-1p", "cache.key.variable_bits=true", "variable_bits", "codec: trellis with max_bits"),
        ("nuq3-1p", "cache.key.trellis=true", "cache.key.trellis", "codec: trellis"),
        ("kvq3", "cache.key.phase=true", "cache.key.phase", "pair_rotation of the trellis codec"),
        ("kvq3", "cache.key.feedback=true", "cache.key.feedback", "error_compensation of the trellis codec"),
        ("kvq3", "cache.key.feedback_rank=2", "cache.key.feedback_rank", "error_compensation.rank"),
        ("kvq3", "cache.key.sweeps=1", "cache.key.sweeps", "error_compensation.refinement_passes"),
        ("kvq3", "cache.value.importance=true", "importance", "token_weighting of the trellis codec"),
        ("kvq3", "allocation.foreign=0.1", "allocation.foreign", "vocabulary_samples"),
        ("kvq3", "allocation.first_layer=4", "allocation.first_layer", "first_layer_weight"),
        ("kvq3", "allocation.written=0", "allocation.written", "self_generated"),
    ],
)
def test_a_key_of_an_older_recipe_gets_one_line_that_says_what_to_write(recipe, assignment, place, now):
    with pytest.raises(ConfigError) as caught:
        calibration_config(recipe, assignments=[assignment])
    message = str(caught.value)
    assert f"{place}: no such key any more; write {now}" in message
    assert message.startswith(recipe)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"), [("cache: [", "is not YAML"), ("- 1", "not a mapping"), ("cache: {}", "cache.key")]
)
def test_wrong_files_are_named(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        calibration_config(str(file))


def test_no_such_recipe_lists_those_that_are():
    with pytest.raises(ConfigError, match=r"no recipe or file 'nuq9'; the recipes are .*nuq3-1p"):
        read_recipe("nuq9")


TRELLIS = {"codec": "trellis", "max_bits": 4}
SCALAR = {"bits": 4}


def config(key, value, **sections):
    return CalibrationConfig.model_validate({"cache": {"key": key, "value": value}, **sections})


@pytest.mark.parametrize(
    "key", [{**TRELLIS, "states": 1, "error_compensation": {}}, {**TRELLIS, "token_weighting": True}]
)
def test_what_comes_from_gradients_needs_them(key):
    assert config(key, TRELLIS, allocation={}).codec == "trellis"
    assert config(TRELLIS, TRELLIS, allocation={}, fit={"weights": "uniform"})
    with pytest.raises(ValidationError, match=r"they need --weights fisher"):
        config(key, TRELLIS, allocation={}, fit={"weights": "uniform"})


def test_the_trellis_codec_and_its_sections_need_each_other():
    with pytest.raises(ValidationError, match="allocation: the trellis codec needs this section"):
        config(TRELLIS, TRELLIS)
    for section in ("allocation", "learn"):
        with pytest.raises(ValidationError, match=f"{section} is for the trellis codec: leave it out"):
            config(SCALAR, SCALAR, **{section: {}})
    override = {"key": SCALAR, "value": SCALAR, "layers": {0: {"key": TRELLIS, "value": SCALAR}}}
    with pytest.raises(ValidationError, match="not scalar and trellis"):
        CalibrationConfig.model_validate({"cache": override})
