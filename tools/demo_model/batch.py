"""Training batches: about fifteen dialogues packed behind each image, which do not see each other."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foldserve.server.quality.demo.config import CLIP_MEAN, CLIP_STD
from foldserve.server.quality.demo.questions import ALL_KINDS, REFERENTS, UNKNOWN, Dialogue, Turn, ask
from foldserve.server.quality.demo.scene import Scene, draw_scene
from tools.demo_model.tokenizer import build_tokenizer, special_ids

PREFIX_TOKENS = 2  # <s> USER:
MASKED = -3e4  # low enough for a weight of exactly 0 after the softmax, and finite

# Share of each kind of question. Questions that take two steps in the scene need the most practice, so "hard" asks
# mostly those. "long" asks for captions twice as often.
MIXES = {
    "even": (0.05, 0.05, 0.07, 0.09, 0.07, 0.09, 0.15, 0.13, 0.13, 0.08, 0.03, 0.06),
    "hard": (0.03, 0.03, 0.06, 0.05, 0.04, 0.05, 0.18, 0.11, 0.20, 0.14, 0.06, 0.05),
    "long": (0.03, 0.03, 0.06, 0.05, 0.04, 0.05, 0.15, 0.11, 0.18, 0.13, 0.12, 0.05),
}
_OPENINGS = ("please tell me,", "look at the image.", "in this picture,", "hello!")
_GIVE_UP_AFTER = 8  # questions in a row that do not fit


@dataclass(frozen=True)
class PackedText:
    """One packed row of T tokens, or a batch of rows with a leading dimension.

    Attributes:
        ids: (T,).
        offsets: (T,) position of a token in its dialogue.
        segments: (T,) index of the dialogue in its row, -1 for padding.
        targets: (T,) the next token if it is part of an answer, else `UNKNOWN`.
        referents: (T, len(REFERENTS)) classes at the last token of a phrase, else `UNKNOWN`.
        kinds: (T,) index into `ALL_KINDS`, -1 for padding.
    """

    ids: Tensor
    offsets: Tensor
    segments: Tensor
    targets: Tensor
    referents: Tensor
    kinds: Tensor

    def mask(self, prefix: int) -> Tensor:
        """(batch, 1, T, prefix + T) additive mask: a token sees the prefix and its own dialogue up to itself."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        hidden = ~(same & torch.ones_like(same).tril())
        allowed = torch.zeros(*hidden.shape[:2], prefix, device=hidden.device)
        return torch.cat([allowed, torch.zeros_like(hidden, dtype=torch.float).masked_fill_(hidden, MASKED)], 2)[
            :, None
        ]


@dataclass(frozen=True)
class Batch:
    """Scenes with their packed text.

    Attributes:
        pixels: (batch, 3, side, side) normalised.
        labels: (batch, patches, len(LABELS)).
        order: (batch, patches) order of the vision tokens in the decoder.
        span: (batch,) number of positions that the vision tokens are spread over.
    """

    pixels: Tensor
    labels: Tensor
    text: PackedText
    order: Tensor
    span: Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {field.name: getattr(self.text, field.name).to(device) for field in fields(PackedText)}
        rest = (self.pixels, self.labels, self.order, self.span)
        pixels, labels, order, span = (tensor.to(device) for tensor in rest)
        return Batch(pixels, labels, PackedText(**moved), order, span)

    def positions(self) -> Tensor:
        """(batch, prefix + patches + T) positions: vision tokens spread evenly over their span, then the text."""
        patches = self.order.shape[1]
        steps = torch.arange(patches, device=self.span.device) / patches
        vision = PREFIX_TOKENS + steps * self.span[:, None]
        prefix = torch.arange(PREFIX_TOKENS, device=self.span.device).expand(len(self.span), -1)
        return torch.cat([prefix, vision, PREFIX_TOKENS + self.span[:, None] + self.text.offsets], 1)


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """CLIP's image processor: (batch, side, side, 3) -> (batch, 3, side, side)."""
    scaled = torch.from_numpy(pixels).float() / 255
    return ((scaled - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2).contiguous()


def draw_batch(rng: np.random.Generator, images: int, tokens: int, mix: str = "even") -> Batch:
    """A batch of new scenes, with questions of one of `MIXES`.

    Vision tokens come in random order, and half of the images have fewer positions than tokens, as after a reduction:
    the decoder must find a patch by its features, never by its position id.
    """
    scenes = [draw_scene(rng) for _ in range(images)]
    rows = [pack(rng, _dialogues(rng, scene, tokens, mix), tokens) for scene in scenes]
    text = PackedText(
        **{field.name: torch.stack([getattr(row, field.name) for row in rows]) for field in fields(PackedText)}
    )
    patches = scenes[0].labels.shape[0]
    order = np.argsort(rng.random((images, patches)), axis=1)
    span = np.where(rng.random(images) < 0.5, patches, rng.integers(patches // 8, patches, images))
    return Batch(
        normalise(np.stack([scene.pixels for scene in scenes])),
        torch.from_numpy(np.stack([scene.labels for scene in scenes])),
        text,
        torch.from_numpy(order),
        torch.from_numpy(span),
    )


def draw_patches(rng: np.random.Generator, images: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels, as in `Batch`, without text."""
    scenes = [draw_scene(rng) for _ in range(images)]
    labels = torch.from_numpy(np.stack([scene.labels for scene in scenes]))
    return normalise(np.stack([scene.pixels for scene in scenes])), labels


def _dialogues(rng: np.random.Generator, scene: Scene, tokens: int, mix: str) -> list[Dialogue]:
    """More dialogues than fit into `tokens`, without repetition."""
    weights = np.array(MIXES[mix])
    drawn = rng.choice(len(ALL_KINDS), tokens // 5, p=weights / weights.sum())
    asked = [ask(rng, scene, ALL_KINDS[index]) for index in drawn]
    return list({dialogue.turns[-1].question: dialogue for dialogue in asked if dialogue is not None}.values())


def pack(rng: np.random.Generator, dialogues: list[Dialogue], tokens: int) -> PackedText:
    """Fills a row of `tokens` with as many dialogues as fit, in order, with small changes of wording."""
    columns: dict[str, list[int]] = {field.name: [] for field in fields(PackedText)}
    misses = segment = 0
    for dialogue in dialogues:
        ids, targets, referents = encode(tuple(_vary(rng, turn) for turn in dialogue.turns))
        if len(columns["ids"]) + len(ids) > tokens:
            misses += 1
            if misses == _GIVE_UP_AFTER:
                break
            continue
        columns["ids"] += ids
        columns["offsets"] += range(len(ids))
        columns["segments"] += [segment] * len(ids)
        columns["targets"] += targets
        columns["referents"] += [entry for row in referents for entry in row]
        columns["kinds"] += [ALL_KINDS.index(dialogue.kind)] * len(ids)
        segment += 1
    missing = tokens - len(columns["ids"])
    fill = {
        "ids": special_ids().pad,
        "offsets": 0,
        "segments": -1,
        "targets": UNKNOWN,
        "referents": UNKNOWN,
        "kinds": -1,
    }
    for name, column in columns.items():
        column += [fill[name]] * (missing * (len(REFERENTS) if name == "referents" else 1))
    tensors = {name: torch.tensor(column) for name, column in columns.items()}
    return PackedText(**tensors | {"referents": tensors["referents"].view(tokens, len(REFERENTS))})


def encode(turns: tuple[Turn, ...]) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
    """(ids, targets, referents) of a dialogue behind `<s>USER:<image>`; see `PackedText`."""
    tokenizer, special = build_tokenizer(), special_ids()
    ids: list[int] = []
    targets: list[int] = []
    referents: list[tuple[int, ...]] = []
    nothing = (UNKNOWN,) * len(REFERENTS)
    for turn in turns:
        opening = [special.user] if ids else []
        question = tokenizer.encode(turn.question, add_special_tokens=False)
        answer = [*tokenizer.encode(turn.answer, add_special_tokens=False).ids, special.eos]
        rows = [nothing] * len(question.ids)
        for end, referent in turn.mentions:
            last = question.char_to_token(end - 1)
            assert last is not None, f"no token ends at {end} of {turn.question!r}"
            rows[last] = referent
        ids += [*opening, *question.ids, special.assistant, *answer]
        targets += [UNKNOWN] * (len(opening) + len(question.ids)) + answer + [UNKNOWN]
        referents += [nothing] * len(opening) + rows + [nothing] * (1 + len(answer))
    return ids, targets, referents


def _vary(rng: np.random.Generator, turn: Turn) -> Turn:
    question, mentions = turn.question, turn.mentions
    if rng.random() < 0.08:
        opening = f"{_OPENINGS[int(rng.integers(len(_OPENINGS)))]} "
        question = opening + question
        mentions = tuple((len(opening) + end, referent) for end, referent in mentions)
    if rng.random() < 0.08:
        question = question.rstrip("?.")
    return Turn(question, turn.answer, mentions)
