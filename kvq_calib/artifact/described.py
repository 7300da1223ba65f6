"""What an artifact says of itself, for what is written about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from kvq_calib.schema.spec import KVCacheSpec

__all__ = ["Described"]


class Described(Protocol):
    """A :class:`~kvq_calib.artifact.artifact.KVArtifact`, as far as cards, commands and uploads see it."""

    @property
    def spec(self) -> KVCacheSpec:
        """How keys and values are quantized."""

    @property
    def model(self) -> Mapping[str, Any]:
        """The model it is for."""

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Where its numbers come from."""

    def bits_per_element(self, context: int) -> float:
        """Everything stored for ``context`` tokens, in bits, over the numbers an unquantized cache would hold."""

    def to_bytes(self) -> bytes:
        """The file's content."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
