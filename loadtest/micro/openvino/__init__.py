"""Benchmark against OpenVINO GenAI, which also has a ratio per request, on one CPU."""
