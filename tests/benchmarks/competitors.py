"""What the losses are compared with: FreeAnchor as others compute it.

A loss here takes the model whose settings it shares, the features (for their sizes), what the head
computed, `[logits, deltas]` of L tensors (N, A * C or A * 4, H, W) each, and the objects, and gives
the sum of the losses. Detectron2's RetinaNet needs no code of its own.
"""

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, pairwise_iou


def straightforward_loss(model, features, predictions, instances):
    """The paper's formulas on dense tensors, with autograd: the way of its official code.

    As there: all levels are permuted and concatenated, IoUs are (M, R) matrices, P{a in A+} is a
    dense (R, C) tensor per image, and probabilities go through `binary_cross_entropy`. Where the
    official code takes detours over sparse tensors to fill P{a in A+}, this is faster.
    """
    anchors = Boxes.cat(model.anchor_generator(features))  # (R, 4)
    logits, deltas = (
        torch.cat(levels, dim=1)  # (N, R, .)
        for levels in model._transpose_dense_predictions(predictions, [model.num_classes, 4])
    )
    cls_prob = logits.sigmoid()
    box_prob = torch.stack(
        [_dense_box_prob(model, anchors, d, objects) for d, objects in zip(deltas, instances)]
    )
    positive = torch.cat(
        [
            _positive_loss(model, anchors, p, d, objects)
            for p, d, objects in zip(cls_prob, deltas, instances)
        ]
    )
    background = cls_prob * (1 - box_prob)
    negative = background**model.focal_loss_gamma * F.binary_cross_entropy(
        background, torch.zeros_like(background), reduction="none"
    )
    num_objects = max(1, len(positive))
    alpha = model.focal_loss_alpha
    return alpha * positive.sum() / num_objects + (1 - alpha) * negative.sum() / (
        num_objects * model.pre_anchor_topk
    )


@torch.no_grad()
def _dense_box_prob(model, anchors, deltas, objects):
    """P{a in A+} of an image, (R, C)."""
    boxes = model.box2box_transform.apply_deltas(deltas, anchors.tensor)
    iou = pairwise_iou(objects.gt_boxes, Boxes(boxes))  # (M, R)
    threshold = model.bbox_threshold
    highest = iou.amax(dim=1, keepdim=True).clamp(min=threshold + 1e-6)
    prob = ((iou - threshold) / (highest - threshold)).clamp(0, 1)
    # The maximum over the objects of a class.
    return iou.new_zeros(len(boxes), model.num_classes).index_reduce_(
        1, objects.gt_classes, prob.t(), "amax"
    )


def _positive_loss(model, anchors, cls_prob, deltas, objects):
    """-log Mean-max of the bag of each object of an image, (M,)."""
    (bag,) = torch_bags(anchors, [objects.gt_boxes], model.pre_anchor_topk)
    gt_boxes = objects.gt_boxes.tensor.repeat_interleave(bag.shape[1], dim=0)
    target = model.box2box_transform.get_deltas(anchors.tensor[bag].flatten(0, 1), gt_boxes)
    distance = F.smooth_l1_loss(
        deltas[bag], target.view(*bag.shape, 4), reduction="none", beta=model.smooth_l1_beta
    ).sum(dim=-1)
    prob = cls_prob[bag, objects.gt_classes[:, None]] * (-model.bbox_reg_weight * distance).exp()
    weight = 1 / (1 - prob).clamp(min=1e-12)
    mean_max = (weight * prob).sum(dim=1) / weight.sum(dim=1)
    mean_max = mean_max.clamp(max=1)  # it may round to more, which the next line refuses
    return F.binary_cross_entropy(mean_max, torch.ones_like(mean_max), reduction="none")


def torch_bags(anchors, gt_boxes, k):
    """Bags as everyone computes them: image by image, the IoUs of all anchors, then top-k."""
    return [pairwise_iou(x, anchors).topk(k, dim=1, sorted=False).indices for x in gt_boxes]


def mmdetection_loss(device):
    """The loss of MMDetection's `FreeAnchorRetinaHead`, written for its version 3.3."""
    from mmdet.models.dense_heads import FreeAnchorRetinaHead
    from mmengine.structures import InstanceData

    head = FreeAnchorRetinaHead(
        num_classes=80,
        in_channels=256,
        anchor_generator={
            "type": "AnchorGenerator",
            "octave_base_scale": 4,
            "scales_per_octave": 3,
            "ratios": [0.5, 1.0, 2.0],
            "strides": [8, 16, 32, 64, 128],
            "scale_major": False,  # anchors in the order of Detectron2: the same raw outputs
        },
        bbox_coder={
            "type": "DeltaXYWHBBoxCoder",
            "target_means": [0.0, 0.0, 0.0, 0.0],
            "target_stds": [0.1, 0.1, 0.2, 0.2],
        },
        loss_bbox={"type": "SmoothL1Loss", "beta": 0.11, "loss_weight": 0.75},
    ).to(device)

    def loss(model, features, predictions, instances):
        objects = [InstanceData(bboxes=x.gt_boxes.tensor, labels=x.gt_classes) for x in instances]
        metas = [{"img_shape": x.image_size, "pad_shape": x.image_size} for x in instances]
        return sum(head.loss_by_feat(*predictions, objects, metas).values())

    return loss
