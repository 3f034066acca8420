"""How studies run a model: vLLM's offline engine with the model's own chat template, processor and scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser

from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.plan import Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.plugin import register
from foldserve.server.engine.processor import KWARG
from foldserve.server.engine.query import text_of, with_query
from foldserve.server.engine.withdrawal import StepCapacity, admit, prompt_items
from foldserve.server.engine.worker import WORKERS, device
from foldserve.server.settings import CONFIG_KEY

if TYPE_CHECKING:
    from PIL.Image import Image

KV_CACHE_BYTES = 2 << 30
"""Enough for one prompt at a time; by default, vLLM takes nearly all memory of a CPU machine."""

Messages = list[dict[str, Any]]
"""OpenAI chat messages; images are parts `{"type": "image_pil", "image_pil": image}`."""


class OfflineModel:
    """A checkpoint that foldserve can reduce, with its engine options.

    Attributes:
        layers: number of decoder layers.
        first_layer: the least withdrawal layer K.
    """

    def __init__(
        self, model: str, argv: Sequence[str], command: str, *, defaults: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> None:
        """Reads the model's configuration without loading weights.

        Args:
            argv: options of `vllm serve`.
            command: name of the foldserve command, for messages.
            defaults: option values that `argv` may override.
            fixed: option values that `argv` may not set.

        Raises:
            ValueError: not a model that foldserve can reduce.
            SystemExit: options that vLLM's parser refuses, or fixed ones.
        """
        register()
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=f"foldserve {command} MODEL"))
        parser.set_defaults(**defaults)
        self._args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *argv]))
        for name, value in fixed.items():
            if getattr(self._args, name) not in (parser.get_default(name), value):
                parser.error(f"foldserve {command} sets --{name.replace('_', '-')} itself: leave that option out")
            setattr(self._args, name, value)
        model_config = self._args.create_model_config()
        family = family_of(model_config)
        if family is None:
            raise ValueError(f"foldserve reduces the vision tokens of LLaVA-1.5-like models; {model} is another one")
        self.model, self.revision, self.family = model, self._args.revision, family
        self.layers: int = model_config.hf_config.get_text_config().num_hidden_layers
        self.first_layer = withdrawal.first_layer(model_config.hf_config)

    def layouts(self, images: Iterable[Image]) -> list[Layout]:
        """Layout of each image at ratio 0."""
        family = self.family
        if not family.sizes_matter:
            return [family.largest for _ in images]
        info = MULTIMODAL_REGISTRY.create_processor(self._args.create_model_config()).info
        return [family.layout(family.shape(ImageProcessorItems([image]), 0, info, {})) for image in images]

    def unpredicted(self, images: Iterable[Image], levels: int) -> list[int]:
        """How many cells of each image its pixels do not predict; raises InvalidReduction where there is no telling."""
        processor: Any = MULTIMODAL_REGISTRY.create_processor(self._args.create_model_config())
        return [count for image in images for count in processor.unpredicted([image], levels)]


def render_prompt(llm: LLM, messages: Messages, **options: Any) -> Any:
    """The engine's input for a dialogue, from the model's chat template (with generation prompt) and processor."""
    template = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
    renderer = llm.renderer
    tokenizing = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)  # the template writes them
    _, (rendered,) = renderer.render_chat([messages], template, tokenizing, **options)
    return rendered


@dataclass(frozen=True, slots=True, eq=False)
class OfflineAnswer:
    """A greedy answer, and in `first` the (vocab,) fp32 log-probabilities of its first token."""

    text: str
    first: NDArray[np.float32]


class AnsweringModel(OfflineModel):
    """A model that answers many questions at once; at most one engine of it runs at a time."""

    def __init__(self, model: str, argv: Sequence[str] = (), command: str = "evaluate") -> None:
        defaults = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "enforce_eager": True} if device() == "cpu" else {}
        super().__init__(model, argv, command, defaults=defaults, fixed={"max_logprobs": -1})

    @contextmanager
    def engine(self, withdraw_layer: int | None) -> Iterator[AnsweringEngine]:
        """A running engine; ValueError if withdrawal does not support the options or the decoder."""
        args = copy(self._args)
        if withdraw_layer is not None:
            withdrawal.apply_options(args, withdraw_layer, device=device())
            args.additional_config = {**args.additional_config, CONFIG_KEY: {"withdraw_layer": withdraw_layer}}
        elif args.worker_cls == "auto" and args.pipeline_parallel_size == 1:
            args.worker_cls = WORKERS[device()]
        llm = LLM.from_engine_args(args)
        try:
            yield AnsweringEngine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()


def _with_queries(reduction: Reduction, dialogues: Sequence[Messages]) -> list[Reduction]:
    """The reduction of each dialogue's image, with its question as query."""
    return [with_query(reduction, _question(dialogue)) for dialogue in dialogues]


def _question(dialogue: Messages) -> str:
    """The text of the message that holds the image."""
    contents = (message["content"] for message in dialogue if isinstance(message["content"], list))
    return next((text_of(content) for content in contents if any("image_pil" in part for part in content)), "")


class AnsweringEngine:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._step_capacity: StepCapacity = withdrawal.step_capacity(llm.llm_engine.vllm_config)
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._requests = 0

    def ask(
        self, dialogues: Sequence[Messages], reduction: Reduction, plans: Sequence[ItemPlan], max_tokens: int
    ) -> list[OfflineAnswer]:
        """Answers the dialogues, each with one image; `plans` are what `reduction` makes of the images.

        Raises:
            ValueError: a prompt that can't be reduced so.
            RuntimeError: the number of vision tokens differs from the plan.
        """
        first = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, flat_logprobs=True, detokenize=False)
        answer = SamplingParams(temperature=0, max_tokens=max_tokens)
        each = [*zip(dialogues, _with_queries(reduction, dialogues), plans, strict=True)]
        outputs = self._run([(*one, params, ()) for params in (first, answer) for one in each])
        completions = [output.outputs[0] for output in outputs]
        pairs = zip(completions[: len(dialogues)], completions[len(dialogues) :], strict=True)
        return [OfflineAnswer(answered.text, self._log_probabilities(begun)) for begun, answered in pairs]

    def answers(self, dialogues: Sequence[Messages], plans: Sequence[ItemPlan], max_tokens: int) -> list[list[int]]:
        """Token ids of the greedy answers at ratio 0, with the end-of-sequence token."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)
        each = zip(dialogues, plans, strict=True)
        outputs = self._run([(messages, Reduction(), plan, params, ()) for messages, plan in each])
        return [list(output.outputs[0].token_ids) for output in outputs]

    def changed(
        self,
        dialogues: Sequence[Messages],
        reduction: Reduction,
        plans: Sequence[ItemPlan],
        answers: Sequence[Sequence[int]],
    ) -> list[bool]:
        """Whether each greedy answer differs from that of `answers` when the images are reduced.

        One prefill per dialogue: the answer is appended to the prompt, and has changed if one of its tokens is not the
        likeliest.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        each = zip(dialogues, _with_queries(reduction, dialogues), plans, answers, strict=True)
        outputs = self._run([(messages, own, plan, params, answer) for messages, own, plan, answer in each])
        return [
            any(_rank(place) != 1 for place in output.prompt_logprobs[-len(answer) :])
            for output, answer in zip(outputs, answers, strict=True)
        ]

    def _run(
        self, requests: Sequence[tuple[Messages, Reduction, ItemPlan, SamplingParams, Sequence[int]]]
    ) -> list[Any]:
        """Outputs of the requests, in order; the last field of a request is the beginning of its answer."""
        engine = self._llm.llm_engine
        ids = []
        for messages, reduction, plan, params, answer in requests:
            extras = {"mm_processor_kwargs": {KWARG: reduction.to_json()}}
            prompt = render_prompt(self._llm, messages, prompt_extras=extras)
            self._check(prompt, plan)
            prompt["prompt_token_ids"] = [*prompt["prompt_token_ids"], *answer]
            params = params.clone()
            params.output_kind = RequestOutputKind.FINAL_ONLY
            self._requests += 1
            engine.add_request(str(self._requests), prompt, params)
            ids.append(str(self._requests))
        done: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            done |= {output.request_id: output for output in engine.step() if output.finished}
        return [done[request_id] for request_id in ids]

    def _check(self, prompt: Any, plan: ItemPlan) -> None:
        """Checks the prompt against its plan, and as the scheduler would: a refusal there ends the engine."""
        items = prompt_items(prompt)
        token_map = admit(items, len(prompt["prompt_token_ids"]), self._step_capacity)
        found = [item.mm_position.get_num_embeds() for item in items], token_map.total
        if found != ([plan.kept], plan.decoder_removed):
            raise RuntimeError(f"(vision tokens, withdrawn) {found} in the prompt, where {plan} was planned")

    def _log_probabilities(self, completion: Any) -> NDArray[np.float32]:
        flat = completion.logprobs
        values = np.full(self._vocab_size, -np.inf, np.float32)
        values[flat.token_ids] = flat.logprobs
        return values


def _rank(place: Mapping[int, Any]) -> int:
    """Rank of the prompt's own token at this position; 1 is the likeliest."""
    (token,) = place.values()
    return int(token.rank)
