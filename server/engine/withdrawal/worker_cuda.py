"""GPU worker with the withdrawing runner (`worker_cls`; model runner V1). Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from foldserve.server.engine.withdrawal.runner_v1 import WithdrawingRunner
from foldserve.server.engine.worker_cuda import FoldGPUModelRunner


class WithdrawingGPUModelRunner(WithdrawingRunner, FoldGPUModelRunner):
    """See `WithdrawingRunner`."""


class WithdrawingWorker(Worker):
    """Modifications: another runner class."""

    def _make_model_runner(self) -> GPUModelRunner:
        return WithdrawingGPUModelRunner(self.vllm_config, self.device)
