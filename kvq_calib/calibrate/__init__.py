"""From a model and text to statistics: capture, Fisher information, streaming accumulation."""
