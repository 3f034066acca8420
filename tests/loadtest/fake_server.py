"""A small server that streams answers as OpenAI's API does, and tells its metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENCODED = 100


@dataclass
class Fake:
    """The requests that it got, in order of arrival.

    Attributes:
        keys: for chats and for metrics, where it asks for them.
    """

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    refuse: str | None = None
    keys: tuple[str, str] | None = None

    def metrics(self) -> str:
        kept = sum(self.kept(body) for body in self.asked)
        return (
            "# TYPE foldserve_vision_tokens counter\n"
            f'foldserve_vision_tokens_total{{stage="encoded",method="x"}} {ENCODED * len(self.asked)}\n'
            f'foldserve_vision_tokens_total{{stage="kept",method="x"}} {kept}\n'
            "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n"
            "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc 0.5\n"
        )

    @staticmethod
    def kept(body: dict[str, Any]) -> int:
        return round(ENCODED * (1 - body.get("reduction", {}).get("ratio", 0)))


@contextmanager
def fake_server() -> Iterator[Fake]:
    """The server, on a free port; a text of "fail" in a question is answered with 500."""
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._may():
                return self._answer(401, "a key is needed")
            known = {"/metrics": fake.metrics(), "/v1/models": json.dumps({"data": [{"id": "fake"}]})}
            self._answer(200, known[self.path])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._may():
                return self._answer(401, "a key is needed")
            fake.asked.append(body)
            if fake.refuse is not None and body.get("reduction"):
                return self._answer(400, fake.refuse)
            if "fail" in json.dumps(body["messages"]):
                return self._answer(500, "broken")
            if not body.get("stream"):
                return self._answer(200, json.dumps({"usage": {}}))
            count = body["max_completion_tokens"]
            chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "a"}}]} for _ in range(count)]
            chunks.append({"choices": [], "usage": {"prompt_tokens": 10 + fake.kept(body), "completion_tokens": count}})
            self._answer(200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")

        def _may(self) -> bool:
            wanted = fake.keys and fake.keys[self.path == "/metrics"]
            return not wanted or self.headers["Authorization"] == f"Bearer {wanted}"

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
