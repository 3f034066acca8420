"""vLLM names that move or change in its next version; import them from here.

Delete the `except` branches at the next pin.
"""

from __future__ import annotations

try:  # from 0.33 on
    from vllm.renderers.chat_utils.content_parser import MODALITY_PLACEHOLDERS_MAP
    from vllm.v1.core.kv_cache_planning import check_enough_kv_cache_memory, get_kv_cache_groups
except ModuleNotFoundError:
    from vllm.renderers.chat_utils import MODALITY_PLACEHOLDERS_MAP
    from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory, get_kv_cache_groups

try:  # from 0.33 on
    from vllm.transformers_utils.processors.internvl import InternVLChatVideoProcessor
except ImportError:
    from vllm.transformers_utils.processors.internvl import InternVLVideoProcessor as InternVLChatVideoProcessor

__all__ = [
    "MODALITY_PLACEHOLDERS_MAP",
    "InternVLChatVideoProcessor",
    "check_enough_kv_cache_memory",
    "get_kv_cache_groups",
]
