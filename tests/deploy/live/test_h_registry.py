"""`make pin-images` against Docker's own registry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
import yaml
from dxf import DXF

from tests.deploy.files import ROOT
from tests.deploy.live.processes import Process, free_port
from tests.tools.registry import digest

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Starts a registry with HTTPS and these settings of its file; its address."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    started = []

    def start(**settings: object) -> str:
        host, ready = f"localhost:{free_port()}", f"127.0.0.1:{free_port()}"
        tls = {"certificate": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.pem")}
        config = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(tmp_path / "images")}},
            "http": {"addr": host, "tls": tls, "debug": {"addr": ready}},
        }
        (tmp_path / "registry.yaml").write_text(yaml.safe_dump(config | settings))
        program = Path(sys.executable).parent / "docker-registry"
        command: list[str | Path] = [program, "serve", tmp_path / "registry.yaml"]
        started.append(Process(command, f"http://{ready}/debug/health", tmp_path / "registry.log"))
        started[-1].start()
        started[-1].wait_until_ready()
        return host

    yield start
    for process in started:
        process.stop()


def push(host: str, repository: str, tag: str) -> str:
    """Pushes an image for one platform and a list of platforms with it; the list's digest."""
    with DXF(host, repository) as registry:
        config = registry.push_blob(data=iter([b"{}"]), digest=digest(b"{}"))
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 2, "digest": config},
            "layers": [],
        }
        text = json.dumps(manifest)
        registry.set_manifest("amd64", text)
        platform = {"architecture": "amd64", "os": "linux"}
        one = {"mediaType": MANIFEST, "size": len(text), "digest": digest(text.encode()), "platform": platform}
        listed = json.dumps({"schemaVersion": 2, "mediaType": LIST, "manifests": [one]})
        registry.set_manifest(tag, listed)
        return digest(listed.encode())


def pin(file: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, "-m", "tools.pin_images", file]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_tag_is_pinned_to_the_list_of_its_platforms(start: Callable[..., str], tmp_path: Path) -> None:
    host = start()
    pushed = push(host, "library/python", "3.12-slim")
    file = tmp_path / "Dockerfile"
    file.write_text(f"FROM {host}/library/python:3.12-slim AS wheel\n")
    done = pin(file)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == f"FROM {host}/library/python:3.12-slim@{pushed} AS wheel\n"


def test_an_unknown_tag_and_a_login_are_said(start: Callable[..., str], tmp_path: Path) -> None:
    open_to_all = start()
    passwords = tmp_path / "htpasswd"
    passwords.touch()
    guarded = start(auth={"htpasswd": {"realm": "here", "path": str(passwords)}})
    file = tmp_path / "Dockerfile"
    for host, said in ((open_to_all, "no such tag (404)"), (guarded, "401, ")):
        file.write_text(f"FROM {host}/library/python:3\n")
        done = pin(file)
        assert done.returncode == 1 and f"pin-images: {host}/library/python:3: {said}" in done.stderr
        assert file.read_text() == f"FROM {host}/library/python:3\n"
