"""GPU worker whose runner keeps positions and masks padding rows (`worker_cls`; runner V1). Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from foldserve.server.engine.padding_rows import MaskingRunner
from foldserve.server.engine.positions import PositionsRunner


class FoldGPUModelRunner(PositionsRunner, MaskingRunner, GPUModelRunner):
    """See `PositionsRunner` and `MaskingRunner`."""


class FoldWorker(Worker):
    """Modifications: another runner class."""

    def _make_model_runner(self) -> GPUModelRunner:
        return FoldGPUModelRunner(self.vllm_config, self.device)
