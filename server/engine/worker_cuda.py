"""GPU worker whose runner keeps positions (`worker_cls`; model runner V1). Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from foldserve.server.engine.positions import PositionsRunner


class FoldGPUModelRunner(PositionsRunner, GPUModelRunner):
    """See `PositionsRunner`."""


class FoldWorker(Worker):
    """Modifications: another runner class."""

    def _make_model_runner(self) -> GPUModelRunner:
        return FoldGPUModelRunner(self.vllm_config, self.device)
