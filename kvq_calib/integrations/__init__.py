"""The places of other projects that artifacts and packed caches plug into; ``docs/integrations.md`` describes each."""
