"""Tokenizer, image processor and chat template of a LLaVA-1.5 checkpoint, as transformers' LLaVA reads them."""

from __future__ import annotations

from pathlib import Path

from transformers import AddedToken, AutoTokenizer, CLIPVisionConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from foldserve.server.convert.source import ConversionError, read_json

IMAGE_TOKEN = "<image>"

# The conversation "v1" of LLaVA-1.5. Only the template writes <s>: the server adds no special tokens.
_CHAT_TEMPLATE = """\
{%- set system = "A chat between a curious human and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the human's questions." -%}
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] in ('image', 'image_url') -%}{{ '<image>\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}{{ raise_exception('unsupported content type ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system, messages = render(messages[0]['content']), messages[1:] -%}
{%- endif -%}
{{- bos_token ~ system ~ ' ' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' ~ render(message['content']) ~ ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' ~ render(message['content']) ~ eos_token }}
{%- else -%}{{ raise_exception('unsupported role ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer with `<image>` added, unless it has it; raises ConversionError if none is readable.

    LLaVA splits a prompt at its images and encodes each piece on its own: with a sentencepiece model, each begins with
    its own word mark. `legacy` does the same at a special token, and `PreTrainedTokenizerFast` keeps it that way.
    """
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, legacy=True)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder} holds no tokenizer that can be read: {error}") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        bos_token=found.bos_token,
        eos_token=found.eos_token,
        unk_token=found.unk_token,
        pad_token=found.pad_token or found.unk_token,
        model_max_length=found.model_max_length,
        padding_side="left",
    )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return tokenizer


def save_processor(
    target: Path, tokenizer: PreTrainedTokenizerFast, vision: CLIPVisionConfig, tower: Path | None, *, pad: bool
) -> None:
    """Writes tokenizer, image processor and chat template into `target`.

    Args:
        tower: folder of the vision tower, whose `preprocessor_config.json` may have other colour statistics than
            CLIP's.
        pad: pad images to a square instead of cropping them.
    """
    size = vision.image_size
    images = LlavaImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_pad=pad, **_colours(tower)
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(target)


def _colours(tower: Path | None) -> dict[str, object]:
    file = tower / "preprocessor_config.json" if tower else None
    if file is None or not file.is_file():
        return {}
    return {name: value for name, value in read_json(file).items() if name in ("image_mean", "image_std")}
