"""Evaluation and analysis of Qwen3-VL, whose images have any size, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldserve.reducers.reduction import Reduction
from foldserve.server import cli
from foldserve.server.quality.analysis.command import RESULT_FILE
from foldserve.server.quality.analysis.measures import earth_movers_distance, kept_energy
from foldserve.server.quality.analysis.report import Analysis
from foldserve.server.quality.engine.offline import AnsweringModel
from foldserve.server.quality.evaluation.card import Card
from foldserve.server.quality.evaluation.variants import plan_all
from tests import qwen_checkpoint
from tests.engine import qwen_tower_reference
from tests.engine.qwen_reference import QwenReference
from tests.images import photo

SIZES = ((256, 192), (96, 288), (64, 64))
TOKENS = (8 * 6, 9 * 3, 4)
RATIO = 0.4  # of each image one fold is enough
QUESTION = "what is it?"
PROMPT = f"<|im_start|>user\n{qwen_checkpoint.IMAGE}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
VLLMS = ["--dtype", "float32", "--max-model-len", "512"]
PHOTOS = [photo(seed, *size) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoint.write(tmp_path_factory.mktemp("studied") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> QwenReference:
    return QwenReference(checkpoint, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i, image in enumerate(PHOTOS):
        image.save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": QUESTION}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def test_answers_are_the_references(checkpoint: Path, reference: QwenReference) -> None:
    """A method that chooses by a query has each image's own question for it."""
    model, methods = AnsweringModel(str(checkpoint), VLLMS), ("folder", "mmtok")
    layouts = model.layouts(PHOTOS)
    assert tuple(layout.tokens for layout in layouts) == TOKENS
    content = [[{"type": "image_pil", "image_pil": image}, {"type": "text", "text": QUESTION}] for image in PHOTOS]
    dialogues: list[Any] = [[{"role": "user", "content": parts}] for parts in content]
    with model.engine(None) as engine:
        each = [Reduction(method, ratio=0.5) for method in methods]
        replies = [engine.ask(dialogues, reduction, plan_all(reduction, layouts), 1) for reduction in each]
    for method, own in zip(methods, replies, strict=True):
        for image, reply in zip(PHOTOS, own, strict=True):
            asked = {"method": method, "ratio": 0.5, "query": QUESTION}
            tokens, logprobs = reference.generate(PROMPT, [image], [asked], 1)
            assert int(reply.first.argmax()) == tokens[0]
            assert float(reply.first[tokens[0]]) == pytest.approx(logprobs[0], abs=2e-5)


def test_a_card(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Counts are means over images; what one of them is too small for is refused by its number."""
    command = ["evaluate", str(checkpoint), "--data", str(data), "--output", str(tmp_path), "--ratios", "0.5"]
    cli.main([*command, "--methods", "folder,pool", "--card", str(tmp_path / "card.json"), *VLLMS])
    card = Card.read(tmp_path / "card.json")
    kept = {result.label: result.kept for result in card.results if not result.is_control}
    assert kept["none"] == round(sum(TOKENS) / 3) and kept["folder"] == round((24 + 14 + 2) / 3)
    reasons = [refusal.reason for refusal in card.refused if refusal.label == "pool"]
    assert len(reasons) == 1 and reasons[0].startswith("image 3 of 3: method 'pool' would leave")


@pytest.fixture(scope="module")
def analysis(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    output = tmp_path_factory.mktemp("analyzed")
    cli.main(["analyze", str(checkpoint), "--data", str(data), "--ratio", str(RATIO), "--output", str(output), *VLLMS])
    return Analysis.model_validate_json((output / RESULT_FILE).read_text())


def encoded(reference: QwenReference, image: Any) -> Any:
    return reference.processor.image_processor(images=[image], return_tensors="pt")


def test_energy(analysis: Analysis, reference: QwenReference) -> None:
    """Of what the merger makes one token of: 2 x 2 patches."""
    visual, found = reference.model.model.visual, []
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in visual.blocks]
    for image, tokens in zip(PHOTOS, TOKENS, strict=True):
        states.clear()
        inputs = encoded(reference, image)
        with torch.no_grad():
            visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        energy = torch.stack([torch.linalg.svdvals(x.view(tokens, -1)).square() for x in states])
        found.append(kept_energy(energy, tokens))
    for hook in hooks:
        hook.remove()
    assert torch.allclose(torch.tensor(analysis.energy).double(), torch.stack(found).mean(0), atol=1e-4)
    assert analysis.tokens == pytest.approx(sum(TOKENS) / 3)


def test_distance(analysis: Analysis, reference: QwenReference) -> None:
    visual, distances = reference.model.model.visual, []
    for image, tokens in zip(PHOTOS, TOKENS, strict=True):
        inputs = encoded(reference, image)
        _, height, width = inputs["image_grid_thw"][0].tolist()
        with torch.no_grad():
            full = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True).pooler_output
            row = []
            for block in range(len(visual.blocks)):
                asked = {"method": "tome", "layers": [block], "proportional": False}
                grid = (height // 2, width // 2)
                left = qwen_tower_reference.encode(visual, inputs["pixel_values"], grid, int(tokens * RATIO), asked)
                merged = torch.stack([token.levels[0] for token in left])
                sizes = torch.tensor([float(token.size) for token in left])
                row.append(earth_movers_distance(full, merged, sizes))
        distances.append(row)
    assert analysis.distance == pytest.approx(torch.tensor(distances).mean(0).tolist(), abs=1e-4)


def test_attention(analysis: Analysis, reference: QwenReference) -> None:
    model, shares = reference.model, []
    usual = model.config.text_config._attn_implementation
    model.model.language_model.config._attn_implementation = "eager"  # which gives its weights
    for image in PHOTOS:
        inputs = reference.processor(text=[PROMPT], images=[image], return_tensors="pt")
        with torch.no_grad():
            weights = model(**inputs, use_cache=False, output_attentions=True).attentions
        rows = (inputs["input_ids"][0] == reference.config.image_token_id).nonzero().flatten()
        parts = [x.sum(-1) for x in torch.stack(weights)[:, 0].mean(1).tensor_split([rows[0], rows[-1] + 1], dim=-1)]
        behind = torch.stack(parts, dim=-1)[:, int(rows[-1]) + 1 :]
        shares.append(torch.stack([behind[:, -1], behind.mean(1)], 1))
    model.model.language_model.config._attn_implementation = usual
    found = torch.tensor([analysis.attention_last, analysis.attention_text]).transpose(0, 1)
    assert torch.allclose(found, torch.stack(shares).mean(0), atol=1e-4)


def test_an_image_of_too_many_tokens_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldserve.server.quality.engine import study

    monkeypatch.setattr(study, "MOST_TOKENS", 20)
    with pytest.raises(ValueError, match="an image of 256 x 192 pixels has 48 vision tokens"):
        study.ModelStudy(str(checkpoint), VLLMS, command="analyze").tokens(PHOTOS[0], 0.5)
