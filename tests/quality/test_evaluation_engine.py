"""Evaluation and analysis through the real engine, against the same figures computed directly in plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.loadtest.report.journal import RESULTS_FILE
from foldserve.reducers.folder import folder
from foldserve.reducers.ladder import ratio_of
from foldserve.reducers.plan import Reduction
from foldserve.reducers.schedule import fold_schedule
from foldserve.server import cli
from foldserve.server.quality.analysis.command import RESULT_FILE
from foldserve.server.quality.analysis.measures import RATIOS, earth_movers_distance
from foldserve.server.quality.analysis.report import Analysis
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.quality.demo.examples import questions as demo_questions
from foldserve.server.quality.engine.offline import AnsweringModel
from foldserve.server.quality.evaluation.card import Card, VariantResult
from foldserve.server.quality.evaluation.questions import Question
from foldserve.server.quality.evaluation.scores import is_right
from foldserve.server.quality.evaluation.variants import CONTROLS, plan_all
from tests.engine.withdrawal.reference import WithdrawingReference, withdrawn_forward
from tests.images import photo

K, LAYERS, TOKENS = 2, 4, 144
PHOTOS = [photo(seed, 168, 168) for seed in range(3)]
QUESTIONS = ["What is in the picture?", "Is there a red car?", "How many?"]
KINDS = ["what", "exist", "ocr"]
VLLMS = ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "768"]
MAX_TOKENS = 6
MOST = 32  # of an answer of the demo model


class Direct(WithdrawingReference):
    """Modifications: the whole distribution of the first token, the text of an answer, and what analysis looks at."""

    def prompt(self, question: str) -> str:
        return f"<s>USER: <image>\n{question} ASSISTANT:"

    def embeds(self, image: Any, question: str, reduction: dict[str, object]) -> tuple[Tensor, Tensor]:
        """(n, hidden) input of the decoder, and which rows are the image."""
        plan = self.plan(reduction)
        ids = torch.tensor(self.prompt_ids(self.prompt(question), [plan]))
        embeds = self.model.get_input_embeddings()(ids)
        of_image = ids == self.config.image_token_index
        embeds[of_image] = self.image_features(image, plan)
        return embeds, of_image

    @torch.no_grad()
    def first(self, image: Any, question: str, reduction: dict[str, object]) -> Tensor:
        """(vocab,) log-probabilities."""
        embeds, of_image = self.embeds(image, question, reduction)
        kept = ~of_image if self.plan(reduction).decoder == "withdraw" else torch.ones_like(of_image)
        hidden = withdrawn_forward(self.model.model.language_model, embeds, kept, self.layer)
        return self.model.lm_head(hidden[-1]).log_softmax(-1)

    def answer(self, image: Any, question: str, reduction: dict[str, object]) -> str:
        ids, _ = self.generate(self.prompt(question), [image], [reduction], MAX_TOKENS)
        end = self.processor.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def tower_states(self, image: Any) -> list[Tensor]:
        """Hidden states (1, n + 1, d) that enter each tower layer used, and that leave the last."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return list(states[:-1])  # the feature layer is -2

    @torch.no_grad()
    def merged(self, states: Sequence[Tensor], block: int, removed: int) -> tuple[Tensor, Tensor]:
        """(kept, d) output of the tower with tokens merged in `block` by the mean of its keys, and their sizes."""
        tower = self.model.model.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers[: len(states) - 1]
        layer, hidden = layers[block], states[block]
        attention, x = layer.self_attn, layer.layer_norm1(hidden)
        hidden = hidden + attention(x)[0]
        keys = attention.k_proj(x).unflatten(-1, (attention.num_heads, -1)).mean(2)
        reduced = folder(hidden, fold_schedule(hidden.shape[1], removed), metric=keys, class_token=True)
        hidden = reduced.tokens + layer.mlp(layer.layer_norm2(reduced.tokens))
        for later in layers[block + 1 :]:
            output = later(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden[0, 1:], reduced.sizes[0, 1:]

    @torch.no_grad()
    def attention(self, image: Any, question: str) -> Tensor:
        """(layers, 2, 3) shares of the last token's attention, and of the mean of those behind the image."""
        embeds, of_image = self.embeds(image, question, {})
        rows = of_image.nonzero().flatten()
        start, end = int(rows[0]), int(rows[-1]) + 1
        decoder = self.model.model.language_model
        usual = decoder.config._attn_implementation
        decoder.config._attn_implementation = "eager"  # which gives its weights
        weights = decoder(inputs_embeds=embeds[None], use_cache=False, output_attentions=True).attentions
        decoder.config._attn_implementation = usual
        mean = torch.stack(weights)[:, 0].mean(1)[:, end:]  # (layers, rows behind the image, n)
        parts = torch.stack([mean[..., :start].sum(-1), mean[..., start:end].sum(-1), mean[..., end:].sum(-1)], -1)
        return torch.stack([parts[:, -1], parts.mean(1)], 1)


@pytest.fixture(scope="module")
def direct(tiny_llava: Path) -> Direct:
    return Direct(tiny_llava, K)


@pytest.fixture(scope="module")
def data(direct: Direct, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first answer is what the model says at ratio 0; the second what it says at 0.5; nobody says the third."""
    folder_ = tmp_path_factory.mktemp("data")
    asked: list[dict[str, object]] = [{}, {"ratio": 0.5}]
    answers = [direct.answer(PHOTOS[i], QUESTIONS[i], reduction) for i, reduction in enumerate(asked)]
    rows = zip(QUESTIONS, [*answers, "nobody says this"], KINDS, strict=True)
    lines = []
    for i, (question, answer, kind) in enumerate(rows):
        PHOTOS[i].save(folder_ / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": question, "answer": answer, "kind": kind}))
    (folder_ / "data.jsonl").write_text("\n".join(lines))
    return folder_ / "data.jsonl"


@pytest.fixture(scope="module")
def card(tiny_llava: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Card:
    """Two runs of the command: the second finds all that it needs and starts no engine."""
    output = tmp_path_factory.mktemp("evaluated")
    command = ["evaluate", str(tiny_llava), "--data", str(data), "--output", str(output), "--ratios", "0,0.5"]
    command += ["--methods", "folder,fastv,withdraw", "--withdraw", str(K), "--max-tokens", str(MAX_TOKENS)]
    command += ["--card", str(output / "card.json"), *VLLMS]
    cli.main(command)
    written = (output / RESULTS_FILE).read_bytes()
    first = Card.read(output / "card.json")
    (output / "card.json").unlink()
    cli.main(command)
    assert (output / RESULTS_FILE).read_bytes() == written
    assert Card.read(output / "card.json") == first == Card.read(output / "quality.json")
    assert {file.suffix for file in output.iterdir()} == {".jsonl", ".npy", ".svg", ".html", ".md", ".json"}
    return first


def of(card: Card, label: str) -> VariantResult:
    (result,) = [result for result in card.results if result.label == label and not result.is_control]
    return result


@pytest.mark.parametrize(
    ("label", "reduction"), [("none", {}), ("folder", {"ratio": 0.5}), ("withdraw", {"withdraw": True})]
)
def test_figures_are_those_of_a_direct_computation(
    label: str, reduction: dict[str, object], card: Card, direct: Direct, data: Path
) -> None:
    result = of(card, label)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    full = [direct.first(image, question, {}) for image, question in zip(PHOTOS, QUESTIONS, strict=True)]
    own = [direct.first(image, question, reduction) for image, question in zip(PHOTOS, QUESTIONS, strict=True)]
    kl = [float(F.kl_div(f, o, log_target=True, reduction="sum")) for f, o in zip(full, own, strict=True)]
    assert result.kl.value == pytest.approx(sum(kl) / 3, abs=1e-3)
    assert label == "none" or result.kl.value > 1e-2
    agree = [int(f.argmax()) == int(o.argmax()) for f, o in zip(full, own, strict=True)]
    assert result.agreement.value == pytest.approx(sum(agree) / 3)
    right = [
        is_right(direct.answer(image, row["question"], reduction), [row["answer"]])
        for image, row in zip(PHOTOS, rows, strict=True)
    ]
    assert {kind: estimate.value for kind, estimate in result.kinds.items()} == dict(zip(KINDS, right, strict=True))
    assert result.accuracy is not None and result.ocr is not None
    assert (result.accuracy.value, result.ocr.value) == (sum(right[:2]) / 2, 0.0)


def test_the_questions_tell_variants_apart(card: Card) -> None:
    assert [of(card, label).kinds["what"].value for label in ("none", "folder")] == [1.0, 0.0]
    assert [of(card, label).kinds["exist"].value for label in ("none", "folder")] == [0.0, 1.0]
    assert (of(card, "folder").lost, of(card, "folder").gained) == (1, 1)


def test_tokens_and_controls_at_the_same_count(card: Card) -> None:
    measured = {
        result.label: (result.layer, result.kept, result.kept_deep, result.layer_tokens)
        for result in card.results
        if not result.is_control
    }
    rows, columns = 8, 9
    assert measured == {
        "none": (None, TOKENS, TOKENS, TOKENS),
        "folder": (None, 72, 72, 72),
        "fastv": (K, TOKENS, 72, 108),
        "withdraw": (K, TOKENS, 0, 72),
        "random": (None, 72, 72, 72),
        "downsample": (None, rows * columns, rows * columns, 72),
    }
    counts = {name: [r.kept for r in card.results if r.label == name and r.is_control] for name in CONTROLS}
    assert counts == {"random": [72, 108], "downsample": [72, 108]}
    assert not card.refused
    assert (card.questions, card.layers, card.tokens) == (3, LAYERS, TOKENS)


@pytest.fixture(scope="module")
def analysis(tiny_llava: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    output = tmp_path_factory.mktemp("analyzed")
    cli.main(["analyze", str(tiny_llava), "--data", str(data), "--samples", "3", "--output", str(output), *VLLMS])
    return Analysis.model_validate_json((output / RESULT_FILE).read_text())


def test_energy_is_that_of_the_towers_states(analysis: Analysis, direct: Direct) -> None:
    expected = []
    for image in PHOTOS:
        states = torch.cat(direct.tower_states(image)[1:])[:, 1:].double()
        values = torch.linalg.svdvals(states).square()
        kept = [min(TOKENS - int(TOKENS * ratio), values.shape[-1]) for ratio in RATIOS]
        expected.append(torch.stack([values[:, :k].sum(-1) / values.sum(-1) for k in kept], dim=-1))
    assert torch.allclose(torch.tensor(analysis.energy), torch.stack(expected).mean(0).float(), atol=1e-4)


def test_distance_is_that_of_merging_in_each_block(analysis: Analysis, direct: Direct) -> None:
    distances = []
    for image in PHOTOS:
        states = direct.tower_states(image)
        merged = [direct.merged(states, block, TOKENS // 2) for block in range(len(states) - 1)]
        distances.append([earth_movers_distance(states[-1][0, 1:], tokens, sizes) for tokens, sizes in merged])
    assert analysis.distance == pytest.approx(torch.tensor(distances).mean(0).tolist(), abs=1e-4)
    assert min(analysis.distance) > 1e-2


def test_attention_is_that_of_the_decoder(analysis: Analysis, direct: Direct) -> None:
    found = torch.tensor([analysis.attention_last, analysis.attention_text]).transpose(0, 1)
    expected = torch.stack([direct.attention(i, q) for i, q in zip(PHOTOS, QUESTIONS, strict=True)]).mean(0)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(found.sum(-1), torch.ones(LAYERS, 2), atol=1e-5)


def test_options_that_evaluation_sets_itself(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is loaded before it says so."""
    with pytest.raises(SystemExit):
        AnsweringModel(str(tiny_llava), ["--max-logprobs", "5"])
    assert "foldserve evaluate sets --max-logprobs itself: leave that option out" in capsys.readouterr().err
    model = AnsweringModel(str(tiny_llava), ["--scheduler-cls", "some.Scheduler"])
    with pytest.raises(ValueError, match=r"--withdraw-layer sets --scheduler-cls .*: leave"), model.engine(K):
        pass


def test_an_answer_has_changed_where_another_one_is_generated() -> None:
    asked = [Question(q.image, q.question, (q.answer,), q.kind, q.history) for q in demo_questions(7, 24)]
    model = AnsweringModel(str(CHECKPOINT), VLLMS)
    layouts = model.layouts(question.open() for question in asked)
    dialogues = [question.messages() for question in asked]
    whole = plan_all(Reduction(), layouts)
    with model.engine(None) as engine:
        answers = engine.answers(dialogues, whole, MOST)
        full = [reply.text for reply in engine.ask(dialogues, Reduction(), whole, MOST)]
        assert not any(engine.changed(dialogues, Reduction(), whole, answers))
        for step, at_least in ((1, 3), (2, 1)):
            reduction = Reduction(ratio=ratio_of(step))
            plans = plan_all(reduction, layouts)
            generated = [reply.text for reply in engine.ask(dialogues, reduction, plans, MOST)]
            changed = [own != whole for own, whole in zip(generated, full, strict=True)]
            assert engine.changed(dialogues, reduction, plans, answers) == changed
            assert at_least <= sum(changed) < len(changed)
