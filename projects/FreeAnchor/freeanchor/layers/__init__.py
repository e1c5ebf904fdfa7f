"""Tensors in, tensors out: the mathematics of the paper, and its operators."""

from .ops import box_prob, iou_topk, negative_bag_loss, take

__all__ = ["box_prob", "iou_topk", "negative_bag_loss", "take"]
