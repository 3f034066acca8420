"""Prints one line when the server is ready, with a request to try: vLLM's own log ends in a list of routes."""

from __future__ import annotations

import http.client
import sys
import threading
import time
from argparse import Namespace

# A red circle, 96 x 96 pixels: small enough for a line, needs no file and no network, and the demo model knows it.
EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAGAAAABgAQMAAADYVuV7AAAABlBMVEWWoKrcKCjQ0uBiAAAAcUlEQVR42u3RvQ2DMBCA0WcHKZSMwCZhdI/C"
    "CJQUyKTi8keBUiUSX/d0pytszv6s6/SEWwUXMKZUkCEx2JDpAw1doKUNdDSBrQz949Db5AUD6cDaNyisB9ZG6v5kYgnMzIGFKVAZAyvl4613"
    "fuHsV7sDHvQUQkgPWloAAAAASUVORK5CYII="
)
_POLL_S = 0.5


def announce_when_ready(args: Namespace) -> None:
    """Prints the line from a thread once `/health` answers; does nothing where plain HTTP is not served."""
    if args.headless or args.grpc or args.uds or args.ssl_certfile:
        return
    host = "localhost" if args.host in (None, "", "0.0.0.0", "::") else args.host
    threading.Thread(target=_announce, args=(host, args.port), daemon=True).start()


def _announce(host: str, port: int) -> None:
    while not _is_healthy(host, port):
        time.sleep(_POLL_S)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"foldserve: ready at {url}/v1. Try: {_example(url)}", file=sys.stderr, flush=True)


def _is_healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _example(url: str) -> str:
    content = (
        f'{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{EXAMPLE_PNG}"}}}},'
        '{"type":"text","text":"Describe the image."}'
    )
    options = '"max_tokens":16,"temperature":0,"reduction_ratio":0.66'
    body = f'{{"messages":[{{"role":"user","content":[{content}]}}],{options}}}'
    return f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
