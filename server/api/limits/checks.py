"""All checks of a chat request against one served model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from vllm.config import ModelConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput
from vllm.model_executor.model_loader import get_model_cls
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.renderers.chat_utils import PROMPT_EMBEDS_PLACEHOLDER_TOKEN

from foldserve.reducers.item import ItemPlan
from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.api.library_errors import describe_refused_field
from foldserve.server.api.limits.body import check_body
from foldserve.server.api.limits.fields import check_fields
from foldserve.server.api.limits.special_tokens import SpecialTokens
from foldserve.server.api.limits.strict_json import parse
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import MODALITIES, Modality
from foldserve.server.engine.moved import MODALITY_PLACEHOLDERS_MAP
from foldserve.server.limits import Limits

if TYPE_CHECKING:
    from foldserve.server.api.schema import FoldChatRequest


_NAMED = 4  # images and videos that a refusal lists, of each
_HIGHEST_RATIO = 0.95
_LONG = 1_000_000
_LONG_TEXT = 100_000


@dataclass(frozen=True, slots=True)
class ChatChecks:
    """What the checks depend on besides the request.

    Attributes:
        context: tokens of prompt and answer together.
        longest_token: in characters.
        tokens: ids that the tokenizer knows; the model's vocabulary may be padded beyond them.
        media_tokens: id of the token that stands for one embedding, of each modality that the model takes.
        takes: modalities that the model takes besides text.
        truncation_side: the tokenizer's own, for prompts that are cut.
        bounds_thinking: whether the engine can.
    """

    limits: Limits
    special_tokens: SpecialTokens
    context: int
    longest_token: int
    tokens: Container[int]
    media_tokens: Mapping[Modality, int]
    takes: Collection[Modality]
    truncation_side: Literal["left", "right"] = "right"
    bounds_thinking: bool = False

    def read(self, body: bytes, to_chat: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> dict[str, Any]:
        """Parses and checks a body, and neutralises special tokens in its texts; `to_chat` converts another API's body
        first.

        Raises InvalidRequest with the path of what is wrong.
        """
        value = parse(body, self.limits)
        if not isinstance(value, dict):
            raise InvalidRequest("the body must be a JSON object")
        value = value if to_chat is None else to_chat(value)
        contents = check_body(value, self.limits)
        for modality, count in (("image", contents.images), ("video", contents.videos)):
            if count and modality not in self.takes:
                raise InvalidRequest(f"this model takes no {modality}s here: leave them out", "messages")
        # vLLM would refuse it too, but only after it tokenized the prompt, unless it cuts that
        if contents.characters > self.context * self.longest_token and value.get("truncate_prompt_tokens") is None:
            raise self._too_long(f"{contents.characters} characters")
        if self.special_tokens.may_be_in(body):
            self.special_tokens.neutralise_body(value, self.context)
        return value

    def is_long(self, body: bytes) -> bool:
        """Whether reading a body may take so long that it should not block other requests.

        A body without the first character of a special token, such as an image's, takes 10 ms a MB at most.
        """
        return len(body) > _LONG or (len(body) > _LONG_TEXT and self.special_tokens.may_be_in(body))

    def check(self, request: FoldChatRequest) -> None:
        """Checks the fields of a validated request; raises InvalidRequest with the path of a bad one."""
        check_fields(request, self.limits, self.context, self.tokens)
        if request.thinking_token_budget is not None and not self.bounds_thinking:
            raise InvalidRequest(describe_refused_field("thinking_token_budget"), "thinking_token_budget")
        if request.truncate_prompt_tokens is not None and request.truncation_side is None:
            request.truncation_side = self.truncation_side  # without it, vLLM tokenizes a long text before it cuts it

    def check_prompt(self, prompt: EngineInput, planned: Mapping[Modality, Sequence[ItemPlan]]) -> None:
        """Checks the prompt's tokens: there is room for an answer, and media tokens come from media only, none from a
        text.

        Raises LimitExceeded without room for an answer, InvalidRequest for another number of media tokens.
        """
        fields: dict[str, Any] = dict(prompt)
        tokens = list(fields["prompt_token_ids"])
        if len(tokens) >= self.context:
            raise self._too_long(f"{len(tokens)} tokens{shares(planned, len(tokens), self.context)}")
        places = fields.get("mm_placeholders", {})
        for modality, token in self.media_tokens.items():
            expected = sum(place.get_num_embeds() for place in places.get(modality, ()))
            if (found := tokens.count(token)) != expected:
                raise InvalidRequest(
                    f"the prompt holds {found} {modality} tokens where its {modality}s have {expected}", "messages"
                )

    def explain(self, error: Exception) -> Exception:
        """Replaces vLLM's refusal of a text that is too long by our own; returns any other error as it is."""
        if isinstance(error, VLLMValidationError) and error.parameter in ("input_text", "input_tokens"):
            return self._too_long("too many tokens")
        return error

    def _too_long(self, what: str) -> LimitExceeded:
        return LimitExceeded(
            f"the prompt has {what}: with at least one of the answer the model takes {self.context} tokens; "
            "shorten it, send fewer images or frames, or reduce them more",
            "messages",
        )


def shares(planned: Mapping[Modality, Sequence[ItemPlan]], tokens: int, context: int) -> str:
    """How many tokens of a too long prompt are vision tokens, and the ratio that would fit, if there is one."""
    plans = [*chain.from_iterable(planned.values())]
    if not plans:
        return ""
    kept, encoded = sum(plan.kept for plan in plans), sum(plan.encoded for plan in plans)
    each = ", ".join(
        _share(modality, plan) for modality, of_modality in planned.items() for plan in of_modality[:_NAMED]
    )
    if any(len(of_modality) > _NAMED for of_modality in planned.values()):
        each += " and more"
    left = context - 1 - (tokens - kept)
    ratio = math.ceil(100 * (1 - left / encoded)) / 100
    fits = f"; a ratio of {ratio:g} would fit" if 0 < ratio <= _HIGHEST_RATIO else ""
    return f", {kept} of them vision tokens ({each}){fits}"


def _share(modality: Modality, plan: ItemPlan) -> str:
    """`video: 16 frames of 98`."""
    (part, grid), *more = zip(plan.laid_out.parts, plan.grids, strict=True)
    if modality == "video" and not more and part.count > 1:
        return f"video: {part.count} frames of {grid.kept}"
    return f"{modality}: {plan.kept}"


def chat_checks(engine: EngineClient, limits: Limits) -> ChatChecks:
    model = engine.model_config
    tokenizer = engine.renderer.tokenizer
    taken = frozenset(modality for modality, count in items_taken(model).items() if count)
    media_tokens = _media_tokens(model, tokenizer)
    placeholders = [*MODALITY_PLACEHOLDERS_MAP.values(), PROMPT_EMBEDS_PLACEHOLDER_TOKEN]
    placeholders += tokenizer.convert_ids_to_tokens([*media_tokens.values()])
    in_prompts = [get_model_cls(model).get_placeholder_str(modality, 1) or "" for modality in sorted(taken)]
    # InternVL's placeholders are not tokens. Those of others hold tokens that are kept out anyway.
    placeholders += [text for text in in_prompts if not any(token in text for token in placeholders)]
    special = SpecialTokens(tokenizer, placeholders)
    known = known_tokens(tokenizer, model.get_vocab_size())
    longest, side = tokenizer.max_chars_per_token, tokenizer.truncation_side
    thinks = engine.vllm_config.reasoning_config
    bounds = thinks is not None and thinks.enabled
    return ChatChecks(limits, special, model.max_model_len, longest, known, media_tokens, taken, side, bounds)


def items_taken(model: ModelConfig) -> dict[Modality, int]:
    """How many of each modality a prompt may have: what the model takes, within the operator's vLLM limits."""
    limits = MULTIMODAL_REGISTRY.get_processing_info(model).allowed_mm_limits if model.is_multimodal_model else {}
    return {modality: limits.get(modality, 0) for modality in MODALITIES}


def _media_tokens(model: ModelConfig, tokenizer: Any) -> dict[Modality, int]:
    """The token that stands for an embedding in the prompt, for each modality where it is known."""
    config, family = model.hf_config, family_of(model)
    tokens: dict[Modality, int] = {}
    for modality in MODALITIES:
        names = (f"{modality}_token_index", f"{modality}_token_id")
        token = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
        if token is None and family is not None and modality in family.media_tokens:
            token = tokenizer.get_vocab().get(family.media_tokens[modality])
        if token is not None:
            tokens[modality] = token
    return tokens


def known_tokens(tokenizer: Any, vocabulary: int) -> Container[int]:
    """The ids below `vocabulary`, the model's size, for which the tokenizer has a text.

    A model has more if its embeddings are padded to a round number: they were never trained, and vLLM fails on them.
    """
    texts = tokenizer.convert_ids_to_tokens(list(range(vocabulary)))
    known = frozenset(token for token, text in enumerate(texts) if text is not None)
    return range(vocabulary) if len(known) == vocabulary else known
