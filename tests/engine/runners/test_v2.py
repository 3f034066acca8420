"""More of model runner V2 than `tests/engine/test_v2.py`, with its Triton kernels interpreted, which is slow.

`top_k` is left out: Triton's interpreter does not take vLLM's kernel for it.
"""

from __future__ import annotations

import pytest

from tests.engine.cuda.processes import V2, run

SUITES = {
    "positions": ["test_positions_engine.py"],
    "methods": ["test_methods.py", "test_llava_next.py", "test_llava_onevision.py", "test_padding_rows.py"],
    "withdrawal": [
        "withdrawal/test_kept.py",
        "withdrawal/test_positions.py",
        "withdrawal/test_reference.py",
        "withdrawal/piecewise_v2.py",
    ],
    "graphs of the tower": [
        "cuda/test_tower_graphs.py::test_answers_are_those_without_graphs",
        "cuda/test_tower_graphs.py::test_the_runner_leaves_replays_to_the_model",
        "cuda/test_tower_graphs.py::test_captured_again_after_it_was_measured",
    ],
    "asynchronous loop": ["cuda/async_loop.py"],
    "Qwen-VL": [
        "test_qwen.py::test_all_in_one_batch_and_again_from_the_cache",
        "test_qwen.py::test_in_the_tower_beside_others",
        "test_qwen.py::test_videos",
    ],
    "videos of LLaVA": [
        "test_video_llava.py::test_all_in_one_batch_and_again_from_the_cache",
        "test_video_llava.py::test_kept_positions_are_those_of_the_whole_video",
    ],
    "Qwen3.5": ["test_qwen3_5.py::test_in_the_tower_beside_others", "test_qwen3_5.py::test_states_are_found_again"],
    "Idefics3": ["test_idefics3.py::test_all_in_one_batch_and_again_from_the_cache[idefics3]"],
    "Gemma-3": [
        "test_gemma3.py::test_all_in_one_batch_and_again_from_the_cache",
        "test_gemma3.py::test_what_is_left_of_an_image_attends_both_ways",
    ],
    "MMVP": ["test_mmvp.py::test_ratios_and_methods_in_one_batch"],
    "InternVL": ["test_internvl.py::test_all_in_one_batch_and_again_from_the_cache[chat-qwen2]"],
}


@pytest.mark.parametrize("suite", SUITES)
def test_model_runner_v2(suite: str) -> None:
    run("-k", "not top_k and not several_sequences", *(f"tests/engine/{name}" for name in SUITES[suite]), **V2)
