"""The checkpoint that comes with foldserve: small, in the published layout, and right about scenes it never saw."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foldserve.reducers.reduction import Reduction
from foldserve.server.api.announce import EXAMPLE_PNG
from foldserve.server.quality.demo.checkpoint import CHECKPOINT, copy_checkpoint
from foldserve.server.quality.demo.examples import Example, questions
from foldserve.server.quality.demo.questions import ALL_KINDS
from foldserve.server.quality.demo.scene import draw_scene
from tests.quality.accuracy import AnswerEngine, accuracy, scores

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "scene.png"


@pytest.fixture(scope="module")
def engine() -> Iterator[AnswerEngine]:
    yield AnswerEngine(
        CHECKPOINT,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        mm_processor_cache_gb=0.1,
    )


def test_size_and_layout() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 15e6
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["text_config"]["num_hidden_layers"], config["image_seq_length"]) == (12, 144)
    log = [json.loads(line) for line in (CHECKPOINT / "training.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(entry["stage"] for entry in log)) == ["vision", "answers", "practice", "withdrawal"]
    assert log[-1]["loss"] < log[-1]["early"] < 1


def test_stock_transformers_answers_as_vllm_does(engine: AnswerEngine) -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    processor: Any = AutoProcessor.from_pretrained(CHECKPOINT)
    examples, answers = questions(11, len(ALL_KINDS)), []
    for example in examples:
        text = processor.apply_chat_template(example.messages(), add_generation_prompt=True)
        inputs = processor(images=example.image, text=text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=96, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(ids, skip_special_tokens=True))
    assert answers == engine.answers([(example.messages(), example.image) for example in examples])


def test_held_out_questions_are_answered(engine: AnswerEngine) -> None:
    found = accuracy(engine, questions(0, 25 * len(ALL_KINDS)))
    assert {kind: score.total for kind, score in found.items()} == dict.fromkeys(ALL_KINDS, 25)
    shares = {kind: score.share for kind, score in found.items()}
    assert min(shares[kind] for kind in ("color_at", "shape_at", "what_at")) >= 0.92, shares
    assert min(shares[kind] for kind in ("exist", "ocr", "count")) >= 0.8, shares
    assert min(shares.values()) >= 0.56 and sum(shares.values()) / len(shares) >= 0.9, shares


def test_half_the_tokens_keep_most_answers(engine: AnswerEngine) -> None:
    examples = questions(1, 120, ("color_at", "shape_at", "what_at"))
    half = accuracy(engine, examples, Reduction(method="folder", ratio=0.5))
    assert min(score.share for score in half.values()) >= 0.75, half


def test_the_picture_of_the_readme(engine: AnswerEngine) -> None:
    drawn = draw_scene(np.random.default_rng((1051, 2)))
    image = Image.open(PICTURE)
    assert np.array_equal(np.asarray(image), drawn.pixels)
    asked = [Example(image, "What is at the top right?", "", ""), Example(image, "What number is shown?", "", "")]
    dialogues = [(example.messages(), example.image) for example in asked]
    assert engine.answers(dialogues) == ["a cyan star", "562"]
    assert engine.answers(dialogues[:1], Reduction(method="folder", ratio=0.5)) == ["a cyan star"]


def test_the_picture_of_the_example_that_the_server_prints(engine: AnswerEngine) -> None:
    image = Image.open(io.BytesIO(b64decode(EXAMPLE_PNG))).convert("RGB")
    example = Example(image, "Describe the image.", "", "")
    answers = engine.answers([(example.messages(), image)], Reduction(method="folder", ratio=0.66))
    assert answers == ["a red circle in the center"]


def test_scores_count_exact_answers() -> None:
    examples = [
        Example(Image.new("RGB", (1, 1)), "?", answer, kind) for answer, kind in (("12", "a"), ("no", "a"), ("x", "b"))
    ]
    found = scores(examples, ["12", "no way", "x"])
    assert {kind: (score.right, score.total, score.share) for kind, score in found.items()} == {
        "a": (1, 2, 0.5),
        "b": (1, 1, 1.0),
    }


def test_copying_leaves_existing_files_alone(tmp_path: Path) -> None:
    copy_checkpoint(tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {file.name for file in CHECKPOINT.iterdir()}
    with pytest.raises(FileExistsError, match="not an empty directory"):
        copy_checkpoint(tmp_path / "copy")
