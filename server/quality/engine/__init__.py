"""vLLM's engine offline: a model that is asked, and one that is looked into."""
