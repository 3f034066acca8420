"""Images travel to the engine as uint8; the model there scales and normalizes them.

vLLM sends floats, four times the size in transfers and caches, and computes them where requests are prepared. vLLM's
own `mm_device_do_normalize` rounds differently and drops an operator's options, so with it ratio 0 would not be vLLM's
result bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend


class Normalize:
    """Scales and normalizes uint8 images, with the same result as the Hugging Face image processor, in `dtype`."""

    def __init__(
        self, image_processor: TorchvisionBackend, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        scale = 1.0 / image_processor.rescale_factor

        def of_each_colour(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) * scale

        self._mean, self._std = of_each_colour(image_processor.image_mean), of_each_colour(image_processor.image_std)
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) uint8 -> normalized, the same shape."""
        return pixels.to(torch.float32).sub_(self._mean).div_(self._std).to(self._dtype)


def leaving_bytes(image_processor: Any) -> Any | None:
    """A copy that leaves scaling and normalizing to `Normalize`; None if that would change the result.

    A trial image decides, since processor classes override arbitrary methods.
    """
    if not isinstance(image_processor, TorchvisionBackend) or not image_processor.do_normalize:
        return None
    split = copy.copy(image_processor)
    split.rescale_and_normalize = _planes
    trial = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8))
    whole, found = (each(trial, return_tensors="pt")["pixel_values"] for each in (image_processor, split))
    if found.dtype != torch.uint8 or not torch.equal(Normalize(image_processor, whole.dtype)(found), whole):
        return None
    return split


def _planes(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Turn PIL's interleaved colours, which are faster to resize, into three contiguous planes."""
    return images.contiguous()
