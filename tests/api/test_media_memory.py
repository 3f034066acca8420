"""The memory that decoding takes, measured in a process of its own: as much as is counted, and given back."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.image import convert_image_mode

from foldserve.server.api.media.convert import converted
from tests.api.test_media_decode import encode
from tests.images import photo

PIXELS = 12_000_000
SIZE = (4000, 3000)
MB = 1 << 20

PEAKS = """
import json, sys
from foldserve.server.api.media.decode import ImageFile

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10

found = {}
for path in sys.argv[1:]:
    content = open(path, "rb").read()
    ImageFile.open(content).decode()  # what the first one of a kind brings into memory stays there
    file = ImageFile.open(content)
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = status("VmRSS")
    image = file.decode()
    found[path] = [status("VmHWM") - before, file.decoding_bytes]
    del image, file
print(json.dumps(found))
"""

FLOOD = """
import asyncio, json, sys, threading, time
import psutil
from foldserve.server.api.media.guard import MediaGuard
from foldserve.server.limits import Limits

rss = psutil.Process().memory_info
limits = Limits(max_image_megapixels=12, max_media_megapixels=24, max_prepared_megapixels=96, max_media_seconds=600)
urls = [open(path).read() for path in sys.argv[1:]]
peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, rss().rss)
        time.sleep(0.01)

async def one(guard, number):
    parts = [{"type": "image_url", "image_url": {"url": urls[(number + i) % len(urls)]}} for i in range(2)]
    message = {"role": "user", "content": parts}
    async with guard.loaded([message]):
        image = message["content"][0]["image_pil"]
        image.cycle = image
        await asyncio.sleep(0.2)

async def main():
    guard = MediaGuard(limits)
    await one(guard, 0)
    before = rss().rss
    threading.Thread(target=watch, daemon=True).start()
    await asyncio.gather(*(one(guard, number) for number in range(12)))
    end = time.monotonic() + 60
    while rss().rss > before + (32 << 20) and time.monotonic() < end:
        await asyncio.sleep(0.2)
    print(json.dumps([before, peak, rss().rss]))

asyncio.run(main())
"""


def run(script: str, *args: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-c", script, *args]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def files() -> dict[str, bytes]:
    image = Image.fromarray(np.asarray(photo(1, 400, 300)).repeat(10, 0).repeat(10, 1))
    alpha = image.convert("RGBA")
    alpha.putalpha(image.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    fast = {"compress_level": 1}
    return {
        "baseline.jpg": encode(image, "JPEG"),
        "turned.jpg": encode(image, "JPEG", exif=turned),
        "progressive.jpg": encode(image, "JPEG", progressive=True, subsampling=0),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG", progressive=True),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "rgb.png": encode(image, "PNG", **fast),
        "key.png": encode(image, "PNG", transparency=(1, 2, 3), **fast),
        "alpha.png": encode(alpha, "PNG", **fast),
        "grey-alpha.png": encode(alpha.convert("LA"), "PNG", **fast),
        "grey16.png": encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG", **fast),
        "palette.gif": encode(image.quantize(32), "GIF"),
        "lossy.webp": encode(image, "WEBP", method=0),
        "lossless.webp": encode(alpha, "WEBP", lossless=True, quality=0, method=0),
    }


def test_no_more_memory_than_is_counted(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in files()}
    for name, content in files().items():
        paths[name].write_bytes(content)
    found = run(PEAKS, *map(str, paths.values()))
    over = {path: peaks for path, peaks in found.items() if peaks[0] > 1.1 * peaks[1] + 8 * MB}
    assert not over
    assert all(peaks[0] > 2 * PIXELS for peaks in found.values())


def test_memory_falls_back_after_a_flood(tmp_path: Path) -> None:
    kinds = files()
    held = 0  # by the files of all requests, which their bodies are bounded by
    for name in ("alpha.png", "progressive.jpg", "lossless.webp"):
        kind = name.rpartition(".")[2].replace("jpg", "jpeg")
        url = f"data:image/{kind};base64,{base64.b64encode(kinds[name]).decode()}"
        (tmp_path / name).write_text(url)
        held += 8 * len(kinds[name])  # of 24 images
    before, peak, after = run(FLOOD, *map(str, sorted(tmp_path.iterdir())))
    counted = 4 * 96_000_000 + held
    assert peak - before < 2 * counted  # glibc keeps what is freed in between, up to 1.8 times what is counted was seen
    assert peak - before > 100 * MB
    assert after <= before + 32 * MB


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("size", [(1200, 1001), (1 << 20, 2), (3, 400_000)], ids=str)
def test_strips_are_as_the_whole(mode: str, key: bool, size: tuple[int, int]) -> None:
    image = photo(3).resize(size)
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 251) if "16" in mode else image.convert(mode)
    )
    if key and mode in ("1", "L", "P", "RGB"):
        image.info["transparency"] = image.getpixel((1, 1))
    background = (7, 77, 177)
    result = converted(image, "RGB", background)
    if mode == "I;16":
        assert np.array_equal(np.asarray(result)[..., 0], np.asarray(image) >> 8)
        return
    source = image.convert("RGBA") if mode == "RGB" and key else image
    assert np.array_equal(np.asarray(result), np.asarray(convert_image_mode(source, "RGB", background)))
