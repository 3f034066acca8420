"""A real fast tokenizer for the demo model: byte-level BPE trained on a page of text, and LLaVA-1.5's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from foldserve.server.quality import tokenizer_files
from foldserve.server.quality.tokenizer_files import BOS, EOS, IMAGE, PAD, UNK

_TEXT_TOKENS = 512  # unk, bos, eos, 256 bytes, and merges

# The template alone writes <s>: the tokenizer adds nothing by itself, so no path can write it twice.
_CHAT_TEMPLATE = tokenizer_files.chat_template(
    """\
{%- for part in content -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- elif part['type'] in ('image', 'image_url') -%}{{ '<image>\\n' }}
{%- else -%}{{ raise_exception('unsupported content type ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
"""
)

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
    """Ids of the special tokens, the rows of the embedding matrix, and the ids that an answer may hold.

    `answers` are `</s>` and all tokens of printable ASCII: no control character or partial UTF-8 reaches a terminal.
    """

    bos: int
    eos: int
    image: int
    pad: int
    vocab_size: int
    answers: tuple[int, ...]


def save_tokenizer(folder: Path) -> TokenIds:
    """Writes the tokenizer and the chat template; every call writes the same files."""
    tokenizer = _train()
    tokenizer_files.save(tokenizer, _CHAT_TEMPLATE, folder)
    ids, rows = tokenizer.get_vocab(), tokenizer_files.embedding_rows(tokenizer)
    texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]  # "" for special tokens
    readable = (i for i, text in enumerate(texts) if text and text.isascii() and text.isprintable())
    return TokenIds(ids[BOS], ids[EOS], ids[IMAGE], ids[PAD], rows, (ids[EOS], *readable))


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TEXT_TOKENS,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE, PAD)])
    return tokenizer
