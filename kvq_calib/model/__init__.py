"""The only folder that knows transformers: loading, interception, geometry, rotary embeddings."""
