"""Checkpoints: the state of a run on disk, so that an interrupted run can continue."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kvq_calib.artifact.sealed import SealError, read_sealed, seal
from kvq_calib.calibrate.plan import Key, Table
from kvq_calib.calibrate.statistics import Statistics
from kvq_calib.errors import CalibrationError
from kvq_calib.files import write_atomically
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["CHECKPOINT_SECONDS", "VERSION", "Checkpoint", "RunState"]

#: Seconds between checkpoints. Little work is lost, and the time for writing is negligible.
CHECKPOINT_SECONDS = 30.0
#: Increased when the statistics or the file format change, so that older checkpoints are refused.
VERSION = 4
_METADATA_KEY = "kvq_checkpoint"


@dataclass
class RunState:
    """The progress of this rank.

    Attributes:
        statistics: statistics of the text that this rank has seen.
        done: number of finished steps of each part.
    """

    statistics: Table = field(default_factory=Table)
    done: dict[str, int] = field(default_factory=dict)


class Checkpoint:
    """The file with a run's state. Its tensors are named by the position of their key in the plan.

    Args:
        file: file of this rank; ``None`` for no checkpoint.
        identity: digest of everything that must be equal in the checkpoint and the run.
        keys: keys of all statistics that the run can have, in a fixed order.
    """

    def __init__(self, file: Path | None, identity: str, keys: Sequence[Key[Any]]) -> None:
        self._file, self._identity, self._keys = file, identity, tuple(keys)
        self._saved_at = time.monotonic()
        self._saving = 0.0

    def load(self, geometry: KVGeometry) -> RunState:
        """Load the state of an interrupted run; an empty state if there is no file.

        Args:
            geometry: geometry of the model.

        Raises:
            CalibrationError: the file is not a checkpoint, is damaged, or belongs to another run.
        """
        state = RunState()
        if self._file is None or not self._file.exists():
            return state
        try:
            metadata, tensors = read_sealed(self._file, _METADATA_KEY, self._check_identity)
        except SealError as error:
            raise self._problem(str(error)) from error
        state.done.update(self._done(metadata.get("done")))
        for position in self._positions(metadata.get("positions")):
            key = self._keys[position]
            statistics = key.empty(geometry)
            statistics.load(self._taken(tensors, position, statistics))
            state.statistics.put(key, statistics)
        if tensors:
            raise self._problem(f"tensor {sorted(tensors)[0]!r} is unknown")
        return state

    def _check_identity(self, metadata: Mapping[str, Any]) -> None:
        if metadata.get("identity") != self._identity:
            raise CalibrationError(
                f"{self._file} belongs to a run with other settings, data, model or version; remove it, "
                "or run without --resume"
            )

    def _problem(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"{self._file} is not a checkpoint of this run ({what[:200]}); remove it, or run without --resume"
        )

    def _done(self, stated: Any) -> dict[str, int]:
        """Number of finished steps of each part, from the metadata."""
        if not isinstance(stated, dict) or any(type(n) is not int or n < 0 for n in stated.values()):
            raise self._problem("'done' does not hold a number of steps for each part")
        return stated

    def _positions(self, stated: Any) -> list[int]:
        """Positions of the keys that have statistics in the file."""
        known = range(len(self._keys))
        if not isinstance(stated, list) or any(type(n) is not int or n not in known for n in stated):
            raise self._problem("'positions' does not name statistics of this run")
        if len(set(stated)) != len(stated):
            raise self._problem("'positions' names statistics twice")
        return stated

    def _taken(self, tensors: dict[str, Tensor], position: int, empty: Statistics) -> dict[str, Tensor]:
        """The tensors of one key, removed from ``tensors``. They must be like those of ``empty`` statistics."""
        found = {}
        for name, like in empty.state().items():
            tensor = tensors.pop(_name(position, name), None)
            if tensor is None:
                raise self._problem(f"tensor {_name(position, name)!r} is missing")
            if (tensor.dtype, tensor.shape) != (like.dtype, like.shape):
                raise self._problem(
                    f"tensor {_name(position, name)!r} is {tensor.dtype} {list(tensor.shape)}, not {like.dtype} "
                    f"{list(like.shape)}"
                )
            found[name] = tensor
        if not empty.is_possible(found):
            raise self._problem(
                f"tensor {_name(position, min(found))!r}, or one beside it, has impossible values"
            )
        return found

    def save(self, state: RunState, at_once: bool = False) -> None:
        """Write the state, if enough time has passed since the last time.

        Args:
            state: state of this rank.
            at_once: write in any case.
        """
        started = time.monotonic()
        # Large states are written less often: writing takes at most a thirtieth of the time.
        wait = 0.0 if at_once else CHECKPOINT_SECONDS * max(1.0, self._saving)
        if self._file is None or started - self._saved_at < wait:
            return
        position = {key: number for number, key in enumerate(self._keys)}
        tensors = {
            _name(position[key], name): tensor.detach().cpu().contiguous()
            for key, statistics in state.statistics.items()
            for name, tensor in statistics.state().items()
        }
        header = {
            "identity": self._identity,
            "done": state.done,
            "positions": [position[key] for key, _ in state.statistics.items()],
        }
        write_atomically(self._file, seal(_METADATA_KEY, header, tensors))
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - started

    def remove(self) -> None:
        """Remove the file, if it exists."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _name(position: int, tensor: str) -> str:
    return f"{position}/{tensor}"


def file_of_rank(file: Path, rank: int, ranks: int) -> Path:
    """The checkpoint file of one rank."""
    return file if ranks == 1 else file.with_name(f"{file.name}.rank{rank}")
