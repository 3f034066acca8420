"""`foldserve gpu-check`: stages that check whether a machine's GPU computes what it should.

The stages and their verdicts are here. The jobs that they run in processes of their own, which import vLLM, are in
`quality/engine/gpu_check`.
"""
