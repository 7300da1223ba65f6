"""Passes of text through a model, which fill the statistics.

A pass uses keys, views and windows, but no recipes or codecs. Ranks share the windows, and their statistics are added
at the end of each pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvq_calib.calibrate.checkpoint import Checkpoint, RunState
from kvq_calib.calibrate.clock import Clock, Progress
from kvq_calib.calibrate.distributed import added_over_ranks, world
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.plan import Captured, Key, ObservedKey, Table, View
from kvq_calib.calibrate.statistics import Statistics
from kvq_calib.calibrate.texts import Window
from kvq_calib.model.capture import LayerKV, capture
from kvq_calib.model.placement import input_device
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["Passes", "observe_window"]


@dataclass(frozen=True)
class Passes:
    """Runs text through a model.

    Attributes:
        model: causal language model in eval mode.
        geometry: geometry of the model.
        state: state of this rank; finished steps are not repeated.
        totals: statistics of all ranks, of finished parts.
        checkpoint: saves ``state``.
        clock: measures every part.
        progress: called after every step.
        recompute: recompute layers in the backward pass.
    """

    model: Any
    geometry: KVGeometry
    state: RunState
    totals: Table
    checkpoint: Checkpoint
    clock: Clock
    progress: Progress
    recompute: bool = False

    def observe(self, part: str, keys: Sequence[ObservedKey[Any, Any]], windows: Sequence[Window]) -> None:
        """Collect the statistics of keys from their windows. There is a backward pass if any key needs gradients.

        Raises:
            CalibrationError: activations or gradients are not finite.
        """
        self.prepare(keys)
        observation = _Observation(keys, self.geometry, self.state.statistics, self.totals)
        forward = self.clock.timing(part, observation.see)
        backward = self.clock.timing(part, observation.see_gradients)

        def step(number: int) -> None:
            observation.window = windows[number]
            ids = observation.window.ids.to(input_device(self.model))
            if observation.needs_gradients:
                fisher_pass(self.model, ids, backward, on_forward=forward, recompute=self.recompute)
            else:
                forward_pass(self.model, ids)

        if observation.needs_gradients:
            self.steps(part, len(windows), step, keys)
        else:
            with torch.no_grad(), capture(self.model, forward):
                self.steps(part, len(windows), step, keys)

    def prepare(self, keys: Sequence[Key[Any]]) -> None:
        """Make the statistics that were not in the checkpoint."""
        for key in keys:
            if key not in self.state.statistics:
                self.state.statistics.put(key, key.empty(self.geometry))

    def steps(self, part: str, count: int, step: Callable[[int], None], keys: Sequence[Key[Any]]) -> None:
        """Run the remaining steps of this rank, then add the statistics of all ranks.

        Args:
            part: name of the part, for the user.
            count: number of steps of all ranks.
            step: called with the number of the step.
            keys: keys of the statistics that the steps update.
        """
        rank, ranks = world()
        mine = range(rank, count, ranks)
        started = time.monotonic()
        for done, number in enumerate(mine, start=1):
            if done <= self.state.done.get(part, 0):
                continue
            step(number)
            self.state.done[part] = done
            self.progress(part, done, len(mine))
            # What follows the last step may take long, such as training, or the next part of a large model.
            self.checkpoint.save(self.state, at_once=done == len(mine))
        for key in keys:
            self.totals.put(key, added_over_ranks(self.state.statistics.get(key)))
        self.clock.finished(part, started)


def forward_pass(model: Any, ids: Tensor) -> None:
    """A forward pass for the hooks only, without the model's head."""
    model.base_model(input_ids=ids, use_cache=False)


def observe_window(
    model: Any, geometry: KVGeometry, keys: Sequence[ObservedKey[Any, Any]], window: Window
) -> Table:
    """The statistics of keys from the forward pass of one window.

    Raises:
        CalibrationError: activations are not finite.
    """
    found = Table()
    for key in keys:
        found.put(key, key.empty(geometry))
    observation = _Observation(keys, geometry, found, Table())
    observation.window = window
    with torch.no_grad(), capture(model, observation.see):
        forward_pass(model, window.ids.to(input_device(model)))
    return found


@dataclass(frozen=True)
class _Reading:
    """A view of one layer, and the statistics that use it."""

    view: View[Any]
    read: Callable[[Captured], Any]
    takers: list[tuple[ObservedKey[Any, Any], Statistics]]


class _Observation:
    """Passes captured layers on to the keys that use the current window.

    Args:
        keys: keys of the pass.
        geometry: geometry of the model.
        statistics: statistics of the keys.
        totals: statistics of earlier stages.
    """

    def __init__(
        self, keys: Sequence[ObservedKey[Any, Any]], geometry: KVGeometry, statistics: Table, totals: Table
    ) -> None:
        self.window: Window | None = None
        readings: dict[View[Any], _Reading] = {}
        for key in keys:
            if key.view not in readings:
                readings[key.view] = _Reading(key.view, key.view.reader(geometry, totals), [])
            readings[key.view].takers.append((key, statistics.get(key)))
        self.needs_gradients = any(view.needs_gradients for view in readings)
        self._readings: dict[tuple[int, bool], list[_Reading]] = {}
        for view, reading in readings.items():
            self._readings.setdefault((view.tensor.layer, view.needs_gradients), []).append(reading)

    def see(self, kv: LayerKV) -> None:
        """Process a layer in the forward pass."""
        self._hand_out(Captured(kv), needs_gradients=False)

    def see_gradients(self, kv: LayerKV, keys: Tensor, values: Tensor) -> None:
        """Process a layer in the backward pass."""
        self._hand_out(Captured(kv, (keys, values)), needs_gradients=True)

    def _hand_out(self, captured: Captured, needs_gradients: bool) -> None:
        assert self.window is not None
        for reading in self._readings.get((captured.kv.layer, needs_gradients), ()):
            if reading.view.text.takes(self.window):
                seen = reading.read(captured)
                for key, statistics in reading.takers:
                    key.add(statistics, seen)
