"""Images of a data set: read by one rule, and checked by the same before any work is done.

An image is as a viewer shows it: turned as its EXIF or XMP says. Deep pixels (16 and 32 bits,
float) become 8 bits: value / white * 255, where white is `INPUT.MAX_VALUE` or, for 16 bits, 65535.
"""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

from ..errors import DatasetError

__all__ = ["IMAGE_SUFFIXES", "ImageReader", "ImageState", "num_channels", "read_image"]

# The files of a folder that are taken for images, in small letters.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".gif", ".bmp", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
)

_ORIENTATION = 274  # of EXIF; Pillow gives that of XMP by the same number
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAIL_BYTES = 64
_RANGE_16_BIT = 65535
# Pillow refuses images above twice its MAX_IMAGE_PIXELS.
_MOST_PIXELS = 178956970
# The formats that Detectron2 makes of Pillow's "RGB".
_OF_DETECTRON2 = ("BGR", "YUV-BT.601")
# Pillow's limit is one for the process, and images are opened by threads.
_OPENING = threading.Lock()


def num_channels(image_format: str) -> int:
    """The channels of an `INPUT.FORMAT`.

    Raises:
        DatasetError: neither Detectron2 nor Pillow has channels of the format.
    """
    if image_format in _OF_DETECTRON2:
        return 3
    try:
        number = Image.getmodebands(image_format)
    except KeyError:
        number = 0
    # Other modes of one channel have no channels of 8 bits: palettes, deep pixels, bits.
    if number == 0 or (number == 1 and image_format != "L"):
        raise DatasetError(
            f"INPUT.FORMAT {image_format!r} is not known: it is BGR, YUV-BT.601 or a mode of "
            "Pillow with 8 bits (RGB, L, RGBA, CMYK, ...)"
        )
    return number


@dataclass
class ImageState:
    """What a check found of an image."""

    # What is wrong with it, if anything.
    problem: str = ""
    # Its largest value, of an image of 16 bits.
    largest: int | None = None


@dataclass(frozen=True)
class ImageReader:
    """Reads images as a config says."""

    format: str = "BGR"
    max_value: float = 0.0
    max_pixels: int = _MOST_PIXELS

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ImageReader":
        """Build the reader of a config, from `INPUT.{FORMAT, MAX_VALUE, MAX_PIXELS}`."""
        return cls(cfg.INPUT.FORMAT, cfg.INPUT.MAX_VALUE, cfg.INPUT.MAX_PIXELS)

    def read(self, path: str) -> NDArray[Any]:
        """Read an image.

        Returns:
            (H, W, C) array in the format of the reader: uint8, and float32 of YUV-BT.601 and of
            two or four channels.

        Raises:
            OSError, ValueError, SyntaxError: it cannot be read; the message does not name it.
        """
        with self._opened(path) as (_, image):
            return self.convert(image)

    def convert(self, image: Image.Image) -> NDArray[Any]:
        """Make of an image that Pillow opened what :meth:`read` returns; errors as there."""
        pixels: NDArray[Any] = convert_PIL_to_numpy(
            _as_seen(_to_8_bits(image, self.max_value)), self.format
        )
        if pixels.shape[2] not in (1, 3) or pixels.dtype != np.uint8:
            # Resizing by Pillow would take a second or fourth channel for a mask of the others.
            return pixels.astype(np.float32)
        return pixels

    def size(self, path: str) -> tuple[int, int]:
        """Width and height of an image as a viewer shows it; errors as in :meth:`read`."""
        with self._opened(path) as (f, image):
            return _seen_size(f, image)[0]

    def check(self, record: dict[str, Any], decode: bool = False) -> ImageState:
        """Find out whether an image can be used.

        Args:
            record: it, in Detectron2's standard format.
            decode: read all of its pixels; else only where nothing else tells a whole file.
        """
        path = record["file_name"]
        if not PathManager.isfile(path):
            return ImageState(f"{path} is missing")
        try:
            with self._opened(path) as (f, image):
                size, is_whole = _seen_size(f, image)
                if decode or not is_whole:
                    image.load()
                largest = None
                if _is_deep(image):
                    _white(image, self.max_value)
                    if image.mode.startswith("I;16"):
                        largest = int(np.asarray(image).max())
        except Exception as e:  # Pillow's decoders raise many kinds
            return ImageState(f"{path} is not a readable image ({e})")
        # Data that Python registered may leave them out.
        annotated = record.get("width", size[0]), record.get("height", size[1])
        if size != annotated:
            turned = " (width and height are swapped)" if size[::-1] == annotated else ""
            return ImageState(
                f"{path} has {size[0]} x {size[1]} pixels, but {annotated[0]} x {annotated[1]} in "
                f"its annotation{turned}"
            )
        return ImageState(largest=largest)

    @contextmanager
    def _opened(self, path: str) -> Iterator[tuple[IO[bytes], Image.Image]]:
        with PathManager.open(path, "rb") as f:
            with _OPENING:
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    image = Image.open(f)
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
            with image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise ValueError(
                        f"it has {width} x {height} = {width * height} pixels, and "
                        f"INPUT.MAX_PIXELS allows {self.max_pixels}: set that key if there is "
                        "the memory"
                    )
                yield f, image


def read_image(file_name: str, image_format: str, cfg: CfgNode | None = None) -> NDArray[Any]:
    """Read an image as the models see it, see :meth:`ImageReader.read`.

    Args:
        file_name: its path.
        image_format: of the result.
        cfg: whose other keys hold, by default their default values.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        reader = ImageReader() if cfg is None else ImageReader.from_config(cfg)
        return replace(reader, format=image_format).read(file_name)
    except Exception as e:  # Pillow's decoders raise many kinds
        raise DatasetError(f"{file_name} cannot be read: {e}") from e


def _orientation(image: Image.Image) -> int:
    try:
        # That of PNG's own class would decode all pixels first.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF, which viewers ignore
        return 1


def _as_seen(image: Image.Image) -> Image.Image:
    image.load()  # before, some formats do not know all of their EXIF, and TIFF turns itself
    method = _METHODS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _seen_size(f: IO[bytes], image: Image.Image) -> tuple[tuple[int, int], bool]:
    """The size of :func:`_as_seen`, and whether the file is known to be whole."""
    is_whole = _is_whole(f, image)
    if not is_whole:
        image.load()
    size = image.size
    return (size[::-1] if _orientation(image) >= 5 else size), is_whole


def _is_whole(f: IO[bytes], image: Image.Image) -> bool:
    """Whether the file says that it has its end, and no EXIF that only decoding would find."""
    position = f.tell()
    try:
        if image.format in ("JPEG", "MPO"):
            f.seek(-min(_TAIL_BYTES, f.seek(0, os.SEEK_END)), os.SEEK_END)
            return b"\xff\xd9" in f.read()
        if image.format == "PNG":
            f.seek(8)
            pixels_began = False
            while len(head := f.read(8)) == 8:
                length, kind = struct.unpack(">I4s", head)
                if kind == b"IEND":
                    return True
                if pixels_began and kind != b"IDAT":
                    return False
                pixels_began = kind == b"IDAT"
                f.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        f.seek(position)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _white(image: Image.Image, max_value: float) -> float:
    """The value of a deep image that becomes 255."""
    if max_value > 0:
        return max_value
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _RANGE_16_BIT
    kind = "float" if image.mode == "F" else "32-bit"
    raise ValueError(f"it has {kind} pixels: INPUT.MAX_VALUE must say which value is white")


def _to_8_bits(image: Image.Image, max_value: float) -> Image.Image:
    if not _is_deep(image):
        return image
    white = _white(image, max_value)
    values = np.nan_to_num(np.asarray(image, dtype=np.float32) / white, posinf=1.0, neginf=0.0)
    result = Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))
    orientation = _orientation(image)
    if orientation != 1:  # the new image has no EXIF
        result.getexif()[_ORIENTATION] = orientation
    return result
