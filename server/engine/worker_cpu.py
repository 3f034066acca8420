"""CPU worker of every engine (`worker_cls`)."""

from __future__ import annotations

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from foldserve.server.engine import withdrawal
from foldserve.server.engine.grid_map import MappingWorker
from foldserve.server.engine.padding_rows import MaskingRunner
from foldserve.server.engine.runner_v1 import PositionsRunner
from foldserve.server.engine.withdrawal.runner_v1 import WithdrawingRunner


class FoldCPUModelRunner(PositionsRunner, MaskingRunner, CPUModelRunner):
    """See `PositionsRunner` and `MaskingRunner`."""


class WithdrawingCPUModelRunner(WithdrawingRunner, FoldCPUModelRunner):
    """See `WithdrawingRunner`."""


class FoldWorker(MappingWorker, CPUWorker):
    """Modification beside `MappingWorker`'s: V1 runners of ours. Model runner V2 asks the model for its state, which
    is ours as well.
    """

    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            withdraws = withdrawal.withdraw_layer(self.vllm_config) is not None
            runner = WithdrawingCPUModelRunner if withdraws else FoldCPUModelRunner
            self.model_runner = runner(self.vllm_config, self.device)
