"""Settings of a run: the recipe file and the command line, merged and validated once.

Recipes are YAML files, in ``configs/`` of the repository and inside the package. An unknown key is an error. ``--set
cache.key.bits=4`` changes one value by its path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvq_calib.errors import ConfigError
from kvq_calib.files import shipped_folder
from kvq_calib.schema.problem import first_problem
from kvq_calib.schema.spec import KINDS, KVCacheSpec, TrellisSpec

DEFAULT_RECIPE = "nuq3-1p"
#: Smallest and largest budget of a ``kvq-BITS`` recipe, in bits per element.
BUDGETS = (1.5, 6.0)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _TextSettings(_Settings):
    """Settings of a run over a text."""

    dataset: str = "wikitext2"
    text_field: Annotated[str, Field(min_length=1)] = "text"

    def record(self) -> dict[str, Any]:
        """The settings as they are written to artifacts and results; artifacts hold the spec of the cache elsewhere.

        Files are passed on, so only the last part of a path is kept.
        """
        kept = self.model_dump(mode="json", exclude={"cache"})
        return {**kept, "dataset": Path(self.dataset).name or self.dataset}


class FitConfig(_Settings):
    """How levels are fitted.

    Attributes:
        weights: ``fisher`` weights each value by the squared gradient of the loss, which needs a backward pass;
            ``uniform`` gives all values the same weight.
        solver: ``exact`` is k-means by dynamic programming; ``lloyd`` is scikit-learn's ``KMeans``, as in the paper's
            code.
    """

    weights: Literal["fisher", "uniform"] = "fisher"
    solver: Literal["exact", "lloyd"] = "exact"


class AllocationConfig(_Settings):
    """How the trellis codec divides bits among channels (``docs/explanation/widths.md``, ``budget.md``).

    Attributes:
        bits_per_element: the budget in bits per element at ``context`` tokens. Everything that is stored counts.
        context: tokens of context at which the budget holds.
        scope: ``model`` is one budget for the whole model. ``layer`` gives the keys and the values of each layer the
            same budget. With ``uniform`` every channel has the width ``max_bits`` of the cache section.
        min_key_bits: smallest width of a channel of keys. With 0, channels that matter little get no bits.
        min_value_bits: smallest width of a channel of values.
        corrections: how often the allocation is corrected. Each time, the cost of each layer's errors is measured on
            the model's output and the bits are allocated again, because the estimate from gradients is too low for
            large errors.
        shrinkage: how far the weight of an element moves towards the mean of its channel, 0 to 1. Levels fitted to the
            squared gradients alone suit other texts less well.
        vocabulary_samples: share of vocabulary samples (tokens drawn at random from the vocabulary) in the unweighted
            part of a channel's distribution. In the first layer they are all of that part. 0 skips the forward pass
            that collects them.
        first_layer_weight: factor on the errors of the first layer, where tokens missing from the calibration text lose
            most. 4 gives the layer about one bit more.
        self_generated: windows of text that the model generates, for each window of the calibration text. They are used
            in the same way. 0 is none.
        repeats: whether every third generated document repeats pieces of the two before it.
    """

    bits_per_element: Annotated[float, Field(gt=0, le=9)] = 3.4
    context: Annotated[int, Field(ge=1)] = 4096
    scope: Literal["model", "layer", "uniform"] = "model"
    min_key_bits: Annotated[int, Field(ge=0, le=8)] = 0
    min_value_bits: Annotated[int, Field(ge=0, le=8)] = 1
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.25
    vocabulary_samples: Annotated[float, Field(ge=0, le=1)] = 0.1
    first_layer_weight: Annotated[float, Field(gt=0, le=1024)] = 4.0
    self_generated: Annotated[float, Field(ge=0, le=16)] = 0.5
    repeats: bool = True
    corrections: Annotated[int, Field(ge=0, le=8)] = 2


class LearnConfig(_Settings):
    """Training of levels and pair angles after the fit (``docs/explanation/learning.md``).

    Attributes:
        steps: updates, one piece of text each.
        seqlen: tokens of a piece.
        learning_rate: of Adam, in units of a channel's level spacing, and in radians.
    """

    steps: Annotated[int, Field(ge=1)] = 96
    seqlen: Annotated[int, Field(ge=8)] = 512
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.005


class CalibrationConfig(_TextSettings):
    """Everything that decides the content of an artifact, except the model.

    Attributes:
        description: one line for readers.
        cache: how keys and values are quantized.
        fit: how levels are fitted.
        allocation: the budget of bits, for the trellis codec.
        learn: training after the fit, for the trellis codec.
        dataset: name or path of the calibration text.
        text_field: field of the records in a local file that holds their text.
        samples: number of windows of text.
        seqlen: tokens in a window.
        seed: seed of all random choices.
        recompute: recompute layers in the backward pass instead of keeping their activations.
    """

    description: str = ""
    cache: KVCacheSpec
    fit: FitConfig = FitConfig()
    allocation: AllocationConfig | None = None
    learn: LearnConfig | None = None
    samples: Annotated[int, Field(ge=1)] = 16
    seqlen: Annotated[int, Field(ge=8)] = 2048
    seed: Annotated[int, Field(ge=0)] = 0
    recompute: bool = False

    @property
    def codec(self) -> str:
        """Name of the codec, which is the same for the keys and values of all layers."""
        return self.cache.key.codec

    @model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        specs = self.cache.specs()
        codecs = sorted({spec.codec for spec in specs})
        if len(codecs) > 1:
            raise ValueError(
                f"cache: one codec for the keys and values of all layers, not {' and '.join(codecs)}"
            )
        trellis = [spec for spec in specs if isinstance(spec, TrellisSpec)]
        if trellis and self.allocation is None:
            raise ValueError(
                "allocation: the trellis codec needs this section, which says how many bits it may take"
            )
        for section in ("allocation", "learn"):
            if not trellis and getattr(self, section) is not None:
                raise ValueError(
                    f"{section} is for the trellis codec: leave it out (--set {section}=null), or set codec: trellis"
                )
        gradients = any(s.error_compensation or s.token_weighting or s.noise_shaping for s in trellis)
        if gradients and self.fit.weights != "fisher":
            raise ValueError(
                "error_compensation, token_weighting and noise_shaping come from gradients: they need --weights fisher"
            )
        return self


class EvalConfig(_TextSettings):
    """What an evaluation measures.

    Attributes:
        dataset: name or path of the evaluation text.
        text_field: field of the records in a local file that holds their text.
        windows: at most this many windows; ``None`` for all.
        seqlen: tokens in a window.
        mode: ``prefill`` quantizes inside one forward pass; ``decode`` sends the text through the packed cache.
        seed: seed for drawing windows, where they are drawn.
        context: tokens of context at which bits per element are stated.
        chunk: tokens per step in ``decode`` mode.
    """

    windows: Annotated[int, Field(ge=1)] | None = None
    seqlen: Annotated[int, Field(ge=8)] = 2048
    mode: Literal["prefill", "decode"] = "prefill"
    seed: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(ge=1)] = 4096
    chunk: Annotated[int, Field(ge=1)] = 256


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.stem for file in shipped_folder("configs").glob("*.yaml"))


def budget_recipe(bits: float) -> str:
    """Name of the recipe with a budget of ``bits`` per element, such as ``kvq-3.25``; see :data:`BUDGETS`."""
    return f"kvq-{bits:g}"


def _of_budget(bits: float) -> dict[str, Any]:
    """The shipped recipe with the nearest budget, changed to this budget."""
    if not BUDGETS[0] <= bits <= BUDGETS[1]:
        raise ConfigError(
            f"{budget_recipe(bits)}: a budget is {BUDGETS[0]:g} to {BUDGETS[1]:g} bits per element"
        )
    shipped = [read_recipe(name) for name in ("kvq2", "kvq3", "kvq4")]
    settings = min(shipped, key=lambda own: abs(own["allocation"]["bits_per_element"] - bits))
    settings["description"] = settings["description"].replace(
        f"{settings['allocation']['bits_per_element']} bits", f"{bits:g} bits"
    )
    settings["allocation"]["bits_per_element"] = bits
    for kind in KINDS:
        settings["cache"][kind]["max_bits"] = min(math.floor(bits) + 2, 7)
    return settings


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """The content of a shipped recipe, of a ``kvq-BITS`` recipe such as ``kvq-3.25``, or of a YAML file.

    Raises:
        ConfigError: no such recipe or file, or not a YAML mapping.
    """
    if budget := re.fullmatch(r"kvq-(\d+(?:\.\d+)?)", name_or_file):
        return _of_budget(float(budget[1]))
    if name_or_file in recipe_names():
        text = (shipped_folder("configs") / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"no recipe or file {name_or_file!r}; the recipes are {', '.join(recipe_names())}"
            ) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name_or_file} is not a mapping of settings")
    return content


def calibration_config(
    recipe: str,
    *,
    command_line: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> CalibrationConfig:
    """Merge a recipe file, the command line's options and its ``--set`` assignments, in this order.

    Args:
        recipe: name or file.
        command_line: options by name; ``None`` for an option that was not given.
        assignments: ``path.to.key=value`` each, the value in YAML.

    Raises:
        ConfigError: in one line, which key is wrong and why.
    """
    settings = read_recipe(recipe)
    settings.update({name: value for name, value in (command_line or {}).items() if value is not None})
    for assignment in assignments:
        _assign(settings, assignment)
    _inherit_layers(settings)
    try:
        return CalibrationConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{recipe}: {first_problem(error)}") from error


def _inherit_layers(settings: dict[str, Any]) -> None:
    """Complete the overrides of layers from the cache section, in place."""
    cache = settings.get("cache")
    layers = cache.get("layers") if isinstance(cache, dict) else None
    if not isinstance(cache, dict) or not isinstance(layers, dict):
        return  # validation reports it
    whole = {kind: cache[kind] for kind in KINDS if kind in cache}
    merged: dict[Any, Any] = {}
    for name, own in layers.items():
        # A layer's number is a string in the path of an assignment, and a number in a file.
        number = int(name) if isinstance(name, str) and name.removeprefix("-").isdecimal() else name
        merged[number] = _merged(merged.get(number, whole), own)
    cache["layers"] = merged


def _merged(base: Any, own: Any) -> Any:
    """The settings of ``own``, completed from ``base`` section by section."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    return {**base, **{name: _merged(base.get(name), value) for name, value in own.items()}}


def _assign(settings: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment}: write it as KEY=VALUE, for example cache.key.bits=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: {text!r} is not a YAML value") from error
    *parents, last = path.split(".")
    place = settings
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {assignment}: {parent} is a value, not a section")
    place[last] = value
