"""vLLM's offline engine: models that answer questions, and models whose inner states are read."""
