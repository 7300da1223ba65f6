"""Everything that depends on transformers: loading, interception, geometry, rotary embeddings."""
