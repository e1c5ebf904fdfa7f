"""Where images come from: files, folders, patterns, a list on standard input, videos, cameras."""

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ..data import IMAGE_SUFFIXES
from ..data.importing import files_in
from ..errors import DatasetError, FreeAnchorError

__all__ = ["Source", "find_sources"]

_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# Of a camera that does not tell.
_FRAME_RATE = 25.0
# A container's number of frames may be an estimate.
_WHOLE = 0.9


class Source(NamedTuple):
    """Images that belong together: still ones, or the frames of a video.

    Attributes:
        images: paths, or (H, W, 3) uint8 BGR frames, read as one iterates.
        name: of a video; empty for still images.
        length: number of images, as far as it is known.
        frame_rate: frames per second of a video.
    """

    images: Iterator[str | NDArray[np.uint8]]
    name: str = ""
    length: int | None = None
    frame_rate: float = 0.0


def find_sources(
    sources: Sequence[str],
    on_error: Callable[[FreeAnchorError], None],
    say: Callable[[str], None],
) -> list[Source]:
    """Find what the names of a command line mean.

    Args:
        sources: each a file, a folder, a pattern with `*`, `-` for a list on standard input with a
            name in each line, or the number of a camera.
        on_error: called with the error of a video that cannot be read, or not to its end.
        say: called with a sentence about what is not taken.

    Returns:
        All still images as one source, then each video. None is open yet.

    Raises:
        DatasetError: a file is not there, or a folder or pattern has no image.
    """
    stills: list[str] = []
    videos: list[Source] = []
    is_listed = False
    for source in sources:
        if source == "-":
            is_listed = True
        elif source.isdecimal() and not Path(source).exists():
            videos.append(_video(int(source), f"camera_{source}", on_error))
        else:
            for name in _files(source, say):
                if Path(name).suffix.lower() in _VIDEOS:
                    videos.append(_video(name, name, on_error))
                else:
                    stills.append(name)
    found = []
    if stills or is_listed:
        images = _then_listed(stills) if is_listed else iter(stills)
        found.append(Source(images, length=None if is_listed else len(stills)))
    return found + videos


def _files(source: str, say: Callable[[str], None]) -> list[str]:
    path = Path(source)
    if path.is_file():
        return [source]
    if path.is_dir():
        every = sorted(files_in(path, (*IMAGE_SUFFIXES, *_VIDEOS)))
        files = [str(x) for x in every if x.parent == path]
        deeper = [x for x in every if x.parent != path]
        how = f"give '{path}/**/*{deeper[0].suffix}' for those in folders within" if deeper else ""
        if not files:
            raise DatasetError(
                f"{source} is a folder without images or videos" + f": {how}" * bool(deeper)
            )
        if deeper:
            say(f"{len(deeper)} images or videos in folders within {source} are left out: {how}")
        return files
    files = sorted(x for x in glob.glob(source, recursive=True) if Path(x).is_file())
    if not files:
        raise DatasetError(f"There is no image {source}")
    return files


def _then_listed(stills: list[str]) -> Iterator[str]:
    yield from stills
    for line in sys.stdin:
        if name := line.rstrip("\r\n"):
            yield name


def _video(source: str | int, name: str, on_error: Callable[[FreeAnchorError], None]) -> Source:
    try:
        name.encode()
    except UnicodeEncodeError as e:  # where OpenCV would crash
        raise DatasetError(f"{name!a} is no name in UTF-8: rename the video") from e
    capture = cv2.VideoCapture(source)
    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    is_file = isinstance(source, str)
    return Source(
        _frames(source, name, on_error, count if is_file else 0),
        name,
        count if is_file and count > 0 else None,
        rate if rate > 0 else _FRAME_RATE,
    )


def _frames(
    source: str | int, name: str, on_error: Callable[[FreeAnchorError], None], count: int
) -> Iterator[NDArray[np.uint8]]:
    capture = cv2.VideoCapture(source)
    number = 0
    try:
        while True:
            is_read, frame = capture.read()
            if not is_read:
                break
            number += 1
            yield np.asarray(frame, np.uint8)
    finally:
        capture.release()
    if number == 0:
        on_error(DatasetError(f"{name} cannot be read: OpenCV gets no frame from it"))
    elif number < _WHOLE * count:
        on_error(DatasetError(f"{name} is cut off: it ends after {number} of {count} frames"))
