"""Numerical fitting: from weighted statistics to levels and widths."""
