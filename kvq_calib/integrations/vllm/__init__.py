"""The packed cache inside vLLM: an attention backend registered from outside. ``docs/guides/integrations.md`` is its manual.

``pages``, ``step``, ``layer`` and ``checks`` know nothing of vLLM and are tested without it; ``plugin``, ``spec`` and
``backend`` are what vLLM sees.
"""
