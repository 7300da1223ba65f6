"""Recipes and settings: strict, merged in one order, wrong keys named in one line."""

import pytest

from kvq_calib.errors import ConfigError
from kvq_calib.schema.recipe import calibration_config, read_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name):
    config = calibration_config(name)
    assert config.description
    assert config.cache.resolved(4)


def test_the_recipes_of_the_paper_are_there():
    names = set(recipe_names())
    for bits in (4, 3, 2):
        assert {f"nuq{bits}-1p", f"nuq{bits}", f"uniform{bits}", f"nf{bits}"} <= names
        spec = calibration_config(f"nuq{bits}-1p").cache
        assert spec.key.bits == spec.value.bits == bits
        assert spec.key.outliers.fraction == spec.value.outliers.fraction == 0.01
        assert spec.sink_tokens == 1
        assert calibration_config(f"nuq{bits}").cache.key.outliers.fraction == 0


def test_file_then_command_line_then_set(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "samples: 3\nseed: 7\ncache:\n  key: {bits: 4}\n  value: {bits: 2, granularity: token, dynamic: true}\n"
    )
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
        "cache:\n  key: {bits: 3, outliers: {fraction: 0.01}}\n  value: {bits: 3, granularity: token, dynamic: true}\n"
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
        ("samples=0", "samples: "),
        ("nonsense", "write it as KEY=VALUE"),
        ("=3", "write it as KEY=VALUE"),
        ("cache.key.bits=[", "not a YAML value"),
        ("samples.deep=1", "unused"),
    ],
)
def test_wrong_assignments_are_named(assignment, message):
    if message == "unused":
        with pytest.raises(ConfigError, match="samples is a value, not a section"):
            calibration_config("nuq3-1p", command_line={"samples": 3}, assignments=[assignment])
        return
    with pytest.raises(ConfigError) as caught:
        calibration_config("nuq3-1p", assignments=[assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
