"""`/health/live`, `/health/ready`, and `/health` as vLLM's users know it."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from foldserve.server.api.auth.route import OpenRoute
from foldserve.server.api.lifecycle.state import Lifecycle, Phase

health = APIRouter(route_class=OpenRoute, tags=["health"])


@health.get("/health/live")
async def live(raw_request: Request) -> JSONResponse:
    """200 while this process works; 503 when only a new one can."""
    phase = _phase(raw_request)
    return _answer(phase, phase is not Phase.STOPPED)


@health.get("/health/ready")
@health.get("/health")
async def ready(raw_request: Request) -> JSONResponse:
    """200 while new requests are taken; 503 while the server drains, and when its engine is gone."""
    phase = _phase(raw_request)
    return _answer(phase, phase is Phase.SERVING)


def _phase(raw_request: Request) -> Phase:
    lifecycle: Lifecycle = raw_request.app.state.foldserve_lifecycle
    return lifecycle.phase


def _answer(phase: Phase, good: bool) -> JSONResponse:
    return JSONResponse({"status": phase.value}, HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)
