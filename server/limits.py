"""Limits on one request, checked before anything is fetched, decoded or generated.

Every field is an option of `foldserve serve`: `max_image_mb` is `--max-image-mb`. MB and megapixels are powers of ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from foldserve.server.options import flag, option
from foldserve.server.video.frames import FrameRule, VideoBounds

MOST_PIXELS = 178_956_970
"""Pillow refuses larger images."""


def _bound(default: float, help: str, *, least: float = 1, most: float = float("inf")) -> Any:
    return option(default, "N", help, least=least, most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on one request; see each field's help. Raises ValueError for a value that can't be a limit."""

    max_body_mb: float = _bound(32, "size of a request's body, images in data: URLs included", least=0)
    max_unread_mb: float = _bound(1000, "size of all bodies that an API server has received in part", least=0)
    max_json_depth: int = _bound(64, "nesting of the body's JSON")
    max_json_items: int = _bound(200_000, "values in the body's JSON; counted by its punctuation, in texts too")
    max_messages: int = _bound(1024, "messages of a chat")
    max_parts: int = _bound(4096, "parts of all messages' contents and tool calls, and `documents`")
    max_choices: int = _bound(16, "answers to one prompt, `n`")
    max_stop_strings: int = _bound(4, "strings in `stop`", most=4)
    max_stop_chars: int = _bound(256, "characters of each of them, and of each in `bad_words`")
    max_logit_bias: int = _bound(300, "entries of `logit_bias`, `bad_words`, `allowed_token_ids` and the like")
    max_top_logprobs: int = _bound(20, "`top_logprobs` and `prompt_logprobs`", least=0)
    max_tools: int = _bound(128, "`tools`", least=0)
    max_schema_kb: float = _bound(64, "JSON of `response_format`, `structured_outputs` and `tools`, each", least=0)
    max_images_per_request: int = _bound(16, "images of a request", least=0)
    max_videos_per_request: int = _bound(4, "videos of a request", least=0)
    max_image_mb: float = _bound(20, "size of an image file", least=0)
    max_video_mb: float = _bound(50, "size of a video file", least=0)
    max_media_mb: float = _bound(50, "size of all image and video files of a request", least=0)
    max_image_megapixels: float = _bound(40, "width x height of an image", least=0, most=MOST_PIXELS // 10**6)
    oversized: str = option(
        "refuse",
        None,
        "what becomes of an image with more megapixels or a longer side: a 400, or it is scaled down to "
        "them where it can be decoded within --max-media-megapixels",
        choices=("refuse", "scale"),
    )
    max_media_megapixels: float = _bound(
        80, "the same, summed over a request's images and the frames that are taken of its videos", least=0
    )
    max_prepared_megapixels: float = _bound(400, "the same, of 4 bytes, that an API server prepares at once", least=0)
    min_image_side: int = _bound(8, "pixels of an image's shorter side, at least")
    max_image_side: int = _bound(16_384, "pixels of an image's longer side")
    max_image_aspect: float = _bound(50, "longer side over shorter side")
    video_frames: int = _bound(
        32,
        "frames that are taken of a video, evenly spaced in time; fewer if it has fewer, or where the model was "
        "trained with fewer or has no room for so many",
    )
    video_fps: float = _bound(0, "at most so many of them for each second of the video; 0: no such bound", least=0)
    max_video_seconds: float = _bound(600, "length of a video", least=0)
    max_video_megapixels: float = _bound(9, "width x height of a video's frames", least=0)
    max_video_file_frames: int = _bound(72_000, "frames of a video file, taken or not")
    max_media_seconds: float = _bound(15, "time to fetch a request's images and videos, and to decode them", least=0)
    max_media_redirects: int = _bound(3, "redirects that are followed for one file, each checked anew", least=0)
    media_decode_threads: int = _bound(4, "images and videos that are decoded at once, in each API server")
    allow_media_private_host: tuple[str, ...] = option(
        (),
        "NAME",
        "host name or address that media may be fetched from although it is not on the public internet; "
        "may be given several times. Whoever can send a request can then make the server ask that host",
        action="append",
    )

    def __post_init__(self) -> None:
        for bound in fields(self):
            if "choices" in bound.metadata and getattr(self, bound.name) not in bound.metadata["choices"]:
                choices = " or ".join(bound.metadata["choices"])
                raise ValueError(f"{flag(bound.name)} must be {choices}, not {getattr(self, bound.name)!r}")
            if "least" not in bound.metadata:
                continue
            value, least, most = getattr(self, bound.name), bound.metadata["least"], bound.metadata["most"]
            if not least <= value <= most or value == float("inf"):
                above = f" and at most {most}" if most != float("inf") else ""
                raise ValueError(f"{flag(bound.name)} must be at least {least}{above}, not {value}")
        for larger, smaller in (
            ("max_image_side", "min_image_side"),
            ("max_unread_mb", "max_body_mb"),
            ("max_media_megapixels", "max_image_megapixels"),
            ("max_prepared_megapixels", "max_media_megapixels"),
            ("max_media_mb", "max_image_mb"),
        ):
            if getattr(self, larger) < getattr(self, smaller):
                raise ValueError(f"{flag(larger)} must not be below {flag(smaller)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Limits:
        """Inverse of `to_config`; missing limits have their defaults."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in config.items()}
        return cls(**values)

    def to_config(self) -> dict[str, object]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def lowered_to(self, *, images: int, videos: int, frames: int | None) -> Limits:
        """These limits, lowered to those of the model.

        Where a model takes no images or videos (0), the limit stays, since another error refuses them.

        Args:
            frames: of one video; None: any number.
        """
        return replace(
            self,
            max_images_per_request=min(self.max_images_per_request, images or self.max_images_per_request),
            max_videos_per_request=min(self.max_videos_per_request, videos or self.max_videos_per_request),
            video_frames=self.video_frames if frames is None else min(self.video_frames, frames),
        )

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)

    @property
    def max_unread_bytes(self) -> int:
        return int(self.max_unread_mb * 1e6)

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * 1e6)

    @property
    def max_video_bytes(self) -> int:
        return int(self.max_video_mb * 1e6)

    @property
    def video_bounds(self) -> VideoBounds:
        return VideoBounds(
            seconds=self.max_video_seconds,
            frame_pixels=int(self.max_video_megapixels * 1e6),
            pixels=self.max_media_pixels,
            file_frames=self.max_video_file_frames,
            work_s=self.max_media_seconds,
        )

    @property
    def video_rule(self) -> FrameRule:
        return FrameRule(self.video_frames, self.video_fps or None)

    @property
    def max_media_bytes(self) -> int:
        return int(self.max_media_mb * 1e6)

    @property
    def max_image_pixels(self) -> int:
        return int(self.max_image_megapixels * 1e6)

    @property
    def max_media_pixels(self) -> int:
        return int(self.max_media_megapixels * 1e6)

    @property
    def max_prepared_pixels(self) -> int:
        return int(self.max_prepared_megapixels * 1e6)
