"""Patches of vLLM's own code where it has no registry. The plugin applies them in every process.

1. `detokenizer_utils._restore_leading_spaces` accepts a token that the tokenizer does not have.

   Why: models have more vocabulary rows than their tokenizer has tokens. With `logprobs`, such a row's token is None
   and raises TypeError in the task that reads all outputs, which ends the server. Any request with `top_logprobs: 20`
   may trigger it.
   How: the replacement returns the decoded text, "", if the token is None.
   Upstream: https://github.com/vllm-project/vllm/pull/56100
   Remove when: the pinned version of vLLM has this fix.
"""

from __future__ import annotations

from vllm.tokenizers import detokenizer_utils

_plain = detokenizer_utils._restore_leading_spaces


def apply() -> None:
    """Idempotent."""
    detokenizer_utils._restore_leading_spaces = _restore_leading_spaces


def _restore_leading_spaces(raw_token: str | None, token_str: str, marker: str) -> str:
    return token_str if raw_token is None else _plain(raw_token, token_str, marker)
