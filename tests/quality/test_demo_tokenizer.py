"""The trained model's tokenizer: known words are one token, prompts read the same by every path, no text is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.quality.demo.questions import ALL_KINDS, ask
from foldserve.server.quality.demo.scene import draw_scene
from tools.demo_model.tokenizer import build_tokenizer, save_tokenizer, special_ids


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As transformers and vLLM load it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return AutoTokenizer.from_pretrained(folder)


def test_every_word_of_questions_and_answers_is_one_token() -> None:
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    for _ in range(200):
        scene = draw_scene(rng)
        for kind in ALL_KINDS:
            dialogue = ask(rng, scene, kind)
            for turn in dialogue.turns if dialogue else ():
                for text in (turn.question, turn.answer):
                    encoding = tokenizer.encode(text, add_special_tokens=False)
                    assert not [token for token in encoding.tokens if len(token) == 1 and token.isalpha()], text
                    assert tokenizer.decode(encoding.ids) == text


@pytest.mark.parametrize("text", ["what is this?", "no  double spaces\n", "grüße, 你好 🙂", "", "a zebra (2 * 3 = 6)"])
def test_any_text_comes_back(text: str, loaded: Any) -> None:
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert special_ids().eos not in ids and loaded.unk_token_id not in ids
    assert loaded.decode(ids) == text


@pytest.mark.parametrize("answer", ["a cyan star", "562", "no", "two  spaces", "\n", "grüße 🙂", "assistant: x"])
@pytest.mark.parametrize("asked", ["USER: <image>\nWhat? ASSISTANT:", "USER: What? ASSISTANT:", "ASSISTANT:"])
def test_a_streamed_answer_is_the_answer(asked: str, answer: str) -> None:
    """As vLLM decodes: token by token behind the prompt, whose last mark the answer's first space belongs to."""
    tokenizer = build_tokenizer()
    prompt, ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in (asked, answer))
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    assert "".join(stream.step(tokenizer, i) or "" for i in ids) == tokenizer.decode(ids) == answer


def test_turns_are_decoded_as_they_were_written() -> None:
    tokenizer, text = build_tokenizer(), "<s>USER: is it red? ASSISTANT: a star</s>USER: a ring ASSISTANT: "
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False).replace("ASSISTANT", " ASSISTANT") == text


def test_the_checkpoint_has_this_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (CHECKPOINT / file.name).read_bytes()


def test_bos_comes_by_itself_unless_refused(loaded: Any) -> None:
    special = special_ids()
    assert loaded("red")["input_ids"] == [special.bos, *loaded("red", add_special_tokens=False)["input_ids"]]
    ids = loaded("<s>USER: <image>\nWhat? ASSISTANT:", add_special_tokens=False)["input_ids"]
    assert ids == loaded("USER: <image>\nwhat? ASSISTANT:")["input_ids"]
    assert (ids[:3], ids[-1]) == ([special.bos, special.user, special.image], special.assistant)


def test_template_puts_images_first(loaded: Any) -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "and"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, image, text, {"type": "image_url"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    assert loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<s>Be brief. USER: <image>\n<image>\nandand ASSISTANT: Yes.</s>USER: Why? ASSISTANT:"
    )


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}]
)
def test_template_refuses_what_it_cannot_show(message: dict[str, Any], loaded: Any) -> None:
    with pytest.raises(Exception, match="unsupported"):
        loaded.apply_chat_template([message], tokenize=False)


def test_writing_twice_writes_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
