"""YOLO's annotations as COCO files: `freeanchor import --from yolo`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pycocotools import mask as mask_api
from tqdm import tqdm

from ..errors import DatasetError
from .coco_writer import CocoWriter, write_coco
from .findings import show
from .folder import ImageFolder
from .images import IMAGE_SUFFIXES, ImageReader
from .importing import files_in, image_size, read_lines, supervision_formats
from .masks import read_mask, to_rle

__all__ = ["import_yolo"]


def import_yolo(
    source: Path, out: Path, images: Path | None = None, split: str | None = None
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
    supervision_formats()  # before any work
    config, names, base = _read_config(source)
    files = _find_images(config, base, images, split)
    if not files:
        raise DatasetError(f"{source}: there are no images")
    root = images or Path(os.path.commonpath([x.parent for x in files]))
    has_keypoints = all(config.get("kpt_shape") or [False])
    reader, writer = ImageReader(), CocoWriter(names)
    folders: dict[Path, ImageFolder] = {}
    image_of: dict[Path, Path] = {}
    without = 0
    for image in tqdm(files, desc="images", delay=3):
        label = _find_label(image, folders)
        if label is not None and image_of.setdefault(label, image) != image:
            raise DatasetError(
                f"{label} is the label file of {image_of[label]} and of {image}: it can be of one "
                "of them, so give the other another name"
            )
        size = image_size(reader, str(image))
        boxes: NDArray[Any] = np.zeros((0, 4))
        classes: list[int] = []
        polygons: list[dict[str, Any]] = []
        if label is None:
            without += 1
        else:
            boxes, classes, polygons = _read_label(label, size, names, has_keypoints)
        writer.add(os.path.relpath(image, root), size, boxes, classes, polygons)
    if without == len(files):
        raise DatasetError(
            f"none of the {without} images has a label file: that of x/images/y/a.jpg is "
            "x/labels/y/a.txt or lies beside it"
        )
    if without:
        print(f"{without} of {len(files)} images have no label file, and are taken for background")
    write_coco(out, writer.content)
    return root


def _read_config(source: Path) -> tuple[dict[str, Any], list[str], Path]:
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
            names = read_lines(path)
            while names and not names[-1]:
                names.pop()
            if "" in names:  # left out, all behind it would have another's number
                raise DatasetError(f"{path}: line {names.index('') + 1} has no name")
            return {}, names, base
    raise DatasetError(
        f"{source} has no data.yaml and no classes.txt, which name the classes: name the file "
        "data.yaml as SOURCE"
    )


def _find_images(
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
            found += sorted(files_in(path, IMAGE_SUFFIXES))
    return list(dict.fromkeys(Path(os.path.normpath(x)) for x in found))


def _listed(path: Path, base: Path) -> list[Path]:
    """The images that a text file lists."""
    files = []
    for line in filter(None, read_lines(path)):
        choices = [x / line for x in (base, path.parent, base / "images")]
        found = next((x for x in choices if x.is_file()), None)
        if found is None:
            raise DatasetError(f"{path} lists {show(line)}, which is not in {base}")
        files.append(found)
    return files


def _find_label(image: Path, folders: dict[Path, ImageFolder]) -> Path | None:
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


def _read_label(
    label: Path, size: tuple[int, int], names: list[str], has_keypoints: bool
) -> tuple[NDArray[Any], list[int], list[dict[str, Any]]]:
    """Corners (M, 4), classes and polygons of a label file.

    Keypoints follow the box, and are left out.
    """
    _, yolo = supervision_formats()
    lines = [x for x in read_lines(label) if x]
    if has_keypoints:
        lines = [" ".join(x.split()[:5]) for x in lines]
    for number in [x.split()[-1] for x in lines if len(x.split()) > 6]:
        if number.isdecimal() and int(number) > 1:  # behind a confidence, it would be a point
            raise DatasetError(
                f"{label}: a line ends in {number}, which is no share of an image but the id of a "
                "tracker: leave the ids out"
            )
    try:
        found = yolo.yolo_annotations_to_detections(lines, size, with_masks=False)
    except ValueError as e:
        raise DatasetError(f"{label}: {e}") from e
    classes: list[int] = [] if found.class_id is None else found.class_id.tolist()
    if wrong := [c for c in classes if not 0 <= c < len(names)]:
        raise DatasetError(
            f"{label} has the class {wrong[0]}, and there are {len(names)} names, from 0 on"
        )
    return found.xyxy, classes, [_polygon(x, size) for x in lines]


def _polygon(line: str, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's keys for the polygon of a line, whose area is the object's; none of a box."""
    values = [float(x) for x in line.split()[1:]]
    if len(values) < 6:
        return {}
    points = np.reshape(values[: len(values) // 2 * 2], (-1, 2))  # a last one is a confidence
    mask = [(points * size).round(3).ravel().tolist()]
    if isinstance(read_mask(mask, size), str):  # the reader of the file says what is wrong with it
        return {"segmentation": mask}
    return {"segmentation": mask, "area": float(mask_api.area(to_rle(mask, size)))}
