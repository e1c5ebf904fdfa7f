"""The meta-architecture: RetinaNet whose anchors are matched and trained by FreeAnchor."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .losses import bag_logit, negative_bag_loss, positive_bag_loss
from .matching import box_prob, decode_boxes, encode_boxes, iou_topk, matched_log_probability

__all__ = ["FreeAnchor"]


@META_ARCH_REGISTRY.register()
class FreeAnchor(RetinaNet):
    """FreeAnchor (NeurIPS 2019): RetinaNet with learned anchor matching.

    Backbone, head, anchors and inference are Detectron2's RetinaNet, so its checkpoints load and
    detect as before. Anchor labelling and losses are replaced.
    """

    @configurable
    def __init__(
        self,
        *,
        pre_anchor_topk: int = 50,
        bbox_threshold: float = 0.6,
        bbox_reg_weight: float = 0.75,
        **kwargs: Any,
    ) -> None:
        """Build the model from its parts.

        Args:
            pre_anchor_topk: number of anchors in the bag of an object.
            bbox_threshold: IoU at which P{a in A+} starts to rise.
            bbox_reg_weight: weight of the localisation loss in the matched probability.
            kwargs: see :class:`detectron2.modeling.RetinaNet`. `focal_loss_alpha` weighs the
                positive against the negative loss, `focal_loss_gamma` focuses the negative one.

        Raises:
            ValueError: a value is out of its range.
        """
        super().__init__(**kwargs)
        if pre_anchor_topk < 1:
            raise ValueError(f"PRE_ANCHOR_TOPK must be at least 1, got {pre_anchor_topk}")
        if not 0 <= bbox_threshold < 1:
            raise ValueError(f"BBOX_THRESHOLD must be in [0, 1), got {bbox_threshold}")
        if self.box_reg_loss_type != "smooth_l1":
            raise ValueError(
                "BBOX_REG_LOSS_TYPE must be smooth_l1, which the likelihood is made of, got "
                f"{self.box_reg_loss_type}"
            )
        if self.focal_loss_gamma < 1:
            raise ValueError(f"FOCAL_LOSS_GAMMA must be at least 1, got {self.focal_loss_gamma}")
        self.pre_anchor_topk = pre_anchor_topk
        self.bbox_threshold = bbox_threshold
        self.bbox_reg_weight = bbox_reg_weight

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        ret: dict[str, Any] = super().from_config(cfg)
        ret["anchor_matcher"] = None  # objects choose their anchors, no IoU rule does
        ret["pre_anchor_topk"] = cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK
        ret["bbox_threshold"] = cfg.MODEL.FREEANCHOR.BBOX_THRESHOLD
        ret["bbox_reg_weight"] = cfg.MODEL.FREEANCHOR.BBOX_REG_WEIGHT
        return ret

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        pred_logits, pred_anchor_deltas = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4]
        )
        anchors = self.anchor_generator(features)
        return self.losses(anchors, pred_logits, pred_anchor_deltas, gt_instances)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The two bag losses of a batch (paper, section 3.3), in float32 or better.

        Logs to the current `EventStorage`, so there must be one, as for Detectron2's RetinaNet.

        Args:
            anchors: per level, (Hi * Wi * A) anchors, shared by all images.
            pred_logits: per level, (N, Hi * Wi * A, C) class logits.
            pred_anchor_deltas: per level, (N, Hi * Wi * A, 4) deltas.
            gt_instances: N instances with `gt_boxes` and `gt_classes`, possibly none in an image.

        Returns:
            "loss_positive" and "loss_negative", scalars. They stay in the graph of both
            predictions for a batch without any object too, so that every parameter of the head
            gets a gradient and distributed training does not wait for one.
        """
        with torch.autocast(pred_logits[0].device.type, enabled=False):
            logits = torch.cat(pred_logits, dim=1)  # (N, R, C)
            deltas = torch.cat(pred_anchor_deltas, dim=1)  # (N, R, 4)
            dtype = torch.promote_types(deltas.dtype, torch.float32)
            deltas = deltas.to(dtype)
            anchor_boxes = Boxes.cat(anchors).tensor.to(dtype)  # (R, 4)
            gt_boxes = Boxes.cat([x.gt_boxes for x in gt_instances]).tensor.to(dtype)  # (M, 4)
            gt_classes = torch.cat([x.gt_classes for x in gt_instances])  # (M,)
            counts = [len(x) for x in gt_instances]
            image = torch.arange(len(counts), device=deltas.device).repeat_interleave(
                torch.tensor(counts, device=deltas.device), output_size=sum(counts)
            )[:, None]  # (M, 1)

            bag = iou_topk(anchor_boxes, gt_boxes, self.pre_anchor_topk)  # (M, K)
            targets = encode_boxes(
                gt_boxes[:, None], anchor_boxes[bag], self.box2box_transform.weights
            )
            log_prob = matched_log_probability(
                logits[image, bag, gt_classes[:, None]].to(dtype),
                deltas[image, bag],
                targets,
                self.bbox_reg_weight,
                self.smooth_l1_beta,
            )
            positive = positive_bag_loss(log_prob)

            cells, prob, max_iou = self._positive_cells(
                deltas, anchor_boxes, gt_boxes.split(counts), gt_classes.split(counts)
            )
            negative = negative_bag_loss(logits, cells, prob, self.focal_loss_gamma)

        self._log_matching(log_prob, positive, max_iou, len(counts))
        # The others divide the loss of a batch without objects by 1: some 350 times too much.
        num_objects = max(1, sum(counts))
        alpha = self.focal_loss_alpha
        return {
            "loss_positive": positive.sum() * (alpha / num_objects),
            "loss_negative": negative * ((1 - alpha) / (self.pre_anchor_topk * num_objects)),
        }

    @torch.no_grad()
    def _positive_cells(
        self,
        deltas: Tensor,
        anchors: Tensor,
        gt_boxes: Sequence[Tensor],
        gt_classes: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`box_prob` of all images, with cells as indices into the (N, R, C) logits."""
        transform = self.box2box_transform
        boxes = decode_boxes(deltas, anchors, transform.weights, transform.scale_clamp)
        cells, probs, max_ious = [], [], []
        for i, (gt, classes) in enumerate(zip(gt_boxes, gt_classes)):
            cell, prob, max_iou = box_prob(
                boxes[i], gt, classes, self.num_classes, self.bbox_threshold
            )
            cells.append(cell + i * len(anchors) * self.num_classes)
            probs.append(prob)
            max_ious.append(max_iou)
        return torch.cat(cells), torch.cat(probs), torch.cat(max_ious)

    @torch.no_grad()
    def _log_matching(
        self, log_prob: Tensor, positive: Tensor, max_iou: Tensor, num_images: int
    ) -> None:
        """What tells a user whether matching works, to the EventStorage."""
        storage = get_event_storage()
        storage.put_scalar("freeanchor/objects_per_image", len(positive) / num_images)
        if len(positive) == 0:
            return
        # The share of each anchor in the likelihood of its bag, see `positive_bag_loss`.
        share = bag_logit(log_prob).softmax(dim=1)
        likelihood, num_anchors, localized = torch.stack(
            (
                (-positive).exp().mean(),
                (1 / share.square().sum(dim=1)).mean(),
                (max_iou > self.bbox_threshold).to(positive.dtype).mean(),
            )
        ).tolist()  # one synchronisation for all three
        storage.put_scalar("freeanchor/bag_likelihood", likelihood)
        storage.put_scalar("freeanchor/anchors_per_bag", num_anchors)
        storage.put_scalar("freeanchor/localized_objects", localized)
