"""Use of artifacts and packed caches in other projects; ``docs/guides/integrations.md`` describes them."""
