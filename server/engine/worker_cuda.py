"""GPU worker of every engine (`worker_cls`). Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from foldserve.server.engine import withdrawal
from foldserve.server.engine.grid_map import MappingWorker
from foldserve.server.engine.padding_rows import MaskingRunner
from foldserve.server.engine.runner_v1 import PositionsRunner
from foldserve.server.engine.withdrawal.runner_v1 import WithdrawingRunner


class FoldGPUModelRunner(PositionsRunner, MaskingRunner, GPUModelRunner):
    """See `PositionsRunner` and `MaskingRunner`."""


class WithdrawingGPUModelRunner(WithdrawingRunner, FoldGPUModelRunner):
    """See `WithdrawingRunner`."""


class FoldWorker(MappingWorker, Worker):
    """Modification beside `MappingWorker`'s: V1 runners of ours. Model runner V2 asks the model for its state, which
    is ours as well.
    """

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            return super()._make_model_runner()
        withdraws = withdrawal.withdraw_layer(self.vllm_config) is not None
        return (WithdrawingGPUModelRunner if withdraws else FoldGPUModelRunner)(self.vllm_config, self.device)
