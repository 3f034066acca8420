"""Scenes and questions: drawn from the seed alone, and every answer follows from what the scene says it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from foldserve.server.quality.demo.examples import Example, questions
from foldserve.server.quality.demo.glyphs import SHAPES, digit_mask, shape_mask
from foldserve.server.quality.demo.questions import ALL_KINDS, NUMERALS, REFERENTS, UNKNOWN, ask
from foldserve.server.quality.demo.scene import COLOR_NAMES, COLORS, GRID, LABELS, PLACES, Object, Scene, draw_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng(seed)) for seed in range(300)]


def place(cell: int) -> str:
    return "in the center" if PLACES[cell] == "center" else f"at the {PLACES[cell]}"


def label(scene: Scene, name: str) -> np.ndarray:
    return scene.labels[:, list(LABELS).index(name)].reshape(GRID, GRID)


def test_equal_seeds_give_equal_scenes(scenes: list[Scene]) -> None:
    again = draw_scene(np.random.default_rng(7))
    assert np.array_equal(again.pixels, scenes[7].pixels) and np.array_equal(again.labels, scenes[7].labels)
    assert (again.objects, again.number) == (scenes[7].objects, scenes[7].number)
    assert len({scene.pixels.tobytes() for scene in scenes}) == len(scenes)


def test_scenes_are_varied(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.shape for thing in things} == set(SHAPES) and {thing.color for thing in things} == set(COLOR_NAMES)
    assert {thing.cell for thing in things} == set(range(9)) and {thing.big for thing in things} == {False, True}
    assert {len(scene.objects) for scene in scenes} == set(range(1, 7))
    assert {len(scene.number or "") for scene in scenes} == {0, 2, 3, 4}


def test_objects_are_where_the_scene_says_in_their_color(scenes: list[Scene]) -> None:
    for scene in scenes:
        cells = [thing.cell for thing in scene.objects]
        assert cells == sorted(set(cells)) and not set(cells) & set(scene.number_cells)
        for thing in scene.objects:
            ((row, column),) = np.argwhere(label(scene, "anchor") & (label(scene, "cell") == 1 + thing.cell))
            assert (row // 4) * 3 + column // 4 == thing.cell
            # Some pixel of the cell has the colour, up to tint and noise.
            cell = scene.pixels[thing.cell // 3 * 32 :, thing.cell % 3 * 32 :][:32, :32].astype(int)
            assert np.abs(cell - np.array(COLORS[thing.color])).max(-1).min() < 45


def test_patch_labels_name_the_things_of_the_scene(scenes: list[Scene]) -> None:
    for scene in scenes:
        shown = set(zip(*(label(scene, name).ravel() for name in ("shape", "color", "size", "cell")), strict=True))
        things = {
            (1 + SHAPES.index(t.shape), 1 + COLOR_NAMES.index(t.color), 1 + t.big, 1 + t.cell) for t in scene.objects
        }
        assert {entry for entry in shown if entry[0]} == things
        digits = {(i, d - 1) for d, i in zip(label(scene, "digit").ravel(), label(scene, "index").ravel(), strict=True)}
        assert digits - {(0, -1)} == set(enumerate(map(int, scene.number or ""), start=1))


def test_glyphs_differ() -> None:
    assert len({shape_mask(shape, 24).tobytes() for shape in SHAPES}) == len(SHAPES)
    assert len({digit_mask(str(digit), 22).tobytes() for digit in range(10)}) == 10
    with pytest.raises(ValueError, match="got 'blob'"):
        shape_mask("blob", 9)


def only(scene: Scene, holds: Callable[[Object], bool]) -> Object:
    (thing,) = (thing for thing in scene.objects if holds(thing))
    return thing


def expected(scene: Scene, question: str) -> str:
    """The answer by a second way: from the words of the question."""
    words = question.strip("?.").split()
    named = [(c, s) for c, s in pairwise(words) if c in COLORS and s in SHAPES]
    colors, shapes = [w for w in words if w in COLORS], [w for w in words if w in SHAPES]
    cell = next((cell for cell in sorted(range(9), key=lambda c: -len(place(c))) if place(cell) in question), None)
    matching = [
        t for t in scene.objects
        if all(t.color == c for c in colors[:1]) and all(t.shape == s for s in shapes[:1]) and cell in (None, t.cell)
    ]  # fmt: skip
    if "number" in words:
        return scene.number or "no number"
    if words[0] in ("how", "count") and "big" not in words:
        counted = next((w for w in words if w.rstrip("s") in SHAPES or w.removesuffix("es") in SHAPES), "")
        singular = {f"{s}es" if s.endswith("s") else f"{s}s": s for s in SHAPES}.get(counted)
        return NUMERALS[sum(singular in (None, t.shape) for t in matching)]
    if len(named) == 2:
        first, second = (only(scene, lambda t, n=n: (t.color, t.shape) == n) for n in named)  # type: ignore[misc]
        right, down = first.cell % 3 - second.cell % 3, first.cell // 3 - second.cell // 3
        sides = {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}
        if "compared" in words:
            texts = {"above": "above it", "below": "below it", "left": "left of it", "right": "right of it"}
            return " and ".join(text for side, text in texts.items() if sides[side])
        return "yes" if next(holds for side, holds in sides.items() if side in words) else "no"
    if "big" in words or "size" in words:
        return "big" if matching[0].big else "small"
    if words[0] == "where":
        return place(matching[0].cell)
    if "color" in words:
        return matching[0].color
    if "shape" in words:
        return matching[0].shape
    if cell is not None:
        return f"{'an' if matching[0].color == 'orange' else 'a'} {matching[0].name}" if matching else "nothing"
    return "yes" if matching else "no"


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind not in ("caption", "two_turn")])
def test_answers_follow_from_the_scene(kind: str, scenes: list[Scene]) -> None:
    rng, asked = np.random.default_rng(1), Counter[str]()
    for scene in scenes:
        dialogue = ask(rng, scene, kind)
        if dialogue is not None:
            (turn,) = dialogue.turns
            assert turn.answer == expected(scene, turn.question), (turn, scene.objects)
            asked[turn.answer] += 1
    assert len(asked) > 1 and asked.total() > 100
    if {"yes", "no"} <= asked.keys():
        assert 0.4 < asked["yes"] / (asked["yes"] + asked["no"]) < 0.6


def test_captions_name_everything_in_reading_order(scenes: list[Scene]) -> None:
    for scene in scenes:
        dialogue = ask(np.random.default_rng(0), scene, "caption")
        assert dialogue is not None
        parts = dialogue.turns[0].answer.replace(" and ", ", ").split(", ")
        number = [f"the number {scene.number}"] if scene.number else []
        objects = [f"{'an' if t.color == 'orange' else 'a'} {t.name} {place(t.cell)}" for t in scene.objects]
        assert parts == objects + number


def test_a_second_turn_asks_about_the_object_of_the_first(scenes: list[Scene]) -> None:
    rng, seen = np.random.default_rng(2), 0
    for scene in scenes:
        dialogue = ask(rng, scene, "two_turn")
        if dialogue is not None:
            first, second = dialogue.turns
            thing = only(scene, lambda t, r=first.mentions[0][1]: 1 + t.cell == r[0])  # type: ignore[misc]
            facts = {
                "color": thing.color,
                "shape": thing.shape,
                "size": ("small", "big")[thing.big],
                "is": place(thing.cell),
            }
            assert second.answer == next(fact for word, fact in facts.items() if word in second.question.split())
            assert first.answer == expected(scene, first.question)
            seen += 1
    assert seen > 200


def test_phrases_end_where_they_are_mentioned_and_know_what_they_mean(scenes: list[Scene]) -> None:
    rng, ends = np.random.default_rng(3), Counter[str]()
    for scene in scenes:
        for kind in ALL_KINDS:
            dialogue = ask(rng, scene, kind)
            for turn in dialogue.turns if dialogue else ():
                for end, referent in turn.mentions:
                    ends[turn.question[:end].split()[-1]] += 1
                    assert end == len(turn.question) or not turn.question[end].isalnum()
                    classes = zip(referent, REFERENTS.values(), strict=True)
                    assert all(value == UNKNOWN or 0 <= value < size for value, size in classes)
    assert {"circle", "objects", "center", "left", "it"} <= ends.keys()


def test_the_second_phrase_of_a_relation_knows_the_sides(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(4)
    for scene in scenes:
        dialogue = ask(rng, scene, "relation")
        if dialogue is not None:
            turn = dialogue.turns[0]
            (_, first), (_, second) = turn.mentions
            cells = first[0] - 1, second[0] - 1
            signs = np.sign(cells[0] % 3 - cells[1] % 3), np.sign(cells[0] // 3 - cells[1] // 3)
            holds = {"no": 0, "yes": 1}.get(turn.answer, UNKNOWN)
            assert second[-3:] == (1 + signs[0], 1 + signs[1], holds) and first[-3:] == (UNKNOWN,) * 3


def test_held_out_questions() -> None:
    some = questions(5, 30)
    assert [example.kind for example in some] == [*ALL_KINDS, *ALL_KINDS, *ALL_KINDS][:30]
    assert [(e.question, e.answer, e.image.tobytes()) for e in questions(5, 12)] == [
        (e.question, e.answer, e.image.tobytes()) for e in some[:12]
    ]
    assert questions(6, 12)[0].image.tobytes() != some[0].image.tobytes()
    assert all(example.answer.isdigit() for example in questions(0, 40, ("ocr",)))


def test_messages_hold_the_image_once_and_all_turns() -> None:
    example = Example(
        Image.new("RGB", (1, 1)), "what shape is it?", "ring", "two_turn", (("what color is it?", "red"),)
    )
    part: dict[str, object] = {"type": "image_url", "image_url": {"url": "data:"}}
    assert example.messages(part) == [
        {"role": "user", "content": [part, {"type": "text", "text": "what color is it?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "what shape is it?"},
    ]
