"""Annotations of other formats as COCO files: `freeanchor import`.

Single files are parsed by supervision, an optional dependency. Which files belong together, which
images they are of and what their classes are is decided here: its readers of whole folders know
no split files, and take an image without annotations for one without objects.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
import yaml
from numpy.typing import NDArray
from pycocotools import mask as mask_api
from tqdm import tqdm

from ..errors import DatasetError
from .findings import show
from .folder import ImageFolder
from .images import IMAGE_SUFFIXES, ImageReader
from .masks import read_mask, to_rle
from .readings import write_coco

__all__ = ["import_voc", "import_yolo"]

# What tools write for VOC's 0 and 1.
_FLAGS = dict.fromkeys(("", "0", "no", "false"), False) | dict.fromkeys(("1", "yes", "true"), True)
# Before, supervision took the last pixel of VOC's boxes for none of theirs.
_SUPERVISION = (0, 31)


def _supervision() -> Any:
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


def import_voc(
    source: Path, out: Path, images: Path | None = None, split: str | None = None
) -> Path:
    """Write a COCO file of a folder of Pascal VOC's XML files, also in folders within it.

    Objects that are marked as difficult become COCO's `ignore`. Corners count from 1, as VOC's.

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
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import parse

    pascal_voc, _ = _supervision()
    folder = _folder_of(source, ("Annotations", "annotations"), ".xml", "XML files")
    images = images or _folder_of(
        folder, ("../JPEGImages", "../images", "../Images", ""), IMAGE_SUFFIXES, "images"
    )
    # By their paths in the folder, without .xml: two folders may have files of one name.
    trees = {}
    for path in tqdm(sorted(_files(folder, ".xml")), desc="XML files", delay=3):
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
    # Those of all files, so that all parts of a split have the same.
    names = sorted({x.text for tree in trees.values() for x in tree.iterfind("object/name")})
    stems = _read_split(split, list(trees), folder) if split else list(trees)
    finder, reader = ImageFolder(str(images)), ImageReader()
    writer = _Writer(names)
    for stem in tqdm(stems, desc="images", delay=3):
        tree, path = trees[stem], folder / f"{stem}.xml"
        image = _voc_image(tree, stem, finder, path)
        size = _size(reader, image)
        _check_voc_size(tree, size, path, image)
        try:
            found, _ = pascal_voc.detections_from_xml_obj(tree, names, size)
        except (ValueError, KeyError, AttributeError) as e:
            raise DatasetError(f"{path}: {e}") from e
        flags = [x.findtext("difficult", "0").strip().lower() for x in tree.iterfind("object")]
        if unknown := [x for x in flags if x not in _FLAGS]:
            raise DatasetError(f"{path}: `difficult` is {unknown[0]!r}, and should be 0 or 1")
        others = [{"ignore": 1} if _FLAGS[x] else {} for x in flags]
        writer.add(os.path.relpath(image, images), size, found.xyxy, found.class_id, others)
    writer.write(out)
    return images


def _files(folder: Path, suffix: str | tuple[str, ...]) -> Iterator[Path]:
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


def _folder_of(source: Path, names: Sequence[str], suffix: Any, what: str) -> Path:
    """The folder, or one within it, that has files of a kind."""
    for folder in (*(source / name for name in names), source):
        if any(_files(folder, suffix)):
            return Path(os.path.normpath(folder))
    raise DatasetError(
        f"there are no {what} in {source}, nor in {' or '.join(filter(None, names))}"
    )


def _read_split(split: str, stems: Sequence[str], folder: Path) -> list[str]:
    """The files that a split takes: a line is a name or a path, in VOC's lists with a 1 or -1."""
    try:
        lines = [x.strip() for x in Path(split).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as e:
        raise DatasetError(f"the split {split} cannot be read: {e}") from e
    by_name: dict[str, list[str]] = {}
    for stem in stems:
        by_name.setdefault(stem.rpartition("/")[2], []).append(stem)
    line_of: dict[str, str] = {}
    for line in filter(None, lines):
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


def _voc_image(tree: Any, stem: str, finder: ImageFolder, path: Path) -> str:
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


def _size(reader: ImageReader, image: str) -> tuple[int, int]:
    try:
        return reader.size(image)
    except Exception as e:  # Pillow's decoders raise many kinds
        raise DatasetError(f"{image} is not a readable image ({e})") from e


def _check_voc_size(tree: Any, size: tuple[int, int], path: Path, image: str) -> None:
    try:
        said = tuple(int(float(tree.findtext(f"size/{k}") or 0)) for k in ("width", "height"))
    except ValueError:
        said = (0, 0)
    if all(said) and said != size:
        raise DatasetError(
            f"{path} says that its image has {said[0]} x {said[1]} pixels, but {image} has "
            f"{size[0]} x {size[1]}: its boxes are of another image, correct one of them"
        )


def import_yolo(
    source: Path,
    out: Path,
    images: Path | None = None,
    split: str | None = None,
) -> Path:
    """Write a COCO file of YOLO's text files. A line with a polygon has it as `segmentation`.

    Args:
        source: `data.yaml`, or a folder with it or with `classes.txt`.
        out: the COCO file.
        images: the folder of the images, instead of what `data.yaml` says. The labels of
            `x/images/y/a.jpg` are `x/labels/y/a.txt`, or lie beside the image.
        split: `train`, `val` or `test` of `data.yaml`; or a file that lists the images.

    Returns:
        The folder of the images.

    Raises:
        DatasetError: a file cannot be read, or an image is missing.
    """
    _, yolo = _supervision()
    config, names, base = _yolo_config(source)
    files = _yolo_images(config, base, images, split)
    if not files:
        raise DatasetError(f"{source}: there are no images")
    root = images or Path(os.path.commonpath([x.parent for x in files]))
    keypoints = config.get("kpt_shape") or (0, 0)
    num_keypoint_values = int(keypoints[0]) * int(keypoints[1])
    reader, writer = ImageReader(), _Writer(names)
    folders: dict[Path, ImageFolder] = {}
    image_of: dict[Path, Path] = {}
    without = 0
    for image in tqdm(files, desc="images", delay=3):
        label = _yolo_label(image, folders)
        if label is not None and image_of.setdefault(label, image) != image:
            raise DatasetError(
                f"{label} is the label file of {image_of[label]} and of {image}: it can be of one "
                "of them, so give the other another name"
            )
        size = _size(reader, str(image))
        if label is None:
            without += 1
            writer.add(os.path.relpath(image, root), size, np.zeros((0, 4)), [], [])
            continue
        try:
            lines = [x for x in label.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
            if num_keypoint_values:
                lines = [" ".join(x.split()[:5]) for x in lines]
            found = yolo.yolo_annotations_to_detections(lines, size, with_masks=False)
        except (ValueError, OSError) as e:
            raise DatasetError(f"{label}: {e}") from e
        classes = [] if found.class_id is None else found.class_id.tolist()
        wrong = [c for c in classes if not 0 <= c < len(names)]
        if wrong:
            raise DatasetError(
                f"{label} has the class {wrong[0]}, and there are {len(names)} names, from 0 on"
            )
        others = [_yolo_polygon(x, size) for x in lines]
        writer.add(os.path.relpath(image, root), size, found.xyxy, classes, others)
    if without == len(files):
        raise DatasetError(
            f"none of the {without} images has a label file: that of x/images/y/a.jpg is "
            "x/labels/y/a.txt or lies beside it"
        )
    if without:
        print(f"{without} of {len(files)} images have no label file, and are taken for background")
    writer.write(out)
    return root


def _yolo_polygon(line: str, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's keys for the polygon of a line, whose area is the object's; none of a box."""
    values = [float(x) for x in line.split()[1:]]
    if len(values) < 6:
        return {}
    points = np.reshape(values[: len(values) // 2 * 2], (-1, 2))  # a last one is a confidence
    mask = [(points * size).round(3).ravel().tolist()]
    if isinstance(read_mask(mask, size), str):  # the reader of the file says what is wrong with it
        return {"segmentation": mask}
    return {"segmentation": mask, "area": float(mask_api.area(to_rle(mask, size)))}


def _yolo_config(source: Path) -> tuple[dict[str, Any], list[str], Path]:
    """What `data.yaml` holds, the names of the classes, and the folder that paths start from."""
    base = source if source.is_dir() else source.parent
    candidates = [source] if source.is_file() else [base / "data.yaml", base / "data.yml"]
    for path in candidates:
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            try:
                text = path.read_text(encoding="utf-8-sig")
                config = yaml.safe_load(text)
                # As they are written: YAML takes on, no and 007 for True, False and 7.
                written = yaml.load(text, yaml.BaseLoader)  # of texts alone
            except (yaml.YAMLError, OSError, UnicodeError) as e:
                raise DatasetError(f"{path} cannot be read: {e}".replace("\n", " ")) from e
            names = written.get("names") if isinstance(config, dict) else None
            if isinstance(names, dict) and all(k.isdecimal() for k in names):
                by_number = {int(k): name for k, name in names.items()}
                if sorted(by_number) != list(range(len(names))):
                    raise DatasetError(f"{path}: `names` must be numbered from 0, without a gap")
                names = [by_number[i] for i in range(len(names))]
            if not isinstance(names, list) or not names:
                said = config.get("names") if isinstance(config, dict) else None
                raise DatasetError(f"{path}: `names` must list the classes, and is {show(said)}")
            return config, [str(x) for x in names], base / str(config.get("path") or "")
    for path in (base / "classes.txt", base / "labels" / "classes.txt", base / "obj.names"):
        if path.is_file():
            text = path.read_text(encoding="utf-8-sig")
            names = [x.strip() for x in text.rstrip().splitlines()]
            if "" in names:  # left out, all behind it would have another's number
                raise DatasetError(f"{path}: line {names.index('') + 1} has no name")
            return {}, names, base
    raise DatasetError(
        f"{source} has no data.yaml and no classes.txt, which name the classes: name the file "
        "data.yaml as SOURCE"
    )


def _yolo_images(
    config: dict[str, Any], base: Path, images: Path | None, split: str | None
) -> list[Path]:
    if split and Path(split).is_file():
        return _listed(Path(split), images or base)
    if split:
        places = config.get(split, config.get("valid") if split == "val" else None)
        if places is None:
            raise DatasetError(f"data.yaml has no `{split}`, and there is no such file")
    else:
        places = [str(images)] if images else ["images" if (base / "images").is_dir() else "."]
    found: list[Path] = []
    for place in [places] if isinstance(places, str) else places:
        # Roboflow writes ../train/images where it means train/images.
        choices = [base / place, base / str(place).removeprefix("../"), Path(place)]
        path = next((x for x in choices if x.exists()), None)
        if path is None:
            raise DatasetError(f"data.yaml names {show(place)}, which is not in {base}")
        if path.is_file():
            found += _listed(path, base)
        else:
            found += sorted(_files(path, IMAGE_SUFFIXES))
    return list(dict.fromkeys(Path(os.path.normpath(x)) for x in found))


def _listed(path: Path, base: Path) -> list[Path]:
    """The images that a text file lists."""
    files = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            choices = [x / line.strip() for x in (base, path.parent, base / "images")]
            found = next((x for x in choices if x.is_file()), None)
            if found is None:
                raise DatasetError(f"{path} lists {show(line.strip())}, which is not in {base}")
            files.append(found)
    return files


def _yolo_label(image: Path, folders: dict[Path, ImageFolder]) -> Path | None:
    """The label file of an image, which may differ in case as an image may.

    Args:
        image: its path.
        folders: those that have been looked into, kept for the next image.
    """
    places = [(image.parent, image.name)]
    if "images" in image.parts:
        last = len(image.parts) - 1 - image.parts[::-1].index("images")
        places.insert(0, (Path(*image.parts[:last], "labels"), "/".join(image.parts[last + 1 :])))
    for root, name in places:
        finder = folders.setdefault(root, ImageFolder(str(root)))
        found, _ = finder.find(str(Path(name).with_suffix(".txt")))
        if os.path.isfile(found):
            return Path(found)
    return None


class _Writer:
    """Gathers a COCO file."""

    def __init__(self, names: Sequence[str]) -> None:
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        }

    def add(
        self,
        file_name: str,
        size: tuple[int, int],
        corners: NDArray[Any],
        classes: Any,
        others: Sequence[dict[str, Any]],
    ) -> None:
        """Add an image and its boxes (M, 4) x1, y1, x2, y2, which end where it does.

        Args:
            file_name: of the image, in the folder of the images.
            size: its width and height.
            corners: of the boxes.
            classes: (M,) their indices.
            others: (M,) the other keys that their annotations have.
        """
        image_id = len(self.content["images"]) + 1
        width, height = size
        image = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        self.content["images"].append(image)
        for (x1, y1, x2, y2), c, other in zip(corners.tolist(), classes, others, strict=True):
            x1, y1, x2, y2 = max(0.0, x1), max(0.0, y1), min(width, x2), min(height, y2)
            box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            annotation = {
                "id": len(self.content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": int(c) + 1,
                "bbox": box,
                "area": round(box[2] * box[3], 3),
                "iscrowd": 0,
            }
            self.content["annotations"].append({**annotation, **other})

    def write(self, out: Path) -> None:
        """Write it."""
        write_coco(out, self.content)
