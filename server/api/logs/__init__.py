"""Logs: request ids, one line per request, text or JSON. Nothing here imports vllm: the engine's processes load it."""
