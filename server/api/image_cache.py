"""Prepared images are kept in the API process, as vLLM does where several of those share an engine.

What: replaces the renderer's cache in a server with one API process.
Why: there vLLM keeps prepared images in the engine, and its API process notes which ones it believes to be there. It
    notes an image when it has been prepared; a request that ends before it reaches the engine (its client hangs up, its
    answer has no room) leaves a note that is wrong, and the next request with that image fails. Measured: 3 of 10,000
    requests in a soak where three in ten hang up. The price: an image that comes again goes to the engine again.
Upstream: vLLM 0.32 drops the wrong note after that failure, and leaves it to the client to ask again.
Remove when: vLLM notes an image as sent when it has been sent, or lets the kind of cache be chosen for one API process.
"""

from __future__ import annotations

from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.renderers import BaseRenderer


def keep_images_here(renderer: BaseRenderer) -> None:
    """To be called before the first request; leaves caches alone that can't err in this way, and a missing one."""
    if isinstance(renderer._mm_processor_cache, LruKeyReplicatedSenderCache):
        renderer._mm_processor_cache = renderer._mm_processor_only_cache
