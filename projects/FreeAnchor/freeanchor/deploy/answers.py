"""What the JSON API answers about a picture: detections, and the bag of an object."""

from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray

from ..modeling import match_inputs
from .outputs import encode_masks
from .predictor import Predictor

__all__ = ["Pixels", "detect", "find_bag"]

Pixels = NDArray[np.uint8]


def detect(predictor: Predictor, pixels: Pixels) -> dict[str, Any]:
    """The detections in (H, W, 3) BGR pixels, as the API gives them."""
    (found,) = predictor([pixels])
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(boxes.tolist(), found.pred_classes.tolist(), found.scores.tolist())
    masks = [{"segmentation": x} for x in encode_masks(found)] or [{}] * len(found)
    return {
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "detections": [
            {
                "category_id": label + 1,
                "bbox": [round(x, 2) for x in box],
                "score": round(score, 4),
                **mask,
            }
            for (box, label, score), mask in zip(rows, masks, strict=True)
        ],
    }


def find_bag(
    predictor: Predictor, pixels: Pixels, box: tuple[float, float, float, float], label: int
) -> dict[str, Any]:
    """The bag of an object in (H, W, 3) BGR pixels, as the API gives it.

    Args:
        predictor: of a model with bags.
        pixels: the picture.
        box: x, y, width and height of the object.
        label: index of its class.
    """
    inputs = predictor.to_input(pixels)
    height, width = inputs["image"].shape[1:]
    factors = width / pixels.shape[1], height / pixels.shape[0]
    scale = torch.tensor(factors * 2)
    x, y, w, h = box
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[x, y, x + w, y + h]]) * scale)
    instances.gt_classes = torch.tensor([label])
    inputs |= {"instances": instances, "resize_factors": factors}
    with predictor.lock:
        (matching,) = match_inputs(predictor.model, [inputs])

    def rows(anchors: torch.Tensor, values: torch.Tensor, name: str) -> list[dict[str, Any]]:
        corners = anchors.cpu() / scale
        corners[:, 2:] -= corners[:, :2]
        return [
            {"bbox": [round(c, 1) for c in corner], name: float(f"{value:.3g}")}
            for corner, value in zip(corners.tolist(), values.tolist())
        ]

    return {
        "bag": rows(matching.anchors[0], matching.prob[0], "prob"),
        "assigned": rows(matching.assigned[0], matching.assigned_iou[0], "iou"),
    }
