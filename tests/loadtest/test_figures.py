"""Figures, intervals and predictions against known values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from foldserve.loadtest.grid import CONTROL, RATIO_0, GridPoint, Load, Variant
from foldserve.loadtest.metrics import KV_USE, RUNNING, WAITING, read
from foldserve.loadtest.prediction import MeanRequest, ModelShape, read_shape
from foldserve.loadtest.quality import read_accuracy
from foldserve.loadtest.record import BlockJournal, Record, SentRequests, joined
from foldserve.loadtest.report.journal import RESULTS_FILE, run_identity
from foldserve.loadtest.statistics import gaps, mean, quantile, rate, resample_rounds, runs
from foldserve.loadtest.summary import summarise
from foldserve.loadtest.throughput import LoadTestReport, write
from foldserve.loadtest.throughput import read as read_report
from tests import qwen_checkpoint

LOAD = Load(concurrency=2)
FOLDED = Variant("foldserve", "folder", 0.5)
SEVEN_B = ModelShape(4096, 11008, 32, 4096, 1024, 4096, 23, withdraw_layer=16, tile=576)


def record(seconds: float, kept: int, seed: int = 0, api_s: float = 0.5, decode_s: float = 1.0) -> Record:
    """20 requests, one after the other, of about `seconds` each."""
    each = np.random.default_rng(seed).normal(seconds, 0.05 * seconds, 20)
    start = np.concatenate([[0], np.cumsum(each)[:-1]])
    sent = SentRequests(
        start_s=start.tolist(),
        ttft_s=(each / 2).tolist(),
        e2e_s=each.tolist(),
        itl_s=[[0.1, 0.2]] * 20,
        prompt_tokens=[kept + 10] * 20,
        output_tokens=[3] * 20,
        errors=["boom"],
    )
    counters = {"vision_encoded": 2000.0, "vision_kept": 20.0 * kept, "vision_withdrawn": 0.0}
    counters |= {"vllm:request_prefill_time_seconds_sum": 1.0, "vllm:request_decode_time_seconds_sum": 20.0 * decode_s}
    running = 10000 / kept
    gauges = {KV_USE: [0.5, 1.0, 1.0], RUNNING: [running / 2, running, running], WAITING: [0.0, running, running]}
    return Record(sent=sent, counters=counters, gauges=gauges, cpu_s={"api": api_s, "engine": 1.0})


def test_a_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = resample_rounds([[[value] for value in random.normal(5, 1, 60)]], mean).estimate()
        hits += found.low <= 5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("wave", [1, 8, 24, 192])
def test_answers_that_end_together_are_no_chance(wave: int) -> None:
    """A step of wave x 0.4 s, give or take a tenth, ends with a wave of answers: 2.5 answers/s."""
    random = np.random.default_rng(wave)
    hits, widths = 0, []
    for _ in range(200):
        steps = random.normal(0.4 * wave, 0.04 * wave, 192 // wave)
        times = [gap for step in steps for gap in (step, *[0.0] * (wave - 1))]
        found = resample_rounds([runs(times)], rate).estimate()
        hits += found.low <= 2.5 <= found.high
        widths.append(found.high - found.low)
        assert [gap for run in runs(times) for gap in run] == times
    assert np.mean(widths) < 0.8 * wave**0.5 / 8
    assert wave == 192 or hits / 200 >= 0.85  # one wave has no spread


def test_figures_of_rounds() -> None:
    assert resample_rounds([[[1.0], [3.0]], [[5.0], [7.0]]], mean).value == 4
    assert resample_rounds([[[1.0, 2.0], [3.0]]], quantile(0.5)).value == 2
    assert resample_rounds([[[0.5]] * 4], rate).estimate().show(1) == "2.0 [2.0, 2.0]"
    with pytest.raises(ValueError, match="no values"):
        resample_rounds([[]], mean)
    assert gaps([1.0, 1.0, 2.0], [1.0, 3.0, 1.0]) == [1.0, 1.0, 1.0]


def test_blocks_of_a_round_count_as_one_without_the_time_between_them() -> None:
    first, later = record(0.5, 50, 0), record(1.0, 50, 1)
    shifted = later.sent.model_copy(update={"start_s": [start + 1000 for start in later.sent.start_s]})
    both = joined([first, later.model_copy(update={"sent": shifted, "gauges": {}})])
    assert gaps(both.sent.start_s, both.sent.e2e_s) == pytest.approx(first.sent.e2e_s + later.sent.e2e_s)
    assert both.sent.errors == ["boom"] * 2 and len(both.sent.ttft_s) == 40
    assert both.counters["vision_encoded"] == 4000 and both.counters["vision_kept"] == 2000
    assert (both.gauges[RUNNING], both.cpu_s) == ([100, 200, 200], {"api": 1, "engine": 2})
    assert gaps(joined([first]).sent.start_s, first.sent.e2e_s) == pytest.approx(first.sent.e2e_s)


def test_ratios_are_drawn_with_the_same_rounds() -> None:
    """A machine that is twice as slow in one round does not blur the ratio."""
    slow = [[[1.0]] * 8, [[2.0]] * 8, [[4.0]] * 8]
    half = [[[0.5]] * 8, [[1.0]] * 8, [[2.0]] * 8]
    found = (resample_rounds(half, mean) / resample_rounds(slow, mean)).estimate()
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_rows_compare_with_both_bases() -> None:
    points = {
        GridPoint(CONTROL, LOAD): [record(0.98, 100, 0), record(0.98, 100, 1)],
        GridPoint(RATIO_0, LOAD): [record(1.0, 100, 2), record(1.0, 100, 3)],
        GridPoint(FOLDED, LOAD): [record(0.5, 50, 4, api_s=0.55), record(0.5, 50, 5, api_s=0.55)],
    }
    shape = ModelShape(512, 1408, 8, 512, 64, 128, 1)
    control, full, folded = summarise(points, shape)
    assert (folded.requests, folded.failures, folded.rounds) == (42, 2, 2)
    assert folded.to_ratio_0["requests_per_s"].low < 2 < folded.to_ratio_0["requests_per_s"].high
    assert folded.to_vllm["api_cpu_s"].value == pytest.approx(1.1)
    assert folded.to_ratio_0["kv_share"].value == pytest.approx(0.5)
    assert folded.to_ratio_0["resident_when_full"].value == pytest.approx(2)
    assert full.figures["resident_when_full"].value == 100
    assert full.to_ratio_0["requests_per_s"].value == full.limit["requests_per_s"] == 1
    assert 1.5 < folded.limit["requests_per_s"] < 2
    assert folded.limit["resident_when_full"] == pytest.approx((110 + 1.5) / (60 + 1.5))
    assert folded.limit["kv_share"] == pytest.approx((60 + 1.5) / (110 + 1.5))
    assert control.limit == {}
    assert control.figures["itl_s_p50"].value == pytest.approx(0.15)


def test_the_cache_is_told_of_only_where_it_can_be_seen() -> None:
    """Requests that hardly decode never hold all of their blocks; a pool with room does not show what fits into it."""
    seen = record(1.0, 100)
    gauges = {KV_USE: [0.5, 0.95], RUNNING: [50.0, 60.0], WAITING: [50.0, 3.0]}
    for one, expected in (
        (seen, {"kv_use", "kv_share", "resident_when_full"}),
        (record(1.0, 100, decode_s=0.01), {"kv_use", "resident_when_full"}),
        (seen.model_copy(update={"gauges": gauges}), {"kv_use", "kv_share"}),
        (seen.model_copy(update={"gauges": {}}), set()),
    ):
        (row,) = summarise({GridPoint(RATIO_0, LOAD): [one, one]}, None)
        assert {"kv_use", "kv_share", "resident_when_full"} & row.figures.keys() == expected
    (row,) = summarise({GridPoint(RATIO_0, LOAD): [seen.model_copy(update={"gauges": gauges})]}, None)
    assert row.figures["kv_share"].value == pytest.approx(1.45 / 110)


def test_predictions_are_those_of_the_design() -> None:
    """LLaVA-1.5-7B, 64 text tokens, one token out: the decoder's share is 8.40, 3.33 and 2.08 TFLOP.

    The last with layer K-1 whole, of which the withdrawn tokens skip the output projection and the MLP.
    """
    full, folded = MeanRequest(576, 576, 0, 64, 1), MeanRequest(576, 192, 0, 64, 1)
    withdrawn = MeanRequest(576, 192, 192, 64, 1)
    tower = 23 * (576 * (8 * 1024**2 + 4 * 1024 * 4096) + 4 * 576**2 * 1024)

    def decoder(request: MeanRequest) -> float:
        return SEVEN_B.flops(request) - tower - request.kept * 2 * (1024 * 4096 + 4096**2)

    skipped = 192 * (2 * 4096**2 + 6 * 4096 * 11008)
    flops = decoder(full), decoder(folded), decoder(withdrawn) + skipped
    assert [round(each / 1e12, 2) for each in flops] == [8.4, 3.33, 2.08]
    kv = [
        SEVEN_B.kv_elements(MeanRequest(576, r.kept, r.withdrawn, 64, 0)) * 2 / 2**20 for r in (full, folded, withdrawn)
    ]
    assert kv == [320, 128, 80]


def test_tiles_attend_to_themselves() -> None:
    """Five tiles of 576 tokens cost the tower five times what one does."""
    one, five = (MeanRequest(n, 576, 0, 64, 1) for n in (576, 5 * 576))
    tower = 23 * (576 * (8 * 1024**2 + 4 * 1024 * 4096) + 4 * 576**2 * 1024)
    assert SEVEN_B.flops(five) - SEVEN_B.flops(one) == 4 * tower


def test_a_shape_is_read_from_a_checkpoint(tiny_llava: Path, tmp_path: Path) -> None:
    assert read_shape(tiny_llava, 2) == ModelShape(128, 352, 4, 128, 128, 512, 3, 2, tile=144)
    assert read_shape(tmp_path, None) is None
    defaults_left_out = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24}
        | {"intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
        "vision_feature_layer": -2,
    }
    (tmp_path / "config.json").write_text(json.dumps(defaults_left_out))
    assert read_shape(tmp_path, 16) == SEVEN_B
    (tmp_path / "config.json").write_text(json.dumps(defaults_left_out | {"dino_config": {}}))  # a second tower
    assert read_shape(tmp_path, 16) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_shape(tmp_path, None) is None
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')  # most of its layers cost something else
    assert read_shape(tmp_path, None) is None


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_flops_of_qwen_are_those_that_torch_counts(model_type: str, tmp_path: Path) -> None:
    """Of the tower but for its patch embedding, and of the decoder; an image of 8 x 12 tokens."""
    path = qwen_checkpoint.write(tmp_path / model_type, model_type)
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval().model
    shape = read_shape(path, None)
    assert shape is not None and shape.qwen is not None
    rows, columns, vision = 16, 24, model.config.vision_config
    values = 3 * 2 * vision.patch_size**2
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.visual(torch.zeros(rows * columns, values), grid_thw=torch.tensor([[1, rows, columns]]))
    embedding = 2 * rows * columns * values * shape.qwen.hidden
    assert counter.get_total_flops() - embedding == pytest.approx(shape.qwen.flops(rows * columns / 4), rel=1e-3)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        hidden = torch.zeros(1, 50, shape.hidden)
        model.language_model(inputs_embeds=hidden, use_cache=False)
    whole_square = shape.layers * 2 * 50 * 50 * (shape.queries or shape.hidden)  # torch counts all of it, causal or not
    predicted = shape.flops(MeanRequest(0, 0, 0, 50, 1)) + whole_square
    assert counter.get_total_flops() == pytest.approx(predicted, rel=1e-3)


def test_metrics_are_summed_over_labels() -> None:
    text = (
        "# TYPE vllm:prompt_tokens counter\n"
        'vllm:prompt_tokens_total{engine="0"} 3\nvllm:prompt_tokens_total{engine="1"} 4\n'
        "# TYPE foldserve_vision_tokens counter\n"
        'foldserve_vision_tokens_total{stage="kept",method="a"} 5\n'
        'foldserve_vision_tokens_total{stage="kept",method="b"} 6\n'
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 2\n"
    )
    assert read(text) == ({"vllm:prompt_tokens_total": 7, "vision_kept": 11}, {"vllm:num_requests_running": 2})


def test_a_journal_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    file, one = tmp_path / RESULTS_FILE, record(1, 100)
    assert run_identity(a=1) == run_identity(a=1) != run_identity(a=2)
    BlockJournal(tmp_path, "x").add("first", one)
    with file.open("a") as out:
        out.write('{"run": "x", "blo')
    again = BlockJournal(tmp_path, "x")
    again.add("second", one)
    assert BlockJournal(tmp_path, "x")["second"] == one
    assert {tuple(json.loads(line)) for line in file.read_text().splitlines()} == {("run", "block", "record")}
    assert "first" in again and "first" not in BlockJournal(tmp_path, "another run")
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1, is no result"):
        BlockJournal(tmp_path, "x")


def test_the_report_stands_alone_and_shows_every_interval(tmp_path: Path) -> None:
    share = {"value": 0.9, "low": 0.8, "high": 0.95, "count": 10}
    results = [
        {"label": "none", "ratio": 0.0, "accuracy": share},
        {"label": "folder", "ratio": 0.5, "accuracy": share | {"value": 0.85}},
        {"label": "withdraw", "ratio": None, "accuracy": share},
    ]
    card = tmp_path / "quality.json"
    card.write_text(json.dumps({"results": results}))
    accuracy = read_accuracy(card)
    assert [(a.family, a.ratio, a.share.value) for a in accuracy] == [("folder", 0, 0.9), ("folder", 0.5, 0.85)]
    points = {GridPoint(v, LOAD): [record(1.0, 100), record(1.1, 100, 1)] for v in (CONTROL, RATIO_0, FOLDED)}
    rows = summarise(points, ModelShape(512, 1408, 8, 512, 64, 128, 1))
    write(LoadTestReport("<model>", {"machine": "2 CPUs"}, rows, accuracy), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 5 and "&lt;model&gt;" in page and "What does speed cost in right answers?" in page
    assert "folder, ratio 0.5: " in page
    assert "Up to 1.00 [1.00, 1.00] times the requests/s of ratio 0: folder 0.5, 2 at once. 2 CPUs" in page
    main = (tmp_path / "report.md").read_text().split("## ")[1]
    assert f"| 2 at once | folder 0.5 | {rows[2].figures['requests_per_s'].show(3)} | 1.00 [1.00, 1.00] |" in main
    again = read_report(tmp_path)
    fields = json.loads((tmp_path / "report.json").read_text())
    assert set(fields["rows"][2]["figures"]["requests_per_s"]) == {"value", "low", "high"}
    assert (tmp_path / "report.csv").read_text().startswith("load,label,server")
    assert all((tmp_path / f"{stem}.{kind}").is_file() for stem in ("throughput", "ttft") for kind in ("png", "svg"))
    assert again.rows == rows and again.accuracy == accuracy and again.settings == {"machine": "2 CPUs"}
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="no report of `foldserve loadtest`"):
        read_report(tmp_path)
    with pytest.raises(ValueError, match=r"is no quality\.json"):
        read_accuracy(tmp_path / "report.json")
