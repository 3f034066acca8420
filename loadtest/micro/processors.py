"""Our multimodal processor and vLLM's own, in this process, for micro-benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from foldserve.reducers.plan import Reduction
from foldserve.server.engine.processor import KWARG

Name = Literal["ours", "stock"]


class Processors:
    """Both processors, without cache, for a LLaVA-1.5 `checkpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.models.llava import LlavaForConditionalGeneration
        from vllm.multimodal import MULTIMODAL_REGISTRY

        config = EngineArgs(model=str(checkpoint)).create_model_config()
        ours = MULTIMODAL_REGISTRY.create_processor(config)
        stock = LlavaForConditionalGeneration._processor_factory.build_processor(ours.info.ctx)
        self._processors: dict[Name, Any] = {"ours": ours, "stock": stock}
        self._prompt = ours.info.get_tokenizer().encode("<image>What is this?")

    def call(self, name: Name, image: Image.Image, reduction: Reduction | None = None) -> Callable[[], int]:
        """A function that processes the image and returns the number of prompt tokens."""
        processor = self._processors[name]
        kwargs = {} if reduction is None else {KWARG: reduction.to_json()}

        def run() -> int:
            items = processor.info.parse_mm_data({"image": image})
            return len(processor(self._prompt, items, hf_processor_mm_kwargs=kwargs)["prompt_token_ids"])

        return run
