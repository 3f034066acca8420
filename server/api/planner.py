"""From a request's reductions to one plan per image, with every refusal that needs to know the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, make_plan
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.schema import Defaults, FoldChatRequest
from foldserve.server.engine.withdrawal import Room, refuse_request


@dataclass(frozen=True, slots=True)
class Planner:
    """What plans depend on beside the request.

    Attributes:
        geometry: of the served model; None where it can't reduce.
        defaults: what applies where a request says nothing.
        withdraw_layer: K of the server, or None.
        room: that a prompt has in one step of the engine.
    """

    geometry: VisionGeometry | None
    defaults: Defaults
    withdraw_layer: int | None
    room: Room

    def plan(self, request: FoldChatRequest) -> tuple[list[Reduction], list[Plan]]:
        """One reduction and one plan per image, in prompt order; no plans where the model can't reduce.

        Raises:
            InvalidRequest, InvalidReduction: the server can't do what is asked.
        """
        reductions = request.image_reductions(self.defaults)
        self._check_withdrawal(request, reductions)
        if self.geometry is None:
            if any(reduction != Reduction() for reduction in reductions):
                raise InvalidRequest("this model's vision tower can't reduce: leave `reduction` out", "reduction")
            return reductions, []
        try:
            return reductions, [make_plan(reduction, self.geometry) for reduction in reductions]
        except InvalidReduction as error:
            if request.reduction_ratio is not None:
                raise InvalidRequest(str(error), "reduction_ratio") from error
            raise

    def _check_withdrawal(self, request: FoldChatRequest, reductions: Sequence[Reduction]) -> None:
        in_decoder = next((reduction.decoder for reduction in reductions if reduction.decoder), None)
        if in_decoder and self.withdraw_layer is None:
            raise InvalidRequest(
                f"this server has no layer K to run {in_decoder!r} at: start it with --withdraw-layer K",
                "reduction.withdraw" if in_decoder == "withdraw" else "reduction.method",
            )
        withdraws = in_decoder is not None
        try:
            refuse_request(withdraws=withdraws, prompt_logprobs=request.prompt_logprobs)
        except ValueError as error:
            raise InvalidRequest(str(error), "prompt_logprobs") from error
