"""Logs: request ids, one line per request, text or JSON. Never imports vllm: the engine's processes load it first."""
