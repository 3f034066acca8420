"""What a single request may not combine with withdrawal. Pure, for the API to ask before the engine does."""

from __future__ import annotations


def refuse_request(*, withdraws: bool, prompt_logprobs: int | None = None, resumable: bool = False) -> None:
    """Raises ValueError if a request that withdraws tokens asks for what it cannot have.

    The scheduler asks again, but there an exception ends the engine: whoever accepts requests has to ask first.
    """
    if not withdraws:
        return
    if prompt_logprobs is not None:
        raise ValueError(
            f"prompt_logprobs={prompt_logprobs} does not go with withdrawn images: their tokens have no output at the "
            "last layer; ask for one of the two"
        )
    if resumable:
        raise ValueError("a streaming-input session does not go with withdrawn images: send a complete prompt")
