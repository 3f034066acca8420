"""The demo model's tokenizer in Llama's layout: one token per known word, letters and bytes for others."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from foldserve.server.quality import tokenizer_files
from foldserve.server.quality.tokenizer_files import BOS, EOS, IMAGE, PAD, UNK

USER, ASSISTANT = "USER:", "ASSISTANT:"
_SPACE = "▁"

_WORDS = """
a above all an and any are at below big blue bottom can center circle circles color colors compared count cross crosses
cyan describe diamond diamonds do does five four green have heart hearts hello how i image in is it large left list
look many me no not nothing number object objects of on one only or orange picture please purple read red right ring
rings say see shape shapes show shown six size small square squares star stars tell text thank that the there
thing things this three to top triangle triangles two what where which white yellow yes you zero
"""
_PUNCTUATION = ",.?!:;'\"-()"

# As in LLaVA-1.5's own template, all images of a turn come first.
CHAT_TEMPLATE = tokenizer_files.chat_template(
    """\
{%- for part in content if part['type'] in ('image', 'image_url') -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- elif part['type'] not in ('image', 'image_url') -%}{{ raise_exception('unsupported content type ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
"""
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that structure a dialogue, and the rows of the embedding matrix."""

    bos: int
    eos: int
    pad: int
    image: int
    user: int
    assistant: int
    vocab_size: int


@cache
def build_tokenizer() -> Tokenizer:
    """Lower-cases, adds `<s>` by default, and strips spaces around the marks `USER:` and `ASSISTANT:`."""
    pieces = [UNK, BOS, EOS, PAD, _SPACE, *string.digits, *_PUNCTUATION, *string.ascii_lowercase]
    # Viterbi takes the path of the highest score: a whole word before its letters, letters before bytes.
    scored = [(piece, -4.0) for piece in pieces] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scored += [(_SPACE + word, -1.0) for word in _WORDS.split() if len(word) > 1] + [
        (f"{_SPACE}{x}", -1.0) for x in "ai"
    ]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = _decoder()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS, PAD)])
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False, special=True, rstrip=True)])
    marks = [AddedToken(mark, normalized=False, lstrip=True, rstrip=True) for mark in (USER, ASSISTANT)]
    tokenizer.add_tokens(marks)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _decoder() -> decoders.Decoder:
    """Decodes the space after a turn's mark with the mark, so that an answer begins with its first word."""
    marks = [decoders.Replace(mark, f"{mark} ") for mark in (USER, ASSISTANT)]
    first_space = decoders.Replace(Regex(f"(?<=(?:{USER}|{ASSISTANT}) ) "), "")
    pieces = [decoders.Replace(_SPACE, " "), *marks, decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*pieces, first_space, decoders.Strip(" ", 1, 0)])


@cache
def special_ids() -> SpecialIds:
    tokenizer = build_tokenizer()
    ids, rows = tokenizer.get_vocab(), tokenizer_files.embedding_rows(tokenizer)
    return SpecialIds(ids[BOS], ids[EOS], ids[PAD], ids[IMAGE], ids[USER], ids[ASSISTANT], rows)


def save_tokenizer(folder: Path) -> None:
    tokenizer_files.save(build_tokenizer(), CHAT_TEMPLATE, folder)
