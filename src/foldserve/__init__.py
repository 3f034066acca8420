"""Visual token reduction for vision-language models on vLLM. Importing this loads nothing else."""

from __future__ import annotations

from typing import Any

__all__ = ["reduction"]


def reduction(
    *,
    ratio: float | None = None,
    keep_tokens: int | None = None,
    method: str | None = None,
    withdraw: bool | None = None,
    **others: object,
) -> dict[str, Any]:
    """What reduces all images and videos of a prompt offline: `mm_processor_kwargs` of `vllm.LLM`.

        llm.chat(messages, mm_processor_kwargs=foldserve.reduction(ratio=0.5))

    Args:
        ratio: share of tokens removed, in [0, 1).
        keep_tokens: tokens kept of each image, instead of `ratio`.
        method: `folder` by default.
        withdraw: in an engine with a layer K, its vision tokens leave the decoder there.
        others: the other fields of `reduction` over HTTP.

    Raises:
        InvalidReduction: a field is wrong, as over HTTP. What an image or the model does not allow, vLLM's call raises.
    """
    from foldserve.reducers.reduction import Reduction

    fields: dict[str, object] = {
        "ratio": ratio,
        "keep_tokens": keep_tokens,
        "method": method,
        "withdraw": withdraw,
        **others,
    }
    asked = Reduction.parse({name: value for name, value in fields.items() if value is not None})
    return {"foldserve": asked.to_json()}
