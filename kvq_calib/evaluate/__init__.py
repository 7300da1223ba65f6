"""What an artifact costs and what it saves."""
