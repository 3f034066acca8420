"""GPU worker of every engine (`worker_cls`). Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from foldserve.server.engine import withdrawal
from foldserve.server.engine.grid_map import MappingWorker
from foldserve.server.engine.padding_rows import MaskingRunner
from foldserve.server.engine.runner_v1 import PositionsRunner
from foldserve.server.engine.tower_graphs import CapturingRunner, check_captured
from foldserve.server.engine.withdrawal.runner_v1 import WithdrawingRunner


class FoldGPUModelRunner(PositionsRunner, MaskingRunner, CapturingRunner, GPUModelRunner):
    """See `PositionsRunner`, `MaskingRunner` and `CapturingRunner`."""


class WithdrawingGPUModelRunner(WithdrawingRunner, FoldGPUModelRunner):
    """See `WithdrawingRunner`."""


class FoldWorker(MappingWorker, Worker):
    """Modifications beside `MappingWorker`'s:

    - V1 runners of ours. Model runner V2 asks the model for its state, which is ours as well;
    - start-up fails if the configuration asks for CUDA graphs of the tower and vLLM captured none.
    """

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            return super()._make_model_runner()
        withdraws = withdrawal.withdraw_layer(self.vllm_config) is not None
        return (WithdrawingGPUModelRunner if withdraws else FoldGPUModelRunner)(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        check_captured(self.get_model())
        return times
