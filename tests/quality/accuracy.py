"""Answers of a checkpoint in vLLM, and the share of right ones by kind of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foldserve.reducers.plan import Reduction
from foldserve.server.quality.demo.examples import Example


class AnswerEngine:
    """An engine that answers many questions at once."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        """Starts the engine with vLLM's `options`, such as those that `withdrawal.configure` gives."""
        from vllm import LLM

        self._llm = LLM(str(checkpoint), **options)

    def answers(
        self,
        dialogues: Sequence[tuple[Sequence[Mapping[str, object]], Image.Image]],
        reduction: Reduction | None = None,
        max_tokens: int = 96,
        progress: bool = False,
    ) -> list[str]:
        """The text that follows each dialogue, without spaces around it.

        Args:
            dialogues: chat messages with one `{"type": "image"}` part, and that image.
            reduction: for every image; None asks for nothing.
            progress: shows vLLM's progress bar.
        """
        from vllm import SamplingParams

        prompts = [self._prompt(messages, image, reduction) for messages, image in dialogues]
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        return [output.outputs[0].text.strip() for output in self._llm.generate(prompts, params, use_tqdm=progress)]

    def _prompt(
        self, messages: Sequence[Mapping[str, object]], image: Image.Image, reduction: Reduction | None
    ) -> dict[str, Any]:
        tokenizer = self._llm.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written <s>
        prompt: dict[str, Any] = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        if reduction is not None:
            prompt["mm_processor_kwargs"] = {"foldserve": reduction.to_json()}
        return prompt


@dataclass(frozen=True)
class Score:
    """Exact answers among all of one kind."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total


def accuracy(
    engine: AnswerEngine, examples: Sequence[Example], reduction: Reduction | None = None, progress: bool = False
) -> dict[str, Score]:
    """Score by kind: an answer counts when it is the expected one, to the letter."""
    dialogues = [(example.messages(), example.image) for example in examples]
    given = engine.answers(dialogues, reduction, progress=progress)
    return scores(examples, given)


def scores(examples: Sequence[Example], given: Sequence[str]) -> dict[str, Score]:
    """Score by kind of `given` answers, one for each of `examples`."""
    total = Counter(example.kind for example in examples)
    right = Counter(e.kind for e, answer in zip(examples, given, strict=True) if answer == e.answer)
    return {kind: Score(right[kind], count) for kind, count in total.items()}
