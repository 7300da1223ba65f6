"""Rivals: other ways to quantize a cache, which ``kvq-eval compare`` measures beside artifacts.

Each rival is one short class. :mod:`~kvq_calib.evaluate.rivals.base` has the hooks, the shapes and the count of bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvq_calib.errors import ConfigError
from kvq_calib.evaluate.rivals.base import Rival
from kvq_calib.evaluate.rivals.fp8 import FP8
from kvq_calib.evaluate.rivals.ggml import GGML
from kvq_calib.evaluate.rivals.kivi import KIVI
from kvq_calib.evaluate.rivals.kvarn import KVarN
from kvq_calib.evaluate.rivals.oscar import OscarStyle
from kvq_calib.evaluate.rivals.transformers_cache import TransformersCache
from kvq_calib.evaluate.rivals.turboquant import TurboQuant

__all__ = ["Rival", "make_rivals", "rival_names"]


def _all() -> tuple[Rival, ...]:
    return (
        FP8("tensor"),
        FP8("head"),
        GGML(8),
        GGML(5, offset=True),
        GGML(5),
        GGML(4, offset=True),
        GGML(4),
        TransformersCache("hqq", 4),
        TransformersCache("hqq", 2),
        TransformersCache("quanto", 4),
        TransformersCache("quanto", 2),
        KIVI(4),
        KIVI(2),
        KVarN(4, 2),
        KVarN(2, 2),
        TurboQuant(8, 4),
        TurboQuant(4, 4),
        TurboQuant(3, 4),
        TurboQuant(3, 3),
        TurboQuant(4, 4, kept_layers=0),
        TurboQuant(3, 3, kept_layers=0),
        OscarStyle(),
        OscarStyle(sinks=4, recent=0),
    )


def rival_names() -> list[str]:
    """Names of all rivals, in the order of the report."""
    return [rival.name for rival in _all()]


def make_rivals(names: Iterable[str] = ()) -> list[Rival]:
    """Rivals by name, without repetition; all of them if none is named.

    Raises:
        ConfigError: there is no such rival; the message lists them.
    """
    known = {rival.name: rival for rival in _all()}
    chosen = list(dict.fromkeys(names)) or list(known)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"unknown rival {name!r}; use one of {', '.join(known)}")
    return [known[name] for name in chosen]
