"""The artifact: one file that says everything a reader needs."""
