"""Data types that describe a quantized cache: specs, geometry, recipes."""
