"""From weighted statistics to codebooks."""
