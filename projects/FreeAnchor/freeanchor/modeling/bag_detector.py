"""What FreeAnchor and LTM share: a RetinaNet whose objects have bags of candidates."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from ..layers import iou_topk, take
from ..layers.iou_losses import IOU_LOSSES, iou_loss
from ..layers.levels import at_least_float32
from ..layers.losses import bag_logit
from ..layers.matching import (
    BoxCoding,
    Objects,
    decode_boxes,
    encode_boxes,
    matched_log_probability,
)
from ..layers.regions import ignored_anchors, without_ignored
from .anchors import RoundedAnchorGenerator, generate_anchors
from .backbone import check_top_block
from .bags import BagLosses, Bags, Matching, Predictions
from .host_and_device import DelayedScalars, to_device
from .inclusive_corners import from_inclusive_corners, to_inclusive_corners
from .inference import detect
from .normalizer import Normalizer

__all__ = ["BagDetector", "box_coding"]

_FIRST_LOGGED = "freeanchor/objects_per_image"
# Keys of MODEL.FREEANCHOR that are arguments of the same names.
_OPTIONS = (
    *("PRE_ANCHOR_TOPK", "BBOX_THRESHOLD", "BBOX_REG_WEIGHT"),
    *("INCLUSIVE_CORNERS", "IGNORE_REGIONS", "NORMALIZER"),
)
# As Detectron2's RetinaNet assigns anchors.
_RETINANET_MATCHER = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)


def box_coding(transform: Any) -> BoxCoding | None:
    """How the deltas of a model's `box2box_transform` describe boxes, see `decode_boxes`."""
    if isinstance(transform, Box2BoxTransformLinear):
        return None
    return BoxCoding(tuple(transform.weights), transform.scale_clamp)


class BagDetector(RetinaNet):
    """A RetinaNet in which each object has a bag of anchors, and a likelihood of each of them.

    Losses are those of the methods that derive from it: :class:`freeanchor.modeling.FreeAnchor` and
    :class:`freeanchor.modeling.LTM`.
    """

    @configurable
    def __init__(
        self,
        *,
        pre_anchor_topk: int = 50,
        bbox_threshold: float = 0.6,
        bbox_reg_weight: float = 0.75,
        inclusive_corners: bool = False,
        ignore_regions: bool = False,
        config: CfgNode | None = None,
        normalizer: str = "global",
        **kwargs: Any,
    ) -> None:
        """Build the model from its parts.

        Args:
            pre_anchor_topk: number of anchors in the bag of an object.
            bbox_threshold: IoU at which P{a in A+} starts to rise, for FreeAnchor; above it, an
                object is logged as localised.
            bbox_reg_weight: weight of the localisation loss in the matched probability.
            inclusive_corners: whether boxes end on their last pixel where they are resized with
                their image, as in the paper's repository. Inputs and outputs are Detectron2's.
            ignore_regions: whether anchors that predict a box in an ignore region (a crowd) have no
                negative loss, instead of being background.
            config: what the model was built with, if with a config. Weights that need another one
                are refused.
            normalizer: whose objects the losses are divided by, see :class:`Normalizer`.
            kwargs: see :class:`detectron2.modeling.RetinaNet`. `focal_loss_alpha` weighs the
                positive against the negative loss, for FreeAnchor, `focal_loss_gamma` focuses the
                negative one. `box_reg_loss_type` is "smooth_l1", "iou" or "giou".

        Raises:
            ValueError: a value is out of its range.
        """
        super().__init__(**kwargs)
        if pre_anchor_topk < 1:
            raise ValueError(f"PRE_ANCHOR_TOPK must be at least 1, got {pre_anchor_topk}")
        if not 0 <= bbox_threshold < 1:
            raise ValueError(f"BBOX_THRESHOLD must be in [0, 1), got {bbox_threshold}")
        types = IOU_LOSSES if self._box_coding is None else ("smooth_l1", *IOU_LOSSES)
        if self.box_reg_loss_type not in types:
            raise ValueError(
                f"BBOX_REG_LOSS_TYPE must be one of {', '.join(types)}, which the likelihood can "
                f"be made of, got {self.box_reg_loss_type}"
            )
        if self.focal_loss_gamma < 1:
            raise ValueError(f"FOCAL_LOSS_GAMMA must be at least 1, got {self.focal_loss_gamma}")
        if self.max_detections_per_image < 1:  # -1 would leave out the last one
            raise ValueError(
                f"DETECTIONS_PER_IMAGE must be at least 1, got {self.max_detections_per_image}"
            )
        self.pre_anchor_topk = pre_anchor_topk
        self.bbox_threshold = bbox_threshold
        self.bbox_reg_weight = bbox_reg_weight
        self._delayed_scalars = DelayedScalars()
        self.inclusive_corners = inclusive_corners
        self.ignore_regions = ignore_regions
        self._regions: list[Tensor | None] = []  # of the images of the batch
        self.config = config
        self.normalizer = Normalizer(normalizer)
        if inclusive_corners:
            self.register_forward_pre_hook(to_inclusive_corners)
            self.register_forward_hook(from_inclusive_corners)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        ret: dict[str, Any] = super().from_config(cfg)
        check_top_block(cfg, ret["backbone"])
        ret["anchor_matcher"] = None  # objects choose their anchors, no IoU rule does
        ret["config"] = cfg.clone()
        return {**ret, **{name.lower(): cfg.MODEL.FREEANCHOR[name] for name in _OPTIONS}}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        if self.training:
            batched_inputs = to_device(batched_inputs, self.device, self.num_classes)
            if self.ignore_regions:
                self._regions = [x.get("ignore_regions") for x in batched_inputs]
        return super().forward(batched_inputs)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        pred_logits, pred_anchor_deltas = self.by_anchor(predictions)
        anchors = generate_anchors(self.anchor_generator, features)
        # Who has losses of an own with the stable signature need not know of regions.
        regions = [self._regions] if self.ignore_regions else []
        return self.losses(anchors, pred_logits, pred_anchor_deltas, gt_instances, *regions)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect, see :func:`freeanchor.modeling.detect`."""
        return detect(self, features, predictions, images.image_sizes)

    def by_anchor(self, predictions: list[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Views (N, H, W, A, .) of what the head computed, in whatever memory layout."""
        for levels, depth in zip(predictions, (self.num_classes, 4)):
            yield [x.unflatten(1, (-1, depth)).permute(0, 3, 4, 1, 2) for x in levels]

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_instances: list[Instances],
        ignore_regions: Sequence[Tensor | None] = (),
    ) -> dict[str, Tensor]:
        """The losses of a batch, in float32 or better.

        Logs to the current `EventStorage` in a training step: in training mode, with gradients, and
        of each iteration the first time, so that a hook that computes a validation loss does not
        enter the curves.

        Args:
            anchors: per level, (Hi * Wi * A) anchors, shared by all images.
            pred_logits: per level, (N, Hi * Wi * A, C) class logits, or (N, Hi, Wi, A, C), in any
                memory layout. The latter makes the search for bags faster.
            pred_anchor_deltas: per level, (N, Hi * Wi * A, 4) or (N, Hi, Wi, A, 4) deltas.
            gt_instances: N instances with `gt_boxes` and `gt_classes`, possibly none in an image.
            ignore_regions: N times (G, 4) boxes, or None; see :mod:`freeanchor.layers.regions`.

        Returns:
            Scalars whose names begin with "loss_". They stay in the graph of both predictions for a
            batch without any object too, so that every parameter of the head gets a gradient and
            distributed training does not wait for one.
        """
        with torch.autocast(pred_logits[0].device.type, enabled=False):
            # Of one dtype, if the head gives two.
            dtype = torch.promote_types(pred_logits[0].dtype, pred_anchor_deltas[0].dtype)
            pred_logits, pred_anchor_deltas = (
                [x.to(dtype) for x in levels] for levels in (pred_logits, pred_anchor_deltas)
            )
            bags = self._bags(anchors, pred_logits, pred_anchor_deltas, gt_instances)
            num_objects = self.normalizer(gt_instances, bags.anchors.device).to(bags.anchors.dtype)
            background = pred_logits
            if any(x is not None and len(x) for x in ignore_regions):
                masks = ignored_anchors(
                    pred_anchor_deltas, bags.levels, ignore_regions, self._box_coding
                )
                background = without_ignored(pred_logits, masks)
            predictions = Predictions(pred_logits, background, pred_anchor_deltas)
            found = self._bag_losses(bags, predictions, num_objects)

        if not torch.compiler.is_compiling():  # a log is no tensor
            self._log_matching(found, len(gt_instances))
        return found.losses

    @abstractmethod
    def _bag_losses(self, bags: Bags, predictions: Predictions, num_objects: Tensor) -> BagLosses:
        """The losses of bags, divided by the scalar number of objects."""

    def _bag_logits(self, bags: Bags, predictions: Predictions, of_background: Tensor) -> Tensor:
        """(M, K) logits of the objects' classes, given those of the background there."""
        if predictions.background is predictions.logits:
            return of_background
        return take(predictions.logits, self._pairs(bags))  # objects in a region keep their bags

    def _pairs(self, bags: Bags) -> Tensor:
        """(M, K) indices of the logits of the objects' classes at their bags, of (N, R, C)."""
        pairs: Tensor = bags.row * self.num_classes + bags.objects.classes[:, None]
        return pairs

    @property
    def _box_coding(self) -> BoxCoding | None:
        return box_coding(self.box2box_transform)

    def _bags(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_instances: list[Instances],
    ) -> Bags:
        """The search for bags (paper, section 3.2); arguments as of :meth:`losses`."""
        dtype = at_least_float32(pred_anchor_deltas)
        classes = [x.gt_classes for x in gt_instances]
        objects = Objects(
            torch.cat([x.gt_boxes.tensor for x in gt_instances]).to(dtype),
            torch.cat(classes),
            torch.cat([torch.full_like(x, i) for i, x in enumerate(classes)]),
        )
        levels = [x.tensor.to(dtype) for x in anchors]
        if type(self.anchor_generator) in (DefaultAnchorGenerator, RoundedAnchorGenerator):
            levels = [x.view(*logits.shape[1:-1], 4) for x, logits in zip(levels, pred_logits)]
        bag = self._search(levels, objects.boxes)  # (M, K)
        row = objects.images[:, None] * sum(len(x) for x in anchors) + bag
        index = bag[..., None] * 4 + torch.arange(4, device=bag.device)
        return Bags(levels, objects, row, take([x[None] for x in levels], index))

    def _search(self, levels: list[Tensor], boxes: Tensor) -> Tensor:
        """(M, K) indices of the anchors in the bags of (M, 4) boxes."""
        return iou_topk(levels, boxes, self.pre_anchor_topk)

    def _bag_deltas(self, bags: Bags, deltas: list[Tensor]) -> Tensor:
        """(M, K, 4) deltas at the anchors of the bags."""
        return take(deltas, bags.row[..., None] * 4 + torch.arange(4, device=bags.row.device))

    def _log_prob(self, bags: Bags, bag_logits: Tensor, bag_deltas: Tensor) -> Tensor:
        """(M, K) logarithm of the matched probabilities, of what was predicted for the bags."""
        boxes, coding = bags.objects.boxes[:, None], self._box_coding
        if self.box_reg_loss_type == "smooth_l1":
            assert coding is not None
            targets = encode_boxes(boxes, bags.anchors, coding.weights)
            weight, beta = self.bbox_reg_weight, self.smooth_l1_beta
            return matched_log_probability(bag_logits, bag_deltas, targets, weight, beta)
        predicted = decode_boxes(bag_deltas, bags.anchors, coding)
        distance = iou_loss(predicted, boxes, self.box_reg_loss_type)
        log_prob: Tensor = F.logsigmoid(bag_logits) - self.bbox_reg_weight * distance
        return log_prob

    @torch.no_grad()
    def match(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_instances: list[Instances],
    ) -> list[Matching]:
        """Match objects as :meth:`losses` does, and as RetinaNet would, to look at it.

        Args: as of :meth:`losses`.

        Returns:
            The matching of each image.
        """
        with torch.autocast(pred_logits[0].device.type, enabled=False):
            bags = self._bags(anchors, pred_logits, pred_anchor_deltas, gt_instances)
            bag_logits = take(pred_logits, self._pairs(bags))
            bag_deltas = self._bag_deltas(bags, pred_anchor_deltas)
            prob = self._log_prob(bags, bag_logits, bag_deltas).exp()
        all_anchors = Boxes.cat(anchors)
        counts = [len(x) for x in gt_instances]
        result = []
        for instances, bag_anchors, bag_prob in zip(
            gt_instances, bags.anchors.split(counts), prob.split(counts)
        ):
            iou = pairwise_iou(instances.gt_boxes, all_anchors)  # (M, R)
            objects, labels = _RETINANET_MATCHER(iou)
            if self._box_coding is None:  # points have no IoU
                labels.zero_()
            chosen = [((labels == 1) & (objects == i)).nonzero()[:, 0] for i in range(len(iou))]
            result.append(
                Matching(
                    instances.gt_boxes.tensor,
                    bag_anchors,
                    bag_prob,
                    [all_anchors.tensor[index] for index in chosen],
                    [iou[i, index] for i, index in enumerate(chosen)],
                )
            )
        return result

    def _training_storage(self) -> EventStorage | None:
        """Where a training step logs, None in what is none, see :meth:`losses`."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        try:
            storage: EventStorage = get_event_storage()
        except AssertionError:  # there is none
            return None
        _, iteration = storage.latest().get(_FIRST_LOGGED, (0.0, -1))
        return None if iteration == storage.iter else storage

    def _log_matching(self, found: BagLosses, num_images: int) -> None:
        """What tells a user whether matching works, to the EventStorage."""
        storage = self._training_storage()
        if storage is None:
            return
        log_prob, positive = found.log_prob.detach(), found.positive.detach()
        storage.put_scalar(_FIRST_LOGGED, len(positive) / num_images)
        if len(positive) == 0:
            return
        # The share of each anchor in the likelihood of its bag, see `positive_bag_loss`.
        share = bag_logit(log_prob).softmax(dim=1)
        values = {
            "freeanchor/bag_likelihood": (-positive).exp().mean(),
            "freeanchor/anchors_per_bag": (1 / share.square().sum(dim=1)).mean(),
            "freeanchor/localized_objects": (found.max_iou > self.bbox_threshold)
            .to(share.dtype)
            .mean(),
        }
        self._delayed_scalars.put(list(values), torch.stack(list(values.values())))
