"""CPU worker with the withdrawing runner (`worker_cls`; model runner V1)."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from foldserve.server.engine.withdrawal.runner_v1 import WithdrawingRunner
from foldserve.server.engine.worker_cpu import FoldCPUModelRunner


class WithdrawingCPUModelRunner(WithdrawingRunner, FoldCPUModelRunner):
    """See `WithdrawingRunner`."""


class WithdrawingWorker(CPUWorker):
    """Modifications: another runner class."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = WithdrawingCPUModelRunner(self.vllm_config, self.device)
