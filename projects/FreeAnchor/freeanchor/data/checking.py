"""A whole look at a data set before it is trained on: `freeanchor check`."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import DatasetError
from ..evaluation import ASPECT_RATIOS, CROWDING, aspect_ratios, crowding
from .anchors import best_anchor_iou, has_anchors, training_boxes
from .coco import read_coco
from .coco_file import CocoFile
from .coco_writer import write_coco
from .containers import read_json
from .datasets import sum_up
from .fields import refer
from .images import ImageReader, ImageState

__all__ = ["check_dataset"]

# COCO's limits of small and medium, as sides of a square.
_SIZES = (("small, up to 32 x 32 pixels", 32.0), ("medium, 96 x 96", 96.0), ("large", np.inf))
_LEAST_IOU = 0.3
_PER_PROCESS = 500  # images, below which it is not worth while to start another one


def check_dataset(
    annotations: str, images: str, cfg: CfgNode, write: Path | None = None
) -> tuple[list[str], bool]:
    """Read everything once, in several processes.

    Args:
        annotations: a COCO file.
        images: the folder of its images.
        cfg: of the model that is to be trained on it.
        write: a COCO file to be written, with what can be used; the original stays as it is.

    Returns:
        Lines to print, and whether it can be trained on.

    Raises:
        DatasetError: the annotation file cannot be used at all.
    """
    reader = ImageReader.from_config(cfg)
    file = read_coco(annotations, images, reader, cfg.MODEL.MASK_ON)
    states = _look_at_images(file, reader)
    problem = sum_up(states, reader)
    crowd = file.crowd
    lines = [*file.findings.lines(), *([problem] if problem else [])]
    lines += [
        f"{len(file.image_ids)} images, {len(crowd)} boxes, {int(crowd.sum())} of them crowds"
    ]
    is_trainable = not problem and bool((~crowd).any())
    if not file.has_truth:
        lines.append("there are no `annotations`: nothing to train on")
    elif (~crowd).any():
        lines += _describe(file, cfg)
    else:
        lines.append("there is no usable box to train on")
    if write is not None:
        whole = np.array([not x.problem for x in states], dtype=bool)
        _write_clean(file, images, whole, write)
        lines.append(f"What can be used is in {write}: {int(whole.sum())} images")
    return lines, is_trainable


def _look(arguments: tuple[ImageReader, dict[str, Any]]) -> ImageState:
    reader, record = arguments
    return reader.check(record, decode=True)


def _look_at_images(file: CocoFile, reader: ImageReader) -> list[ImageState]:
    records = [
        {"file_name": name, "width": width, "height": height}
        for name, (width, height) in zip(file.file_names, file.sizes.tolist())
    ]
    work = [(reader, record) for record in records]
    # Not forked: PyTorch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    # Those that this process may use, which macOS does not say.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    count = min(cores, 1 + len(records) // _PER_PROCESS)
    if count == 1:
        return [_look(x) for x in tqdm(work, desc="images", delay=1)]
    try:
        with ProcessPoolExecutor(count, context) as pool:
            found = pool.map(_look, work, chunksize=16)
            return list(tqdm(found, total=len(work), desc="images"))
    except BrokenProcessPool as e:
        raise DatasetError(
            f"{file.path}: a process that was reading its images was ended, maybe for lack of "
            "memory: free some, and check again"
        ) from e


def _describe(file: CocoFile, cfg: CfgNode) -> list[str]:
    """What training would use."""
    owner = np.repeat(np.arange(len(file.image_ids)), np.diff(file.starts))
    those = ~file.crowd
    boxes, owner = file.boxes[those], owner[those]
    counts = np.bincount(file.classes[those], minlength=len(file.class_names))
    in_image = np.bincount(owner, minlength=len(file.image_ids))
    lines = ["boxes of each class: " + ", ".join(map("{} {}".format, file.class_names, counts))]
    lines.append(
        f"boxes per image: {in_image.mean():.1f} on average, at most {in_image.max()}; "
        f"{int((in_image == 0).sum())} images without"
    )
    side = np.sqrt(boxes[:, 2:].prod(axis=1))
    lines.append("sizes: " + _shares(side, _SIZES))
    lines.append("longer over shorter side: " + _shares(aspect_ratios(boxes), ASPECT_RATIOS))
    # In pieces of one image: the memory is that of its boxes, squared.
    order = np.argsort(owner, kind="stable")
    pieces = np.split(boxes[order], np.cumsum(in_image)[:-1])
    crowded = np.concatenate([crowding(x) for x in pieces])
    lines.append("largest IoU with another box: " + _shares(crowded, CROWDING))
    if has_anchors(cfg):
        records = file.records(range(len(file.class_names)))
        iou = best_anchor_iou(training_boxes(records, cfg), cfg)
        share = (iou < _LEAST_IOU).mean()
        lines.append(f"boxes that no anchor of the config overlaps by {_LEAST_IOU}: {share:.1%}")
    return lines


def _shares(values: NDArray[Any], limits: Sequence[tuple[str, float]]) -> str:
    """The share of the values up to each limit."""
    index = np.searchsorted([x for _, x in limits], values, side="left")
    counts = np.bincount(np.minimum(index, len(limits) - 1), minlength=len(limits))
    return ", ".join(f"{name}: {n / len(values):.1%}" for (name, _), n in zip(limits, counts))


def _write_clean(file: CocoFile, images: str, whole: NDArray[Any], out: Path) -> None:
    """Write the entries of a file that can be used, with their other keys as they are."""
    if out.exists() and os.path.samefile(file.path, out):
        raise DatasetError(f"--write {out} is the file that is checked: give another name")
    content = read_json(file.path)
    positions = refer([x["id"] for x in content["images"]], file.image_ids).tolist()
    entries = {}
    for i, entry in zip(positions, content["images"]):
        entries[i] = {
            **entry,
            "id": file.image_ids[i],
            "file_name": os.path.relpath(file.file_names[i], images),
            "width": int(file.sizes[i, 0]),
            "height": int(file.sizes[i, 1]),
        }
    content["images"] = [entries[i] for i in range(len(entries)) if whole[i]]
    if file.has_truth:
        owner = np.repeat(np.arange(len(file.image_ids)), np.diff(file.starts))
        content["annotations"] = [
            {
                **content["annotations"][row],
                "image_id": file.image_ids[owner[j]],
                "category_id": file.class_ids[file.classes[j]],
                "bbox": file.boxes[j].tolist(),
                "area": float(file.areas[j]),
                "iscrowd": int(file.crowd[j]),
            }
            for j, row in enumerate(file.rows.tolist())
            if whole[owner[j]]
        ]
    categories = content["categories"]
    positions = refer([x["id"] for x in categories], file.class_ids).tolist()
    content["categories"] = [
        {**category, "id": file.class_ids[i], "name": file.class_names[i]}
        for i, category in sorted(zip(positions, categories), key=lambda x: x[0])
    ]
    write_coco(out, content)
