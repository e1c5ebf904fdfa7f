"""What strangers send: how much of it, how often, and pictures out of it. Nothing is trusted."""

import asyncio
import io
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..data import ImageReader

__all__ = ["ACCEPTED", "Gate", "Limits", "RefusedError", "decode_picture", "read_body"]

ACCEPTED = ("JPEG", "PNG", "WEBP")  # what browsers show
_MOST_SLENDER = 50  # longer over shorter side
_MOST_ADDRESSES = 10_000  # whose rates are remembered


class Limits(NamedTuple):
    """What is accepted.

    Attributes:
        max_bytes: of a file.
        max_pixels: of a picture.
        max_queue: requests that are read, wait or are computed at one time.
        rate: requests per minute from an address; 0 for any number.
        upload_seconds: in which a file must have come.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000
    max_queue: int = 16
    rate: float = 240
    upload_seconds: float = 30


class RefusedError(Exception):
    """A request is not served. The message says why in one sentence, for the one who sent it."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0) -> None:
        """Build the refusal.

        Args:
            status: of HTTP.
            reason: a word for the metrics.
            message: for the user.
            retry_after: seconds after which the same request may be served.
        """
        super().__init__(message)
        self.status, self.reason = status, reason
        self.retry_after = math.ceil(retry_after)


class Gate:
    """Lets requests in, as many as there is room for, and has them served one after another."""

    def __init__(self, limits: Limits) -> None:
        """Build an open gate."""
        self.limits = limits
        self.waiting = 0  # requests that are in
        self.busy_since: float | None = None
        self._turn = asyncio.Lock()
        self._seconds = 1.0  # that a request takes, about
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check_rate(self, address: str) -> None:
        """Count a request of an address.

        Raises:
            RefusedError: it has sent too many. A sixth of a minute's number may come at once.
        """
        if not self.limits.rate:
            return
        now, burst = time.monotonic(), max(1.0, self.limits.rate / 6)
        tokens, then = self._tokens.pop(address, (burst, now))
        tokens = min(burst, tokens + (now - then) * self.limits.rate / 60)
        allowed = tokens >= 1
        self._tokens[address] = (tokens - allowed, now)
        if len(self._tokens) > _MOST_ADDRESSES:
            self._tokens.popitem(last=False)
        if not allowed:
            raise RefusedError(
                429,
                "rate",
                f"Only {self.limits.rate:g} pictures per minute are taken from one address: "
                "wait a little",
                (1 - tokens) * 60 / self.limits.rate,
            )

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place in the queue.

        Raises:
            RefusedError: there is none.
        """
        if self.waiting >= self.limits.max_queue:
            seconds = self._seconds * self.waiting / 2
            message = f"{self.waiting} pictures are waiting already: try again"
            raise RefusedError(503, "busy", message, min(60, max(1, seconds)))
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The turn of a request that has a place, in the order of their coming."""
        async with self._turn:
            self.busy_since = time.monotonic()
            try:
                yield
            finally:
                self._seconds += 0.1 * (time.monotonic() - self.busy_since - self._seconds)
                self.busy_since = None


async def read_body(chunks: AsyncIterator[bytes], limits: Limits) -> bytes:
    """Read what is sent, and no more than that.

    Raises:
        RefusedError: it is nothing, too much or too slow.
    """

    async def read() -> bytes:
        content = bytearray()
        async for chunk in chunks:
            content += chunk
            if len(content) > limits.max_bytes:
                raise RefusedError(
                    413, "bytes", f"The file has more than {limits.max_bytes / 1e6:g} MB"
                )
        return bytes(content)

    try:
        content = await asyncio.wait_for(read(), limits.upload_seconds)
    except (asyncio.TimeoutError, TimeoutError) as e:
        message = f"The file did not come within {limits.upload_seconds:g} seconds"
        raise RefusedError(408, "slow", message) from e
    if not content:
        raise RefusedError(400, "empty", "Nothing was sent: send the picture as the body")
    return content


def decode_picture(content: bytes, max_pixels: int, reader: ImageReader) -> NDArray[Any]:
    """Decode a picture by the rule of the training.

    Its size is looked at before anything is decoded.

    Args:
        content: JPEG, PNG or WebP; of several frames the first is taken.
        max_pixels: more are refused.
        reader: the rule.

    Returns:
        (H, W, C) pixels in the format of the reader.

    Raises:
        RefusedError: it is something else, damaged, too large or too slender.
    """
    try:
        with Image.open(io.BytesIO(content), formats=ACCEPTED) as picture:
            _check_size(*picture.size, max_pixels)
            return np.ascontiguousarray(reader.convert(picture))
    except RefusedError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise RefusedError(
            413, "pixels", f"The picture has too many pixels, of {max_pixels}"
        ) from e
    except UnidentifiedImageError as e:
        message = f"The file is no {', '.join(ACCEPTED[:-1])} or {ACCEPTED[-1]} picture"
        raise RefusedError(415, "type", message) from e
    except Exception as e:  # Pillow's decoders raise many kinds
        raise RefusedError(422, "damaged", f"The picture cannot be read: {e}") from e


def _check_size(width: int, height: int, max_pixels: int) -> None:
    size = f"The picture has {width} x {height} pixels"
    if width * height > max_pixels:
        raise RefusedError(413, "pixels", f"{size}, more than {max_pixels / 1e6:g} million")
    if max(width, height) > _MOST_SLENDER * min(width, height):
        message = f"{size}, which is too slender: crop it to at most {_MOST_SLENDER} to 1"
        raise RefusedError(422, "shape", message)
