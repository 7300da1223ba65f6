"""Calibration: from a model and text to artifacts, by streaming statistics and fits."""
