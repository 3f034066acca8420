"""What docs/guides/clients.md says of openai, LangChain, LiteLLM and pydantic-ai, if these are installed."""

from __future__ import annotations

import os
import unittest
from typing import Any, ClassVar

import litellm
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ImageUrl, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, SCENE = os.environ["URL"], os.environ["SCENE"]
QUESTION = {"type": "text", "text": "what is at the top right?"}
IMAGE = {"type": "image_url", "image_url": {"url": SCENE, "detail": "low"}}
REDUCED, WHOLE = 36, 144
"""Vision tokens at `detail: low`, and without any reduction."""


class Answer(BaseModel):
    answer: str


class OpenAIPython(unittest.TestCase):
    client: Any = OpenAI(base_url=URL, api_key="none")

    def test_a_keyword_argument_is_a_type_error(self) -> None:
        with self.assertRaises(TypeError):
            self.client.chat.completions.create(model="demo", messages=[], reduction_ratio=0.5)

    def test_completions_are_refused(self) -> None:
        with self.assertRaises(NotFoundError) as caught:
            self.client.completions.create(model="demo", prompt="hello")
        self.assertEqual(caught.exception.code, "unsupported_route")

    def test_a_stream_has_no_usage_unless_asked(self) -> None:
        stream = self.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": [IMAGE, QUESTION]}], stream=True, max_tokens=2
        )
        self.assertEqual([chunk.usage for chunk in stream if chunk.usage], [])

    def test_a_ratio_goes_before_detail(self) -> None:
        answer = self.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": [IMAGE, QUESTION]}],
            max_tokens=2,
            extra_body={"reduction_ratio": 0.5},
        )
        self.assertEqual(answer.usage.vision_tokens["kept"], 72)


class LangChain(unittest.TestCase):
    llm = ChatOpenAI(base_url=URL, api_key="none", model="demo", temperature=0, stream_usage=True)

    def kept(self, image: dict[str, Any]) -> int:
        answer = self.llm.invoke([HumanMessage([image, QUESTION])])
        return int(answer.response_metadata["token_usage"]["vision_tokens"]["kept"])

    def test_a_stream_has_usage_but_no_vision_tokens(self) -> None:
        chunks = list(self.llm.stream([HumanMessage([IMAGE, QUESTION])]))
        self.assertTrue(any(chunk.usage_metadata for chunk in chunks))
        self.assertNotIn("vision_tokens", str(chunks))

    def test_tools_are_refused(self) -> None:
        for llm in (self.llm.with_structured_output(Answer, method="function_calling"), self.llm.bind_tools([Answer])):
            with self.assertRaises(BadRequestError):
                llm.invoke([HumanMessage([IMAGE, QUESTION])])

    def test_its_own_image_block_loses_detail(self) -> None:
        self.assertEqual(self.kept(IMAGE), REDUCED)
        self.assertEqual(self.kept({"type": "image", "url": SCENE, "detail": "low"}), WHOLE)


class LiteLLM(unittest.TestCase):
    request: ClassVar[dict[str, Any]] = {
        "model": "hosted_vllm/demo",
        "api_base": URL,
        "messages": [{"role": "user", "content": [IMAGE, QUESTION]}],
        "max_tokens": 2,
        "reduction_ratio": 0.5,
    }

    def test_a_stream_has_usage_but_no_vision_tokens(self) -> None:
        stream = litellm.completion(**self.request, stream=True, stream_options={"include_usage": True})
        usages = [chunk.usage for chunk in stream if getattr(chunk, "usage", None)]
        self.assertEqual(len(usages), 1)
        self.assertFalse(hasattr(usages[0], "vision_tokens"))

    def test_unknown_fields_pass_where_parameters_are_dropped(self) -> None:
        answer = litellm.completion(**self.request, drop_params=True)
        self.assertEqual(answer.usage.vision_tokens["kept"], 72)


class PydanticAI(unittest.TestCase):
    model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=URL, api_key="none"))
    prompt = (ImageUrl(SCENE), QUESTION["text"])

    def test_its_usage_has_no_vision_tokens(self) -> None:
        result = Agent(self.model, model_settings={"max_tokens": 2}).run_sync(self.prompt)
        self.assertGreater(result.usage.input_tokens, 0)
        self.assertNotIn("vision", str(result.all_messages()[-1].usage))

    def test_a_plain_output_type_is_a_tool(self) -> None:
        with self.assertRaises(ModelHTTPError) as caught:
            Agent(self.model, output_type=Answer).run_sync(self.prompt)
        self.assertIn("tools", str(caught.exception.body))

    def test_detail(self) -> None:
        low = {"detail": "low"}
        image = BinaryContent.from_data_uri(SCENE)
        image.vendor_metadata = low
        tokens = [
            Agent(self.model, model_settings={"max_tokens": 2}).run_sync([one, QUESTION["text"]]).usage.input_tokens
            for one in (ImageUrl(SCENE), ImageUrl(SCENE, vendor_metadata=low), image)
        ]
        self.assertEqual([tokens[0] - some for some in tokens[1:]], [WHOLE - REDUCED] * 2)


if __name__ == "__main__":
    unittest.main()
