"""The meta-architecture of the NeurIPS paper."""

from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from ..layers import negative_bag_loss
from ..layers.losses import positive_bag_loss
from .bag_detector import BagDetector
from .bags import BagLosses, Bags, Predictions

__all__ = ["FreeAnchor"]


@META_ARCH_REGISTRY.register()
class FreeAnchor(BagDetector):
    """FreeAnchor (NeurIPS 2019): RetinaNet with learned anchor matching.

    Backbone, head and anchors are Detectron2's RetinaNet, so its checkpoints load and detect as
    before. Anchor labelling and losses are replaced, and detections are found faster. The losses
    are "loss_positive" and "loss_negative" (paper, section 3.3).
    """

    def _bag_losses(self, bags: Bags, predictions: Predictions, num_objects: Tensor) -> BagLosses:
        coding = self._box_coding
        assert coding is not None
        negative, of_background, max_iou = negative_bag_loss(
            predictions.background,
            predictions.deltas,
            bags.levels,
            bags.objects,
            self._pairs(bags),
            coding,
            self.bbox_threshold,
            self.focal_loss_gamma,
            (1 - self.focal_loss_alpha) / (self.pre_anchor_topk * num_objects),
        )
        bag_logits = self._bag_logits(bags, predictions, of_background)
        log_prob = self._log_prob(bags, bag_logits, self._bag_deltas(bags, predictions.deltas))
        positive = positive_bag_loss(log_prob)
        losses = {
            "loss_positive": positive.sum() * (self.focal_loss_alpha / num_objects),
            "loss_negative": negative,
        }
        return BagLosses(losses, log_prob, positive, max_iou)
