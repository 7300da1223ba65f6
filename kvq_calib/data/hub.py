"""Wikitext-2 and C4 from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import huggingface_hub.constants

from kvq_calib.errors import DataError, one_line
from kvq_calib.model.hub import hub_reachable, quiet

__all__ = ["C4_EVALUATION_DOCUMENTS", "c4", "wikitext2"]

C4_EVALUATION_DOCUMENTS = 1100
"""Documents of the validation shard that the literature joins for evaluation."""

_T = TypeVar("_T")

_C4_FILES = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}


def wikitext2(split: Literal["calibration", "evaluation"]) -> list[str]:
    """Return the lines of Wikitext-2 raw: the train split for calibration, the test split for evaluation."""
    part = "train" if split == "calibration" else "test"

    def read(datasets: Any) -> list[str]:
        return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])

    return _from_hub("wikitext2", read)


def c4(split: Literal["calibration", "evaluation"]) -> Iterator[str]:
    """Yield documents of the first English shard as they arrive: train for calibration, validation for evaluation."""
    part, file = _C4_FILES[split]

    def read(datasets: Any) -> Iterator[str]:
        stream = datasets.load_dataset("allenai/c4", data_files={part: file}, split=part, streaming=True)
        rows = iter(stream)
        first = next(rows)  # the connection is made here
        return (row["text"] for row in itertools.chain([first], rows))

    return _from_hub("c4", read)


def _from_hub(name: str, read: Callable[[Any], _T]) -> _T:
    """Call `read(datasets)`. Without network, only data in the local cache can be read."""
    import datasets  # the import takes a second, and only these two data sets need it

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
        stack.callback(datasets.logging.set_verbosity, verbosity)
        if bars:
            stack.callback(datasets.enable_progress_bars)
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        if not hub_reachable():
            holders: tuple[Any, Any] = (datasets.config, huggingface_hub.constants)
            for constants in holders:
                stack.callback(setattr, constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
                constants.HF_HUB_OFFLINE = True
        try:
            return read(datasets)
        except Exception as error:
            raise DataError(
                f"cannot load {name} from the hub ({one_line(error)}); without network use python-docs, "
                "or the path of a file of text or of a folder of those"
            ) from error
