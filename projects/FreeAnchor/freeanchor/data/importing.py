"""What the importers of other formats share: `freeanchor import`.

Single files are parsed by supervision, an optional dependency. Which files belong together, which
images they are of and what their classes are is decided here: its readers of whole folders know
no split files, and take an image without annotations for one without objects.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .images import ImageReader

__all__ = ["files_in", "image_size", "read_lines", "supervision_formats"]

# Before, supervision took the last pixel of VOC's boxes for none of theirs.
_SUPERVISION = (0, 31)


def supervision_formats() -> Any:
    """The modules of supervision that parse VOC and YOLO."""
    try:
        import supervision
        from supervision.dataset.formats import pascal_voc, yolo
    except ImportError as e:
        raise DatasetError(
            "reading VOC and YOLO needs supervision, which is not installed: pip install "
            "'freeanchor[import]', or supervision"
        ) from e
    version = re.findall(r"\d+", supervision.__version__)[:2]
    if tuple(map(int, version)) < _SUPERVISION:
        raise DatasetError(
            f"supervision {supervision.__version__} reads other boxes: pip install "
            f"'supervision>={_SUPERVISION[0]}.{_SUPERVISION[1]}'"
        )
    return pascal_voc, yolo


def files_in(folder: Path, suffix: str | tuple[str, ...]) -> Iterator[Path]:
    """The files of a kind in a folder and in those within it, but for copies that tools hide."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [x for x in folders if not x.startswith((".", "__MACOSX"))]
        if real in seen:  # by a link, which may lead back
            folders[:] = names[:] = []
        seen.add(real)
        for name in names:
            if name.lower().endswith(suffix) and not name.startswith("."):
                yield Path(place, name)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without the white space around them.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        return [x.strip() for x in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as e:
        raise DatasetError(f"{path} cannot be read: {e}") from e


def image_size(reader: ImageReader, image: str) -> tuple[int, int]:
    """Width and height of an image; an error that names it where it cannot be read."""
    try:
        return reader.size(image)
    except Exception as e:  # Pillow's decoders raise many kinds
        raise DatasetError(f"{image} is not a readable image ({e})") from e
