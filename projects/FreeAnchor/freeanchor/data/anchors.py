"""Anchors from the data: sizes and aspect ratios that fit the objects of a training set.

The bag of an object holds the anchors with the highest IoU. Where none of them fits, as with text
lines, it holds any that touch the object, and there is little to choose from.
"""

import re
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.structures import Boxes, BoxMode
from numpy.typing import NDArray

from ..config import is_two_stage
from ..errors import DatasetError
from ..layers import iou_topk
from ..layers.matching import box_iou

__all__ = ["best_anchor_iou", "has_anchors", "propose_anchors", "training_boxes"]

# Of each image with objects, (height, width) of the network's input and (n, 4) boxes x1 y1 x2 y2.
Images = list[tuple[tuple[int, int], NDArray[Any]]]

GOOD_IOU = 0.5
_MAX_ROUNDS = 100
_SMALLEST = 2 ** np.arange(2.5, 6.01, 0.25)  # 6 to 64 pixels
_MOST_IMAGES = 100  # that the search looks at


def training_boxes(records: list[dict[str, Any]], cfg: CfgNode) -> Images:
    """The objects of a data set in the size in which it is trained on.

    Args:
        records: images in Detectron2's standard format.
        cfg: its `INPUT.MIN_SIZE_TRAIN` (of several, the middle one) and `MAX_SIZE_TRAIN`, or
            `SCALE_JITTER` (the middle of it, before the crop).

    Returns:
        Per image with objects, (height, width) of the network's input and (n, 4) boxes x1 y1 x2 y2.

    Raises:
        DatasetError: there is no object.
    """
    result = []
    for record in records:
        boxes = [
            BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
            for x in record.get("annotations", ())
            if not x.get("iscrowd")
        ]
        if boxes:
            old = record["height"], record["width"]
            new = _training_size(*old, cfg)
            scale = np.array([new[1] / old[1], new[0] / old[0]] * 2)
            result.append((new, np.array(boxes, dtype=np.float64) * scale))
    if not result:
        raise DatasetError("there is no object to fit anchors to")
    return result


def _training_size(height: int, width: int, cfg: CfgNode) -> tuple[int, int]:
    """Height and width that an image is trained in."""
    keys = cfg.INPUT
    new: tuple[int, int] = height, width
    size = int(np.median(keys.MIN_SIZE_TRAIN))
    if keys.SCALE_JITTER:
        scale = float(np.mean(keys.SCALE_JITTER)) * keys.MAX_SIZE_TRAIN / max(height, width)
        new = round(height * scale), round(width * scale)
    elif size > 0:  # with 0, Detectron2 does not resize
        new = ResizeShortestEdge.get_output_shape(height, width, size, keys.MAX_SIZE_TRAIN)
    return max(1, new[0]), max(1, new[1])


def has_anchors(cfg: CfgNode) -> bool:
    """Whether objects choose from anchors, and not from points."""
    return not (cfg.MODEL.META_ARCHITECTURE == "LTM" and cfg.MODEL.LTM.CANDIDATES == "points")


def _strides(cfg: CfgNode) -> list[int]:
    """The strides of the levels that have anchors, by their names: that of "p3" is 2 ** 3."""
    names = cfg.MODEL["RPN" if is_two_stage(cfg) else "RETINANET"].IN_FEATURES
    levels = [re.search(r"\d+$", name) for name in names]
    if None in levels:
        raise DatasetError(f"the strides of the features {', '.join(names)} are not known")
    return [2 ** int(x[0]) for x in levels if x]


def best_anchor_iou(images: Images, cfg: CfgNode) -> NDArray[Any]:
    """Measure how well the anchors of a config fit objects, where they lie in their images.

    Args:
        images: see :func:`training_boxes`.
        cfg: its `MODEL.ANCHOR_GENERATOR`, and the `IN_FEATURES` of the dense head.

    Returns:
        (M,) the IoU of each object with its best anchor.

    Raises:
        DatasetError: the config has no anchors, or the names of the features do not say their
            strides.
    """
    if not has_anchors(cfg):
        raise DatasetError("MODEL.LTM.CANDIDATES points has no anchors: there are none to choose")
    strides = _strides(cfg)
    generate = build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in strides])
    best = []
    for (height, width), boxes in images:
        # As the network's features: padded to a multiple of 32, and halved from there, rounded up.
        shapes = [[-(-(-(-x // 32) * 32) // stride) for x in (height, width)] for stride in strides]
        anchors = generate([torch.zeros(1, 1, *shape) for shape in shapes])
        levels = [x.tensor.view(*shape, -1, 4) for x, shape in zip(anchors, shapes)]
        objects = torch.from_numpy(boxes).float()
        index = iou_topk(levels, objects, 1)[:, 0]
        best.append(box_iou(objects, Boxes.cat(anchors).tensor[index]).numpy())
    return np.concatenate(best)


def propose_anchors(images: Images, cfg: CfgNode) -> tuple[list[list[float]], list[list[float]]]:
    """Sizes and aspect ratios for Detectron2's anchor generator, as many as the config has.

    The ratios are the centres of a k-medians of the objects' shapes (of two shapes of one area, the
    IoU falls with the difference of the logarithms of their ratios), or those of the config. The
    sizes double from level to level. Of all these and the anchors of the config itself, those are
    taken that overlap most objects by 0.5 and, among such, have the largest mean IoU.

    Args:
        images: see :func:`training_boxes`.
        cfg: config of the model.

    Returns:
        Tuple of what `MODEL.ANCHOR_GENERATOR.SIZES` and `ASPECT_RATIOS` take.
    """
    keys = cfg.MODEL.ANCHOR_GENERATOR
    shapes = np.concatenate([boxes[:, 2:] - boxes[:, :2] for _, boxes in images])
    log_ratios = np.log(shapes[:, 1] / shapes[:, 0])  # height / width, as in the config
    clustered = [_cluster(log_ratios, len(keys.ASPECT_RATIOS[0])).round(3).tolist()]
    num_sizes = len(keys.SIZES[0])
    octaves = 2 ** (np.arange(len(_strides(cfg)))[:, None] + np.arange(num_sizes) / num_sizes)
    all_sizes = [(smallest * octaves).round(2).tolist() for smallest in _SMALLEST]
    sample = images[:: -(-len(images) // _MOST_IMAGES)]

    def fit(anchors: tuple[list[list[float]], list[list[float]]]) -> tuple[float, float]:
        changed = cfg.clone()
        changed.defrost()
        generator = changed.MODEL.ANCHOR_GENERATOR
        generator.SIZES, generator.ASPECT_RATIOS = anchors
        iou = best_anchor_iou(sample, changed)
        return float((iou >= GOOD_IOU).mean()), float(iou.mean())

    candidates = [
        (sizes, ratios) for sizes in all_sizes for ratios in (clustered, keys.ASPECT_RATIOS)
    ]
    return max([(keys.SIZES, keys.ASPECT_RATIOS), *candidates], key=fit)


def _cluster(values: NDArray[Any], count: int) -> NDArray[Any]:
    """(count,) increasing exponentials of the centres of a k-medians of (M,) values."""
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(_MAX_ROUNDS):
        nearest = np.abs(values[:, None] - centres).argmin(axis=1)
        groups = [values[nearest == i] for i in range(count)]
        new = np.array([np.median(x) if len(x) else c for x, c in zip(groups, centres)])
        if np.array_equal(new, centres):
            break
        centres = new
    result: NDArray[Any] = np.exp(np.sort(centres))
    return result
