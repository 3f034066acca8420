"""The benchmark against OpenVINO: its loop and its figures, on our engine; nothing here is asserted about time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from foldserve.loadtest.micro.openvino.__main__ import contenders
from foldserve.loadtest.micro.openvino.engines import PROMPT, Contender, Foldserve, Setup
from foldserve.loadtest.micro.openvino.older import write_older
from foldserve.loadtest.micro.openvino.report import Cell, charts, read_results, results, tables
from foldserve.loadtest.micro.openvino.runs import Load, LoadRun, RemoteEngine, noise
from foldserve.loadtest.report.charts import join_charts
from foldserve.reducers.plan import Reduction
from tests import qwen_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "docs/explanation/benchmarks"
LAYERS, WITHDRAW_LAYER, BLOCK, PX = 8, 4, 32, 224
TOKEN_BYTES = 2 * 2 * 32 * 2  # per layer: a key and a value, two heads of 32, 16 bits


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
    checkpoint = qwen_checkpoint.write(tmp_path_factory.mktemp("openvino") / "model", "qwen2_5_vl")
    setup = Setup(threads=1, kv_gib=1)
    remote = RemoteEngine(partial(Foldserve, checkpoint, setup, withdraw_layer=WITHDRAW_LAYER, eager=True))
    yield remote
    remote.stop()


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_kv_in_use_is_that_of_the_kept_tokens(engine: RemoteEngine, ratio: float) -> None:
    mine = [each for each in contenders(ratio, PX) if each.engine == "foldserve" and each.name != "downsample"]
    for contender in mine:
        run = engine.measure(contender, Load(requests=3, concurrency=2, tokens=4, seed=1))
        kept = (PX // 28) ** 2 - int((PX // 28) ** 2 * ratio)
        text = (
            len(PROMPT) - sum(len(mark) - 1 for mark in _marks()) - 1 + 3
        )  # of the four new tokens, the last has no KV
        deep = 0 if contender.name.endswith("withdraw") else kept
        shallow_blocks, deep_blocks = blocks(text + kept), blocks(text + deep)
        half = WITHDRAW_LAYER * BLOCK * TOKEN_BYTES
        assert run.kv_bytes == 2 * half * (shallow_blocks + deep_blocks), contender
        assert len(run.ttft_s) == 3 and min(run.ttft_s) > 0 and run.requests_per_s > 0


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        RemoteEngine(partial(Foldserve, tmp_path / "nowhere", Setup(1), withdraw_layer=4, eager=True))


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_contenders_have_as_many_tokens_or_fewer_by_less_than_a_row(ratio: float) -> None:
    side = 784 // 28
    for contender in contenders(ratio, 784):
        Reduction.parse(dict(contender.reduction))
        if contender.name == "smaller image":
            left = (contender.px // 28) ** 2
            assert left <= (1 - ratio) * side**2 < (contender.px // 28 + 1) ** 2


def test_images_differ_by_seed_and_number() -> None:
    pictures = {noise(28, (seed, number)).tobytes() for seed in range(3) for number in range(3)}
    assert len(pictures) == 9 and noise(28, (1, 2)).tobytes() in pictures


def test_the_table_compares_within_rounds() -> None:
    cells = [
        Cell(each, 8, [LoadRun(speed * machine, (0.1, 0.3, 0.2), 5 << 20) for machine in (1.0, 0.5, 2.0)])
        for each, speed in zip(contenders(0.5, 784), (3.0, 2.0, 4.0, 1.0, 1.0), strict=True)
    ]
    (table,) = tables(results(cells))
    folder, theirs, *_ = table.cells
    assert folder[:5] == ["0.5", "ours", "folder", "3.00 [1.50, 6.00]", "1.50 [1.50, 1.50]"]
    assert theirs[1:3] == ["OpenVINO", "pruning_ratio"] and theirs[4] == "-"
    assert folder[5:] == ["200 [200, 200]", "5"]


def test_the_page_the_data_and_the_picture_agree() -> None:
    """The data are the page's figures: what they were made from was not saved."""
    saved = read_results(BENCHMARKS / "openvino-cpu.json")
    page, picture = ((BENCHMARKS / f"openvino-cpu.{kind}").read_text() for kind in ("md", "svg"))
    for table in tables(saved):
        assert table.markdown() in page
    shown = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")
    drawn = ElementTree.fromstring(join_charts(charts(saved), 2).svg()).iter("{http://www.w3.org/2000/svg}title")
    assert [title.text for title in shown] == [title.text for title in drawn]


def test_what_was_saved_is_read_as_it_was(tmp_path: Path) -> None:
    cells = [Cell(each, 8, [LoadRun(2.0, (0.1, 0.3), 5 << 20)] * 3) for each in contenders(0.5, 784)]
    (tmp_path / "figures.json").write_text(json.dumps({"results": [asdict(each) for each in results(cells)]}))
    again = read_results(tmp_path / "figures.json")
    assert [table.cells for table in tables(again)] == [table.cells for table in tables(results(cells))]


def test_the_picture_has_a_panel_for_each_load_and_figure() -> None:
    none = [Cell(each, n, [LoadRun(1, (0.1,), 0)]) for n in (1, 8) for each in contenders(0, 784)]
    some = [Cell(each, n, [LoadRun(2, (0.1,), 0)]) for n in (1, 8) for each in contenders(0.5, 784)]
    figure = join_charts(charts(results([*none, *some])), 2).figure
    assert [len(axes.get_lines()) > 0 for axes in figure.axes] == [True] * 4
    assert Contender("openvino", "none", 0, 784) in [cell.contender for cell in none]


def _marks() -> list[str]:
    return ["<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>", "<|im_start|>"]


def test_the_export_reads_the_older_names(tmp_path: Path) -> None:
    checkpoint = qwen_checkpoint.write(tmp_path / "new", "qwen2_5_vl")
    write_older(checkpoint, tmp_path / "older")
    older = json.loads((tmp_path / "older" / "config.json").read_text())
    scaling = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}
    for part in (older, older["text_config"]):
        assert part["rope_theta"] == 10000.0 and part["rope_scaling"] == scaling and "rope_parameters" not in part
    tokenizer = json.loads((tmp_path / "older" / "tokenizer_config.json").read_text())
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"] and "extra_special_tokens" not in tokenizer
