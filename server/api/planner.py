"""Turns a request into reductions of its images and videos, and refuses what it can without fetching them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain

from foldserve.reducers import METHODS
from foldserve.reducers.item import ItemPlan, Layout, check_reduction, plan_item
from foldserve.reducers.method import AcrossFrames
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.reducers.reduction import Positions
from foldserve.server.api.auto import AutoChooser, AutoRatio
from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.engine.encoder_budget import EncoderBudget
from foldserve.server.engine.family import LOW_DETAIL_RATIO, Family, Modality
from foldserve.server.engine.positions import CANNOT_KEEP, refuse_positions
from foldserve.server.engine.query import with_query
from foldserve.server.engine.withdrawal import StepCapacity, refuse_request
from foldserve.server.settings import Settings

_NOTHING = Reduction()


@dataclass(frozen=True, slots=True)
class Planner:
    """What plans depend on besides the request. The processor makes them once it has the images.

    Raises ValueError if the operator wants base tiles of a model whose images have none, or a pixel cap where pixels
    can't be compared.

    Attributes:
        family: of the served model; None where it can't reduce.
        step_capacity: that a prompt has in one step of the engine.
        positions: rotary positions that the model was trained for; None where the engine's runner can't keep those of
            the tokens that stay.
        encoder: what the tower takes at once; None where it is not reduced.
    """

    family: Family | None
    settings: Settings
    step_capacity: StepCapacity
    positions: int | None = None
    encoder: EncoderBudget | None = None
    chooser: AutoChooser = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chooser", AutoChooser(self.settings))
        self._check_cap()
        if self.settings.several_images == "tiles":
            return
        if self.family is None or self.family.largest.tiling is None:
            raise ValueError(
                "--several-images base needs a model that lays images out in tiles, which this one does not"
            )

    @property
    def default_positions(self) -> Positions:
        """Positions for requests with the server's default method that do not name any."""
        if self.settings.positions is None and self.family is not None:
            return self.family.default_positions(self.settings.default_reduction)
        return self.settings.positions or "renumber"

    def check(self, request: FoldChatRequest) -> dict[Modality, list[Reduction]]:
        """One reduction per image and per video, in prompt order; nothing is fetched.

        If a method takes a query and the request names none, the query is the text of the item's message.

        Raises:
            InvalidRequest, InvalidReduction: the server can't do what is asked, whatever the images are.
        """
        if isinstance(request.requested_reduction, AutoRatio):
            asked = self._automatic(request, request.requested_reduction)
        else:
            asked = request.reductions(self._defaults(request), self.low_detail)
        texts = request.progress.texts
        reductions = {
            modality: [self._with_positions(with_query(*pair)) for pair in zip(each, texts[modality], strict=True)]
            for modality, each in asked.items()
        }
        for modality, each in reductions.items():
            self._check_modality(modality, each, request)
        self._check_withdrawal(request, [*chain.from_iterable(reductions.values())])  # which an option may change
        return reductions

    def _check_cap(self) -> None:
        policy = self.settings.auto
        if policy is None or policy.pixel_cap is None:
            return
        if self.family is None or not self.family.takes_cells:
            raise ValueError(
                "--auto was calibrated with a pixel cap, but this model can't have one: calibrate it with "
                "`--pixel-cap none`"
            )

    def _automatic(self, request: FoldChatRequest, asked: AutoRatio) -> dict[Modality, list[Reduction]]:
        """Chooses the reductions for `ratio: "auto"`, and notes the choice in `request.progress`."""
        progress = request.progress
        try:
            if "video" in progress.details:
                raise InvalidReduction("ratio 'auto' was calibrated on images: give videos a number", "ratio")
            each, progress.auto = self.chooser.choose(asked, progress.owner, request.model, progress.image_names)
        except InvalidReduction as error:
            raise with_request_param(error, request) from error
        progress.image_names = []
        return {"image": each} if each else {}

    def _check_modality(self, modality: Modality, reductions: Sequence[Reduction], request: FoldChatRequest) -> None:
        family = self.family
        if family is None or modality not in family.modalities:
            if any(reduction != _NOTHING for reduction in reductions):
                raise InvalidRequest(f"this model's {modality}s can't be reduced: leave `reduction` out", "reduction")
            return
        is_image = modality == "image"
        try:
            for reduction in reductions:
                if is_image:
                    _check_for(family, family.of_image(reduction, family.largest), family.largest)
                else:
                    _check_for(family, family.of_video(reduction), family.shortest_video)
        except InvalidReduction as error:
            raise with_request_param(error, request) from error

    def check_sizes(self, planned: Mapping[Modality, Sequence[ItemPlan]]) -> None:
        """Refuses items for which the tower's memory was not measured, however little of them is kept.

        Raises LimitExceeded if one has more tokens before reduction than start-up tried.
        """
        if self.encoder is None:
            return
        for modality, plans in planned.items():
            for i, plan in enumerate(plans):
                if plan.encoded > self.encoder.tokens:
                    smaller = "a smaller one" if modality == "image" else "a smaller or shorter one"
                    raise LimitExceeded(
                        f"{modality} {i + 1} of {len(plans)} has {plan.encoded} tokens before reduction, and this "
                        f"server's vision tower takes {self.encoder.tokens} at once: send {smaller}, or start the "
                        "server with a higher --max-num-batched-tokens",
                        "messages",
                    )

    def check_positions(self, plans: Sequence[ItemPlan], prompt_tokens: int, request: FoldChatRequest) -> None:
        """Refuses positions that the model was not trained for.

        Tokens that keep their positions leave gaps, so the prompt takes more positions than it has tokens. An answer
        without a maximum length ends with the last position. Raises InvalidRequest if the prompt or the requested
        answer goes beyond.
        """
        if self.family is None or self.positions is None:
            return
        beyond = sum(map(self.family.positions_beyond_tokens, plans))
        if beyond <= 0:
            return
        asked = request.max_completion_tokens or request.__dict__.get("max_tokens")  # deprecated: a read of it warns
        try:
            refuse_positions(prompt_tokens, beyond, asked or 1, self.positions)
        except InvalidReduction as error:
            raise InvalidRequest(str(error), "reduction.positions") from error
        if asked is None:
            request.max_completion_tokens = self.positions - prompt_tokens - beyond

    @property
    def low_detail(self) -> Mapping[Modality, Reduction]:
        """The reductions for `detail: "low"`; a family may have its own for images."""
        return _low_detail(self.family, self.settings.default_reduction, self.settings.low_detail_ratio)

    def _defaults(self, request: FoldChatRequest) -> Mapping[Modality, Reduction]:
        """Reductions for images and videos of which the request says nothing."""
        default = self.settings.default_reduction
        defaults: dict[Modality, Reduction] = {"image": _of_images(default), "video": default}
        if self.settings.several_images == "base" and len(request.progress.details.get("image", ())) > 1:
            defaults["image"] = replace(defaults["image"], first="base_only")
        return defaults

    def _with_positions(self, reduction: Reduction) -> Reduction:
        """Fills in open positions from the server's or the family's default, if tokens are removed."""
        if self.family is not None:
            reduction = self.family.with_positions(reduction, self.settings.positions)
        if reduction.positions == "keep" and self.positions is None:
            raise InvalidRequest(CANNOT_KEEP, "reduction.positions")
        return reduction

    def _check_withdrawal(self, request: FoldChatRequest, reductions: Sequence[Reduction]) -> None:
        in_decoder = next((reduction.decoder for reduction in reductions if reduction.decoder), None)
        if in_decoder and self.family is not None:
            METHODS[in_decoder].check(self.family.largest.parts[0].geometry)
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


def with_request_param(error: InvalidReduction, request: FoldChatRequest) -> InvalidRequest | InvalidReduction:
    """The error, with the name under which the request has the field."""
    if request.reduction_ratio is None or error.param == "positions":
        return error
    return InvalidRequest(str(error), "reduction_ratio")


def _of_images(default: Reduction) -> Reduction:
    """The server's default, without a method that works only on videos."""
    if not isinstance(METHODS[default.method], AcrossFrames):
        return default
    return replace(default, method=_NOTHING.method, options=(), ratio=None, keep_tokens=None)


@lru_cache(maxsize=8)
def _low_detail(family: Family | None, default: Reduction, ratio: float | None) -> Mapping[Modality, Reduction]:
    low = default.with_ratio(LOW_DETAIL_RATIO if ratio is None else ratio)
    return {"image": low if family is None else family.low_detail(_of_images(default), ratio), "video": low}


def _check_for(family: Family, reduction: Reduction, layout: Layout) -> None:
    """Raises InvalidReduction if a plan can't be made; if sizes matter, for an image or video of any size."""
    if not family.sizes_matter:
        plan_item(reduction, layout)
    elif reduction.acts_before_decoder:
        check_reduction(reduction, layout)
