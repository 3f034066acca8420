"""The demo model is a real LLaVA-1.5 checkpoint. That vLLM loads it and agrees with transformers: tests/engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foldserve.server.quality import demo_model
from tests.images import photo


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model.create(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def processor(path: Path) -> Any:
    return AutoProcessor.from_pretrained(path)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_equal_arguments_give_equal_files_and_another_seed_other_weights(path: Path, tmp_path: Path) -> None:
    again = files(demo_model.create(tmp_path / "again"))
    assert again == files(path)
    other = files(demo_model.create(tmp_path / "other", seed=1))
    assert {name for name in again if again[name] != other[name]} == {"model.safetensors"}


def test_bfloat16_is_the_same_model_rounded(path: Path, tmp_path: Path) -> None:
    rounded = load_file(demo_model.create(tmp_path / "m", dtype="bfloat16") / "model.safetensors")
    exact = load_file(path / "model.safetensors")
    assert rounded.keys() == exact.keys()
    for name, weight in exact.items():
        assert torch.equal(weight.bfloat16(), rounded[name]), name


def test_it_is_small_and_says_that_it_answers_nonsense(path: Path) -> None:
    assert sum(map(len, files(path).values())) < 16 << 20
    assert demo_model.NOTICE in (path / "README.md").read_text()


def test_layout_is_that_of_the_published_checkpoint(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert config["text_config"]["max_position_embeddings"] == 4096
    assert config["image_seq_length"] == 576
    published = {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.3.self_attn.k_proj.bias",
        "multi_modal_projector.linear_2.weight",
        "language_model.model.layers.7.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    }
    assert published <= load_file(path / "model.safetensors").keys()


def test_an_image_is_one_token_that_becomes_576(processor: Any, path: Path) -> None:
    image_token = json.loads((path / "config.json").read_text())["image_token_index"]
    assert processor.tokenizer("a<image>\nb", add_special_tokens=True)["input_ids"].count(image_token) == 1
    ids = processor(images=photo(0), text="a<image>\nb")["input_ids"][0]
    assert ids.count(image_token) == 576


@pytest.mark.parametrize("text", ["What is this?", " two  spaces\n", "Grüße, 你好 🙂", "", "<s> as text? </s>"])
def test_tokenizer_gives_any_text_back(text: str, processor: Any) -> None:
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


def test_chat_template_puts_images_where_they_stand(processor: Any) -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "and"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, image, text, {"type": "image_url"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<s>Be brief. USER: and<image>\nand<image>\n ASSISTANT: Yes.</s>USER: Why? ASSISTANT:"
    )
    assert processor.apply_chat_template(messages[1:2]) == "<s>USER: and<image>\nand<image>\n "


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}]
)
def test_chat_template_refuses_what_it_cannot_show(message: dict[str, Any], processor: Any) -> None:
    with pytest.raises(Exception, match="unsupported"):
        processor.apply_chat_template([message])


def test_answers_depend_on_image_and_prompt_and_are_readable(path: Path, processor: Any) -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info

    def answer(seed: int, question: str) -> str:
        inputs = processor(images=photo(seed), text=f"<s>USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    answers = [answer(seed, question) for seed in range(4) for question in ("What is this?", "Which color?")]
    assert len(set(answers)) == len(answers)
    assert all(text.isascii() and text.isprintable() for text in answers)


def test_an_existing_directory_is_left_alone(path: Path, tmp_path: Path) -> None:
    before = files(path)
    with pytest.raises(FileExistsError, match="not an empty directory"):
        demo_model.create(path, seed=1)
    assert files(path) == before
    (tmp_path / "empty").mkdir()
    assert files(demo_model.create(tmp_path / "empty")) == before


def test_nothing_is_left_of_an_attempt_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "random_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo_model.create(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 13}, "patch_size must divide image_size"),
        ({"num_heads": 3}, "num_heads must divide hidden_size"),
        ({"vision_heads": 0}, "vision_heads must divide vision_hidden"),
        ({"num_layers": 0}, "at least 1 decoder layer"),
        ({"vision_layers": 1}, "2 vision layers"),
        ({"hidden_size": 20}, "must be even"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        demo_model.create(tmp_path / "m", **sizes)  # type: ignore[arg-type]
