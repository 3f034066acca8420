"""What foldserve changes in vLLM's own code, for want of a registry. The plugin applies it in every process.

1. `detokenizer_utils._restore_leading_spaces` takes a token that the tokenizer does not know.

   Why: models have more rows than their tokenizer has tokens. With `logprobs`, an id of such a row, whose token is
   None, raises TypeError in the task that reads all outputs, which ends the server: an ordinary request with
   `top_logprobs: 20` meets one sooner or later.
   How: the function is replaced by one that returns the text as decoded, "", where the token is None.
   Upstream: https://github.com/vllm-project/vllm/pull/56100
   Remove when: the pinned version of vLLM has that.
"""

from __future__ import annotations

from vllm.tokenizers import detokenizer_utils

_plain = detokenizer_utils._restore_leading_spaces


def apply() -> None:
    """Applies all patches. Idempotent."""
    detokenizer_utils._restore_leading_spaces = _restore_leading_spaces


def _restore_leading_spaces(raw_token: str | None, token_str: str, marker: str) -> str:
    return token_str if raw_token is None else _plain(raw_token, token_str, marker)
