"""Pascal VOC's annotations as COCO files: `freeanchor import --from voc`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from tqdm import tqdm

from ..errors import DatasetError
from .coco_writer import CocoWriter, write_coco
from .findings import show
from .folder import ImageFolder
from .images import IMAGE_SUFFIXES, ImageReader
from .importing import files_in, image_size, read_lines, supervision_formats

__all__ = ["import_voc"]

# What tools write for VOC's 0 and 1.
_FLAGS = dict.fromkeys(("", "0", "no", "false"), False) | dict.fromkeys(("1", "yes", "true"), True)


def import_voc(
    source: Path, out: Path, images: Path | None = None, split: str | None = None
) -> Path:
    """Write a COCO file of a folder of Pascal VOC's XML files, also in folders within it.

    Objects that are marked as difficult become COCO's `ignore`. Corners count from 1, as VOC's,
    unless one is below it: then all are taken as they are, and a line says so.

    Args:
        source: the folder, or the one above `Annotations` and `JPEGImages`.
        out: the COCO file.
        images: the folder of the images, if it is not beside the XML files.
        split: a file with the names of the files to take, one a line; by default all are taken.

    Returns:
        The folder of the images.

    Raises:
        DatasetError: a file cannot be read, or its image is missing or of another size.
    """
    pascal_voc, _ = supervision_formats()
    folder = _folder_of(source, ("Annotations", "annotations"), ".xml", "XML files")
    images = images or _folder_of(
        folder, ("../JPEGImages", "../images", "../Images", ""), IMAGE_SUFFIXES, "images"
    )
    trees = _read_trees(folder)
    # Those of all files, so that all parts of a split have the same.
    names = sorted({x.text for tree in trees.values() for x in tree.iterfind("object/name")})
    stems = _read_split(split, list(trees), folder) if split else list(trees)
    from_zero = [x for x in trees if any(map(_is_below_one, trees[x].iterfind("object/bndbox/*")))]
    if from_zero:
        print(
            f"{folder / from_zero[0]}.xml has a corner below 1, which VOC counts from: the boxes "
            "of all files are taken to count from 0"
        )
    finder, reader = ImageFolder(str(images)), ImageReader()
    writer = CocoWriter(names)
    for stem in tqdm(stems, desc="images", delay=3):
        tree, path = trees[stem], folder / f"{stem}.xml"
        image = _find_image(tree, stem, finder, path)
        size = image_size(reader, image)
        _check_size(tree, size, path, image)
        try:
            found, _ = pascal_voc.detections_from_xml_obj(tree, names, size)
        except (ValueError, KeyError, AttributeError) as e:
            raise DatasetError(f"{path}: {e}") from e
        found.xyxy[:, :2] += bool(from_zero)  # from which 1 was taken
        writer.add(
            os.path.relpath(image, images), size, found.xyxy, found.class_id, _difficult(tree, path)
        )
    write_coco(out, writer.content)
    return images


def _read_trees(folder: Path) -> dict[str, Any]:
    """What the XML files hold, by their paths in the folder: two folders may have a name both."""
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import parse

    trees: dict[str, Any] = {}
    for path in tqdm(sorted(files_in(folder, ".xml")), desc="XML files", delay=3):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in trees:
            raise DatasetError(f"{path} is there twice, with .xml and .XML: keep one of them")
        try:
            trees[stem] = parse(path).getroot()
        except (ParseError, DefusedXmlException, OSError, UnicodeError) as e:
            raise DatasetError(f"{path} is no XML file: {e}") from e
        for name in trees[stem].iterfind("object/name"):
            name.text = (name.text or "").strip()  # what lays out a file is no part of a name
            if not name.text:
                raise DatasetError(f"{path} has an object with an empty name")
    return trees


def _folder_of(source: Path, names: Sequence[str], suffix: Any, what: str) -> Path:
    """The folder, or one within it, that has files of a kind."""
    for folder in (*(source / name for name in names), source):
        if any(files_in(folder, suffix)):
            return Path(os.path.normpath(folder))
    raise DatasetError(
        f"there are no {what} in {source}, nor in {' or '.join(filter(None, names))}"
    )


def _read_split(split: str, stems: Sequence[str], folder: Path) -> list[str]:
    """The files that a split takes: a line is a name or a path, in VOC's lists with a 1 or -1."""
    by_name: dict[str, list[str]] = {}
    for stem in stems:
        by_name.setdefault(stem.rpartition("/")[2], []).append(stem)
    line_of: dict[str, str] = {}
    for line in filter(None, read_lines(Path(split))):
        found: list[str] = []
        for text in (line, line.split()[0]):
            for path in (text, os.path.splitext(text)[0]):
                found = found or _same_end(path, by_name)
        if not found:
            raise DatasetError(f"{split} names {show(line)}, which has no XML file in {folder}")
        if len(found) > 1:
            raise DatasetError(
                f"{split} names {show(line)}, which is {' and '.join(map(show, found[:3]))} in "
                f"{folder}: give the name of the folder too"
            )
        other = line_of.setdefault(found[0], line)
        if other.split()[0] != line.split()[0]:
            raise DatasetError(
                f"{split} names {show(other)} and {show(line)}, which are both {show(found[0])} in "
                f"{folder}"
            )
    if not line_of:
        raise DatasetError(f"the split {split} is empty")
    return list(line_of)


def _same_end(path: str, by_name: dict[str, list[str]]) -> list[str]:
    """The files that a path may mean: it itself, what it ends in, or all that end in it."""
    those = by_name.get(path.rpartition("/")[2], [])
    shorter = [x for x in those if f"/{path}".endswith(f"/{x}")]
    return [max(shorter, key=len)] if shorter else [x for x in those if x.endswith(f"/{path}")]


def _find_image(tree: Any, stem: str, finder: ImageFolder, path: Path) -> str:
    """The image of an XML file: of the same name, or else of the name that it says."""
    name = (tree.findtext("filename") or "").strip()
    # Of several with its own name it is the one that it says.
    said = os.path.splitext(name)[1]
    for suffix in (said, *IMAGE_SUFFIXES) if said.lower() in IMAGE_SUFFIXES else IMAGE_SUFFIXES:
        found, _ = finder.find(f"{stem}{suffix}")
        if os.path.isfile(found):
            return found
    found, _ = finder.find(name) if name else ("", False)
    if not os.path.isfile(found):
        raise DatasetError(
            f"{path}: there is no image of this name, nor {show(name)}, in {finder.root}"
        )
    return found


def _check_size(tree: Any, size: tuple[int, int], path: Path, image: str) -> None:
    try:
        said = tuple(int(float(tree.findtext(f"size/{k}") or 0)) for k in ("width", "height"))
    except (ValueError, OverflowError):
        said = (0, 0)
    if all(said) and said != size:
        raise DatasetError(
            f"{path} says that its image has {said[0]} x {said[1]} pixels, but {image} has "
            f"{size[0]} x {size[1]}: its boxes are of another image, correct one of them"
        )


def _is_below_one(corner: Any) -> bool:
    """Whether an `xmin` or `ymin` is one that VOC does not have."""
    text = (corner.text or "").strip()
    return corner.tag in ("xmin", "ymin") and bool(re.fullmatch(r"0+(\.\d*)?|\.\d+", text))


def _difficult(tree: Any, path: Path) -> list[dict[str, Any]]:
    """Of each object, what COCO says where it is marked as difficult."""
    flags = [x.findtext("difficult", "0").strip().lower() for x in tree.iterfind("object")]
    if unknown := [x for x in flags if x not in _FLAGS]:
        raise DatasetError(f"{path}: `difficult` is {unknown[0]!r}, and should be 0 or 1")
    return [{"ignore": 1} if _FLAGS[x] else {} for x in flags]
