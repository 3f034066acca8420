"""The benchmarks' own logic, on tiny models; nothing here is asserted about time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from foldserve.loadtest.micro import pixelprune, processor
from foldserve.loadtest.micro.engine import ProbedEngine
from foldserve.loadtest.micro.pairs import alternate, ratio
from foldserve.loadtest.micro.processors import Processors
from foldserve.loadtest.micro.shape import Shape
from foldserve.loadtest.micro.variants import Bench
from foldserve.loadtest.micro.withdrawal import TIMED, engine_options, render, render_resident, table
from foldserve.reducers.plan import Reduction

TINY = Shape(layers=4, hidden=128, image_px=168, text=40, withdraw_layer=2)
IDLE = ("prefill", "decode x1", "decode x4")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    checkpoint = TINY.write(tmp_path_factory.mktemp("bench") / "model")
    return Bench(TINY, checkpoint, **engine_options(dtype=TINY.dtype, pool_mib=4, eager=True))


def test_pairs_alternate_as_abba() -> None:
    order: list[str] = []

    def run(name: str) -> str:
        order.append(name)
        return name

    assert alternate(lambda: run("a"), lambda: run("b"), 4) == [("a", "b")] * 4
    assert "".join(order) == "abbaabba"


def test_ratio_is_the_median_of_pairs_whatever_the_machine_does() -> None:
    found = ratio([(1.0, 2.0), (50.0, 100.0), (0.3, 0.6), (9.0, 3.0)])  # one pair was disturbed
    assert found.value == 0.5
    assert (found.low, found.pairs) == (0.5, 4)
    assert found.high > 0.5


def test_ratio_of_equal_pairs_has_no_interval() -> None:
    found = ratio([(3.0, 4.0)] * 5)
    assert (found.low, found.value, found.high) == (0.75, 0.75, 0.75)


def test_formulas_give_the_published_figures_of_the_7b_shape() -> None:
    shape = Shape(layers=32, hidden=4096, text=64, withdraw_layer=16)
    mib = 1 << 20
    kept = [(576, 576), (192, 192), (192, 0)]
    assert [shape.kv_bytes(64, *vision) / mib for vision in kept] == [320, 128, 80]


def test_flops_of_the_bench_shape() -> None:
    shape = Shape()
    assert shape.vision == 576
    full = shape.flops(576, 576)
    assert shape.flops(576, 0) / full == pytest.approx(0.546, abs=5e-4)
    # by hand: 638 tokens, 16 layers, d 1024, f 2816
    assert full == 16 * (638 * (8 * 1024**2 + 6 * 1024 * 2816) + 2 * 638**2 * 1024)


def test_every_variant_is_timed_by_forward_and_by_step(bench: Bench) -> None:
    rows = [*bench.prefill(2), *bench.idle(1)]
    assert [(row.variant, row.part) for row in rows] == [
        (variant, part)
        for variant in (
            "withdraw",
            "folder",
            "both",
            *(f"{kind} {what}" for kind in ("idle", "control") for what in IDLE),
        )
        for part in ("forward", "step")
    ]
    assert [row.cpu.pairs for row in rows] == [2] * 6 + ([1] * 2 + [4] * 4) * 2
    assert {row.variant for row in rows if row.goal} == {"withdraw", "both", *(f"idle {what}" for what in IDLE)}
    assert all(row.base_cpu_ms > 0 for row in rows)
    assert all(row.flops is not None and row.flops < 1 for row in rows[:6])
    assert all(render(row).count("|") == table(TIMED).splitlines()[0].count("|") for row in rows)


def test_resident_requests_are_what_blocks_and_formula_say(bench: Bench) -> None:
    found = {row.name: row for row in bench.resident()}
    block = 4 * 2 * 2 * 128 * 32 / (1 << 20)  # layers, key and value, bytes, channels, tokens of a block
    # 41 + 144 tokens in 6 blocks; 41 + 49 in 3; 41 text tokens in 2. Half of the layers are deep.
    blocks = {"nothing": 6, "withdraw": (6 + 2) / 2, "folder": 3, "both": (3 + 2) / 2}
    for name, row in found.items():
        assert row.held_mib == blocks[name.split(", ")[1]] * block, name
        assert row.block_mib == block
        assert row.requests == int(row.pool_mib / row.held_mib)
        assert row.as_predicted, render_resident(row)
    assert found["withdrawing engine, both"].requests > 2 * found["withdrawing engine, nothing"].requests


def test_a_figure_off_by_a_block_is_seen(bench: Bench) -> None:
    row = next(iter(bench.resident()))
    assert not replace(row, held_mib=row.held_mib + row.block_mib).as_predicted
    assert not replace(row, requests=row.expected[1] + 1).as_predicted


def test_a_prefill_of_several_steps_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="did not end in one step"):
        bench.plain.prefill(replace(bench.requests["nothing"], tokens=2))
    bench.plain.clear()


def test_an_engine_in_another_process_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import envs

    monkeypatch.setitem(vars(envs), "VLLM_ENABLE_V1_MULTIPROCESSING", True)  # vLLM reads the environment only once
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        ProbedEngine(tmp_path, None)


def test_processor_is_timed_beside_vllms(tmp_path: Path) -> None:
    file = tmp_path / "processor.json"
    processor.main(["--pairs", "2", "--side", "64", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found.keys() == processor.ASKED.keys()
    assert all(0 < row["ratio"]["low"] <= row["ratio"]["high"] and row["stock_ms"] > 0 for row in found.values())


def test_both_processors_give_prompts_of_the_plans_length(tiny_llava: Path) -> None:
    processors, image = Processors(tiny_llava), Image.new("RGB", (40, 40))
    whole = processors.call("stock", image)()
    assert processors.call("ours", image)() == whole
    assert processors.call("ours", image, Reduction.parse({"ratio": 0.5}))() == whole - 72


@pytest.mark.parametrize("asked", pixelprune.ASKED)
@pytest.mark.parametrize("kind", pixelprune.KINDS)
def test_pixelprune_times_every_rule_on_every_kind_of_image(kind: str, asked: str) -> None:
    assert pixelprune.rule_ms(kind, side=96, cell=14, reduction=pixelprune.ASKED[asked], rounds=1) > 0


def test_pixelprune_rules_differ() -> None:
    assert len(set(pixelprune.ASKED.values())) == len(pixelprune.ASKED)
