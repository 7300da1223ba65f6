"""Figures of the pages on the method, from records and committed artifacts."""

from __future__ import annotations

from collections.abc import Callable

from kvq_calib.evaluate.charts.chart import Chart, Palette

METHOD_FIGURES: dict[str, Callable[[Palette], Chart]] = {}
