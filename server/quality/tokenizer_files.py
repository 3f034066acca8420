"""Shared by the demo models' tokenizers: Llama's special tokens, LLaVA-1.5's chat template, and the files."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from foldserve.server.folders import write_json

BOS, EOS, UNK, PAD, IMAGE = "<s>", "</s>", "<unk>", "<pad>", "<image>"
ROWS_MULTIPLE = 64  # of the embedding matrix, as the published 32000 + 2 tokens fill 32064 rows

# "USER:" and "ASSISTANT:" are written here alone.
_BEFORE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
"""
_AFTER = """\
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


def chat_template(parts: str) -> str:
    """LLaVA-1.5's chat template; `parts` renders a message's `content` if it is a list."""
    return _BEFORE + parts + _AFTER


def embedding_rows(tokenizer: Tokenizer) -> int:
    """Rows of the embedding matrix: the vocabulary, rounded up to a multiple."""
    return -(-tokenizer.get_vocab_size() // ROWS_MULTIPLE) * ROWS_MULTIPLE


def save(tokenizer: Tokenizer, template: str, folder: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "extra_special_tokens": {"image_token": IMAGE},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template)
