"""kvq-calib: calibrated low-bit key-value caches for language models.

``KVArtifact`` is the file a calibration run writes; ``KVQCache`` is the packed cache that uses it. Both are imported
on first use, so that ``import kvq_calib`` and ``--help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.runtime import KVQCache

__all__ = ["KVArtifact", "KVQCache"]

_HOMES = {"KVArtifact": "kvq_calib.artifact.artifact", "KVQCache": "kvq_calib.runtime"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvq_calib' has no attribute {name!r}")
