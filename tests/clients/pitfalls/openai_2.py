"""What docs/guides/clients.md says of LlamaIndex and instructor, if these are installed."""

from __future__ import annotations

import os
import unittest
from typing import Any, ClassVar

import instructor
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

URL, SCENE = os.environ["URL"], os.environ["SCENE"]
QUESTION = "what is at the top right?"


class Answer(BaseModel):
    answer: str


class LlamaIndex(unittest.TestCase):
    message = ChatMessage(blocks=[ImageBlock(url=SCENE, detail="low"), TextBlock(text=QUESTION)])

    def llm(self, **options: Any) -> OpenAILike:
        return OpenAILike(api_base=URL, api_key="none", model="demo", max_tokens=2, max_retries=0, **options)

    def test_it_asks_for_completions_unless_told(self) -> None:
        with self.assertRaises(NotFoundError) as caught:
            self.llm().chat([self.message])
        self.assertEqual(caught.exception.code, "unsupported_route")

    def test_it_sends_a_tool_unless_told(self) -> None:
        with self.assertRaises(BadRequestError) as caught:
            self.llm(is_chat_model=True).as_structured_llm(Answer).chat([self.message])
        self.assertEqual(caught.exception.param, "tool_choice")

    def test_detail(self) -> None:
        answer = self.llm(is_chat_model=True).chat([self.message])
        self.assertEqual(answer.raw.usage.vision_tokens["kept"], 36)


class Instructor(unittest.TestCase):
    request: ClassVar[dict[str, Any]] = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "response_model": Answer,
        "max_tokens": 64,
        "max_retries": 0,
    }

    def sent(self, mode: instructor.Mode) -> Any:
        """What a mode sends."""
        client = instructor.from_openai(OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)
        requests: list[Any] = []
        client.on("completion:kwargs", lambda *_, **request: requests.append(request))
        with self.assertRaises(Exception) as caught:  # the demo model keeps to no form that it is only asked for
            client.chat.completions.create(**self.request)
        return requests[0], str(caught.exception)

    def test_the_default_mode_is_refused(self) -> None:
        self.assertEqual(instructor.from_openai(OpenAI(base_url=URL, api_key="none")).mode, instructor.Mode.TOOLS)
        _, error = self.sent(instructor.Mode.TOOLS)
        self.assertIn("can't call tools", error.replace("\\", ""))

    def test_two_modes_only_ask_for_the_form(self) -> None:
        for mode in (instructor.Mode.JSON, instructor.Mode.MD_JSON):
            request, _ = self.sent(mode)
            self.assertNotEqual(request.get("response_format", {}).get("type"), "json_schema")
            self.assertIn('"answer"', str(request["messages"]))


if __name__ == "__main__":
    unittest.main()
