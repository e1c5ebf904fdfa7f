"""The values of a run, one line of JSON for each iteration that is written."""

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["MetricsWriter", "TolerantWriter"]

logger = logging.getLogger(__name__)

_MEDIAN_OF = 20


class MetricsWriter(EventWriter):
    """What Detectron2's `JSONWriter` writes, also when a value is not finite or a run was killed.

    JSON has no NaN: it becomes null. A line that a killed run left unfinished is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file, to which a resumed run appends."""
        self._path = Path(path)
        self._last_written = -1
        content = self._path.read_bytes() if self._path.exists() else b""
        if not content.endswith(b"\n"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(content[: content.rfind(b"\n") + 1])

    def write(self) -> None:
        lines: dict[int, dict[str, Any]] = defaultdict(dict)
        for name, (value, iteration) in (
            get_event_storage().latest_with_smoothing_hint(_MEDIAN_OF).items()
        ):
            if iteration > self._last_written:
                lines[iteration][name] = value if math.isfinite(value) else None
        if not lines:
            return
        text = "".join(
            json.dumps({**values, "iteration": iteration}, sort_keys=True) + "\n"
            for iteration, values in lines.items()
        )
        with open(self._path, "a") as f:
            size = f.tell()
            try:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            except OSError:
                os.truncate(self._path, size)  # no half line
                raise
        self._last_written = max(lines)


class TolerantWriter(EventWriter):
    """Another writer, whose training goes on when the disk is full."""

    def __init__(self, writer: EventWriter) -> None:
        """Wrap a writer."""
        self._writer = writer

    def write(self) -> None:
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as e:
            logger.error(f"{type(self._writer).__name__} cannot write: {e}. The run goes on")
