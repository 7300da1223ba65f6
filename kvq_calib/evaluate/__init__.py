"""Measurements of what an artifact costs and saves."""
