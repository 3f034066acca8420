"""Tokens that keep their positions, in a real engine against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.plan import Plan
from foldserve.server.engine.positions import PositionMap, attach, detach, full_length, mark
from tests.engine.conftest import MAX_TOKENS, Case, greedy
from tests.engine.reference import Reference
from tests.images import photo

Answer = tuple[list[int], list[float]]


class KeepingReference(Reference):
    """The reference with position ids written out for every token."""

    def survivors(self, image: Image.Image, plan: Plan) -> tuple[Tensor, list[int]]:
        """Projected vision tokens in position order, and the positions in the image."""
        tower = self.model.model.vision_tower
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        features, source = self.image_features(image, plan), torch.arange(plan.kept)
        if plan.method == "folder":
            states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            source = folder(states, plan.folds).source[0]
        elif plan.method == "folder_cls":
            source = self._class_source(tower(pixels, output_hidden_states=True).hidden_states[-3], plan)
        order = source.argsort() if plan.keeps_positions else torch.arange(plan.kept)
        positions = source if plan.keeps_positions else torch.arange(plan.kept)
        return features[order], positions[order].tolist()

    def _class_source(self, hidden: Tensor, plan: Plan) -> Tensor:
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "vision_model", tower).encoder
        layer = encoder.layers[len(encoder.layers) - 2]
        x, heads = layer.layer_norm1(hidden), layer.self_attn.num_heads
        q, k = (p(x).unflatten(-1, (heads, -1)) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * layer.self_attn.scale).softmax(-1)
        return folder_cls(hidden, k.mean(2), weights[:, :, 0].mean(1), plan.folds).source[0, 1:] - 1

    @torch.no_grad()
    def generate(
        self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[dict[str, object]], tokens: int
    ) -> Answer:
        plans = [self.plan(reduction) for reduction in reductions]
        kept = [self.survivors(image, plan) for image, plan in zip(images, plans, strict=True)]
        remaining = iter(zip(kept, plans, strict=True))
        rows: list[Tensor] = []
        places: list[int] = []
        following = 0
        for token in self.processor.tokenizer(prompt)["input_ids"]:
            if token != self.config.image_token_index:
                rows.append(self.model.get_input_embeddings()(torch.tensor([token])))
                places.append(following)
                following += 1
                continue
            (features, positions), plan = next(remaining)
            rows.append(features)
            places += [following + position for position in positions]
            following += plan.encoded if plan.keeps_positions else plan.kept
        embeds = torch.cat(rows)
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            # without a mask, transformers takes a jump in the positions for the start of another sequence
            hidden = self.model.model.language_model(
                inputs_embeds=embeds[None],
                position_ids=torch.tensor([places]),
                attention_mask=torch.ones(1, len(places)),
                use_cache=False,
            ).last_hidden_state
            distribution = self.model.lm_head(hidden[0, -1]).log_softmax(-1)
            out.append(int(distribution.argmax()))
            logprobs.append(float(distribution[out[-1]]))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor(out[-1:]))])
            places.append(following)
            following += 1
        return out, logprobs


@pytest.fixture(scope="module")
def expect(tiny_llava: Path) -> Callable[[Case], Answer]:
    reference = KeepingReference(tiny_llava)
    return lambda case: reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)


def one_image(seed: int, question: str = "What is in the picture?", **reduction: object) -> Case:
    return Case(f"USER: <image>\n{question} ASSISTANT:", [photo(seed)], [{"positions": "keep", **reduction}])


def assert_same(llm: Any, cases: list[Case], expect: Callable[[Case], Answer]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want_tokens, want_logprobs = expect(case)
        assert tokens == want_tokens, case.reductions
        assert logprobs == pytest.approx(want_logprobs, abs=2e-4)


def test_equals_plain_pytorch_in_one_batch(llm: Any, expect: Callable[[Case], Answer]) -> None:
    """Chunks of 50 tokens cut every image; kept and renumbered, several images, text alone."""
    cases = [one_image(11, method=method, ratio=r) for method in ("folder", "folder_cls") for r in (0.25, 0.5, 0.9)]
    cases += [one_image(11, ratio=0.5, positions="renumber"), Case("USER: no picture at all ASSISTANT:")]
    keep = {"positions": "keep"}
    cases.append(
        Case(
            "USER: <image> and <image>\nthen <image> which? ASSISTANT:",
            [photo(1), photo(2), photo(3)],
            [{"ratio": 0.5, **keep}, {"ratio": 0.5}, {"method": "folder_cls", "keep_tokens": 20, **keep}],
        )
    )
    assert_same(llm, cases, expect)


def test_prefix_and_encoder_cache(llm: Any, expect: Callable[[Case], Answer]) -> None:
    """The same image with another question: its blocks or its encoding come from a cache."""
    for question in ("What is in the picture?", "And what is it that one sees there?"):
        for positions in ("keep", "renumber", "keep"):
            assert_same(llm, [one_image(12, question, ratio=0.66, positions=positions)], expect)


def test_positions_make_a_difference(expect: Callable[[Case], Answer]) -> None:
    """Guards the tests above: a reference that ignored positions would make them pass for nothing."""
    kept, renumbered = (expect(one_image(11, ratio=0.5, positions=p))[1] for p in ("keep", "renumber"))
    assert max(abs(a - b) for a, b in zip(kept, renumbered, strict=True)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly(dtype: torch.dtype) -> None:
    source = torch.tensor([0, 1, 255, 256, 2879, 65_535])
    embeds, positions = detach(attach(torch.ones(6, 3, dtype=dtype), source))
    assert torch.equal(positions, source)
    assert torch.equal(embeds, torch.ones(6, 3, dtype=dtype))


def test_identity_says_the_full_length() -> None:
    assert full_length(mark("abc", 576)) == 576
    assert full_length(mark("abc", 576) + "~withdraw:0") == 576
    assert full_length("abc") is full_length("abc~withdraw:0") is None
    assert PositionMap.of([]) is None
