"""Pins the images of other projects that Dockerfiles and compose name by tag: `make pin-images`.

`name:tag` becomes `name:tag@sha256:...`, the tag's current digest for all platforms. Either all files are written or
none. `--check` writes nothing; its exit status is 1 if an image is not pinned or its tag has moved.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests
from dxf import DXF
from dxf.exceptions import DXFError, DXFUnauthorizedError

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "Dockerfile",
    "deploy/Dockerfile.cpu",
    "deploy/Dockerfile.ray",
    "deploy/Dockerfile.router",
    "deploy/compose/compose.yaml",
    "deploy/compose/.env.example",
)
TIMEOUT_S = 30

_IMAGE = re.compile(
    r"^(?P<before># syntax=|FROM |\s+image: (?:\$\{\w+:-)?|# \w+_IMAGE=)"
    r"(?P<tagged>[a-z0-9][\w./-]*(?::\d+/[\w./-]+)?:[\w.-]+)(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.MULTILINE,
)
"""An image with a tag. Images that we build have a variable as tag, so they don't match."""


class PinError(Exception):
    """A registry gave no digest for a tag."""


@dataclass(frozen=True)
class Tag:
    """A tag and the registry that Docker would ask for it."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, tagged: str) -> Tag:
        """Parses `[registry/]repository:tag`; the defaults are Docker Hub and its user `library`."""
        name, tag = tagged.rsplit(":", 1)
        first, _, rest = name.partition("/")
        if rest and (first == "localhost" or "." in first or ":" in first) and first != "docker.io":
            return cls(first, rest, tag)
        name = name.removeprefix("docker.io/")
        return cls("registry-1.docker.io", name if "/" in name else f"library/{name}", tag)

    def digest(self) -> str:
        """Asks the registry, without a login; PinError if it gives no digest."""
        where = f"{self.registry}/{self.repository}:{self.tag}"
        try:
            with DXF(self.registry, self.repository, auth=_log_in_as_nobody, timeout=TIMEOUT_S) as registry:
                digest, _ = registry.head_manifest_and_response(self.tag)
        except DXFUnauthorizedError:
            raise PinError(
                f"{where}: 401, the registry has no such image, or none that can be read without a login"
            ) from None
        except requests.HTTPError as error:
            status = error.response.status_code
            raise PinError(
                f"{where}: {'no such tag' if status == 404 else 'the registry answered'} ({status})"
            ) from None
        except (requests.RequestException, DXFError) as error:
            raise PinError(f"{where}: the registry can't be asked: {error}") from None
        if digest is None:
            raise PinError(f"{where}: the registry answered without Docker-Content-Digest")
        return digest


def _log_in_as_nobody(registry: object, response: requests.Response) -> None:
    assert isinstance(registry, DXF)
    registry.authenticate(response=response)


def tagged_images(text: str) -> list[str]:
    """Images that a file names by tag, as `name:tag`, pinned or not."""
    return [found["tagged"] for found in _IMAGE.finditer(text)]


def pinned(text: str, digests: Mapping[str, str]) -> str:
    """The text of a file with all images pinned; `digests` are keyed by `name:tag`."""
    return _IMAGE.sub(lambda found: f"{found['before']}{found['tagged']}@{digests[found['tagged']]}", text)


def complaints(text: str, digests: Mapping[str, str]) -> list[str]:
    """Messages about images that are not pinned, or not to the tag's current digest."""
    said = []
    for found in _IMAGE.finditer(text):
        now = digests[found["tagged"]]
        if found["digest"] is None:
            said.append(f"{found['tagged']} is not pinned; it is {now} now")
        elif found["digest"] != now:
            said.append(f"{found['tagged']} has moved from {found['digest']} to {now}")
    return said


def write(texts: Mapping[Path, str]) -> None:
    """Writes all files, or none if one can't be written."""
    beside = {path: path.with_name(f"{path.name}.pinning") for path in texts}
    try:
        for path, text in texts.items():
            beside[path].write_text(text)
            shutil.copymode(path, beside[path])
        for path, new in beside.items():
            new.replace(path)
    finally:
        for new in beside.values():
            new.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Pins or checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make pin-images", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if an image is not pinned or has moved"
    )
    parser.add_argument(
        "files", nargs="*", type=Path, default=[ROOT / name for name in FILES], help="default: deploy/'s"
    )
    options = parser.parse_args(argv)
    texts = {path: path.read_text() for path in options.files}
    try:
        digests = _digests({image for text in texts.values() for image in tagged_images(text)})
    except PinError as error:
        print(f"pin-images: {error}; nothing was written", file=sys.stderr)
        return 1
    if options.check:
        said = [f"{path}: {complaint}" for path, text in texts.items() for complaint in complaints(text, digests)]
        print("\n".join(said or ["all images are pinned to what their tags stand for"]))
        return 1 if said else 0
    write({path: pinned(text, digests) for path, text in texts.items()})
    print("\n".join(f"{image}@{digest}" for image, digest in sorted(digests.items())))
    return 0


def _digests(images: set[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(images, pool.map(lambda image: Tag.parse(image).digest(), images), strict=True))


if __name__ == "__main__":
    sys.exit(main())
