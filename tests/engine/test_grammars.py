"""Expensive grammars end, don't delay other requests, and allow the same answers as before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from foldserve.server.engine import grammars
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from tests.engine.conftest import start_engine

pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated:DeprecationWarning")  # vLLM's use

DEAR: dict[str, dict[str, Any]] = {
    "nested repetition": {"regex": "((a{0,200}){0,200}){0,200}"},
    "nested stars": {"regex": "(((a*b?)*c?)*d?)*"},
    "ambiguous rules": {"grammar": 'root ::= s\ns ::= s s | s s s | "a" | ""'},
    "rules that repeat rules": {"grammar": 'root ::= x{0,200}\nx ::= y{0,200}\ny ::= "a"{0,200}'},
    "pattern of a schema": {"json": {"type": "string", "pattern": "^((a{0,99}){0,99}){0,99}$"}},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "count", "tags"],
}
ORDINARY: dict[str, dict[str, Any]] = {
    "regex": {"regex": "[a-z]{3,12}( [0-9]+)*"},
    "schema": {"json": SCHEMA},
    "choice": {"choice": ["a cyan star", "two red circles", "nothing"]},
    "grammar": {"grammar": 'root ::= item ("," item)*\nitem ::= [a-z]+ | [0-9]+'},
    "object": {"json_object": True},
}


@pytest.fixture(scope="module", autouse=True)
def ordinary_priority() -> Iterator[None]:
    """Of the threads: a busy machine would give them nothing for a long time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammars, "_NICE", 0)
        yield


@pytest.fixture(scope="module")
def paced() -> Any:
    return start_engine(CHECKPOINT, scheduler_cls="foldserve.server.engine.scheduler.make_scheduler", max_num_seqs=8)


@pytest.fixture(scope="module")
def stock() -> Any:
    return start_engine(CHECKPOINT, max_num_seqs=8)


def params(form: dict[str, Any] | None, **fields: Any) -> SamplingParams:
    asked = None if form is None else StructuredOutputsParams(**form)
    return SamplingParams(
        **({"temperature": 0, "max_tokens": 60, "output_kind": RequestOutputKind.FINAL_ONLY} | fields),
        structured_outputs=asked,
    )


def run(llm: Any, requests: dict[str, SamplingParams]) -> dict[str, Any]:
    """Outputs in the order in which the requests ended."""
    for name, asked in requests.items():
        llm.llm_engine.add_request(name, f"USER: What is {name}? ASSISTANT:", asked)
    done: dict[str, Any] = {}
    while llm.llm_engine.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        time.sleep(0.0005)  # a server's engine does so where it has nothing to compute
    return done


def answers(outputs: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    return {
        name: sorted((o.index, tuple(o.token_ids), o.finish_reason) for o in output.outputs)
        for name, output in outputs.items()
    }


@pytest.mark.parametrize("form", DEAR)
def test_a_dear_grammar_ends_and_others_do_not_wait_for_it(
    paced: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "TOKEN_LIMIT_S", 0.2)
    monkeypatch.setattr(grammars, "TOTAL_LIMIT_S", 1.0)
    likes_a = {token: 100 for piece, token in paced.get_tokenizer().get_vocab().items() if piece in ("a", "▁a")}
    alone = answers(run(paced, {"other": params(None, max_tokens=6, ignore_eos=True)}))
    both = run(
        paced,
        {
            "dear": params(DEAR[form], max_tokens=1500, logit_bias=likes_a, min_tokens=1400),
            "other": params(None, max_tokens=6, ignore_eos=True),
        },
    )
    assert list(both) == ["other", "dear"]
    assert both["dear"].outputs[0].finish_reason == "error"
    assert answers(both)["other"] == alone["other"]
    assert not paced.llm_engine.engine_core.engine_core.scheduler.requests


@pytest.mark.parametrize("fields", [{}, {"temperature": 1, "seed": 5, "n": 3}], ids=["greedy", "sampled"])
def test_grammars_in_threads_allow_the_same(
    paced: Any, stock: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, as if all were slow; beside requests without a grammar, more than run at once."""
    requests = {name: params(form, **fields) for name, form in ORDINARY.items()}
    requests |= {f"plain {i}": params(None, **fields) for i in range(4)}
    wanted = answers(run(stock, requests))
    monkeypatch.setattr(grammars, "SLOW_S", -1.0)
    monkeypatch.setattr(grammars, "TOTAL_LIMIT_S", 1e9)
    found = run(paced, requests)
    assert answers(found) == wanted
    if not fields:
        assert found["choice"].outputs[0].text in ORDINARY["choice"]["choice"]


@pytest.mark.parametrize("form", ORDINARY)
def test_ordinary_grammars_stay_in_the_loop(paced: Any, stock: Any, form: str) -> None:
    requests = {name: params(ORDINARY[form]) for name in ("one", "two")}
    assert answers(run(paced, requests)) == answers(run(stock, requests))


def test_a_grammar_that_fails_in_a_thread(paced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception, or a token that it does not accept, ends its request alone."""
    monkeypatch.setattr(grammars, "SLOW_S", -1.0)
    for failure in (RuntimeError("broken"), False):

        def advance(self: Any, request_id: str, tokens: list[int], failure: Any = failure) -> bool:
            if isinstance(failure, Exception):
                raise failure
            return bool(failure)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grammars.PacedGrammar, "_advance", advance)
            both = run(
                paced, {"formed": params(ORDINARY["schema"]), "other": params(None, max_tokens=5, ignore_eos=True)}
            )
        assert both["formed"].outputs[0].finish_reason == "error"
        assert len(both["other"].outputs[0].token_ids) == 5
