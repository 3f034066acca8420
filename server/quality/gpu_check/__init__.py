"""`foldserve gpu-check`: stages that say whether a machine's GPU computes what it should, each in processes of its own.

What is asked and what is made of the answers is here; the processes, which import vLLM, are `quality/engine/gpu_check`.
"""
