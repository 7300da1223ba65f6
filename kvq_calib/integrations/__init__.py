"""Where artifacts and packed caches plug into other projects; ``docs/guides/integrations.md`` describes each."""
