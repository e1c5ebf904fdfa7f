"""Where detections go: annotated pictures and videos, COCO json, CSV, YOLO text."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Protocol

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api

from ..checkpoint import replacing
from ..data import encode_mask
from ..data.importing import read_lines
from ..errors import FreeAnchorError
from ..visualization import find_font, overlay_masks

__all__ = ["WRITERS", "Detected", "draw_boxes", "encode_masks"]

# What every OpenCV writes.
_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
_YOLO_COLUMNS = 6  # class, four of the box, score, which labels that people draw do not have


class Detected(NamedTuple):
    """What was found in an image.

    Attributes:
        name: file of the image or video.
        pixels: (H, W, 3) uint8 BGR.
        instances: the detections.
        frame: its number in a video, from 0; -1 for a still image.
        frame_rate: frames per second of a video.
    """

    name: str
    pixels: NDArray[np.uint8]
    instances: Instances
    frame: int = -1
    frame_rate: float = 0.0


class _Names:
    """Names of output files, one of its own for each input."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, source: str, suffix: str, has_frames: bool = False) -> str:
        """The file name of an input with another suffix; of its whole name and a number if taken.

        `a_2.txt` is that of `a_2.jpg` and of nothing else, whatever came before.

        With `has_frames`, those with the number of a frame behind the stem are not taken either.
        """
        if source not in self._names:
            chosen, number = Path(source).stem, 1
            while f"{chosen}{suffix}" in self._taken or (
                has_frames and self._are_frames_taken(chosen, suffix)
            ):
                number += 1
                chosen = f"{Path(source).name}_{number}"
            self._names[source] = f"{chosen}{suffix}"
            self._taken.add(self._names[source])
        return self._names[source]

    def _are_frames_taken(self, stem: str, suffix: str) -> bool:
        frame = re.compile(rf"{re.escape(stem)}_\d{{6,}}{re.escape(suffix)}")
        return any(map(frame.fullmatch, self._taken))


class Writer(Protocol):
    """Writes detections into a folder; a context, at whose end everything is there.

    Where it ends by an error, a file of an earlier run is not replaced by a part of this one.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None: ...

    def write(self, detected: Detected) -> None:
        """Write the detections of an image."""

    def __enter__(self) -> "Writer": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class _Base:
    """What the writers share."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder, self.class_names = folder, class_names
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Pictures(_Base):
    """`pictures/NAME`, and `pictures/NAME.mp4` of a video."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / "pictures", class_names)
        self._names = _Names()
        self._video: _Video | None = None

    def write(self, detected: Detected) -> None:
        """Write an annotated picture, or the next frame of a video."""
        picture = draw_boxes(detected.pixels, detected.instances, self.class_names)
        if detected.frame < 0:
            suffix = Path(detected.name).suffix
            suffix = suffix if suffix.lower() in _PICTURES else ".png"
            target = self._target(detected.name, suffix)
            try:
                # Not by imwrite, which crashes where a name is not UTF-8.
                target.write_bytes(cv2.imencode(suffix, picture)[1].tobytes())
            except (OSError, cv2.error) as e:
                raise FreeAnchorError(f"{target} cannot be written: {e}") from e
            return
        if self._video is None or self._video.name != detected.name:
            self.__exit__()
            target = self._target(detected.name, ".mp4")
            size = picture.shape[1], picture.shape[0]
            self._video = _Video(detected.name, target, detected.frame_rate, size)
        self._video.write(picture)

    def _target(self, name: str, suffix: str) -> Path:
        target = self.folder / self._names.of(name, suffix)
        if target.resolve() == Path(name).resolve():
            raise FreeAnchorError(f"{target} is an input: give another --out")
        return target

    def __exit__(self, *error: object) -> None:
        """Finish a video."""
        video, self._video = self._video, None
        if video is not None:
            video.close(is_whole=not any(error))


class _Video:
    """A video that is being written, beside its place until it is whole."""

    def __init__(self, name: str, target: Path, frame_rate: float, size: tuple[int, int]) -> None:
        self.name, self._target = name, target
        self._unfinished = target.with_suffix(f".unfinished{target.suffix}")
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._file = cv2.VideoWriter(str(self._unfinished), code, frame_rate, size)
        if not self._file.isOpened():
            raise FreeAnchorError(f"{target} cannot be written: OpenCV has no encoder for it")
        self.write = self._file.write

    def close(self, is_whole: bool) -> None:
        self._file.release()
        try:
            if is_whole:
                # OpenCV does not say that a disk is full.
                if not cv2.VideoCapture(str(self._unfinished)).isOpened():
                    raise FreeAnchorError(f"{self._target} cannot be written: is the disk full?")
                self._unfinished.replace(self._target)
        finally:
            self._unfinished.unlink(missing_ok=True)


class _OneFile(_Base):
    """What writers of one file for all images share.

    It is written as detections come, to a file without a name, so that memory does not fill.
    """

    NAME: ClassVar[str]

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self._file = TemporaryFile(  # noqa: SIM115  # closed in __exit__
            "w+", dir=folder, newline="", encoding="utf-8", errors="backslashreplace"
        )

    def _finish(self) -> None:
        """Write what comes behind all detections."""

    def __exit__(self, *error: object) -> None:
        """Put the file in its place, if all is there."""
        with self._file as f:
            if not any(error):
                self._finish()
                f.seek(0)
                with replacing(self.folder / self.NAME) as target:
                    shutil.copyfileobj(f.buffer, target)  # type: ignore[type-var]


class Coco(_OneFile):
    """`detections.json` in COCO's annotation format with scores; classes are numbered from 1.

    Masks are run-length encodings, and their areas the `area`.
    """

    NAME = "detections.json"

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self._images: list[dict[str, Any]] = []
        self._number = 0
        categories = [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)]
        self._file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    def write(self, detected: Detected) -> None:
        """Write the detections of an image."""
        height, width = detected.pixels.shape[:2]
        image = {"id": len(self._images) + 1, "file_name": detected.name}
        image |= {"width": width, "height": height}
        self._images.append(image | ({"frame": detected.frame} if detected.frame >= 0 else {}))
        masks = encode_masks(detected.instances)
        for i, ((x1, y1, x2, y2), score, index) in enumerate(_rows(detected.instances)):
            annotation = {
                "id": self._number + 1,
                "image_id": image["id"],
                "category_id": index + 1,
                "bbox": [round(x, 3) for x in (x1, y1, x2 - x1, y2 - y1)],
                "area": round((x2 - x1) * (y2 - y1), 3),
                "iscrowd": 0,
                "score": round(score, 6),
            }
            if masks:
                area = float(mask_api.area(masks[i]))
                annotation |= {"area": area, "segmentation": masks[i]}
            self._file.write(",\n" * (self._number > 0) + json.dumps(annotation))
            self._number += 1

    def _finish(self) -> None:
        self._file.write(f'],\n"images": {json.dumps(self._images)}}}\n')


class Csv(_OneFile):
    """`detections.csv`, a line for each detection."""

    NAME = "detections.csv"

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self._lines = csv.writer(self._file)
        self._lines.writerow(["image", "frame", "class", "score", "x1", "y1", "x2", "y2"])

    def write(self, detected: Detected) -> None:
        """Write the detections of an image."""
        frame = detected.frame if detected.frame >= 0 else ""
        for box, score, index in _rows(detected.instances):
            numbers = [f"{score:.6f}", *(f"{x:.3f}" for x in box)]
            self._lines.writerow([detected.name, frame, self.class_names[index], *numbers])


class Yolo(_Base):
    """`labels/NAME.txt`, with class, centre and size as shares of the image, and score."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / "labels", class_names)
        self._names = _Names()
        for path in filter(Path.is_file, self.folder.glob("*.txt")):
            if any(len(x.split()) != _YOLO_COLUMNS for x in read_lines(path)):
                raise FreeAnchorError(
                    f"{path} holds labels that are no detections, which would be lost: give "
                    "another --out"
                )
        text = "".join(f"{x}\n" for x in class_names)
        (folder / "classes.txt").write_text(text, encoding="utf-8")

    def write(self, detected: Detected) -> None:
        """Write the detections of an image; no line where there is none."""
        name = self._names.of(detected.name, ".txt", has_frames=detected.frame >= 0)
        target = self.folder / name
        if detected.frame >= 0:
            target = target.with_stem(f"{target.stem}_{detected.frame:06d}")
        height, width = detected.pixels.shape[:2]
        lines = []
        for (x1, y1, x2, y2), score, index in _rows(detected.instances):
            box = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width
            numbers = (*box, (y2 - y1) / height, score)
            lines.append(" ".join([str(index), *(f"{x:.6f}" for x in numbers)]) + "\n")
        target.write_text("".join(lines))


WRITERS: dict[str, type[Writer]] = {"pictures": Pictures, "coco": Coco, "csv": Csv, "yolo": Yolo}


def _rows(instances: Instances) -> list[tuple[list[float], float, int]]:
    """Box (x1, y1, x2, y2), score and class of each detection."""
    columns = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
    return list(zip(*(x.tolist() for x in columns), strict=True))


def encode_masks(instances: Instances) -> list[dict[str, Any]]:
    """COCO's run-length encoding of each mask; none if there are no masks."""
    if not instances.has("pred_masks"):
        return []
    return [encode_mask(mask) for mask in instances.pred_masks.numpy()]


def draw_boxes(
    pixels: NDArray[np.uint8], instances: Instances, class_names: Sequence[str]
) -> NDArray[np.uint8]:
    """Draw detections with their classes and scores, and their masks if they have some.

    Args:
        pixels: (H, W, 3) uint8 BGR; not changed.
        instances: the detections.
        class_names: names of the classes.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    rgb = np.ascontiguousarray(pixels[:, :, ::-1])
    if instances.has("pred_masks"):
        masks = list(instances.pred_masks.numpy())
        rgb = overlay_masks(rgb, masks, instances.pred_classes.tolist())
    image = Image.fromarray(rgb)
    draw = ImageDraw.Draw(image)
    size = max(10, min(image.size) // 40)
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    for box, score, index in reversed(_rows(instances)):  # the surest on top
        color = tuple(colors[index % len(colors)])
        draw.rectangle(box, outline=color, width=max(1, size // 6))
        file, label = find_font(f"{class_names[index]} {score:.0%}")
        font = ImageFont.truetype(file, size)
        width = draw.textlength(label, font)
        # Above the box where there is room, and always within the picture.
        x = max(0.0, min(box[0], image.width - width))
        y = box[1] - 1.2 * size if box[1] >= 1.2 * size else box[1]
        draw.rectangle((x, y, x + width, y + 1.2 * size), fill=color)
        ink = "black" if np.dot(color, (0.299, 0.587, 0.114)) > 128 else "white"
        draw.text((x, y), label, ink, font)
    drawn: NDArray[np.uint8] = np.asarray(image)[:, :, ::-1].copy()
    return drawn
