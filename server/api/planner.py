"""From a request's reductions to one plan per image, with every refusal that needs to know the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, make_plan
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.engine.positions import CANNOT_KEEP, refuse_positions
from foldserve.server.engine.withdrawal import Room, refuse_request
from foldserve.server.settings import Settings

_NOTHING = Reduction()


@dataclass(frozen=True, slots=True)
class Planner:
    """What plans depend on beside the request.

    Attributes:
        geometry: of the served model; None where it can't reduce.
        settings: the server's; what applies where a request says nothing is among them.
        room: that a prompt has in one step of the engine.
        positions: rotary positions that the model was trained for; None where the engine's runner can't keep those of
            the tokens that stay.
    """

    geometry: VisionGeometry | None
    settings: Settings
    room: Room
    positions: int | None = None

    def plan(self, request: FoldChatRequest) -> tuple[list[Reduction], list[Plan]]:
        """One reduction and one plan per image, in prompt order; no plans where the model can't reduce.

        Raises:
            InvalidRequest, InvalidReduction: the server can't do what is asked.
        """
        reductions = [self._with_positions(reduction) for reduction in request.image_reductions(self.settings)]
        self._check_withdrawal(request, reductions)
        if self.geometry is None:
            if any(reduction != _NOTHING for reduction in reductions):
                raise InvalidRequest("this model's vision tower can't reduce: leave `reduction` out", "reduction")
            return reductions, []
        try:
            return reductions, [make_plan(reduction, self.geometry) for reduction in reductions]
        except InvalidReduction as error:
            if request.reduction_ratio is not None:
                raise InvalidRequest(str(error), "reduction_ratio") from error
            raise

    def check_positions(self, plans: Sequence[Plan], prompt_tokens: int, request: FoldChatRequest) -> None:
        """Sees to it that no token gets a position that the model was not trained for.

        Tokens that keep their positions leave gaps, so that the prompt takes more positions than it has tokens. An
        answer whose length is left open ends where the positions do.

        Raises:
            InvalidRequest: the prompt, or the answer asked for, goes beyond.
        """
        gaps = sum(plan.removed for plan in plans if plan.keeps_positions)
        if not gaps or self.positions is None:
            return
        asked = request.max_completion_tokens or request.__dict__.get("max_tokens")  # deprecated: a read of it warns
        try:
            refuse_positions(prompt_tokens, gaps, asked or 1, self.positions)
        except InvalidReduction as error:
            raise InvalidRequest(str(error), "reduction.positions") from error
        if asked is None:
            request.max_completion_tokens = self.positions - prompt_tokens - gaps

    def _with_positions(self, reduction: Reduction) -> Reduction:
        """The server's default where the request leaves positions open, as far as anything is removed."""
        if reduction.positions is None and (reduction.ratio or reduction.keep_tokens):
            reduction = replace(reduction, positions=self.settings.positions)
        if reduction.positions == "keep" and self.positions is None:
            raise InvalidRequest(CANNOT_KEEP, "reduction.positions")
        return reduction

    def _check_withdrawal(self, request: FoldChatRequest, reductions: Sequence[Reduction]) -> None:
        in_decoder = next((reduction.decoder for reduction in reductions if reduction.decoder), None)
        if in_decoder and self.settings.withdraw_layer is None:
            raise InvalidRequest(
                f"this server has no layer K to run {in_decoder!r} at: start it with --withdraw-layer K",
                "reduction.withdraw" if in_decoder == "withdraw" else "reduction.method",
            )
        withdraws = in_decoder is not None
        try:
            refuse_request(withdraws=withdraws, prompt_logprobs=request.prompt_logprobs)
        except ValueError as error:
            raise InvalidRequest(str(error), "prompt_logprobs") from error
