"""vLLM's offline engine behind the model's own chat template, processor and scheduler: how every study asks a model."""

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
from foldserve.server.engine.withdrawal import Room, admit, prompt_items
from foldserve.server.engine.worker import WORKERS, device
from foldserve.server.settings import CONFIG_KEY

if TYPE_CHECKING:
    from PIL.Image import Image

KV_CACHE_BYTES = 2 << 30
"""Enough to ask one prompt after the other; left to itself, vLLM takes nearly all of a CPU's memory."""

Messages = list[dict[str, Any]]
"""A dialogue as OpenAI's chat messages; images are parts `{"type": "image_pil", "image_pil": image}`."""


class OfflineModel:
    """A checkpoint whose images foldserve reduces, with the engine options that it is served with.

    Attributes:
        model: name or directory.
        revision: on the Hugging Face hub, or None.
        layers: decoder layers.
        first_layer: the least withdrawal layer K.
        family: that it belongs to.
    """

    def __init__(
        self, model: str, argv: Sequence[str], command: str, *, defaults: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> None:
        """Reads the model's configuration; nothing is loaded.

        Args:
            argv: engine options as `vllm serve` takes them.
            command: of foldserve, for messages.
            defaults: values of options that `argv` leaves open.
            fixed: values of options that `argv` may not set.

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
        """Of each image at ratio 0."""
        family = self.family
        if not family.sizes_matter:
            return [family.largest for _ in images]
        info = MULTIMODAL_REGISTRY.create_processor(self._args.create_model_config()).info
        return [family.layout(family.shape(ImageProcessorItems([image]), 0, info, {})) for image in images]

    def unpredicted(self, images: Iterable[Image], levels: int) -> list[int]:
        """How many cells of each image its pixels do not predict; raises InvalidReduction where there is no telling."""
        processor: Any = MULTIMODAL_REGISTRY.create_processor(self._args.create_model_config())
        return [count for image in images for count in processor.unpredicted([image], levels)]


def render(llm: LLM, messages: Messages, **options: Any) -> Any:
    """A dialogue as the engine takes it, through the model's chat template and processor, to be answered next."""
    template = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
    renderer = llm.renderer
    tokenizing = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)  # the template writes them
    _, (rendered,) = renderer.render_chat([messages], template, tokenizing, **options)
    return rendered


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What the model said.

    Attributes:
        text: greedy answer.
        first: (vocab,) fp32 log-probabilities of its first token, over the whole vocabulary.
    """

    text: str
    first: NDArray[np.float32]


class AnsweringModel(OfflineModel):
    """A model that answers many questions at once; at most one engine of it runs at a time."""

    def __init__(self, model: str, argv: Sequence[str] = (), command: str = "evaluate") -> None:
        """See `OfflineModel`."""
        defaults = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "enforce_eager": True} if device() == "cpu" else {}
        super().__init__(model, argv, command, defaults=defaults, fixed={"max_logprobs": -1})

    @contextmanager
    def engine(self, withdraw_layer: int | None) -> Iterator[AnsweringEngine]:
        """A running engine, with K = `withdraw_layer` or without withdrawal.

        Raises:
            ValueError: options or a decoder that withdrawal does not go with.
        """
        args = copy(self._args)
        if withdraw_layer is not None:
            withdrawal.apply(args, withdraw_layer, device=device())
            args.additional_config = {**args.additional_config, CONFIG_KEY: {"withdraw_layer": withdraw_layer}}
        elif args.worker_cls == "auto" and args.pipeline_parallel_size == 1:
            args.worker_cls = WORKERS[device()]
        llm = LLM.from_engine_args(args)
        try:
            yield AnsweringEngine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()


def _asked(reduction: Reduction, dialogues: Sequence[Messages]) -> list[Reduction]:
    """Of the image of each dialogue, with its question."""
    return [with_query(reduction, _question(dialogue)) for dialogue in dialogues]


def _question(dialogue: Messages) -> str:
    """The text beside its image."""
    contents = (message["content"] for message in dialogue if isinstance(message["content"], list))
    return next((text_of(content) for content in contents if any("image_pil" in part for part in content)), "")


class AnsweringEngine:
    """A running engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._room: Room = withdrawal.step_room(llm.llm_engine.vllm_config)
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._requests = 0

    def ask(
        self, dialogues: Sequence[Messages], reduction: Reduction, plans: Sequence[ItemPlan], max_tokens: int
    ) -> list[Reply]:
        """Answers all dialogues, each with one image, of which its plan is what `reduction` makes.

        Raises:
            ValueError: a prompt that the reduction does not go with.
            RuntimeError: an image that did not get the plan's tokens.
        """
        first = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, flat_logprobs=True, detokenize=False)
        answer = SamplingParams(temperature=0, max_tokens=max_tokens)
        each = [*zip(dialogues, _asked(reduction, dialogues), plans, strict=True)]
        outputs = self._run([(*one, params, ()) for params in (first, answer) for one in each])
        told = [output.outputs[0] for output in outputs]
        pairs = zip(told[: len(dialogues)], told[len(dialogues) :], strict=True)
        return [Reply(answered.text, self._log_probabilities(begun)) for begun, answered in pairs]

    def answers(self, dialogues: Sequence[Messages], plans: Sequence[ItemPlan], max_tokens: int) -> list[list[int]]:
        """Token ids of the greedy answers with all vision tokens, the one that ends an answer among them."""
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
        """Whether the greedy answers to these dialogues are others than `answers` once their images are reduced.

        One prefill each: the answer stands behind the prompt, and has changed if one of its tokens isn't the likeliest.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        each = zip(dialogues, _asked(reduction, dialogues), plans, answers, strict=True)
        outputs = self._run([(messages, own, plan, params, answer) for messages, own, plan, answer in each])
        return [
            any(_rank(place) != 1 for place in output.prompt_logprobs[-len(answer) :])
            for output, answer in zip(outputs, answers, strict=True)
        ]

    def _run(
        self, requests: Sequence[tuple[Messages, Reduction, ItemPlan, SamplingParams, Sequence[int]]]
    ) -> list[Any]:
        """What comes of each request, in their order: a dialogue, what is asked of its image and comes of that, and the
        answer's first tokens.
        """
        engine = self._llm.llm_engine
        ids = []
        for messages, reduction, plan, params, answer in requests:
            prompt = render(self._llm, messages, prompt_extras={"mm_processor_kwargs": {KWARG: reduction.to_json()}})
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
        """The prompt holds what was planned, and the scheduler will take it: there, a refusal ends the engine."""
        items = prompt_items(prompt)
        token_map = admit(items, len(prompt["prompt_token_ids"]), self._room)
        found = [item.mm_position.get_num_embeds() for item in items], token_map.total
        if found != ([plan.kept], plan.decoder_removed):
            raise RuntimeError(f"(vision tokens, withdrawn) {found} in the prompt, where {plan} was planned")

    def _log_probabilities(self, completion: Any) -> NDArray[np.float32]:
        flat = completion.logprobs
        values = np.full(self._vocab_size, -np.inf, np.float32)
        values[flat.token_ids] = flat.logprobs
        return values


def _rank(place: Mapping[int, Any]) -> int:
    """Of the prompt's own token among all, 1 being the likeliest."""
    (token,) = place.values()
    return int(token.rank)
