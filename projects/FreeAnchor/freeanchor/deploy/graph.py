"""A detector as one function of tensors, for other runtimes to have.

Every step has a fixed number of results, so that sizes of batch and image may differ from call to
call: absent candidates and detections have score 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import RetinaNet
from torch import Tensor, nn

from ..layers.matching import decode_boxes
from ..modeling import box_coding

__all__ = ["Detector"]


class Detector(nn.Module):
    """From pixels to boxes.

    Args of a call: `images`, (N, H, W, 3) uint8 in the order BGR, of any size.

    Returns of a call, with NMS and K = `max_detections_per_image`:

    - `boxes`: (N, K, 4), x1, y1, x2, y2 in pixels of the image;
    - `scores`: (N, K), the highest first, and 0 where there is no more detection;
    - `labels`: (N, K) int64 index of the class, and -1 there.

    Without NMS, and of all R anchors: `boxes` (N, R, 4), not clipped to the image, and `scores`
    (N, R, C).
    """

    def __init__(self, model: RetinaNet, is_rgb: bool, nms: bool, for_onnx: bool) -> None:
        """Wrap a model, in evaluation mode.

        Args:
            model: a RetinaNet or FreeAnchor.
            is_rgb: whether it was trained on RGB.
            nms: whether to return detections, or what all anchors predict.
            for_onnx: whether NMS is to be an operator of ONNX, or torchvision's.
        """
        super().__init__()
        self.model, self.is_rgb, self.nms, self.for_onnx = model, is_rgb, nms, for_onnx
        self.stride = max(1, model.backbone.size_divisibility)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect, see the class."""
        model = self.model
        if not self.for_onnx:  # whose runtimes check it
            images = _check_type(images)
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        if self.is_rgb:
            pixels = pixels[:, [2, 1, 0]]
        height, width = images.shape[1], images.shape[2]
        pixels = (pixels - model.pixel_mean) / model.pixel_std
        # Behind the normalisation, as in Detectron2.
        right, bottom = (
            (x + self.stride - 1) // self.stride * self.stride - x for x in (width, height)
        )
        pixels = F.pad(pixels, (0, right, 0, bottom))
        features = model.backbone(pixels)
        logits, deltas = model.head([features[name] for name in model.head_in_features])
        levels = [self._level(i, *x) for i, x in enumerate(zip(logits, deltas, strict=True))]
        boxes, scores, *labels = (torch.cat(x, dim=1) for x in zip(*levels, strict=True))
        if not self.nms:
            return boxes, scores
        return self._select(boxes, scores, labels[0], height, width)

    def _level(self, level: int, logits: Tensor, deltas: Tensor) -> tuple[Tensor, ...]:
        """Boxes (N, k, 4), scores (N, k) and classes (N, k) of the candidates of a level."""
        model = self.model
        num_images, width = logits.shape[0], logits.shape[3]
        logits = logits.reshape(num_images, -1, model.num_classes, logits.shape[2] * width)
        deltas = deltas.reshape(num_images, -1, 4, logits.shape[3])
        if not self.nms:
            index = torch.arange(logits.shape[1] * logits.shape[3], device=logits.device)
            index = index.expand(num_images, -1)
            scores = logits.permute(0, 1, 3, 2).flatten(1, 2).sigmoid()
            return self._decode(level, deltas, index, width), scores
        # The best k lie at those k anchors whose best classes are the best.
        k = model.test_topk_candidates
        best, index = _fill(logits.amax(2).flatten(1), k).topk(k)
        index = index.clamp(max=logits.shape[1] * logits.shape[3] - 1)
        classes = _pick(logits, index)
        # Those that only fill are no candidates.
        classes = classes.where(best[..., None] > -torch.inf, -torch.inf)
        scores, chosen = classes.flatten(1).topk(k)
        scores = scores.sigmoid()
        anchor = torch.div(chosen, model.num_classes, rounding_mode="floor")
        labels = chosen - anchor * model.num_classes
        boxes = self._decode(level, deltas, index.gather(1, anchor), width)
        return boxes, scores.where(scores > model.test_score_thresh, 0.0), labels

    def _decode(self, level: int, deltas: Tensor, index: Tensor, width: int) -> Tensor:
        """Boxes (N, k, 4) of anchors: (N, k) indices in the order of the memory of deltas."""
        generator, transform = self.model.anchor_generator, self.model.box2box_transform
        coding = box_coding(transform)
        shape = torch.div(index, deltas.shape[3], rounding_mode="floor")
        cell = index - shape * deltas.shape[3]
        row = torch.div(cell, width, rounding_mode="floor")
        center = torch.stack([cell - row * width, row], dim=2) + generator.offset
        center = center.to(torch.float32) * generator.strides[level]
        anchors = torch.cat([center, center], dim=2) + list(generator.cell_anchors)[level][shape]
        return decode_boxes(_pick(deltas, index), anchors, coding)

    def _select(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per-class NMS, and the best of each image, clipped to it."""
        model = self.model
        nms = _onnx_nms if self.for_onnx else _torchvision_nms
        scores = nms(boxes, scores, labels, model.num_classes, model.test_nms_thresh)
        k = model.max_detections_per_image
        scores, best = _fill(scores, k, 0.0).topk(k)
        best = best.clamp(max=boxes.shape[1] - 1)
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=2)
        # Nothing is left of a box beside the image: those behind it move up.
        is_empty = (boxes[..., 2] <= boxes[..., 0]) | (boxes[..., 3] <= boxes[..., 1])
        scores, order = scores.where(~is_empty, 0.0).topk(k)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        labels = labels.gather(1, best.gather(1, order))
        return boxes * (scores > 0)[..., None], scores, labels.where(scores > 0, -1)


@torch.jit.script_if_tracing  # part of the file: else fractions of 255 would be detected in
def _check_type(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise ValueError("images must be uint8, from 0 to 255")
    return images


def _fill(x: Tensor, k: int, value: float = -torch.inf) -> Tensor:
    """(N, n) with k more columns, so that there are always k to choose."""
    return torch.cat([x, x.new_full((1, k), value).expand(x.shape[0], -1)], dim=1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """(N, k, D) of (N, A, D, H * W), for (N, k) indices a * H * W + cell."""
    depth, cells = x.shape[2], x.shape[3]
    anchor = torch.div(index, cells, rounding_mode="floor")
    first = anchor * (depth * cells) + (index - anchor * cells)
    offset = torch.arange(depth, device=x.device) * cells
    flat = (first[..., None] + offset).flatten(1)
    return x.flatten(1).gather(1, flat).view(x.shape[0], -1, depth)


def _torchvision_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, threshold: float
) -> Tensor:
    """(N, n) scores, 0 where a box is suppressed by one of its image and class."""
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    group = (image * num_classes + labels).flatten()
    index = (scores.flatten() > 0).nonzero()[:, 0]
    # All groups in one call, far from each other: exact in float64.
    candidates = boxes.flatten(0, 1)[index].to(torch.float64)
    span = candidates.abs().sum() + 1
    candidates = candidates + 2 * span * group[index, None]
    keep = index[torchvision.ops.nms(candidates, scores.flatten()[index].double(), threshold)]
    is_kept = torch.zeros_like(scores.flatten()).index_fill(0, keep, 1.0)
    return scores * is_kept.view_as(scores)


def _onnx_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, threshold: float
) -> Tensor:
    """The same, for ONNX."""
    classes = torch.arange(num_classes, device=boxes.device)[:, None]
    by_class = torch.where(labels[:, None] == classes, scores[:, None], 0.0)  # (N, C, n)
    image, _, index = _NonMaxSuppression.apply(boxes, by_class, threshold).unbind(1)
    number = boxes.shape[1]
    is_kept = (
        torch.zeros_like(scores)
        .flatten()
        .scatter(0, image * number + index, torch.ones_like(image, dtype=scores.dtype))
    )
    return scores * is_kept.view(-1, number)


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator: rows (image, class, box) of what is kept of (N, n, 4) and (N, C, n)."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        rows = []
        for i, classes in enumerate(scores):
            for c, score in enumerate(classes):
                index = (score > 0).nonzero()[:, 0]
                keep = index[torchvision.ops.nms(boxes[i, index], score[index], threshold)]
                rows.append(F.pad(keep[:, None], (2, 0)) + torch.tensor([i, c, 0]))
        return torch.cat(rows)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, threshold: float) -> Any:
        limit = g.op("Constant", value_t=torch.tensor([2**31 - 1]))
        thresholds = [
            g.op("Constant", value_t=torch.tensor([x], dtype=torch.float32))
            for x in (threshold, 0.0)
        ]
        return g.op("NonMaxSuppression", boxes, scores, limit, *thresholds)
