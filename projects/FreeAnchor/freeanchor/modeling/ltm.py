"""The meta-architecture of the journal paper, with anchors and without."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import negative_bag_loss
from ..layers.losses import positive_bag_loss
from ..layers.ltm import (
    background_loss_of_bags,
    matched_in_bag,
    nearest_points,
    precision_bag_loss,
)
from ..layers.matching import BoxCoding, Objects, box_iou, decode_boxes
from .bag_detector import BagDetector
from .bags import BagLosses, Bags, Predictions

__all__ = ["LTM", "PointHead"]

# Of no effect where nothing is matched.
_NO_CODING = BoxCoding((1.0, 1.0, 1.0, 1.0), 0.0)


class PointHead(RetinaNetHead):
    """A RetinaNet head whose deltas are distances: not negative, with a learned scale per level."""

    @configurable
    def __init__(self, *, input_shape: list[Any], **kwargs: Any) -> None:
        """Build the head; arguments as of :class:`RetinaNetHead`."""
        super().__init__(input_shape=input_shape, **kwargs)
        self.scales = nn.Parameter(torch.ones(len(input_shape)))
        # Boxes start as large as RetinaNet's anchors, of four strides. From boxes without area,
        # where ReLU leaves the most of them else, neither ReLU nor IoU has a gradient.
        nn.init.constant_(self.bbox_pred.bias, 2.0)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level, (N, C, H, W) logits and (N, 4, H, W) distances to the four sides."""
        logits, distances = super().forward(features)
        return logits, [F.relu(x * scale) for x, scale in zip(distances, self.scales)]


@META_ARCH_REGISTRY.register()
class LTM(BagDetector):
    """Learning to match (TPAMI 2021): FreeAnchor's successor, which matches inside the bag.

    Whether an anchor is matched is its IoU with its object in relation to the best of the bag.
    The losses are means over objects of "loss_positive", -log of the recall likelihood, and of
    "loss_negative", -log of the precision likelihood of a bag; and "loss_background", the focal
    loss of what is in no bag.

    Its candidates are anchors, or points without an anchor, see `MODEL.LTM.CANDIDATES`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        ret = super().from_config(cfg)
        candidates = cfg.MODEL.LTM.CANDIDATES
        if candidates not in ("anchors", "points"):
            raise ValueError(f"MODEL.LTM.CANDIDATES must be anchors or points, got {candidates}")
        if candidates == "points":
            generator = cfg.MODEL.ANCHOR_GENERATOR
            if {*ret["anchor_generator"].num_cell_anchors} != {1} or {
                float(x) for level in generator.ASPECT_RATIOS for x in level
            } != {1.0}:
                raise ValueError(
                    "MODEL.LTM.CANDIDATES points needs one MODEL.ANCHOR_GENERATOR.SIZES for each "
                    "level, its stride, and ASPECT_RATIOS [[1.0]]"
                )
            shapes = ret["backbone"].output_shape()
            ret["head"] = PointHead(cfg, [shapes[name] for name in ret["head_in_features"]])
            ret["box2box_transform"] = Box2BoxTransformLinear(normalize_by_size=True)
        return ret

    def _search(self, levels: list[Tensor], boxes: Tensor) -> Tensor:
        if self._box_coding is not None:
            return super()._search(levels, boxes)
        if any(level.dim() != 4 for level in levels):
            raise ValueError(
                "points are looked for in grids: predictions must be (N, H, W, 1, C) and "
                "(N, H, W, 1, 4), and the anchor generator Detectron2's"
            )
        return nearest_points(levels, boxes, self.pre_anchor_topk)

    def _bag_losses(self, bags: Bags, predictions: Predictions, num_objects: Tensor) -> BagLosses:
        boxes, pairs = bags.objects.boxes, self._pairs(bags)
        bag_deltas = self._bag_deltas(bags, predictions.deltas)
        predicted = decode_boxes(bag_deltas.detach(), bags.anchors, self._box_coding)
        iou = box_iou(boxes[:, None], predicted)
        prob, is_first = matched_in_bag(iou, pairs)
        # The distinct pairs of the batch, for as many objects as the losses are divided by. A batch
        # without objects weighs as much as one with a single object.
        num_pairs = is_first.sum().clamp(min=self.pre_anchor_topk).to(boxes.dtype)
        scale = max(1, len(boxes)) / (num_objects * num_pairs)
        everywhere, of_background, _ = negative_bag_loss(
            predictions.background,
            predictions.deltas,
            bags.levels,
            Objects(*(x[:0] for x in bags.objects)),
            pairs,
            self._box_coding or _NO_CODING,
            0.0,
            self.focal_loss_gamma,
            scale,
        )
        in_bags = background_loss_of_bags(of_background, is_first, self.focal_loss_gamma)
        bag_logits = self._bag_logits(bags, predictions, of_background)
        log_prob = self._log_prob(bags, bag_logits, bag_deltas)
        positive = positive_bag_loss(log_prob)
        losses = {
            "loss_positive": positive.sum() / num_objects,
            "loss_negative": precision_bag_loss(bag_logits, prob).sum() / num_objects,
            "loss_background": everywhere - in_bags * scale,
        }
        return BagLosses(losses, log_prob, positive, iou.amax(dim=1))
