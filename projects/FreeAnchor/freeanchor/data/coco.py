"""The one reader of COCO annotation files: training and evaluation see what it reads.

`pycocotools` and Detectron2's `load_coco_json` take a file as it is. Here, what is unambiguous is
read whatever it is written as, what no detector can use is left out and counted, and what could
mean two things is an error that names the file and the entry.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import DatasetError
from .coco_file import CocoFile, without_collection
from .containers import read_json
from .fields import MISSING, UNKNOWN, read_boxes, read_flags, read_ids, read_numbers, refer
from .findings import BOX_PROBLEMS, Findings, box_problems, check_plausible, show
from .folder import ImageFolder
from .images import ImageReader
from .masks import MaskColumn

__all__ = ["read_coco"]

logger = logging.getLogger(__name__)

_CHUNK = 100_000  # annotations that are looked at, and freed, at a time
_LARGE = 50e6  # bytes of a file whose reading takes long enough to be announced
# Two files of COCO 2014 that everybody uses have some annotations twice.
_WITH_DUPLICATES = "minival"


def read_coco(
    path: str, image_root: str, reader: ImageReader | None = None, masks: bool = False
) -> CocoFile:
    """Read a COCO annotation file.

    Args:
        path: the file.
        image_root: the folder of its images.
        reader: reads the size of images that the file has no size for.
        masks: whether to read the `segmentation` of the objects, which then need one.

    Raises:
        DatasetError: the file is no COCO file, or something in it cannot be what is meant.
    """
    try:
        with without_collection():
            content = read_json(path, lambda size: _announce(path, size))
            class_ids, class_names = _read_categories(content["categories"])
            file = _read_images(content["images"], path, image_root, reader or ImageReader())
            file.class_ids, file.class_names = class_ids, class_names
            alike = _alike(class_names)
            file.findings.add(
                "classes differ from another one in case or spaces alone, and are taken for "
                "classes of their own",
                len(alike),
                lambda: f"{show(alike[0][1])} from {show(alike[0][0])}",
            )
            annotations = content.pop("annotations", None)
            if annotations is not None:
                file.has_truth = True
                _Annotations(file, _entries(annotations, "annotations"), masks).read()
    except DatasetError as e:
        message = str(e)
        raise DatasetError(message if path in message else f"{path}: {message}") from e
    return file


def _announce(path: str, size: int) -> None:
    if size > _LARGE:
        logger.info(f"Reading {path} ({size / 1e6:.0f} MB)")


def _entries(values: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise DatasetError(f"`{key}` is {show(values)}, and should be a list of objects")
    if not set(map(type, values)) <= {dict}:
        i = next(i for i, x in enumerate(values) if type(x) is not dict)
        raise DatasetError(
            f"entry {i + 1} of `{key}` is {show(values[i])}, and should be an object"
        )
    return values


def _order(ids: Sequence[int | str]) -> list[int]:
    """The order of ids: numbers as such, also in text, and text after them."""

    def key(i: int) -> tuple[bool, int, str]:
        x = ids[i]
        if isinstance(x, int):
            return False, x, ""
        return (False, int(x), x) if x.isdecimal() and x.isascii() else (True, 0, x)

    return sorted(range(len(ids)), key=key)


def _read_categories(values: Any) -> tuple[list[int | str], list[str]]:
    """Ids and names, by the order of the ids."""
    entries = _entries(values, "categories")

    def name(i: int) -> str:
        return f"category {show(entries[i].get('name', i + 1))}"

    names = []
    for i, entry in enumerate(entries):
        value = entry.get("name")
        if type(value) in (int, float):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise DatasetError(
                f"entry {i + 1} of `categories` (id {show(entry.get('id'))}) has the `name` "
                f"{show(value)}: give it one"
            )
        if not value.isprintable():
            raise DatasetError(f"the `name` {show(value)} in `categories` cannot be printed")
        names.append(value)
    if not all("id" in entry for entry in entries):
        raise DatasetError("every entry of `categories` needs an `id` and a `name`")
    ids = read_ids([entry["id"] for entry in entries], name)
    for i, value in enumerate(names):
        if value in names[:i]:
            first = ids[names.index(value)]
            raise DatasetError(
                f"categories {show(first)} and {show(ids[i])} have the same name {show(value)}: "
                "give them different names, or the boxes of both one id"
            )
    order = _order(ids)
    return [ids[i] for i in order], [names[i] for i in order]


def _alike(names: Sequence[str]) -> list[tuple[str, str]]:
    """An earlier name and a later one, which may be meant to be the same."""
    first: dict[str, str] = {}
    found = [(first.setdefault("".join(x.casefold().split()), x), x) for x in names]
    return [(a, b) for a, b in found if a != b]


def _read_images(values: Any, path: str, image_root: str, reader: ImageReader) -> CocoFile:
    entries = _entries(values, "images")

    def name(i: int) -> str:
        return f"entry {i + 1} of `images` ({show(entries[i].get('file_name'))})"

    ids = read_ids([x.get("id") for x in entries], name)
    order = _order(ids)
    ids, entries = [ids[i] for i in order], [entries[i] for i in order]
    folder, findings = ImageFolder(image_root), Findings()
    paths: list[str] = []
    first: dict[str, int] = {}
    for i, entry in enumerate(entries):
        file_name = entry.get("file_name")
        if not isinstance(file_name, str) or not file_name.strip():
            raise DatasetError(
                f"image {show(ids[i])} has the `file_name` {show(file_name)}: name its file"
            )
        try:
            found, is_renamed = folder.find(file_name)
        except DatasetError as e:
            raise DatasetError(f"`file_name` of image {show(ids[i])}: {e}") from e
        if is_renamed:
            findings.add(
                "images are there by another name than in `file_name`",
                1,
                lambda found=found, file_name=file_name: f"{show(file_name)} is {found}",  # type: ignore[misc]
            )
        if first.setdefault(found, i) != i:
            raise DatasetError(
                f"images {show(ids[first[found]])} and {show(ids[i])} are the same file {found}: "
                "list it once, with all of its boxes"
            )
        paths.append(found)
    sizes = _read_sizes(entries, paths, reader, findings)
    return CocoFile(path, [], [], ids, paths, sizes, findings=findings)


def _read_sizes(
    entries: list[dict[str, Any]], paths: list[str], reader: ImageReader, findings: Findings
) -> NDArray[Any]:
    """(N, 2) width and height; those that the file does not have are read from the images."""
    sizes = np.stack([read_numbers([x.get(k) for x in entries]) for k in ("width", "height")], 1)
    with np.errstate(invalid="ignore"):
        unknown = ~((sizes >= 1) & (sizes < 2**31) & (sizes % 1 == 0)).all(axis=1)
    for i in np.flatnonzero(unknown):
        try:
            sizes[i] = reader.size(paths[i])
        except Exception as e:  # Pillow's decoders raise many kinds
            raise DatasetError(
                f"image {show(entries[i]['id'])} has `width` {show(entries[i].get('width'))} and "
                f"`height` {show(entries[i].get('height'))}, and {paths[i]} cannot be read ({e})"
            ) from e
    findings.add(
        "images have no usable `width` and `height`, which their files were asked for",
        int(unknown.sum()),
        lambda: paths[np.flatnonzero(unknown)[0]],
    )
    return sizes.astype(np.int64)


class _Annotations:
    """The annotations of a file on their way into its columns."""

    def __init__(self, file: CocoFile, entries: list[dict[str, Any]], masks: bool) -> None:
        self.file = file
        self.entries = entries
        self.masks = MaskColumn() if masks else None
        self.ids: list[Any] = []  # as they are in the file

    def name(self, i: int) -> str:
        """How messages call an annotation."""
        x = self.ids[i] if i < len(self.ids) else self.entries[i].get("id")
        return f"entry {i + 1} of `annotations`" if x is None else f"annotation {show(x)}"

    def read(self) -> None:
        """Fill the columns of the file."""
        total = len(self.entries)
        images, classes = np.zeros((2, total), dtype=np.int64)
        boxes, areas = np.zeros((total, 4)), np.zeros(total)
        broken, crowd = np.zeros((2, total), dtype=bool)
        with tqdm(total=total, unit=" boxes", unit_scale=True, delay=3, desc="reading") as bar:
            for start in range(0, total, _CHUNK):
                chunk = self.entries[start : start + _CHUNK]
                rows = slice(start, start + len(chunk))
                self.ids += [x.get("id") for x in chunk]
                images[rows] = self._refer(start, chunk, "image_id", self.file.image_ids)
                classes[rows] = self._refer(start, chunk, "category_id", self.file.class_ids)
                values = [x.get("bbox") for x in chunk]
                boxes[rows], broken[rows] = read_boxes(values)
                crowd[rows] = self._read_crowd(start, chunk)
                areas[rows] = read_numbers([x.get("area") for x in chunk])
                if self.masks is not None:
                    sizes = self.file.sizes[images[rows]]
                    self.masks.add([x.get("segmentation") for x in chunk], sizes)
                self._note_broken(start, values, broken[rows])
                self.entries[rows] = [None] * len(chunk)  # type: ignore[list-item]  # frees them
                bar.update(len(chunk))
        self._check_ids()
        is_known = images != UNKNOWN
        if total and not is_known.any():
            raise DatasetError(
                "none of the annotations belongs to an image: their `image_id` and the `id` of "
                "the images do not go together"
            )
        self.file.findings.add(
            "annotations are of images that are not listed, and left out",
            int(total - is_known.sum()),
            lambda: self.name(int(np.flatnonzero(~is_known)[0])),
        )
        self._fill(is_known, images, classes, boxes, broken, crowd, areas)

    def _fill(
        self,
        is_known: NDArray[Any],
        images: NDArray[Any],
        classes: NDArray[Any],
        boxes: NDArray[Any],
        broken: NDArray[Any],
        crowd: NDArray[Any],
        areas: NDArray[Any],
    ) -> None:
        file = self.file
        sizes = file.sizes[images].astype(np.float64)
        problems = box_problems(boxes, sizes)
        problems[broken] = 1
        check_plausible(boxes[is_known], sizes[is_known], problems[is_known], file.path, file.path)
        for kind in range(2, len(BOX_PROBLEMS)):
            those = np.flatnonzero((problems == kind) & is_known)
            if len(those):
                i = int(those[0])
                example = f"{self.name(i)} of {file.file_names[images[i]]}: {boxes[i].tolist()}"
                file.findings.add(
                    f"boxes are left out, where a `bbox` {BOX_PROBLEMS[kind]}",
                    len(those),
                    lambda example=example: example,  # type: ignore[misc]
                )
        with np.errstate(over="ignore", invalid="ignore"):
            own = boxes[:, 2] * boxes[:, 3]
            areas = np.where((areas > 0) & np.isfinite(areas), areas, own)
        is_usable = is_known & (problems == 0)
        if self.masks is not None:
            is_usable = self.masks.usable(boxes, crowd, is_usable, self.name, file.findings)
        kept = np.flatnonzero(is_usable)
        kept = kept[np.argsort(images[kept], kind="stable")]
        file.boxes, file.areas, file.crowd = boxes[kept], areas[kept], crowd[kept]
        file.classes, file.rows = classes[kept].astype(np.int32), kept
        if self.masks is not None:
            file.masks = [self.masks.masks[i] for i in kept.tolist()]
        counts = np.bincount(images[kept], minlength=len(file.image_ids))
        file.starts = np.concatenate([[0], np.cumsum(counts)])

    def _refer(
        self, start: int, chunk: list[dict[str, Any]], key: str, ids: list[int | str]
    ) -> NDArray[Any]:
        values = [x.get(key) for x in chunk]
        found = refer(values, ids)
        wrong = found == MISSING
        if key == "category_id":
            wrong |= found == UNKNOWN
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            wanted = {
                "category_id": "the id of a category",
                "image_id": "that of an image",
            }
            raise DatasetError(
                f"{self.name(start + i)} has the `{key}` {show(values[i])}: give it "
                f"{wanted[key]}, or remove it"
            )
        return found

    def _read_crowd(self, start: int, chunk: list[dict[str, Any]]) -> NDArray[Any]:
        crowd = np.zeros(len(chunk), dtype=bool)
        for key in ("iscrowd", "ignore"):
            values = [x.get(key) for x in chunk]
            flags, odd = read_flags(values)
            crowd |= flags
            self.file.findings.add(
                f"values of `{key}` are neither 0 nor 1, and taken for 0",
                int(odd.sum()),
                lambda values=values, odd=odd: (  # type: ignore[misc]
                    f"{self.name(start + int(np.flatnonzero(odd)[0]))}: "
                    f"{show(values[np.flatnonzero(odd)[0]])}"
                ),
            )
        return crowd

    def _note_broken(self, start: int, values: list[Any], broken: NDArray[Any]) -> None:
        if broken.any():
            i = int(np.flatnonzero(broken)[0])
            self.file.findings.add(
                f"boxes are left out, where a `bbox` {BOX_PROBLEMS[1]}",
                int(broken.sum()),
                lambda: f"{self.name(start + i)}: {show(values[i])}",
            )

    def _check_ids(self) -> None:
        """Annotations need no id, but those that there are must be different."""
        if _WITH_DUPLICATES in self.file.path:
            return
        if set(map(type, self.ids)) <= {int}:
            try:
                ordered = np.sort(np.array(self.ids, dtype=np.int64))
                if not (ordered[1:] == ordered[:-1]).any():
                    return
            except OverflowError:
                pass
        there = [i for i, x in enumerate(self.ids) if x is not None]
        read_ids([self.ids[i] for i in there], lambda i: f"entry {there[i] + 1} of `annotations`")
