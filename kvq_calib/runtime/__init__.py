"""The packed key-value cache and attention over it."""
