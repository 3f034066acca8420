"""`make pin-images` against a registry with HTTPS on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.deploy.files import COMPOSE, DOCKERFILES, PROFILES, ROOT, compose
from tests.tools.registry import Registry, digest, index, running
from tools.pin_images import FILES, Tag, main, tagged_images, write

DOCKERFILE = """FROM {host}/library/python:3.12-slim AS wheel
COPY --from=wheel /a:1 /b
FROM wheel
"""
COMPOSE_FILE = """services:
  server:
    image: foldserve:${{TAG:-latest}}
  prometheus:
    image: ${{PROMETHEUS_IMAGE:-{host}/prom/prometheus:v3.5.0}}
  other:
    image: {host}/library/python:3.12-slim
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with running(authority) as registry:
        for tagged in ("library/python:3.12-slim", "prom/prometheus:v3.5.0"):
            registry.manifests[tagged] = index(tagged)
        yield registry


@pytest.fixture
def files(registry: Registry, tmp_path: Path) -> list[Path]:
    texts = {"Dockerfile": DOCKERFILE, "compose.yaml": COMPOSE_FILE}
    for name, text in texts.items():
        (tmp_path / name).write_text(text.format(host=registry.host))
    return [tmp_path / name for name in texts]


def pin(files: list[Path], *options: str) -> int:
    return main([*options, *map(str, files)])


def test_every_tag_gets_the_digest_of_its_index_and_nothing_else_changes(registry: Registry, files: list[Path]) -> None:
    before = [path.read_text() for path in files]
    assert pin(files) == 0
    for tagged, manifest in registry.manifests.items():
        whole = f"{registry.host}/{tagged}"
        before = [text.replace(whole, f"{whole}@{digest(manifest)}") for text in before]
    assert [path.read_text() for path in files] == before
    assert {path.name for path in files[0].parent.iterdir()} == {"Dockerfile", "compose.yaml", "ca.pem"}


def test_each_tag_is_asked_once_and_no_manifest_is_fetched(registry: Registry, files: list[Path]) -> None:
    """GET of a manifest counts towards Docker Hub's limit, HEAD does not."""
    assert pin(files) == 0
    head = "HEAD /v2/library/python/manifests/3.12-slim"
    assert registry.asked.count(head) == 2  # without a token, and with one
    assert {line for line in registry.asked if line.startswith("GET")} == {"GET /token"}


def test_what_is_pinned_is_pinned_anew(registry: Registry, files: list[Path]) -> None:
    assert pin(files) == 0
    once = files[0].read_text()
    assert pin(files) == 0
    assert files[0].read_text() == once
    registry.manifests["library/python:3.12-slim"] = moved = index("a security update")
    assert pin(files) == 0
    assert digest(moved) in files[0].read_text() and digest(moved) in files[1].read_text()
    assert files[0].read_text().count("sha256:") == 1


def test_check_says_what_is_not_pinned_and_what_has_moved(
    registry: Registry, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    dockerfile, compose_file = files
    was, now = digest(registry.manifests["library/python:3.12-slim"]), index("a security update")
    assert pin([dockerfile]) == 0
    capsys.readouterr()
    registry.manifests["library/python:3.12-slim"] = now
    before = [path.read_text() for path in files]
    assert pin(files, "--check") == 1
    python = f"{registry.host}/library/python:3.12-slim"
    said = capsys.readouterr().out.splitlines()
    assert f"{dockerfile}: {python} has moved from {was} to {digest(now)}" in said
    assert f"{compose_file}: {python} is not pinned; it is {digest(now)} now" in said
    assert len(said) == 3
    assert [path.read_text() for path in files] == before
    assert pin(files) == 0 and pin(files, "--check") == 0


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("prom/prometheus:v9.9.9", "no such tag (404)"),
        ("private/image:1", "401, the registry has no such image, or none that can be read without a login"),
    ],
    ids=["unknown-tag", "login"],
)
def test_one_image_that_the_registry_does_not_give_leaves_all_files_alone(
    named: str, said: str, registry: Registry, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files[1].write_text(f"{files[1].read_text()}  last:\n    image: {registry.host}/{named}\n")
    before = [path.read_text() for path in files]
    assert pin(files) == 1
    assert capsys.readouterr().err == f"pin-images: {registry.host}/{named}: {said}; nothing was written\n"
    assert [path.read_text() for path in files] == before


def test_a_registry_that_is_not_there_leaves_all_files_alone(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        gone = f"localhost:{nobody.getsockname()[1]}/prom/prometheus:v3.5.0"
        files[1].write_text(f"services:\n  only:\n    image: {gone}\n")
        before = [path.read_text() for path in files]
        assert pin(files) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"pin-images: {gone}: the registry can't be asked: ") and "refused" in error
    assert [path.read_text() for path in files] == before


def test_a_certificate_that_nobody_vouches_for_is_refused(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert pin(files) == 1
    assert "certificate verify failed" in capsys.readouterr().err


def test_a_file_that_can_not_be_written_leaves_the_others_alone(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.write_text("old")
    with pytest.raises(FileNotFoundError):
        write({first: "new", tmp_path / "no-folder" / "second": "new"})
    assert first.read_text() == "old" and list(tmp_path.iterdir()) == [first]


@pytest.mark.parametrize(
    ("tagged", "tag"),
    [
        ("python:3.12-slim", Tag("registry-1.docker.io", "library/python", "3.12-slim")),
        ("vllm/vllm-openai:v0.32.0", Tag("registry-1.docker.io", "vllm/vllm-openai", "v0.32.0")),
        ("docker.io/library/python:3", Tag("registry-1.docker.io", "library/python", "3")),
        ("docker.io/python:3", Tag("registry-1.docker.io", "library/python", "3")),
        ("quay.io/prometheus/prometheus:v3", Tag("quay.io", "prometheus/prometheus", "v3")),
        ("localhost:5000/a:1", Tag("localhost:5000", "a", "1")),
        ("localhost/a:1", Tag("localhost", "a", "1")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tag_is_asked_of_the_registry_that_docker_asks(tagged: str, tag: Tag) -> None:
    assert Tag.parse(tagged) == tag


def test_every_image_of_other_projects_in_deploy_is_one_to_pin() -> None:
    named = {path: tagged_images((ROOT / path).read_text()) for path in FILES}
    for path in DOCKERFILES:
        lines = (ROOT / path).read_text().splitlines()
        assert len(named[path]) == sum(line.startswith(("FROM ", "# syntax=")) for line in lines), path
    others = {
        str(service["image"]).split("@")[0]
        for profile in PROFILES
        for service in compose(profile).values()
        if not service["image"].startswith("foldserve")
    }
    assert set(named[str(COMPOSE.relative_to(ROOT))]) == others
    assert named["deploy/compose/.env.example"] == named[str(COMPOSE.relative_to(ROOT))]
