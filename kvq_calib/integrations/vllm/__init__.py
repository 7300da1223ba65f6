"""The packed cache inside vLLM, as an attention backend; ``docs/guides/integrations.md`` is its manual.

``pages``, ``step``, ``layer`` and ``checks`` know nothing of vLLM and are tested without it; ``plugin``, ``spec`` and
``backend`` are what vLLM sees.
"""
