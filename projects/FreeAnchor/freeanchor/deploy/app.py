"""The page and the JSON API of a trained model, as an ASGI application."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..data import ImageReader, num_channels
from ..errors import FreeAnchorError
from ..modeling import has_bags
from ..visualization import VIEWER, make_page, read_asset
from .answers import Pixels, detect, find_bag
from .predictor import Predictor
from .uploads import ACCEPTED, Gate, Limits, RefusedError, decode_picture, read_body

__all__ = ["make_app"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_STUCK_SECONDS = 300
# A form of another site may send these without asking first whether it may.
_SIMPLE_TYPES = ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded")
# Of the description of the API: FastAPI does not see that a body is read, nor how one is refused.
_PICTURE = {
    "requestBody": {
        "required": True,
        "content": {
            f"image/{kind.lower()}": {"schema": {"type": "string", "format": "binary"}}
            for kind in ACCEPTED
        },
    }
}
_REFUSED: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Refused, with the reason",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"error": {"type": "string"}},
                    "required": ["error"],
                }
            }
        },
    }
}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Metrics:
    """What /metrics tells."""

    def __init__(self, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "freeanchor_requests", "Answers", ["path", "status"], registry=self.registry
        )
        self.refused = Counter(
            "freeanchor_refused", "Requests refused", ["reason"], registry=self.registry
        )
        self.detections = Counter(
            "freeanchor_detections", "Boxes handed out", registry=self.registry
        )
        self.seconds = Histogram(
            "freeanchor_seconds", "Time of a picture", ["step"], registry=self.registry
        )
        queue = Gauge("freeanchor_queue", "Requests that wait or run", registry=self.registry)
        queue.set_function(lambda: gate.waiting)


def _page() -> str:
    folder = files(__package__) / "assets"
    return make_page(
        "FreeAnchor",
        (folder / "page.html").read_text(encoding="utf-8"),
        [read_asset("viewer.css"), (folder / "page.css").read_text(encoding="utf-8")],
        [*map(read_asset, VIEWER), (folder / "page.js").read_text(encoding="utf-8")],
        connect="'self'",
    )


def _check_access(request: Request, token: str) -> None:
    """Who knows the token may do everything; without one, only who is on this machine.

    A page of the net could lead a browser here by a name of its own, so names count too.
    """
    if request.url.path in ("/", "/health"):
        return
    if token:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RefusedError(
                401,
                "token",
                "The token is missing or wrong: it is in the address that freeanchor serve printed",
            )
        return
    host = request.headers.get("host", "")
    if host.rsplit(":", 1)[0] not in _LOCAL_NAMES and host not in _LOCAL_NAMES:
        raise RefusedError(403, "host", "This server answers to localhost alone")


class _Guard:
    """Lets nobody in without a right, and adds headers to and counts what goes out."""

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        metrics: _Metrics,
        refuse: Callable[[Request, RefusedError], Awaitable[Response]],
    ) -> None:
        self.app, self.token, self.metrics, self.refuse = app, token, metrics, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
                # A label for each path that is asked for would pile up.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        app = self.app
        if scope["type"] == "http":
            request = Request(scope, receive)
            try:
                _check_access(request, self.token)
            except RefusedError as e:
                app = await self.refuse(request, e)
        await app(scope, receive, send_on)


class _Desk:
    """Takes pictures in, and has them worked on one after another."""

    def __init__(
        self, gate: Gate, metrics: _Metrics, reader: ImageReader, is_ending: Callable[[], bool]
    ) -> None:
        self.gate, self.metrics, self.reader, self.is_ending = gate, metrics, reader, is_ending
        self.worker = ThreadPoolExecutor(1, "model")

    async def serve(self, request: Request, work: Callable[[Pixels], _T]) -> _T:
        """Have the picture that is the body worked on, when it is its turn.

        Raises:
            RefusedError: it is not taken, or the work failed.
        """
        self.gate.check_rate(request.client.host if request.client else "")
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind in _SIMPLE_TYPES:
            message = "Send the picture as the body, with Content-Type image/jpeg, png or webp"
            raise RefusedError(415, "type", message)
        start = time.monotonic()
        async with self.gate.place():
            content = await read_body(request.stream(), self.gate.limits)
            async with self.gate.turn():
                if self.is_ending():
                    raise RefusedError(503, "ending", "The server is being shut down", 10)
                if await request.is_disconnected():
                    raise RefusedError(499, "left", "The client has left")
                self.metrics.seconds.labels("wait").observe(time.monotonic() - start)
                start = time.monotonic()
                try:
                    result = await asyncio.get_running_loop().run_in_executor(
                        self.worker, lambda: work(self._decode(content))
                    )
                except RefusedError:
                    raise
                except Exception as e:
                    logger.exception("A picture failed")
                    message = "Something went wrong here, see the log of the server"
                    raise RefusedError(500, "failed", message) from e
                self.metrics.seconds.labels("work").observe(time.monotonic() - start)
                return result

    def _decode(self, content: bytes) -> Pixels:
        return decode_picture(content, self.gate.limits.max_pixels, self.reader)


def make_app(
    predictor: Predictor,
    score: float,
    limits: Limits,
    token: str = "",
    is_ending: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Build the application.

    Args:
        predictor: the model; its confidence is that of the detections that are handed out.
        score: where the slider of the page begins.
        limits: of what is accepted.
        token: that requests must have; without one, they must be for this machine by its name.
        is_ending: whether the server was told to end: who waits then is sent away.

    Raises:
        FreeAnchorError: the model sees more of a picture than its colours.
    """
    image_format = predictor.cfg.INPUT.FORMAT
    if num_channels(image_format) not in (1, 3):
        raise FreeAnchorError(
            f"INPUT.FORMAT {image_format}: the page shows pictures in three colours, and the model "
            "would find something else than in their files; `freeanchor predict` reads them whole"
        )
    app = FastAPI(title="FreeAnchor", docs_url=None, redoc_url=None, responses=_REFUSED)
    gate = Gate(limits)
    metrics = _Metrics(gate)
    reader = replace(ImageReader.from_config(predictor.cfg), format="BGR")
    desk = _Desk(gate, metrics, reader, is_ending)
    are_bags = has_bags(predictor.cfg)
    page = _page()

    async def refuse(request: Request, e: RefusedError) -> Response:
        await _drain(request, limits)
        metrics.refused.labels(e.reason).inc()
        headers = {"Retry-After": str(e.retry_after)} if e.retry_after else {}
        if e.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": str(e)}, e.status, headers)

    app.add_middleware(_Guard, token=token, metrics=metrics, refuse=refuse)
    app.exception_handler(RefusedError)(refuse)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> Response:
        first = e.errors()[0]
        message = f"{first['loc'][-1]}: {first['msg'][0].lower()}{first['msg'][1:]}"
        return await refuse(request, RefusedError(422, "parameter", message))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, e: HTTPException) -> Response:
        return await refuse(request, RefusedError(e.status_code, "http", str(e.detail)))

    # Proxies and monitors ask by HEAD, whose answers the server sends without their body.
    @app.head("/", include_in_schema=False)
    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        since = gate.busy_since
        is_stuck = since is not None and time.monotonic() - since > _STUCK_SECONDS
        status = "stuck" if is_stuck else "ok"
        return JSONResponse({"status": status, "queue": gate.waiting}, 503 if is_stuck else 200)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        text = "text/plain; version=0.0.4; charset=utf-8"
        return Response(generate_latest(metrics.registry), media_type=text)

    @app.get("/api/model")
    async def describe() -> dict[str, Any]:
        """Say what the model detects and what is accepted."""
        return {
            "categories": [{"id": i, "name": x} for i, x in enumerate(predictor.class_names, 1)],
            "score": score,
            "least_score": predictor.confidence,
            "bags": are_bags,
            "masks": bool(predictor.cfg.MODEL.MASK_ON),
            "limits": limits._asdict(),
        }

    @app.post("/api/detect", openapi_extra=_PICTURE)
    async def detect_in(request: Request) -> dict[str, Any]:
        """Detect in the picture that is the body, with scores above `least_score` of the model."""
        result = await desk.serve(request, lambda pixels: detect(predictor, pixels))
        metrics.detections.inc(len(result["detections"]))
        return result

    number = Annotated[float, Query(allow_inf_nan=False)]
    side = Annotated[float, Query(ge=1, allow_inf_nan=False)]
    category = Annotated[int, Query(ge=1, le=len(predictor.class_names))]

    @app.post("/api/bag", openapi_extra=_PICTURE)
    async def bag_in(
        request: Request,
        x: number,
        y: number,
        width: side,
        height: side,
        category_id: category,
    ) -> dict[str, Any]:
        """Match an object, whose box is given, in the picture that is the body."""
        if not are_bags:
            kind = predictor.cfg.MODEL.META_ARCHITECTURE
            raise RefusedError(404, "bags", f"The model is a {kind}, which has no bags")

        def work(pixels: Pixels) -> dict[str, Any]:
            rows, columns = pixels.shape[:2]
            if x < 0 or y < 0 or x + width > columns + 1 or y + height > rows + 1:
                message = f"The box is not inside the picture of {columns} x {rows} pixels"
                raise RefusedError(422, "parameter", message)
            return find_bag(predictor, pixels, (x, y, width, height), category_id - 1)

        return await desk.serve(request, work)

    return app


async def _drain(request: Request, limits: Limits) -> None:
    """Take the rest of a body, so that the client reads the answer and does not fail in sending."""

    async def drain() -> None:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > 2 * limits.max_bytes:
                return

    try:
        await asyncio.wait_for(drain(), min(5, limits.upload_seconds))
    except Exception:  # it was read before, is too slow, or the client has left
        return
