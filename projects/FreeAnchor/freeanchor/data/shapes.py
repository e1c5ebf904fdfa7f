"""A small data set to see FreeAnchor at work: `freeanchor shapes OUT_DIR`.

It has what the method is made for: slender bars, crowds, and rings and crescents whose centre does
not lie on the object, on textured backgrounds. Colours say nothing about the class. The same
seed gives the same bytes.
"""

import colorsys
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import check_folder
from .coco_writer import write_coco
from .masks import encode_mask

CLASSES = ("bar", "disc", "ring", "crescent")
_SIZE = 256
# An object is refused where it would leave less than this of another one, or of itself, to see.
_MIN_VISIBLE = 0.8
_MAX_TRIES = 60


def _noise(rng: np.random.Generator, cells: int) -> NDArray[Any]:
    """(S, S) smooth noise in [0, 1] with about `cells` features along a side."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    noise: NDArray[Any] = np.asarray(coarse.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC))
    return noise.clip(0, 1)


def _texture(rng: np.random.Generator, cells: int, saturation: float) -> NDArray[Any]:
    """(S, S, 3) texture between two shades of a random colour, in [0, 1]."""
    hue, shade = rng.random(), rng.uniform(0.5, 1)
    colour = np.array(colorsys.hsv_to_rgb(hue, saturation, shade), dtype=np.float32)
    texture: NDArray[Any] = colour * (0.6 + 0.4 * _noise(rng, cells)[..., None])
    return texture


def _coverage(rng: np.random.Generator, name: str, x: float, y: float) -> NDArray[Any]:
    """(S, S) share of each pixel that an object of random size and pose around (x, y) covers."""
    angle = float(rng.integers(4) * np.pi / 2 + rng.uniform(-0.03, 0.03))
    cos, sin = math.cos(angle), math.sin(angle)
    dy, dx = np.ogrid[:_SIZE, :_SIZE]
    dy, dx = (dy + 0.5 - y).astype(np.float32), (dx + 0.5 - x).astype(np.float32)
    u = dx * cos + dy * sin
    v = dy * cos - dx * sin
    # The (signed) distance from the outline: an anti-aliased mask with exact geometry.
    if name == "bar":
        length = rng.uniform(70, 140)
        distance = np.maximum(abs(u) - length / 2, abs(v) - length / rng.uniform(8, 12))
    elif name == "disc":
        distance = np.hypot(u, v) - rng.uniform(12, 30)
    elif name == "ring":
        radius = rng.uniform(18, 42)
        distance = np.abs(np.hypot(u, v) - radius * 0.85) - radius * 0.15
    else:
        radius = rng.uniform(20, 42)
        hollow = np.hypot(u - 0.5 * radius, v) - 0.8 * radius
        distance = np.maximum(np.hypot(u, v) - radius, -hollow)
    coverage: NDArray[Any] = (0.5 - distance).clip(0, 1)
    return coverage


def draw(rng: np.random.Generator) -> tuple[NDArray[Any], list[dict[str, Any]]]:
    """Draw one image.

    Args:
        rng: source of all randomness.

    Returns:
        (S, S, 3) uint8 RGB image, and per object a dict with `category_id` (from 1), `bbox`
        (x, y, width, height of the whole object, also of what others hide), `area` and
        `segmentation`, a run-length encoding of the whole object as well.
    """
    image = _texture(rng, int(rng.integers(4, 24)), 0.2)
    objects: list[dict[str, Any]] = []
    masks: list[NDArray[Any]] = []  # what can be seen of each object
    wanted = int(rng.integers(6, 13))
    for _ in range(_MAX_TRIES):
        if len(objects) == wanted:
            break
        name = str(rng.choice(CLASSES))
        x, y = rng.uniform(10, _SIZE - 10, 2)
        if objects and rng.random() < 0.5:  # a crowd: the same class, partly over a neighbour
            neighbour = objects[rng.integers(len(objects))]
            name = CLASSES[neighbour["category_id"] - 1]
            left, top, width, height = neighbour["bbox"]
            x = left + width / 2 + rng.uniform(-1, 1) * (width / 2 + 10)
            y = top + height / 2 + rng.uniform(-1, 1) * (height / 2 + 10)
        cover = _coverage(rng, name, x, y)
        mask = cover > 0.5
        if not mask.any() or mask[[0, -1]].any() or mask[:, [0, -1]].any():
            continue
        remaining = [m & ~mask for m in masks]
        if any(m.sum() < _MIN_VISIBLE * o["area"] for m, o in zip(remaining, objects)):
            continue
        masks = [*remaining, mask]
        ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = [xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1]
        objects.append(
            {
                "category_id": CLASSES.index(name) + 1,
                "bbox": [float(v) for v in box],
                "area": float(mask.sum()),
                "segmentation": encode_mask(mask),
            }
        )
        texture = _texture(rng, int(rng.integers(8, 40)), 0.9)
        image = image + (texture - image) * cover[..., None]
    image = image + 0.03 * rng.standard_normal(image.shape, dtype=np.float32)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), objects


def write_shapes(
    out_dir: Path, num_train: int, num_val: int, seed: int, masks: bool = False
) -> None:
    """Write `images/`, `train.json` and `val.json` in COCO format.

    Args:
        out_dir: directory, made if needed. Files of an earlier run are overwritten.
        num_train: number of training images.
        num_val: number of validation images.
        seed: the same seed gives the same bytes.
        masks: whether the objects have their `segmentation` in the files.

    Raises:
        FileError: the directory cannot be one.
    """
    check_folder(out_dir)
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for split, count, stream in (("train", num_train, 0), ("val", num_val, 1)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            pixels, objects = draw(np.random.default_rng((seed, stream, image_id)))
            file_name = f"{split}_{image_id:05d}.png"
            Image.fromarray(pixels).save(out_dir / "images" / file_name, compress_level=1)
            images.append({"id": image_id, "file_name": file_name, "width": _SIZE, "height": _SIZE})
            for o in objects:
                if not masks:
                    del o["segmentation"]
                annotation_id = len(annotations) + 1
                annotations.append({"id": annotation_id, "image_id": image_id, "iscrowd": 0, **o})
        content = {
            "info": {"description": "FreeAnchor shapes", "seed": seed},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
        }
        write_coco(out_dir / f"{split}.json", content)
