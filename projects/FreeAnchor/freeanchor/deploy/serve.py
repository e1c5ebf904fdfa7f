"""`freeanchor serve MODEL`: a page where a colleague drops pictures, and a JSON API."""

import ipaddress
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress

from ..checkpoint import describe_scores
from ..errors import FreeAnchorError
from .predictor import CONFIDENCE, NONE_RECOMMENDED, Predictor
from .uploads import Limits

try:
    import uvicorn

    from .app import make_app
except ModuleNotFoundError as e:
    raise FreeAnchorError(
        f"The page needs {e.name}, which is not installed: pip install 'freeanchor[serve]'"
    ) from e

__all__ = ["LEAST_SCORE", "choose_token", "serve"]

LEAST_SCORE = 0.05  # of the detections that the slider of the page can show
_TOKEN = "FREEANCHOR_TOKEN"
_LEAST_TOKEN = 16
_MOST_CONNECTIONS = 500


def choose_token(host: str) -> str:
    """The token that requests must have: none on this machine, unless the user gives one.

    Args:
        host: address or name that the server is bound to.

    Raises:
        FreeAnchorError: the environment variable FREEANCHOR_TOKEN is too short to be safe.
    """
    token = os.environ.get(_TOKEN, "")
    if token and len(token) < _LEAST_TOKEN:
        raise FreeAnchorError(f"{_TOKEN} needs {_LEAST_TOKEN} characters or more")
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    return token or ("" if is_local else secrets.token_urlsafe(32))


def serve(
    load: Callable[[], Predictor], score: float | None, host: str, port: int, limits: Limits
) -> None:
    """Serve a model until the process is interrupted.

    Args:
        load: makes the predictor, once the address is known to be free.
        score: where the slider of the page begins, by default the recommended threshold of all
            classes together, or else 0.5.
        host: address or name to be bound to. Elsewhere than on this machine, requests need a
            token: that of the environment variable FREEANCHOR_TOKEN, or a random one.
        port: 0 for any that is free.
        limits: of what is accepted.

    Raises:
        FreeAnchorError: the address or the model cannot be used.
    """
    token = choose_token(host)
    if score is not None and not 0 <= score <= 1:
        raise FreeAnchorError(f"--confidence must be in 0 to 1, got {score}")
    if min(limits[:3]) < 1 or not limits.rate >= 0:
        raise FreeAnchorError("Limits must be positive: one byte, pixel and place at least")
    if not 0 <= port < 2**16:
        raise FreeAnchorError(f"--port {port} cannot be used: it is not in 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except OSError as e:
        raise FreeAnchorError(f"--host {host} --port {port} cannot be used: {e}") from e
    with bound:
        predictor = load()
        known, reason = predictor.recommended, "as given"
        if score is None and known is not None:
            score, reason = known.score, known.reason
        elif score is None:
            score, reason = CONFIDENCE, NONE_RECOMMENDED
        print(f"The slider of the scores begins at {describe_scores(score, reason)}", flush=True)
        app = make_app(predictor, score, limits, token, lambda: server.should_exit)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{bound.getsockname()[1]}/"
        print(f"The page is {address}{f'#token={token}' if token else ''}", flush=True)
        if token:
            print("Who has this address can use it; it is not encrypted.", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody on this machine could claim any address
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=10,
        )
        server = uvicorn.Server(config)
        with suppress(KeyboardInterrupt):  # which uvicorn hands on when it has ended
            server.run(sockets=[bound])
