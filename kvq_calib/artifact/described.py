"""The interface of artifacts that model cards, commands and uploads use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from kvq_calib.schema.spec import KVCacheSpec

__all__ = ["Described"]


class Described(Protocol):
    """The part of :class:`~kvq_calib.artifact.artifact.KVArtifact` that model cards, commands and uploads use."""

    @property
    def spec(self) -> KVCacheSpec:
        """How keys and values are quantized."""

    @property
    def model(self) -> Mapping[str, Any]:
        """The model it is for."""

    @property
    def calibration(self) -> Mapping[str, Any]:
        """How it was calibrated."""

    def bits_per_element(self, context: int) -> float:
        """All bits stored for ``context`` tokens, divided by the numbers in an unquantized cache."""

    def to_bytes(self) -> bytes:
        """The content of the file."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
