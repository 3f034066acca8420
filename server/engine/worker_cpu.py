"""CPU worker whose runner keeps positions and masks padding rows (`worker_cls`; model runner V1)."""

from __future__ import annotations

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from foldserve.server.engine.padding_rows import MaskingRunner
from foldserve.server.engine.positions import PositionsRunner


class FoldCPUModelRunner(PositionsRunner, MaskingRunner, CPUModelRunner):
    """See `PositionsRunner` and `MaskingRunner`."""


class FoldWorker(CPUWorker):
    """Modifications: another runner class."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = FoldCPUModelRunner(self.vllm_config, self.device)
