"""kvq-calib: calibrated low-bit KV caches."""
