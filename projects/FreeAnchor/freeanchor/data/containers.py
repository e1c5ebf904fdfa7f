"""Opening an annotation file: what is no COCO file is named as what it is."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

from detectron2.utils.file_io import PathManager

from ..errors import DatasetError
from .findings import show

__all__ = ["read_json"]

_YOLO_LINE = re.compile(rb"\s*\d+(\s+-?[\d.eE+-]+){4,}\s*")
# The first bytes of files that are not text, and what to do about them.
_MAGIC = (
    (b"\x1f\x8b", "compressed by gzip: unpack it (gunzip)"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"BZh", "compressed by bzip2: unpack it (bunzip2)"),
    (b"\xfd7zXZ", "compressed by xz: unpack it (unxz)"),
    (b"(\xb5/\xfd", "compressed by zstd: unpack it (unzstd)"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"PAR1", "a Parquet file: write it as COCO JSON"),
    (b"\xff\xfe", "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\x89PNG", "an image, not annotations"),
    (b"\xff\xd8\xff", "an image, not annotations"),
)


def read_json(path: str, size: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Read a COCO annotation file.

    Args:
        path: what the user gave.
        size: is told the size of the file in bytes before it is parsed.

    Returns:
        What is in the file, a JSON object with `images` and `categories`, not looked into.

    Raises:
        DatasetError: it cannot be read, or is something else, which is named.
    """
    if PathManager.isdir(path):
        raise DatasetError(f"{path} is {_folder(path)}")
    if not PathManager.isfile(path):
        raise DatasetError(f"there is no annotation file {path}")
    try:
        with PathManager.open(path, "rb") as f:
            content = f.read()
    except OSError as e:
        raise DatasetError(f"{path} cannot be read: {e}") from e
    size(len(content))
    problem = _bytes_problem(content)
    if problem:
        raise DatasetError(f"{path} is {problem}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DatasetError(
            f"{path} is not a JSON file in UTF-8 (byte {e.start}): save it as UTF-8, for instance "
            "by iconv -f LATIN1 -t UTF-8"
        ) from e
    head = content[:4096]
    del content
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DatasetError(f"{path} is not a JSON file: {_text_problem(head, str(e))}") from e
    if not isinstance(parsed, dict) or not parsed.get("images") or not parsed.get("categories"):
        raise DatasetError(f"{path} is not a COCO annotation file: {_json_problem(parsed)}")
    return parsed


def _folder(path: str) -> str:
    names = {x.lower(): x for x in PathManager.ls(path)}
    for kind, what, suffix, inner in (
        ("voc", "Pascal VOC's XML files", ".xml", "annotations"),
        ("yolo", "YOLO's text files", ".txt", "labels"),
    ):
        found = list(names)
        below = os.path.join(path, names.get(inner, inner))
        if PathManager.isdir(below):
            found += PathManager.ls(below)
        # YOLO's labels are often in a folder for each split.
        has_labels = kind == "yolo" and PathManager.isdir(below)
        if has_labels or any(x.lower().endswith(suffix) for x in found):
            return (
                f"a folder with {what}: `freeanchor import --from {kind} {path} OUT.json` makes an "
                "annotation file of it"
            )
    return "a folder: give the annotation file in it"


def _bytes_problem(content: bytes) -> str:
    if not content.strip():
        return "empty: it should be a COCO annotation file"
    for magic, what in _MAGIC:
        if content.startswith(magic):
            return what
    if b"\0" in content[:100]:
        return "not a JSON file in UTF-8 (it has zero bytes): save it as UTF-8"
    return ""


def _text_problem(head: bytes, reason: str) -> str:
    """What a text that is no JSON looks like."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lines = head.splitlines()
    if head.startswith(b"<"):
        if b"<annotation" in head:
            return (
                "it is Pascal VOC's XML; `freeanchor import --from voc FOLDER OUT.json` reads a "
                "folder of them"
            )
        return "it is XML or HTML"
    if lines and _YOLO_LINE.fullmatch(lines[0]):
        return (
            "it looks like YOLO's text format; `freeanchor import --from yolo FOLDER OUT.json` "
            "reads a folder of them"
        )
    if head.startswith(b"{") and len(lines) > 1 and lines[1].startswith(b"{"):
        return "it is JSON lines, one object a line; write one COCO object with all of them"
    if lines and lines[0].count(b",") >= 4 and not head.startswith((b"{", b"[")):
        return "it looks like CSV; write it as COCO JSON"
    return reason


def _json_problem(parsed: Any) -> str:
    """What JSON that is not COCO's looks like."""
    if isinstance(parsed, list):
        first = parsed[0] if parsed and isinstance(parsed[0], dict) else {}
        if "score" in first and "image_id" in first:
            return "it is a list of detections; the file with `images` and `categories` is needed"
        if "image" in first and "annotations" in first:
            return "it is CreateML's format; export it as COCO"
        return "it holds a list, not an object with `images`, `annotations` and `categories`"
    if not isinstance(parsed, dict):
        return f"it holds {show(parsed)}, not an object with `images` and `categories`"
    values = [x for x in parsed.values() if isinstance(x, dict)]
    if any(str(k).startswith("_via_") for k in parsed) or any(
        "regions" in x and "filename" in x for x in values
    ):
        return "it is a project of the VGG Image Annotator (VIA); export it there as COCO format"
    if "shapes" in parsed and "imagePath" in parsed:
        return "it is labelme's format; export it as COCO (labelme2coco)"
    missing = [k for k in ("images", "categories") if not parsed.get(k)]
    return f"it has no `{missing[0]}`"
