"""Questions about a scene, by kind, each with its one right answer and the objects that its phrases refer to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from foldserve.server.quality.demo.glyphs import SHAPES
from foldserve.server.quality.demo.scene import CELLS, COLOR_NAMES, PLACES, Object, Scene, pick

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six")
UNKNOWN = -100
"""Class without a target: `cross_entropy`'s `ignore_index`."""

# Property of what a phrase refers to -> number of classes. Class 0 is "nothing there"; a count is its own class.
# `across` and `along` place the object of the phrase before, seen from this phrase's object: 0 left or above, 1 in
# line, 2 right or below. `holds`: whether the claimed relation is true.
REFERENTS = {
    "cell": 1 + CELLS**2,
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLOR_NAMES),
    "size": 3,
    "count": 7,
    "across": 3,
    "along": 3,
    "holds": 2,
}


@dataclass(frozen=True)
class Phrase:
    """Words of a question, and one class or `UNKNOWN` for each of `REFERENTS`."""

    text: str
    referent: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `mentions` holds (end of a phrase in `question`, its referent)."""

    question: str
    answer: str
    mentions: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """Turns about one scene; only the last answer is scored."""

    kind: str
    turns: tuple[Turn, ...]


_ALONE = (UNKNOWN,) * 3  # no relation to another phrase

_Maker: TypeAlias = Callable[[np.random.Generator, Scene], Turn | None]


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Dialogue | None:
    """A question of `kind` (KeyError if unknown), or None if the scene allows none, such as `ocr` without a number."""
    if kind == "two_turn":
        return _two_turn(rng, scene)
    turn = KINDS[kind](rng, scene)
    return None if turn is None else Dialogue(kind, (turn,))


def _turn(template: str, answer: str, *phrases: Phrase) -> Turn:
    """Fills each {} of the template with a phrase and notes where it ends."""
    text, mentions = "", []
    for part, phrase in zip(template.split("{}"), (*phrases, None), strict=True):
        text += part
        if phrase is not None:
            text += phrase.text
            mentions.append((len(text), phrase.referent))
    return Turn(text, answer, tuple(mentions))


def _refer(matches: Sequence[Object]) -> tuple[int, ...]:
    if not matches:
        return (0, 0, 0, 0, 0, *_ALONE)
    if len(matches) > 1:
        return (*[UNKNOWN] * 4, len(matches), *_ALONE)
    one = matches[0]
    return (1 + one.cell, 1 + SHAPES.index(one.shape), 1 + COLOR_NAMES.index(one.color), 1 + one.big, 1, *_ALONE)


def _place(scene: Scene, cell: int) -> Phrase:
    where = "in the center" if PLACES[cell] == "center" else f"at the {PLACES[cell]}"
    _, *rest = _refer([thing for thing in scene.objects if thing.cell == cell])
    return Phrase(where, (1 + cell, *rest))


def _named(scene: Scene, name: str) -> Phrase:
    """A colour and a shape, as in "red circle"."""
    return Phrase(name, _refer([thing for thing in scene.objects if thing.name == name]))


def _shaped(scene: Scene, shape: str, plural: bool = False) -> Phrase:
    return Phrase(_plural(shape) if plural else shape, _refer([t for t in scene.objects if t.shape == shape]))


def _colored(scene: Scene, color: str, noun: str) -> Phrase:
    return Phrase(f"{color} {noun}", _refer([thing for thing in scene.objects if thing.color == color]))


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _unique(scene: Scene, key: Callable[[Object], str]) -> list[Object]:
    keys = [key(thing) for thing in scene.objects]
    return [thing for thing in scene.objects if keys.count(key(thing)) == 1]


def _color_at(rng: np.random.Generator, scene: Scene) -> Turn | None:
    thing = pick(rng, scene.objects)
    templates = ("what color is the object {}?", "what color is {}?", "which color do you see {}?")
    return _turn(pick(rng, templates), thing.color, _place(scene, thing.cell))


def _shape_at(rng: np.random.Generator, scene: Scene) -> Turn | None:
    thing = pick(rng, scene.objects)
    templates = ("what shape is the object {}?", "what shape is {}?", "which shape do you see {}?")
    return _turn(pick(rng, templates), thing.shape, _place(scene, thing.cell))


def _what_at(rng: np.random.Generator, scene: Scene) -> Turn | None:
    cell = int(rng.integers(CELLS**2)) if rng.random() < 0.35 else pick(rng, scene.objects).cell
    if cell in scene.number_cells:
        return None
    answer = next((_with_article(thing.name) for thing in scene.objects if thing.cell == cell), "nothing")
    return _turn(pick(rng, ("what is {}?", "what do you see {}?", "which object is {}?")), answer, _place(scene, cell))


def _attribute(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if rng.random() < 0.5:
        things = _unique(scene, lambda thing: thing.shape)
        if not things:
            return None
        thing = pick(rng, things)
        templates = ("what color is the {}?", "what is the color of the {}?", "which color does the {} have?")
        return _turn(pick(rng, templates), thing.color, _shaped(scene, thing.shape))
    things = _unique(scene, lambda thing: thing.color)
    if not things:
        return None
    thing = pick(rng, things)
    templates = ("what shape is the {}?", "what is the shape of the {}?", "which shape does the {} have?")
    return _turn(pick(rng, templates), thing.shape, _colored(scene, thing.color, "object"))


def _size(rng: np.random.Generator, scene: Scene) -> Turn | None:
    things = _unique(scene, lambda thing: thing.name)
    if not things:
        return None
    thing = pick(rng, things)
    templates = ("is the {} big or small?", "what size is the {}?", "how big is the {}?")
    return _turn(pick(rng, templates), "big" if thing.big else "small", _named(scene, thing.name))


def _where(rng: np.random.Generator, scene: Scene) -> Turn | None:
    things = _unique(scene, lambda thing: thing.name)
    if not things:
        return None
    thing = pick(rng, things)
    templates = ("where is the {}?", "where do you see the {}?")
    return _turn(pick(rng, templates), _place(scene, thing.cell).text, _named(scene, thing.name))


def _relation(rng: np.random.Generator, scene: Scene) -> Turn | None:
    things = _unique(scene, lambda thing: thing.name)
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
    right = first.cell % CELLS - second.cell % CELLS
    down = first.cell // CELLS - second.cell // CELLS
    target = _named(scene, second.name)
    sides = 1 + int(np.sign(right)), 1 + int(np.sign(down))

    def phrases(holds: int) -> tuple[Phrase, Phrase]:
        related = (*target.referent[: -len(_ALONE)], *sides, holds)
        return _named(scene, first.name), Phrase(target.text, related)

    if rng.random() < 0.3:
        across = ["left of it" if right < 0 else "right of it"] if right else []
        along = ["above it" if down < 0 else "below it"] if down else []
        return _turn("where is the {} compared to the {}?", " and ".join(along + across), *phrases(UNKNOWN))
    claims = [("left of", right < 0), ("right of", right > 0)] if right else []
    claims += [("above", down < 0), ("below", down > 0)] if down else []
    side, holds = pick(rng, claims)
    template = pick(rng, ("is the {} SIDE the {}?", "do you see the {} SIDE the {}?")).replace("SIDE", side)
    return _turn(template, "yes" if holds else "no", *phrases(int(holds)))


def _exist(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """As in POPE: "yes" and "no" are equally frequent, and most "no" questions name something plausible."""
    holds, form = bool(rng.random() < 0.5), rng.random()
    if form < 0.6:
        present = {thing.name for thing in scene.objects}
        options = [name for name in _likely_names(rng, scene) if (name in present) == holds]
    elif form < 0.8:
        shapes = {thing.shape for thing in scene.objects}
        options = [shape for shape in SHAPES if (shape in shapes) == holds]
    else:
        colors = {thing.color for thing in scene.objects}
        options = [color for color in COLOR_NAMES if (color in colors) == holds]
    if not options:
        return None
    choice = pick(rng, options)
    phrase = (
        _named(scene, choice)
        if form < 0.6
        else _shaped(scene, choice)
        if form < 0.8
        else _colored(scene, choice, "object")
    )
    article = _with_article(choice).split()[0]
    templates = (f"is there {article} {{}}?", f"do you see {article} {{}}?", f"is there {article} {{}} in the image?")
    return _turn(pick(rng, templates), "yes" if holds else "no", phrase)


def _likely_names(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Names of an object of the scene, of ones that share its colour or shape, and of a random one."""
    thing, other = pick(rng, scene.objects), pick(rng, scene.objects)
    mixed = [
        f"{thing.color} {other.shape}",
        f"{thing.color} {pick(rng, SHAPES)}",
        f"{pick(rng, COLOR_NAMES)} {thing.shape}",
    ]
    return [thing.name, *mixed, f"{pick(rng, COLOR_NAMES)} {pick(rng, SHAPES)}"]


def _count(rng: np.random.Generator, scene: Scene) -> Turn | None:
    thing, form = pick(rng, scene.objects), rng.random()
    any_other = rng.random() < 0.2
    if form < 0.3:
        phrase = Phrase(pick(rng, ("objects", "shapes")), (*[UNKNOWN] * 4, len(scene.objects), *_ALONE))
    elif form < 0.65:
        phrase = _shaped(scene, pick(rng, SHAPES) if any_other else thing.shape, plural=True)
    else:
        phrase = _colored(scene, pick(rng, COLOR_NAMES) if any_other else thing.color, "objects")
    templates = ("how many {} are there?", "how many {} do you see?", "count the {}.")
    return _turn(pick(rng, templates), NUMERALS[phrase.referent[4]], phrase)


def _ocr(rng: np.random.Generator, scene: Scene) -> Turn | None:
    if scene.number is None and rng.random() < 0.8:
        return None
    templates = (
        "what number is shown?",
        "read the number.",
        "which number do you see?",
        "what number is in the image?",
    )
    return _turn(pick(rng, templates), scene.number or "no number")


def _caption(rng: np.random.Generator, scene: Scene) -> Turn | None:
    parts = [f"{_with_article(thing.name)} {_place(scene, thing.cell).text}" for thing in scene.objects]
    if scene.number is not None:
        parts.append(f"the number {scene.number}")
    answer = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    templates = ("describe the image.", "what is in the image?", "describe the picture.", "what do you see?")
    return _turn(pick(rng, templates), answer)


def _two_turn(rng: np.random.Generator, scene: Scene) -> Dialogue | None:
    """A second question about "it": only the first turn says which object is meant."""
    makers = (_color_at, _shape_at, _attribute, _size)
    first = pick(rng, makers)(rng, scene)
    if first is None:
        return None
    referent = first.mentions[0][1]
    cell, shape, color, size, *_ = referent
    questions = {
        "what color is it?": COLOR_NAMES[color - 1],
        "what shape is it?": SHAPES[shape - 1],
        "what size is it?": ("small", "big")[size - 1],
        "where is it?": _place(scene, cell - 1).text,
    }
    question, answer = pick(rng, [entry for entry in questions.items() if entry[1] != first.answer])
    end = question.index("it?") + len("it")
    return Dialogue("two_turn", (first, Turn(question, answer, ((end, referent),))))


KINDS: dict[str, _Maker] = {
    "color_at": _color_at,
    "shape_at": _shape_at,
    "what_at": _what_at,
    "attribute": _attribute,
    "size": _size,
    "where": _where,
    "relation": _relation,
    "exist": _exist,
    "count": _count,
    "ocr": _ocr,
    "caption": _caption,
}
"""Kinds of single questions; `two_turn` joins two of them."""

ALL_KINDS = (*KINDS, "two_turn")
