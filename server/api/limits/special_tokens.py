"""Keeps texts from becoming control tokens or image placeholders.

A tokenizer turns `</s>` or `<image>` into one special token wherever it stands in the prompt, even if a user typed it.
Such a text gets an invisible character after its first one: it reads the same, and is tokenized as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any

from foldserve.server.api.errors import LimitExceeded

_INVISIBLE = ("\u2060", "\u200b", "\u200d", "\ufe0e")  # word joiner, zero-width space, ...
_RENDERED = ("messages", "tools", "documents")  # a chat template may put these into the prompt
_NOT_TEXT = ("image_url", "role", "type", "video_url")


class SpecialTokenBudget:
    """The special tokens that a body's texts may still hold."""

    def __init__(self, most: int) -> None:
        self._most = self.left = most

    def spend(self, number: int) -> None:
        """Raises LimitExceeded if fewer are left."""
        if number > self.left:
            raise LimitExceeded(
                f"the texts hold more than {self._most} special tokens of the model, which its context has no room for",
                "messages",
            )
        self.left -= number


class SpecialTokens:
    """The special tokens of one tokenizer.

    `placeholders` are texts that stand for images in the model's prompts, special tokens or not.
    Raises ValueError if the tokenizer's normalization undoes `neutralise`.
    """

    def __init__(self, tokenizer: Any, placeholders: Iterable[str] = ()) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        # One character can't be split: such a token is a letter of its tokenizer, not a command.
        self._texts = sorted(text for text in special | set(placeholders) if len(text) > 1)
        self._first_bytes = [first.encode() for first in sorted({text[0] for text in self._texts})] + [b"\\u"]
        self._first_letters = re.compile(_first_letters_of(self._texts))
        self._invisible = self._choose(tokenizer)

    def _choose(self, tokenizer: Any) -> str:
        ids = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        for character in _INVISIBLE:
            split = [text[0] + character + text[1:] for text in self._texts]
            is_in_a_token = any(character in text for text in self._texts)
            if not is_in_a_token and not any(
                ids & set(tokenizer.encode(f"a{text}b", add_special_tokens=False)) for text in split
            ):
                return character
        raise ValueError("this tokenizer finds its special tokens in any text: it can't be served to the public")

    def neutralise(self, texts: Sequence[str], budget: SpecialTokenBudget | None = None) -> list[str]:
        """Breaks up every special token in consecutive texts, also across their borders.

        One pass inserts a character after the first letter of each token, overlapping ones included. The result holds
        none, since a token's letters were neighbours before. Raises LimitExceeded for more tokens than the allowance.
        """
        whole = "".join(texts)
        found = self._first_letters.finditer(whole)
        splits = [match.end() for match in (islice(found, budget.left + 1) if budget else found)]
        if budget:
            budget.spend(len(splits))
        if not splits:
            return list(texts)
        safe, begin, done = [], 0, 0
        for end in accumulate(map(len, texts)):
            pieces = []
            while done < len(splits) and splits[done] < end:
                pieces.append(whole[begin : splits[done]])
                begin = splits[done]
                done += 1
            safe.append(self._invisible.join([*pieces, whole[begin:end]]))
            begin = end
        return safe

    def may_be_in(self, body: bytes) -> bool:
        """Whether a raw chat body holds a character that a special token begins with, or an escape that may be one."""
        return any(_holds(body, first) for first in self._first_bytes)

    def neutralise_body(self, body: dict[str, Any], most: int) -> None:
        """Neutralises, in place, every text of a chat body that may get into the prompt.

        Raises LimitExceeded for more than `most` special tokens; each becomes two tokens or more.
        """
        budget = SpecialTokenBudget(most)
        for name in _RENDERED:
            if name in body:
                body[name] = self._neutralise_value(body[name], budget)

    def _neutralise_value(self, value: Any, budget: SpecialTokenBudget) -> Any:
        if isinstance(value, str):
            return self.neutralise([value], budget)[0]
        if isinstance(value, dict):
            return {
                self._neutralise_value(key, budget): self._neutralise_field(key, inner, budget)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return self._neutralise_list(value, budget)
        return value

    def _neutralise_field(self, key: str, value: Any, budget: SpecialTokenBudget) -> Any:
        if key in _NOT_TEXT and isinstance(value, str | dict):
            return value
        if key == "arguments" and isinstance(value, str) and "\\" in value:
            return self._neutralise_json(value, budget)
        return self._neutralise_value(value, budget)

    def _neutralise_json(self, text: str, budget: SpecialTokenBudget) -> str:
        """A template gets a tool call's arguments parsed: `\\u003c` and `<\\/` are letters by then."""
        try:
            value = json.loads(text)
            safe = self._neutralise_value(value, budget)
            if safe != value:
                text = json.dumps(safe, ensure_ascii=False)
        except ValueError:  # vLLM takes it for no arguments
            pass
        except RecursionError as error:
            raise LimitExceeded("the arguments of a tool call are nested too deeply", "messages") from error
        return self.neutralise([text], budget)[0]  # for templates that show it as it is

    def _neutralise_list(self, parts: list[Any], budget: SpecialTokenBudget) -> list[Any]:
        """A template may join neighbouring texts of one message."""
        places = [(p, key) for p, part in enumerate(parts) for key in _text_keys(part)]
        done = self.neutralise([parts[p] if key is None else parts[p][key] for p, key in places], budget)
        by_place = dict(zip(places, done, strict=True))
        result = []
        for p, part in enumerate(parts):
            if (p, None) in by_place:
                result.append(by_place[p, None])
            elif isinstance(part, dict):
                texts = {key: by_place[p, key] for key in _text_keys(part)}
                others = {key: inner for key, inner in part.items() if key not in texts}
                result.append(self._neutralise_value(others, budget) | texts)
            else:
                result.append(self._neutralise_value(part, budget))
        return result


def _first_letters_of(texts: Iterable[str]) -> str:
    """A pattern of first letters with the rest as a lookahead; each following letter is read once."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return "|".join(f"{re.escape(first)}(?={_pattern(rest)})" for first, rest in tree.items()) or "(?!)"


def _pattern(tree: dict[str, Any]) -> str:
    """Matches the shortest texts in a tree of letters, since a longer one begins where a shorter one does."""
    if "" in tree:
        return ""
    branches = [re.escape(letter) + _pattern(rest) for letter, rest in tree.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _text_keys(part: object) -> list[str | None]:
    """Where a part of a message has its text: in itself (None), or in these fields."""
    if isinstance(part, str):
        return [None]
    if isinstance(part, dict):
        return [key for key in ("text", "refusal", "thinking") if isinstance(part.get(key), str)]
    return []


def _holds(body: bytes, part: bytes) -> bool:
    """`part in body`, as fast as a search for one byte if the first byte is rare, as in an image's base64."""
    lead = part[:1]
    first = body.find(lead)
    return first >= 0 and body.find(part, first, body.rfind(lead) + len(part)) >= 0
