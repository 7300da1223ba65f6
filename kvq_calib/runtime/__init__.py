"""The packed key-value cache, and attention over it."""

from kvq_calib.runtime.attention import attach, attached, detach
from kvq_calib.runtime.cache import KVQCache
from kvq_calib.runtime.captured import captured_steps

__all__ = ["KVQCache", "attach", "attached", "captured_steps", "detach"]
