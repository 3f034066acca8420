"""Evaluation without an engine: questions, scores, variants, resumption, and what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from foldserve.loadtest.report.journal import RESULTS_FILE, run_identity
from foldserve.reducers import METHODS, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.method import AcrossFrames, InDecoder
from foldserve.reducers.plan import Reduction
from foldserve.server import cli
from foldserve.server.api.catalog import served_card
from foldserve.server.quality.evaluation.card import Card, refusals, results
from foldserve.server.quality.evaluation.command import card_file
from foldserve.server.quality.evaluation.journal import Outcome, OutcomeJournal
from foldserve.server.quality.evaluation.options import EvaluationOptions
from foldserve.server.quality.evaluation.plots import plots
from foldserve.server.quality.evaluation.questions import Question, data_hash, load_questions
from foldserve.server.quality.evaluation.run import measure, reference_variant
from foldserve.server.quality.evaluation.scores import is_right, mean, normalise, share
from foldserve.server.quality.evaluation.tables import html, markdown
from foldserve.server.quality.evaluation.variants import (
    CONTROLS,
    Variant,
    complete,
    default_specs,
    parse_specs,
    variants,
)
from tests.images import photo
from tests.loadtest.readable import check

LAYOUT = Layout.single(VisionGeometry(144, (12, 12), layers=6, class_token=True))
LAYOUTS = [LAYOUT] * 5  # of QUESTIONS
LAYERS = 12


def planned(*methods: str, ratios: Sequence[float] = (0.5,), layers: Sequence[int] = ()) -> Any:
    return variants(parse_specs(methods), ratios, layers, LAYOUTS, LAYERS)


# --- scores


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("A red Circle.", ["red circle"], True),
        ("yes", ["no", "Yes!"], True),
        ("3.5", ["35"], False),
        ("a red circle at the top", ["red circle"], False),
        ("top-left", ["top left"], True),
        ("anthem", ["them"], False),
        ("", ["the"], True),
        ("x", [], False),
    ],
)
def test_exact_match_after_normalisation(answer: str, accepted: list[str], right: bool) -> None:
    assert is_right(answer, accepted) == right


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@settings(deadline=None)  # the first call imports scipy
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_share_is_wilsons(hits: list[bool]) -> None:
    n, p, z = len(hits), sum(hits) / len(hits), 1.959963984540054
    center, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    found = share(hits)
    assert (found.value, found.count) == (p, n)
    assert (found.low, found.high) == pytest.approx(
        ((center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)), abs=1e-9
    )


def test_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [mean(rng.exponential(1.0, 100).tolist()) for _ in range(300)]
    covered = sum(found.low <= 1.0 <= found.high for found in intervals)
    assert 0.88 <= covered / 300 <= 0.98
    assert asdict(mean([2.0])) == {"value": 2.0, "low": 2.0, "high": 2.0, "count": 1}


def test_nothing_has_no_share_and_no_mean() -> None:
    for statistic in (share, mean):
        with pytest.raises(ValueError, match="no questions"):
            statistic([])


# --- variants


def test_specs_of_a_command_line() -> None:
    texts = ["folder,illava:layers=[1,2],decoder=true,pool", "folder:scale=official", '{"method": "folder+withdraw"}']
    assert [(spec.label, dict(spec.fields)) for spec in parse_specs(texts)] == [
        ("folder", {"method": "folder"}),
        ("illava:layers=[1,2],decoder=true", {"method": "illava", "layers": [1, 2], "decoder": True}),
        ("pool", {"method": "pool"}),
        ("folder:scale=official", {"method": "folder", "scale": "official"}),
        ("folder+withdraw", {"method": "folder+withdraw"}),
    ]
    json_spec = parse_specs(['{"method": "folder", "scale": "official"}'])[0]
    assert (json_spec.label, json_spec.reduction().options) == ('folder:scale="official"', (("scale", "official"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder:ratio=0.5", "give amounts with --ratios"),
        ("folder:withdraw=true", r"\+withdraw"),
        ("folder:official", "must be option=value"),
        ('{"scale": "official"}', "names no method"),
        ('{"method": ', "no JSON object"),
    ],
)
def test_specs_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_specs([text])


def test_controls_and_withdrawal_are_added_where_they_are_missing() -> None:
    assert [spec.label for spec in complete(parse_specs(["random,folder"]), False)] == [
        "random",
        "folder",
        "downsample",
    ]
    assert [spec.label for spec in complete(parse_specs(["folder"]), True)] == ["folder", *CONTROLS, "withdraw"]
    of_images = {name for name, method in METHODS.items() if not isinstance(method, AcrossFrames)}
    assert {spec.label for spec in default_specs(True)} == of_images
    in_decoder = {name for name, method in METHODS.items() if isinstance(method, InDecoder)}
    assert {spec.label for spec in default_specs(False)} == of_images - in_decoder


def test_each_method_at_each_amount_and_controls_at_each_count() -> None:
    found, refused = planned("folder", "folder+withdraw", "withdraw", "fastv", ratios=(0.5, 0.75), layers=(3, 6))
    assert not refused
    measured = [(v.label, v.ratio, v.layer, v.kept, v.layer_tokens) for v in found if v.label not in CONTROLS]
    assert measured == [
        ("folder", 0.5, None, 72, 72.0),
        ("folder", 0.75, None, 36, 36.0),
        ("folder+withdraw", 0.5, 3, 72, 18.0),
        ("folder+withdraw", 0.75, 3, 36, 9.0),
        ("folder+withdraw", 0.5, 6, 72, 36.0),
        ("folder+withdraw", 0.75, 6, 36, 18.0),
        ("withdraw", None, 3, 144, 36.0),
        ("withdraw", None, 6, 144, 72.0),
        ("fastv", 0.5, 3, 144, 90.0),
        ("fastv", 0.75, 3, 144, 63.0),
        ("fastv", 0.5, 6, 144, 108.0),
        ("fastv", 0.75, 6, 144, 90.0),
    ]
    counts = [9, 18, 36, 63, 72, 90, 108]
    assert [v.kept for v in found if v.label == "random"] == counts
    for variant, count in zip((v for v in found if v.label == "downsample"), counts, strict=True):
        rows, columns = variant.plans[0].grids[0].grid or (0, 0)
        assert (variant.plans[0].method, rows * columns) == ("downsample", variant.kept)
        assert 0.7 * count <= variant.kept <= count


def test_images_of_several_sizes_are_counted_at_the_mean() -> None:
    """Three and six grids of 64 tokens, a separator beside each: controls get a ratio, and keep no more than asked."""
    layouts = [Layout((Part(VisionGeometry(64, (8, 8)), n, separators=n),), (n,)) for n in (3, 6, 3, 6)]
    found, refused = variants(parse_specs(["folder", "withdraw"]), (0.5,), (3,), layouts, LAYERS)
    half, withdrawn, *controls = found
    assert (half.kept, [plan.kept for plan in half.plans]) == (4.5 * 33, [3 * 33, 6 * 33, 3 * 33, 6 * 33])
    assert (withdrawn.kept, withdrawn.kept_deep, withdrawn.layer_tokens) == (4.5 * 65, 0, 4.5 * 65 / 4)
    assert not refused
    assert [(v.label, v.reduction.keep_tokens) for v in controls] == [(n, None) for n in CONTROLS for _ in range(2)]
    for control, beside in zip(controls[:2], (withdrawn, half), strict=True):
        assert beside.count - 4.5 <= control.kept <= beside.count
    assert half.key != withdrawn.key != controls[0].key


def test_controls_have_the_positions_of_what_they_control() -> None:
    found, _ = planned("folder,folder:positions=keep")
    controls = [(v.label, v.reduction.positions, v.plans[0].keeps_positions) for v in found if v.is_control]
    assert controls == [
        ("random", None, False),
        ("random:positions=keep", "keep", True),
        ("downsample", None, False),
    ]


def test_what_the_model_cannot_do_is_told_with_its_reason() -> None:
    found, refused = planned("stf", "fastv", "nonesuch", "folder", ratios=(0.5, 0.995))
    assert [v.label for v in found] == ["folder", *CONTROLS]
    reasons = {(r.label, r.ratio): r.reason for r in refused}
    assert "trained into a checkpoint's projector" in reasons["stf", 0.5]
    assert "give --withdraw K" in reasons["fastv", 0.5]
    assert "unknown method 'nonesuch'" in reasons["nonesuch", None]
    assert "2 have to stay" in reasons["folder", 0.995]


# --- questions


def test_questions_of_a_file(tmp_path: Path) -> None:
    photo(1, 64, 48).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "How many?", "answer": ["2", "two"], "kind": "count", "id": 7},
        {"image": "a.png", "question": "What?"},
        {"image": "a.png", "question": "Which?", "answer": "red"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    found = load_questions(file, 10, "unused")
    assert [(q.text, q.answers, q.kind) for q in found] == [
        ("How many?", ("2", "two"), "count"),
        ("What?", (), "all"),
        ("Which?", ("red",), "all"),
    ]
    assert [q.text for q in load_questions(file, 2, "unused")] == ["How many?", "What?"]
    (message,) = found[0].messages()
    image, text = message["content"]
    assert (image["image_pil"].size, text) == ((64, 48), {"type": "text", "text": "How many?"})
    (in_folder,) = load_questions(tmp_path, 5, "Describe it.")
    assert (in_folder.text, in_folder.answers) == ("Describe it.", ())
    assert len({data_hash(found), data_hash(found[:2]), data_hash([*found[:2], in_folder])}) == 3


def test_malformed_questions_are_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"image": "a.png", "question": "x"}\n{"image": "a.png", "answer": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: .*question: Field required.*answer"):
        load_questions(file, 5, "x")
    with pytest.raises(ValueError, match="at least one question"):
        load_questions(file, 0, "x")
    file.write_text("")
    with pytest.raises(ValueError, match="holds no questions"):
        load_questions(file, 5, "x")


def test_built_in_questions_are_the_same_every_time_and_keep_their_turns() -> None:
    found = load_questions(None, 24, "unused")
    assert data_hash(found) == data_hash(load_questions(None, 24, "unused"))
    assert data_hash(found[:12]) == data_hash(load_questions(None, 12, "unused"))
    (two_turns, *_) = [question for question in found if question.history]
    roles = [message["role"] for message in two_turns.messages()]
    assert roles == ["user", "assistant", "user"]
    assert all(question.answers and question.kind != "all" for question in found)


# --- measuring


@dataclass(frozen=True)
class FakeReply:
    text: str
    first: NDArray[np.float32]


@dataclass
class FakeModel:
    """Answers "yes" with ever less conviction the fewer tokens it gets, and "no" below 40; 3 words in all."""

    started: list[int | None] = field(default_factory=list)
    asked: list[ItemPlan] = field(default_factory=list)
    fails_at: int | None = None

    @contextmanager
    def engine(self, withdraw_layer: int | None) -> Iterator[FakeModel]:
        self.started.append(withdraw_layer)
        yield self

    def ask(
        self, dialogues: Sequence[Any], reduction: Reduction, plans: Sequence[ItemPlan], max_tokens: int
    ) -> list[FakeReply]:
        assert [plan_item(reduction, LAYOUT)] * len(dialogues) == list(plans)
        plan = plans[0]
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(plan)
        yes = (plan.kept_deep + 8) / 168
        first = np.log(np.array([yes, 0.95 - yes, 0.05], np.float32))
        return [FakeReply("yes" if plan.kept_deep >= 40 else "no", first)] * len(dialogues)


QUESTIONS = [
    Question(Image.new("RGB", (8, 8), (i, 0, 0)), "?", ("yes",) if i < 3 else ("no",), "ocr" if i == 0 else "exist")
    for i in range(5)
]


def run(model: FakeModel, folder: Path, todo: Sequence[Variant], identity: str = "run") -> OutcomeJournal:
    journal = OutcomeJournal(folder, identity)
    measure(model, QUESTIONS, reference_variant(LAYOUTS, LAYERS), todo, journal, max_tokens=8, batch=2)
    return journal


def card_of(folder: Path, *methods: str, layers: Sequence[int] = ()) -> Card:
    model = FakeModel()
    todo, refused = planned(*methods, ratios=(0.5, 0.75), layers=layers)
    journal = run(model, folder, todo)
    return Card(
        model="<the & model>",
        model_hash="sha256:1",
        data="five",
        data_hash="sha256:2",
        questions=5,
        tokens=144,
        layers=LAYERS,
        engine={"vLLM": "0"},
        results=results(QUESTIONS, reference_variant(LAYOUTS, LAYERS), todo, journal),
        refused=refusals(refused),
    )


def test_figures_of_a_card(tmp_path: Path) -> None:
    card = card_of(tmp_path, "folder", "withdraw", layers=(3,))
    full, half, quarter, withdrawn, *controls = card.results
    assert (full.label, full.kept, full.kl.value, full.agreement.value) == ("none", 144, 0.0, 1.0)
    assert full.accuracy is not None and full.ocr is not None
    assert (full.accuracy.value, full.accuracy.count, full.ocr.value, full.ocr.count) == (0.5, 4, 1.0, 1)
    assert quarter.accuracy is not None
    assert (half.lost, half.gained, quarter.lost, quarter.gained, quarter.accuracy.value) == (0, 0, 3, 2, 0.5)
    p, q = np.array([80 / 168, 0.95 - 80 / 168, 0.05]), np.array([152 / 168, 0.95 - 152 / 168, 0.05])
    assert half.kl.value == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)
    assert (half.agreement.value, quarter.agreement.value) == (1.0, 0.0)
    assert (withdrawn.layer_tokens, withdrawn.kept_deep) == (36.0, 0)
    assert {(r.label, r.is_control) for r in controls} == {(name, True) for name in CONTROLS}
    assert card.control("random", quarter) == next(r for r in controls if r.kept == 36)
    assert set(full.kinds) == {"ocr", "exist"}


def test_engine_starts_once_for_each_layer_and_the_reference_comes_first(tmp_path: Path) -> None:
    model = FakeModel()
    run(model, tmp_path, planned("withdraw", "folder", layers=(6, 3))[0])
    assert model.started == [None, 3, 6]
    assert model.asked[0] == plan_item(Reduction(), LAYOUT)


def test_a_stopped_run_goes_on_and_a_finished_one_asks_nothing(tmp_path: Path) -> None:
    todo = planned("folder", ratios=(0.25, 0.5, 0.75))[0]
    stopped = FakeModel(fails_at=7)  # three batches each: in the second variant beside the reference
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path, todo)
    written = (tmp_path / RESULTS_FILE).read_text().splitlines()
    assert [tuple(json.loads(line)) for line in written] == [("run", "variant", "outcomes")] * 2
    resumed, whole = FakeModel(), FakeModel()
    journal = run(resumed, tmp_path, todo)
    expected = run(whole, tmp_path / "whole", todo)
    assert [journal[v.key] for v in todo] == [expected[v.key] for v in todo]
    assert len(resumed.asked) == len(whole.asked) - 6
    again = FakeModel()
    run(again, tmp_path, todo)
    assert (again.asked, again.started) == ([], [])
    other = FakeModel()
    run(other, tmp_path, todo, identity="other weights")
    assert other.asked == whole.asked


def test_a_line_that_was_cut_off_is_measured_again_and_a_strange_file_is_left_alone(tmp_path: Path) -> None:
    todo = planned("folder")[0]
    run(FakeModel(), tmp_path, todo)
    file = tmp_path / RESULTS_FILE
    whole = file.read_text()
    file.write_text(whole[:-20])
    resumed = FakeModel()
    run(resumed, tmp_path, todo)
    assert len(resumed.asked) == 3  # one variant, three batches
    assert file.read_text() == whole
    file.write_text("not ours\n")
    with pytest.raises(ValueError, match="line 1, is no result"):
        OutcomeJournal(tmp_path, "run")
    assert file.read_text() == "not ours\n"


def test_a_lost_reference_is_measured_again(tmp_path: Path) -> None:
    todo = planned("folder")[0]
    run(FakeModel(), tmp_path, todo)
    next(tmp_path.glob("reference-*.npy")).unlink()
    resumed = FakeModel()
    run(resumed, tmp_path, [*todo, *planned("pool")[0]])
    assert resumed.asked[0].is_identity


def test_an_outcome_is_strict_and_runs_differ_by_anything_that_counts() -> None:
    with pytest.raises(ValueError, match="extra"):
        Outcome.model_validate({"answer": "", "right": None, "kl": 0.0, "agrees": True, "more": 1})
    assert run_identity(weights="a", data="b") == run_identity(data="b", weights="a") != run_identity(weights="b")


# --- what is written


def test_card_is_read_back_and_served(tmp_path: Path) -> None:
    card = card_of(tmp_path, "folder", "stf")
    assert served_card(str(tmp_path)) is None
    card.write(tmp_path / "quality.json")
    assert Card.read(tmp_path / "quality.json") == card
    served = served_card(str(tmp_path))
    assert served == card.summary()
    assert served["model_hash"] == "sha256:1"
    first, second, *_ = served["results"]
    assert (first["method"], first["accuracy"], first["ocr"], first["kl"]) == ("none", 0.5, 1.0, 0.0)
    assert (second["method"], second["reduction"], second["kept"]) == ("folder", {"ratio": 0.5}, 72)
    assert served["refused"][0]["label"] == "stf"


def test_markdown_has_a_row_for_each_variant_with_the_controls_beside(tmp_path: Path) -> None:
    card = card_of(tmp_path, "folder", "withdraw", "stf", layers=(3,))
    text = markdown(card)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| folder")]
    assert rows[0][:5] == ["| folder", "0.5", "-", "72", "72.0"]
    assert rows[0][5] == "50.0 (15.0..85.0)"
    assert rows[0][6:8] == ["50.0", "50.0"]
    assert "| withdraw | - | 3 | 144 | 36.0 |" in text
    assert "| none | 0 | - | 144 | 144.0 | 50.0" in text
    assert "| stf | 0.5 | - | method 'stf' is trained" in text
    widths = {line.count(" | ") for block in text.split("\n\n") for line in block.splitlines()[:1] if "KL" in line}
    assert len(widths) == 2  # the table's heading, and the notes


def test_charts_of_a_small_card_are_the_same_every_time(tmp_path: Path) -> None:
    card = card_of(tmp_path, "folder", "random", "withdraw", "folder+withdraw", layers=(3, 6))
    drawn = {chart.stem: chart.whole().svg() for chart in plots({"": card})}
    assert list(drawn) == ["accuracy", "ocr", "kl", "kinds"]  # two questions a kind: no K can make a difference
    assert {chart.stem: chart.whole().svg() for chart in plots({"": card})} == drawn
    for chart in plots({"": card}):
        check(chart)
    for name in ("folder", "random", "downsample", "withdraw"):
        assert f">{name}<" in drawn["accuracy"]


def test_page_needs_nothing_else_and_shows_names_as_text(tmp_path: Path) -> None:
    card = card_of(tmp_path, "folder", "stf")
    text = html(card, plots({"": card}))
    assert "<h1>Quality of &lt;the &amp; model&gt;</h1>" in text
    assert text.count("<svg") == 4
    assert "Not possible on this model" in text
    assert 'src="' not in text


# --- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "0,half"], "ratios such as"),
        (["--withdraw", "a"], "decoder layers such as"),
        (["--ratios", "1"], r"each in \[0, 1\), not 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--limit", "0"], "at least one question"),
        (["--methods", "folder:ratio=0.5"], "give amounts with --ratios"),
        (["--data", "/nowhere"], "neither a folder of images nor a JSONL file"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    with pytest.raises(SystemExit) as exit_:
        cli.main(["evaluate", "model", *arguments])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_where_the_card_goes(tmp_path: Path) -> None:
    output = Path("out")
    assert card_file(EvaluationOptions(str(tmp_path), output=output)) == tmp_path / "quality.json"
    assert card_file(EvaluationOptions("org/name", output=output)) == Path("out/quality.json")
    assert card_file(EvaluationOptions(str(tmp_path), output=output, card=Path("x.json"))) == Path("x.json")
