"""The artifact: one file with everything a reader needs."""
