"""A real fast tokenizer for the demo model: byte-level BPE trained on a page of text, and LLaVA-1.5's chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

_UNK, _BOS, _EOS, _IMAGE, _PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
_TEXT_TOKENS = 512  # unk, bos, eos, 256 bytes, and merges
_MULTIPLE = 64  # rows of the embedding matrix, as the published 32000 + 2 tokens fill 32064 rows

# LLaVA-1.5's turns. The template alone writes <s>: the tokenizer adds nothing by itself, so no path can write it twice.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- elif part['type'] in ('image', 'image_url') -%}{{ '<image>\\n' }}
{%- else -%}{{ raise_exception('unsupported content type ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ render(message['content']) ~ ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' ~ render(message['content']) ~ ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' ~ render(message['content']) ~ eos_token }}
{%- else -%}{{ raise_exception('unsupported role ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

_CORPUS = """\
What is in this picture? What do you see in the image? Describe the image. Describe this photo in detail, please.
How many people are there? How many colors does it have? Where is the dog? Which animal is on the left, and which one is
on the right? Read the text on the sign. Is there a red car in front of the house? Answer with one word: yes or no.
The image shows a street with a yellow bus, three people waiting and a tree behind them. In the background there is a
building with large windows. A cat is sleeping on the table next to a cup of coffee. It looks like a sunny morning.
The picture on the top left shows a blue circle, a green square and a white triangle. There are two numbers: 12 and 408.
A man with a hat is riding a bicycle along the water. The woman is holding a phone, and the child is pointing at a bird.
I can see a plate with bread, cheese and some fruit. The light comes from the window, so the scene is bright and warm.
You are a helpful assistant. Answer the question of the user in a few words. USER: Compare the two pictures. ASSISTANT:
The first image is darker than the second. Both of them show the same room, but the chair has been moved to the corner.
"""


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens, the rows of the embedding matrix, and the ids an answer may hold.

    `answers` are `</s>` and every token of printable ASCII: neither control characters nor torn UTF-8 reach a terminal.
    """

    bos: int
    eos: int
    image: int
    pad: int
    vocab_size: int
    answers: tuple[int, ...]


def save_tokenizer(folder: Path) -> TokenIds:
    """Writes `tokenizer.json` and `tokenizer_config.json` into `folder`; every call writes the same."""
    tokenizer = _train()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "unk_token": _UNK,
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _PAD,
        "extra_special_tokens": {"image_token": _IMAGE},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = tokenizer.get_vocab()
    rows = -(-tokenizer.get_vocab_size() // _MULTIPLE) * _MULTIPLE
    texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]  # "" for special tokens
    readable = (i for i, text in enumerate(texts) if text and text.isascii() and text.isprintable())
    return TokenIds(ids[_BOS], ids[_EOS], ids[_IMAGE], ids[_PAD], rows, (ids[_EOS], *readable))


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TEXT_TOKENS,
        special_tokens=[_UNK, _BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (_IMAGE, _PAD)])
    return tokenizer
