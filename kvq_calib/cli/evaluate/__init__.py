"""The commands of ``kvq-eval``."""
