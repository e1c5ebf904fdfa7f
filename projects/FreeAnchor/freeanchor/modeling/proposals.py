"""FreeAnchor as the first stage of Detectron2's GeneralizedRCNN: a dense detector of one class.

ROI heads of Detectron2, with masks too, classify and refine what it proposes.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..errors import FreeAnchorError
from .inference import apply_nms, candidates
from .meta_arch import FreeAnchor

__all__ = ["FreeAnchorRPN", "of_one_class"]

# Scores of 1 have no finite logit in float32.
_EPSILON = 1e-7


@PROPOSAL_GENERATOR_REGISTRY.register()
class FreeAnchorRPN(nn.Module):
    """Proposals of a FreeAnchor (NeurIPS 2019) for which all classes are one.

    Called like Detectron2's RPN, which it stands in for.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: FreeAnchor,
        loss_weight: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        min_box_size: float,
    ) -> None:
        """Build the first stage from its parts.

        Args:
            detector: of one class. Its backbone is not used, its score and NMS thresholds are those
                of proposals.
            loss_weight: factor of both losses.
            pre_nms_topk: in training and in a test, as many of each level come to NMS, which is of
                all levels together.
            post_nms_topk: in training and in a test, as many of an image are proposed.
            min_box_size: proposals with a side that is not longer are left out.
        """
        super().__init__()
        self.detector = detector
        self.loss_weight = loss_weight
        self.pre_nms_topk = pre_nms_topk
        self.post_nms_topk = post_nms_topk
        self.min_box_size = min_box_size

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        rpn = cfg.MODEL.RPN
        return {
            "detector": _build_detector(cfg, input_shape),
            "loss_weight": rpn.LOSS_WEIGHT,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Propose boxes.

        Args:
            images: the N images.
            features: by name, (N, C, H, W).
            gt_instances: of each image, with `gt_boxes`; their classes do not matter.

        Returns:
            Per image, `proposal_boxes` and `objectness_logits`, the highest first; and in training
            "loss_rpn_positive" and "loss_rpn_negative".
        """
        levels = [features[name] for name in self.detector.head_in_features]
        predictions = self.detector.head(levels)
        losses = {}
        if self.training:
            assert gt_instances is not None, "training needs objects"
            objects = [of_one_class(x) for x in gt_instances]
            found = self.detector.forward_training(images, levels, predictions, objects)
            losses = {
                name.replace("loss_", "loss_rpn_"): loss * self.loss_weight
                for name, loss in found.items()
            }
        return self._propose(levels, predictions, images.image_sizes), losses

    @torch.no_grad()
    def _propose(
        self,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """The best boxes of each image after NMS, see :meth:`forward`."""
        phase = 0 if self.training else 1
        threshold, topk = self.detector.test_score_thresh, self.pre_nms_topk[phase]
        proposals = []
        for found in candidates(self.detector, features, predictions, image_sizes, threshold, topk):
            # Where they are not finite, the losses say why.
            found = found[found.pred_boxes.tensor.isfinite().all(dim=1)]
            found.pred_boxes.clip(found.image_size)
            found = found[found.pred_boxes.nonempty(threshold=self.min_box_size)]
            found = apply_nms(found, self.detector.test_nms_thresh, self.post_nms_topk[phase])
            proposal = Instances(found.image_size, proposal_boxes=found.pred_boxes)
            proposal.objectness_logits = found.scores.logit(eps=_EPSILON)
            proposals.append(proposal)
        return proposals


def of_one_class(objects: Instances) -> Instances:
    """The boxes of objects, as the first stage is trained with them."""
    classes = torch.zeros_like(objects.gt_classes)
    return Instances(objects.image_size, gt_boxes=objects.gt_boxes, gt_classes=classes)


def _build_detector(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> FreeAnchor:
    """The FreeAnchor of one class that a config of two stages asks for, without a backbone."""
    keys, dense, names = cfg.MODEL.FREEANCHOR, cfg.MODEL.RETINANET, cfg.MODEL.RPN.IN_FEATURES
    for key in ("IGNORE_REGIONS", "INCLUSIVE_CORNERS"):
        if keys[key]:
            raise FreeAnchorError(
                f"MODEL.FREEANCHOR.{key} is of one-stage models: Detectron2's ROI heads do not "
                "have it, so leave it out"
            )
    shapes = [input_shape[name] for name in names]
    anchor_generator = build_anchor_generator(cfg, shapes)
    (num_anchors,) = {*anchor_generator.num_cell_anchors}
    detector: FreeAnchor = FreeAnchor(
        backbone=nn.Identity(),
        head=RetinaNetHead(
            input_shape=shapes,
            num_classes=1,
            num_anchors=num_anchors,
            conv_dims=[shapes[0].channels] * dense.NUM_CONVS,
            norm=dense.NORM,
            prior_prob=dense.PRIOR_PROB,
        ),
        head_in_features=names,
        anchor_generator=anchor_generator,
        box2box_transform=Box2BoxTransform(weights=dense.BBOX_REG_WEIGHTS),
        anchor_matcher=None,
        num_classes=1,
        focal_loss_alpha=dense.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=dense.FOCAL_LOSS_GAMMA,
        smooth_l1_beta=dense.SMOOTH_L1_LOSS_BETA,
        box_reg_loss_type=dense.BBOX_REG_LOSS_TYPE,
        test_score_thresh=dense.SCORE_THRESH_TEST,
        test_nms_thresh=cfg.MODEL.RPN.NMS_THRESH,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        pre_anchor_topk=keys.PRE_ANCHOR_TOPK,
        bbox_threshold=keys.BBOX_THRESHOLD,
        bbox_reg_weight=keys.BBOX_REG_WEIGHT,
        normalizer=keys.NORMALIZER,
        config=cfg.clone(),
    )
    return detector
