"""What an engine with a given configuration would be: vLLM's choices and our arithmetic, before anything is loaded."""
