"""The other decoder families, compiled parts, and an engine without K, against plain PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import Case, Engine, words
from tests.engine.withdrawal.test_kept import SHORT, TINY
from tests.engine.withdrawal.test_reference import MIXED, TOKENS

CASES = [*MIXED[:4], MIXED[5], MIXED[6], MIXED[9], *SHORT[:2]]

FAMILIES: dict[str, dict[str, object]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": None, "head_dim": 32},
}


def convert(source: Path, target: Path, family: str) -> Path:
    """The checkpoint with a decoder of another family: two KV heads, biases for Qwen2, norms of q and k for Qwen3."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= {"model_type": family, "num_key_value_heads": 2} | FAMILIES[family]
    (target / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = load_file(target / "model.safetensors")
    for name in [name for name in weights if "language_model" in name and ".self_attn." in name]:
        attention, projection = name.removesuffix(".weight").rsplit(".", 1)
        if projection in ("k_proj", "v_proj"):
            weights[name] = weights[name][: 2 * 32].clone()
        if family == "qwen2" and projection != "o_proj":
            weights[f"{attention}.{projection}.bias"] = torch.randn(len(weights[name]), generator=generator)
        if family == "qwen3" and projection in ("q_proj", "k_proj"):
            weights[f"{attention}.{projection[0]}_norm.weight"] = 1 + torch.rand(32, generator=generator)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_families(eight_layers: Path, tmp_path: Path, family: str) -> None:
    path = convert(eight_layers, tmp_path / family, family)
    engine = Engine(path, LAYERS // 2, max_num_batched_tokens=150)
    Expected(path).generate(engine, LAYERS // 2, CASES, TOKENS)
    names = engine.llm.apply_model(
        lambda m: [type(part).__name__ for part in (m.language_model, m.language_model.model)]
    )
    assert names == [[f"{family.capitalize()}ForCausalLM", "WithdrawingDecoder"]]
    engine.assert_all_blocks_free()


def test_groups_of_several_layers_in_several_buckets(tmp_path: Path) -> None:
    """K = 6 of 10: left alone, vLLM would pad six and four layers to groups of four."""
    from foldserve.server.quality.demo_model import create

    path = create(tmp_path / "ten-layers", image_size=168, num_layers=10)
    engine = Engine(path, 6, max_num_batched_tokens=70)
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    assert [len(group.layer_names) for group in groups] == [2] * 5
    expected = Expected(path)
    for _ in range(2):
        expected.generate(engine, 6, [*CASES[:-2], TINY], TOKENS)
    engine.assert_all_blocks_free()


def test_compiled_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foldserve.server.quality.demo_model import create

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    path = create(tmp_path / "two-layers", image_size=168, num_layers=2)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    engine = Engine(path, 1, enforce_eager=False, max_num_batched_tokens=150)
    assert graphs["unique_graphs"] - before == 3  # one per part
    expected = Expected(path)
    expected.generate(engine, 1, MIXED[3:4], TOKENS)  # vLLM compiles a function for log-probabilities
    before = graphs["unique_graphs"]
    for _ in range(2):
        expected.generate(engine, 1, [*MIXED, *SHORT], TOKENS)
    assert graphs["unique_graphs"] == before  # the same graphs serve batches of every size
    engine.assert_all_blocks_free()


def test_without_k_nothing_of_this_is_active(eight_layers: Path, expected: Expected) -> None:
    engine = Engine(eight_layers, None)
    case = Case(f"USER: <image> {words(1, 5)} ASSISTANT:", (0,), withdraw=False)
    expected.generate(engine, LAYERS, [case], TOKENS)
    assert len(engine.managers) == 1
    assert engine.llm.apply_model(lambda model: type(model.language_model).__name__) == ["LlamaForCausalLM"]
    assert type(engine.scheduler).__name__ == "Scheduler"
