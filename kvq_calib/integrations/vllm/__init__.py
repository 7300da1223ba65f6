"""The packed cache in vLLM, as an attention backend; see ``docs/guides/integrations.md``.

``pages``, ``step``, ``layer`` and ``checks`` do not depend on vLLM and are tested without it. ``plugin``, ``spec`` and
``backend`` are the interface to vLLM.
"""
