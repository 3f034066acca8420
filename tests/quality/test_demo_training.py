"""Training at a tiny size: packing hides nothing and leaks nothing, resuming is exact, the export is the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foldserve.server.quality.demo.examples import questions
from foldserve.server.quality.demo.questions import ALL_KINDS, UNKNOWN, Turn, ask
from foldserve.server.quality.demo.scene import draw_scene
from tools.demo_model import losses
from tools.demo_model.batch import PREFIX_TOKENS, Batch, PackedText, draw_batch, encode, normalise, pack
from tools.demo_model.export import export
from tools.demo_model.model import DemoLlava, Masks, rotation
from tools.demo_model.muon import orthogonalise
from tools.demo_model.tokenizer import build_tokenizer, special_ids
from tools.demo_model.training import GEOMETRY, Recipe, Trainer, TrainingStage, forward

TINY = replace(GEOMETRY, hidden_size=64, num_layers=3, num_heads=2, vision_hidden=32, vision_layers=3, vision_heads=1)
RECIPE = Recipe(
    vision=TrainingStage("vision", steps=3, images=2, warmup=2),
    answers=TrainingStage("answers", steps=3, images=2, vision_rate=0.1, warmup=2, steady=1.0),
    practice=TrainingStage("practice", steps=3, images=2, vision_rate=0.1, mix="hard", warmup=2),
    withdrawal=TrainingStage("withdrawal", steps=2, images=2, vision_rate=0.1, mix="long", warmup=1, withdrawn=0.5),
    geometry=TINY,
    text_tokens=96,
    phrase_layer=2,
    early_layer=2,
    claim_layer=2,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> DemoLlava:
    torch.manual_seed(0)
    return DemoLlava(TINY, special_ids().vocab_size).eval()


def logits(model: DemoLlava, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        last = TINY.num_layers
        return model.logits(forward(model, model.vision(batch.pixels), batch, {last})[last])


def rows(text: PackedText, **changes: torch.Tensor) -> PackedText:
    """`text`, one row, as a batch of one."""
    return PackedText(**{name: value[None] for name, value in (vars(text) | changes).items()})


def test_a_packed_dialogue_has_the_logits_it_has_alone(model: DemoLlava) -> None:
    rng = np.random.default_rng(0)
    scene = draw_scene(rng)
    dialogues = [dialogue for kind in ALL_KINDS if (dialogue := ask(rng, scene, kind)) is not None]
    pixels, labels = normalise(scene.pixels[None]), torch.from_numpy(scene.labels[None])
    order, span = torch.randperm(144)[None], torch.tensor([100])
    packed = pack(np.random.default_rng(1), dialogues, 256)
    together = logits(model, Batch(pixels, labels, rows(packed), order, span))[0]
    assert int(packed.segments.max()) + 1 == len(dialogues)
    for segment in range(len(dialogues)):
        own = packed.segments == segment
        alone = PackedText(**{name: value[own] for name, value in vars(packed).items()})
        apart = logits(model, Batch(pixels, labels, rows(alone), order, span))[0]
        torch.testing.assert_close(together[own], apart, rtol=1e-4, atol=1e-5)


def test_rows_are_full_and_targets_are_the_answers() -> None:
    batch = draw_batch(np.random.default_rng(0), images=8, tokens=192)
    assert (batch.text.segments >= 0).float().mean() > 0.95
    assert batch.text.segments.max(1).values.min() >= 8
    judged = batch.text.targets != UNKNOWN
    following = batch.text.ids.roll(-1, 1)
    assert torch.equal(batch.text.targets[judged], following[judged])
    assert torch.equal(batch.order.sort(1).values, torch.arange(144).expand(8, -1))
    assert not torch.equal(batch.order[0], batch.order[1])
    positions = batch.positions()
    assert positions.shape == (8, 2 + 144 + 192) and bool((positions[:, 2:146].diff(dim=1) > 0).all())
    starts = batch.text.offsets == 0
    assert torch.equal(positions[:, 146:][starts & (batch.text.segments >= 0)] - 2,
                       batch.span[:, None].expand_as(starts)[starts & (batch.text.segments >= 0)])  # fmt: skip


def test_a_referent_stands_at_the_last_token_of_its_phrase() -> None:
    turns = (
        Turn("where is the red circle?", "at the top", ((23, (2, 1, 1, 1, 1, 1, 1)),)),
        Turn("what color is it?", "red"),
    )
    ids, targets, referents = encode(turns)
    tokenizer, special = build_tokenizer(), special_ids()
    assert tokenizer.decode([ids[i] for i, referent in enumerate(referents) if referent[0] == 2]) == "circle"
    assert ids.count(special.user) == 1 and ids.count(special.assistant) == 2
    answers = [tokenizer.decode([target]) for target in targets if target not in (UNKNOWN, special.eos)]
    assert answers == ["at", "the", "top", "red"] and targets.count(special.eos) == 2


def test_the_order_of_a_batch_is_that_of_the_decoder(model: DemoLlava) -> None:
    batch = draw_batch(np.random.default_rng(3), images=1, tokens=64)
    in_place = replace(batch, order=torch.arange(144)[None])
    assert not torch.allclose(logits(model, batch), logits(model, in_place), atol=1e-5)
    with torch.inference_mode():
        shuffled = model.vision(batch.pixels)[:, batch.order[0]]
        by_hand = model.logits(forward(model, shuffled, in_place, {TINY.num_layers})[TINY.num_layers])
    torch.testing.assert_close(by_hand, logits(model, batch))


def test_a_withdrawn_image_leaves_as_if_its_rows_had_gone(model: DemoLlava) -> None:
    batch = draw_batch(np.random.default_rng(4), images=3, tokens=64)
    before_text, last = PREFIX_TOKENS + 144, TINY.num_layers
    with torch.inference_mode():
        features = model.vision(batch.pixels)
        found = forward(model, features, batch, {1, 2, last}, torch.tensor([1, 2, last]))
        whole = forward(model, features, batch, {1, 2, last})
        seen = batch.text.mask(before_text)
        gone = seen[..., [*range(PREFIX_TOKENS), *range(before_text, seen.shape[-1])]]
        positions = batch.positions()[:, [*range(PREFIX_TOKENS), *range(before_text, seen.shape[-1])]]
        for row, layers in enumerate((1, 2)):
            turn = rotation(positions[row : row + 1], model.decoder.head_size)
            prefix = _prefix_states(model, layers)
            x = torch.cat([prefix, whole[layers][row : row + 1]], 1)
            for layer in model.decoder.layers[layers:]:
                x = layer(x, turn, Masks(torch.full((2, 2), -3e4).triu(1), gone[row : row + 1]))
            torch.testing.assert_close(found[last][row], x[0, PREFIX_TOKENS:], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found[last][row], whole[last][row], atol=1e-4)
    torch.testing.assert_close(found[last][2], whole[last][2])


def _prefix_states(model: DemoLlava, layers: int) -> torch.Tensor:
    """(1, 2, width) of `<s> USER:` after `layers`: nothing stands before it."""
    special = special_ids()
    x = model.decoder.embed_tokens(torch.tensor([[special.bos, special.user]]))
    turn = rotation(torch.arange(PREFIX_TOKENS)[None], model.decoder.head_size)
    nothing = torch.empty(1, 1, 0, PREFIX_TOKENS)
    for layer in model.decoder.layers[:layers]:
        x = layer(x, turn, Masks(torch.full((2, 2), -3e4).triu(1), nothing))
    return x


def test_half_of_the_images_are_withdrawn_from_the_early_layer_on(tmp_path: Path) -> None:
    stage = TrainingStage("withdrawal", steps=1, images=400, withdrawn=0.5)
    geometry = replace(TINY, num_layers=6)
    trainer = Trainer(
        replace(RECIPE, vision=stage, geometry=geometry, early_layer=3), tmp_path, CPU, compile_blocks=False
    )
    drawn = trainer._seen_layers(np.random.default_rng(0))
    assert drawn is not None
    counts = torch.bincount(drawn, minlength=7).tolist()
    assert counts[:3] == [0, 0, 0] and all(40 < count < 95 for count in counts[3:6]) and 160 < counts[6] < 240


def test_accuracy_of_a_batch_counts_whole_dialogues() -> None:
    batch = draw_batch(np.random.default_rng(0), images=4, tokens=192)
    wanted = batch.text.targets.clamp(min=0)
    perfect = torch.nn.functional.one_hot(wanted, special_ids().vocab_size).float()
    assert all(float(share) == 1 for share in losses.answers_right(perfect, batch).values())
    first = int(((batch.text.segments[0] == 0) & (batch.text.targets[0] != UNKNOWN)).nonzero()[0])
    perfect[0, first] = perfect[0, first].roll(1)
    kind = ALL_KINDS[int(batch.text.kinds[0, 0])]
    shares = losses.answers_right(perfect, batch)
    assert float(shares.pop(kind)) < 1 and all(float(share) == 1 for share in shares.values())


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 40, 16), (3, 16, 40), (1, 32, 20)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.3


@pytest.mark.parametrize("stop", [2, 3, 10], ids=["in a stage", "between stages", "in the last stage"])
def test_a_stopped_run_continues_bit_for_bit(stop: int, tmp_path: Path) -> None:
    whole = Trainer(RECIPE, tmp_path / "whole", CPU, compile_blocks=False)
    whole.run(log_every=1)

    class Stopped(Exception):
        pass

    steps, original = 0, Trainer.train_step

    class Interrupted(Trainer):
        def train_step(self) -> dict[str, torch.Tensor]:
            nonlocal steps
            if steps == stop:
                self.save()
                raise Stopped
            steps += 1
            return original(self)

    with pytest.raises(Stopped):
        Interrupted(RECIPE, tmp_path / "parts", CPU, compile_blocks=False).run(log_every=1)
    resumed = Trainer(RECIPE, tmp_path / "parts", CPU, compile_blocks=False)
    resumed.run(log_every=1)
    for name, weight in whole.modules.state_dict().items():
        assert torch.equal(weight, resumed.modules.state_dict()[name]), name
    logs = [(tmp_path / run / "training.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    without_time = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert without_time[0] == without_time[1]


def test_a_directory_of_another_seed_is_refused(tmp_path: Path) -> None:
    Trainer(RECIPE, tmp_path, CPU, compile_blocks=False).save()
    with pytest.raises(ValueError, match="seed 0, and 1 was asked for"):
        Trainer(replace(RECIPE, seed=1), tmp_path, CPU, compile_blocks=False)


def test_training_learns_and_logs(tmp_path: Path) -> None:
    stages = [
        TrainingStage("vision", 2, 2),
        TrainingStage("answers", 12, 4, rate=3e-3, warmup=2, steady=1.0),
        TrainingStage("practice", 2, 2, mix="hard"),
        TrainingStage("withdrawal", 1, 2, mix="long", withdrawn=1.0),
    ]
    recipe = replace(RECIPE, vision=stages[0], answers=stages[1], practice=stages[2], withdrawal=stages[3])
    Trainer(recipe, tmp_path, CPU, compile_blocks=False).run(log_every=4)
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in log] == [
        ("vision", 2), ("answers", 4), ("answers", 8), ("answers", 12), ("practice", 2),
        ("withdrawal", 1),
    ]  # fmt: skip
    assert log[3]["loss"] < 0.8 * log[1]["loss"]
    assert {"phrase_cell", "patch_digit", "early", "late_count", "claim_holds"} <= log[-2].keys()


def test_rates_rise_stay_and_fall() -> None:
    stage = TrainingStage("vision", steps=1000, images=1, rate=1.0, warmup=50, steady=0.5)
    rates = [stage.rate_at(step) for step in range(1000)]
    assert rates[0] == 1 / 50 and rates[50:501] == [1.0] * 451
    assert all(a > b for a, b in pairwise(rates[501:])) and rates[-1] < 0.01
    assert replace(stage, steady=1.0).rate_at(999) == 1.0


def test_the_export_is_the_model_that_was_trained(model: DemoLlava, tmp_path: Path) -> None:
    export(model, tmp_path, torch.float32)
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    processor: Any = AutoProcessor.from_pretrained(tmp_path)
    for example in questions(0, 3):
        text = processor.apply_chat_template(example.messages(), add_generation_prompt=True)
        inputs = processor(images=example.image, text=text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            theirs = stock(**inputs).logits[0, 146:]
        ids = inputs["input_ids"][0, 146:]
        count = len(ids)
        row = PackedText(
            ids,
            torch.arange(count),
            torch.zeros_like(ids),
            ids,
            torch.zeros(count, 7, dtype=torch.long),
            torch.zeros_like(ids),
        )
        batch = Batch(
            normalise(np.array(example.image)[None]),
            torch.zeros(1, 144, 9, dtype=torch.long),
            rows(row),
            torch.arange(144)[None],
            torch.tensor([144]),
        )
        torch.testing.assert_close(logits(model, batch)[0], theirs, rtol=1e-4, atol=1e-4)
