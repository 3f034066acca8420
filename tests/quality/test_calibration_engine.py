"""Calibration on the real engine: what it measures is what a withdrawing engine does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from foldserve.server import cli
from foldserve.server.quality.calibration_file import Calibration
from foldserve.server.quality.calibration_search import kl_divergence
from tests import qwen_checkpoint
from tests.engine.qwen_reference import QwenReference
from tests.engine.withdrawal.harness import PHOTOS, Engine
from tests.engine.withdrawal.test_families import convert

LAYER = 2
QUESTIONS = ["What is in the picture?", "the red car and a dog, or two people?"]


@pytest.fixture(scope="module")
def checkpoint(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two KV heads for four heads, and norms of queries and keys."""
    return convert(tiny_llava, tmp_path_factory.mktemp("calibrated") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    """One with withdrawal at `LAYER`, whose log-probabilities cover the whole vocabulary."""
    return Engine(checkpoint, LAYER, max_logprobs=-1)


def log_probabilities(
    engine: Engine, photo: int, question: str, *, withdraw: bool, answer: Sequence[int] = ()
) -> torch.Tensor:
    """(vocab,) of the answer's next token, as the engine serves it; `answer` has those before it."""
    from vllm import SamplingParams

    prompt = engine.llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": f"<image>\n{question}"}], add_generation_prompt=True, return_dict=False
    )
    (output,) = engine.llm.generate(
        {
            "prompt_token_ids": [*prompt, *answer],
            "multi_modal_data": {"image": PHOTOS[photo]},
            "mm_processor_kwargs": {"foldserve": {"withdraw": withdraw}},
        },
        SamplingParams(max_tokens=1, temperature=0, logprobs=-1),
        use_tqdm=False,
    )
    first = output.outputs[0].logprobs[0]
    return torch.tensor([first[token].logprob for token in range(len(first))])


@pytest.mark.parametrize("photo", [0, 1])
def test_kl_is_that_of_the_withdrawing_engine(engine: Engine, photo: int) -> None:
    from foldserve.server.quality.engine.kl_probe import chat_prompt, probe

    full, withdrawn = probe(engine.llm, chat_prompt(engine.llm, PHOTOS[photo], QUESTIONS[photo]), range(1, 4))
    full, withdrawn = full[0], withdrawn[:, 0]
    served = log_probabilities(engine, photo, QUESTIONS[photo], withdraw=False)
    served_withdrawn = log_probabilities(engine, photo, QUESTIONS[photo], withdraw=True)
    assert torch.allclose(full.log_softmax(-1), served, atol=1e-4)
    assert torch.allclose(withdrawn[LAYER - 1].log_softmax(-1), served_withdrawn, atol=1e-4)
    kl, kl_served = kl_divergence(withdrawn, full), kl_divergence(served_withdrawn, served)
    assert kl[LAYER - 1] == pytest.approx(float(kl_served), abs=1e-4)
    assert min(abs(float(kl[k] - kl_served)) for k in (0, 2)) > 1e-2  # another K would not pass


def test_kl_is_that_of_plain_pytorch_under_m_rope_and_with_deepstack(tmp_path: Path) -> None:
    from foldserve.server.quality.engine.kl_probe import KLProbe, chat_prompt, probe

    checkpoint = qwen_checkpoint.write(tmp_path / "qwen3_vl", "qwen3_vl")
    probed = KLProbe(str(checkpoint), ["--dtype", "float32", "--max-model-len", "1024"])
    assert probed.first_layer == 4  # its first three layers add features of images
    probed.start()
    full, withdrawn = probe(probed._llm, chat_prompt(probed._llm, PHOTOS[0], QUESTIONS[0]), range(4, 8))
    prompt = f"<|im_start|>user\n{qwen_checkpoint.IMAGE}{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    away = [(layer, logits, True) for layer, logits in zip(range(4, 8), withdrawn[:, 0], strict=True)]
    for layer, logits, withdraw in [(4, full[0], False), *away]:
        asked = {"withdraw": withdraw}
        (token,), (logprob,) = QwenReference(checkpoint, layer).generate(prompt, [PHOTOS[0]], [asked], 1)
        assert int(logits.argmax()) == token
        assert float(logits.log_softmax(-1)[token]) == pytest.approx(logprob, abs=1e-4)


def test_every_token_of_an_answer_follows_those_before_it(engine: Engine) -> None:
    from foldserve.server.quality.engine.kl_probe import chat_prompt, probe

    answer = [17, 300, 5, 42]
    full, withdrawn = probe(engine.llm, chat_prompt(engine.llm, PHOTOS[0], QUESTIONS[0]), range(LAYER, 3), answer)
    for index in range(len(answer) + 1):
        for logits, withdraw in ((full, False), (withdrawn[0], True)):
            served = log_probabilities(engine, 0, QUESTIONS[0], withdraw=withdraw, answer=answer[:index])
            assert torch.allclose(logits[index].log_softmax(-1), served, atol=1e-4)


def test_calibrate_end_to_end(engine: Engine, checkpoint: Path, tmp_path: Path, capfd: Any) -> None:
    rows = []
    for i, question in enumerate(QUESTIONS):
        PHOTOS[i].save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "question": question}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    output = tmp_path / "withdrawal.json"
    command = ["calibrate", str(checkpoint), "--data", str(tmp_path / "data.jsonl"), "--output", str(output)]
    vllms = ["--dtype", "float32", "--kv-cache-memory-bytes", "67108864", "--max-model-len", "768"]
    cli.main([*command, "--min-layer", str(LAYER), "--eta", "100", "--answer-tokens", "4", *vllms])

    kl: list[float] = []
    for i, question in enumerate(QUESTIONS):
        answer: list[int] = []
        for _ in range(4):
            withdrawn, full = (
                log_probabilities(engine, i, question, withdraw=withdraw, answer=answer) for withdraw in (True, False)
            )
            kl.append(float(kl_divergence(withdrawn, full)))
            answer.append(int(full.argmax()))
    found = Calibration.model_validate_json(output.read_text())
    assert found.kl[LAYER] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    assert (list(found.kl), found.withdraw_layer, found.samples) == ([2, 3], LAYER, 2)
    assert output.with_suffix(".png").is_file()
    assert "foldserve calibrate: 100%" in capfd.readouterr().err
