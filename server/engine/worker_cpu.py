"""CPU worker whose runner keeps positions (`worker_cls`; model runner V1)."""

from __future__ import annotations

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from foldserve.server.engine.positions import PositionsRunner


class FoldCPUModelRunner(PositionsRunner, CPUModelRunner):
    """See `PositionsRunner`."""


class FoldWorker(CPUWorker):
    """Modifications: another runner class."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = FoldCPUModelRunner(self.vllm_config, self.device)
