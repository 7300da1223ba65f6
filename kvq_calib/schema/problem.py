"""The first error of a validation, as one line."""

from __future__ import annotations

from pydantic import ValidationError

__all__ = ["first_problem"]

#: Keys of older recipes and artifacts, and what replaces each of them.
_RENAMED = {
    "granularity": "thresholds: channel, token, token_normalized or channel_online",
    "dynamic": "thresholds: channel, token, token_normalized or channel_online",
    "channel_normalized": "thresholds: token_normalized",
    "datatype": "levels: uniform, normal_float or kmeans",
    "variable_bits": "codec: trellis with max_bits",
    "trellis": "codec: trellis",
    "phase": "pair_rotation of the trellis codec",
    "feedback": "error_compensation of the trellis codec",
    "feedback_rank": "error_compensation.rank",
    "sweeps": "error_compensation.refinement_passes",
    "importance": "token_weighting of the trellis codec",
    "foreign": "vocabulary_samples",
    "first_layer": "first_layer_weight",
    "written": "self_generated",
}


def first_problem(error: ValidationError) -> str:
    """A pydantic error as one line: the first key that is wrong, and why."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        now = _RENAMED.get(str(problem["loc"][-1]))
        message = "no such key" if now is None else f"no such key any more; write {now}"
    return f"{place}: {message}" if place else message
