"""What can be said of a quantized cache: specs, geometry, recipes."""
