"""The meta-architecture: RetinaNet whose anchors are matched and trained by FreeAnchor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from ..layers import iou_topk, negative_bag_loss, take
from ..layers.losses import bag_logit, positive_bag_loss
from ..layers.matching import BoxCoding, Objects, encode_boxes, matched_log_probability
from ..layers.regions import ignored_anchors, without_ignored
from .anchors import RoundedAnchorGenerator
from .backbone import TopBlock
from .host_and_device import DelayedScalars, to_device
from .inclusive_corners import from_inclusive_corners, to_inclusive_corners
from .inference import detect
from .normalizer import Normalizer

__all__ = ["FreeAnchor", "Matching"]

_FIRST_LOGGED = "freeanchor/objects_per_image"
# As Detectron2's RetinaNet assigns anchors.
_RETINANET_MATCHER = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)


class Matching(NamedTuple):
    """How the M objects of an image are matched, for pictures.

    Attributes:
        boxes: (M, 4) objects.
        anchors: (M, K, 4) bags.
        prob: (M, K) matched probabilities P_ij^cls * P_ij^loc.
        assigned: per object, (n, 4) anchors that Detectron2's RetinaNet would train for it.
        assigned_iou: per object, (n,) their IoU with it.
    """

    boxes: Tensor
    anchors: Tensor
    prob: Tensor
    assigned: list[Tensor]
    assigned_iou: list[Tensor]


class _Bags(NamedTuple):
    """The bags of the M objects of a batch; indices as in :mod:`freeanchor.layers.matching`."""

    levels: list[Tensor]  # anchors, as the search takes them
    objects: Objects
    row: Tensor  # (M, K) of (N, R)
    anchors: Tensor  # (M, K, 4)


@META_ARCH_REGISTRY.register()
class FreeAnchor(RetinaNet):
    """FreeAnchor (NeurIPS 2019): RetinaNet with learned anchor matching.

    Backbone, head and anchors are Detectron2's RetinaNet, so its checkpoints load and detect as
    before. Anchor labelling and losses are replaced, and detections are found faster.
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
            bbox_threshold: IoU at which P{a in A+} starts to rise.
            bbox_reg_weight: weight of the localisation loss in the matched probability.
            inclusive_corners: whether boxes end on their last pixel where they are resized with
                their image, as in the paper's repository. Inputs and outputs are Detectron2's.
            ignore_regions: whether anchors that predict a box in an ignore region (a crowd) have no
                negative loss, instead of being background.
            config: what the model was built with, if with a config. Weights that need another one
                are refused.
            normalizer: whose objects the losses are divided by, see :class:`Normalizer`.
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
        keys = cfg.MODEL.FREEANCHOR
        is_default = keys.P6_IN_FEATURE == "res5" and keys.P7_RELU
        if not is_default and not isinstance(getattr(ret["backbone"], "top_block", None), TopBlock):
            raise ValueError(
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} ignores MODEL.FREEANCHOR."
                "P6_IN_FEATURE and P7_RELU: set it to build_freeanchor_resnet_fpn_backbone"
            )
        ret["anchor_matcher"] = None  # objects choose their anchors, no IoU rule does
        ret["pre_anchor_topk"] = cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK
        ret["bbox_threshold"] = cfg.MODEL.FREEANCHOR.BBOX_THRESHOLD
        ret["bbox_reg_weight"] = cfg.MODEL.FREEANCHOR.BBOX_REG_WEIGHT
        ret["inclusive_corners"] = cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS
        ret["ignore_regions"] = cfg.MODEL.FREEANCHOR.IGNORE_REGIONS
        ret["config"] = cfg.clone()
        ret["normalizer"] = cfg.MODEL.FREEANCHOR.NORMALIZER
        return ret

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
        # Views (N, H, W, A, .) of what the head computed, in whatever memory layout.
        pred_logits, pred_anchor_deltas = (
            [x.unflatten(1, (-1, depth)).permute(0, 3, 4, 1, 2) for x in levels]
            for levels, depth in zip(predictions, (self.num_classes, 4))
        )
        anchors = self.anchor_generator(features)
        # Who has losses of an own with the stable signature need not know of regions.
        regions = [self._regions] if self.ignore_regions else []
        return self.losses(anchors, pred_logits, pred_anchor_deltas, gt_instances, *regions)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect, see :func:`freeanchor.modeling.detect`."""
        return detect(self, features, predictions, images.image_sizes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_instances: list[Instances],
        ignore_regions: Sequence[Tensor | None] = (),
    ) -> dict[str, Tensor]:
        """The two bag losses of a batch (paper, section 3.3), in float32 or better.

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
            "loss_positive" and "loss_negative", scalars. They stay in the graph of both
            predictions for a batch without any object too, so that every parameter of the head
            gets a gradient and distributed training does not wait for one.
        """
        with torch.autocast(pred_logits[0].device.type, enabled=False):
            # Of one dtype, if the head gives two.
            dtype = torch.promote_types(pred_logits[0].dtype, pred_anchor_deltas[0].dtype)
            pred_logits, pred_anchor_deltas = (
                [x.to(dtype) for x in levels] for levels in (pred_logits, pred_anchor_deltas)
            )
            bags = self._bags(anchors, pred_logits, pred_anchor_deltas, gt_instances)
            num_objects = self.normalizer(gt_instances, bags.anchors.device).to(bags.anchors.dtype)
            index = bags.row * self.num_classes + bags.objects.classes[:, None]
            background = pred_logits
            is_ignoring = any(x is not None and len(x) for x in ignore_regions)
            if is_ignoring:
                masks = ignored_anchors(
                    pred_anchor_deltas, bags.levels, ignore_regions, self._box_coding
                )
                background = without_ignored(pred_logits, masks)
            negative, bag_logits, max_iou = negative_bag_loss(
                background,
                pred_anchor_deltas,
                bags.levels,
                bags.objects,
                index,
                self._box_coding,
                self.bbox_threshold,
                self.focal_loss_gamma,
                (1 - self.focal_loss_alpha) / (self.pre_anchor_topk * num_objects),
            )
            if is_ignoring:  # the objects in a region keep their bags
                bag_logits = take(pred_logits, index)
            log_prob = self._log_prob(bags, bag_logits, pred_anchor_deltas)
            positive = positive_bag_loss(log_prob)

        if not torch.compiler.is_compiling():  # a log is no tensor
            self._log_matching(log_prob, positive, max_iou, len(gt_instances))
        return {
            "loss_positive": positive.sum() * (self.focal_loss_alpha / num_objects),
            "loss_negative": negative,
        }

    @property
    def _box_coding(self) -> BoxCoding:
        transform = self.box2box_transform
        return BoxCoding(tuple(transform.weights), transform.scale_clamp)

    def _bags(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_instances: list[Instances],
    ) -> _Bags:
        """The search for bags (paper, section 3.2); arguments as of :meth:`losses`."""
        dtype = torch.promote_types(pred_anchor_deltas[0].dtype, torch.float32)
        classes = [x.gt_classes for x in gt_instances]
        objects = Objects(
            torch.cat([x.gt_boxes.tensor for x in gt_instances]).to(dtype),
            torch.cat(classes),
            torch.cat([torch.full_like(x, i) for i, x in enumerate(classes)]),
        )
        levels = [x.tensor.to(dtype) for x in anchors]
        if type(self.anchor_generator) in (DefaultAnchorGenerator, RoundedAnchorGenerator):
            levels = [x.view(*logits.shape[1:-1], 4) for x, logits in zip(levels, pred_logits)]
        bag = iou_topk(levels, objects.boxes, self.pre_anchor_topk)  # (M, K)
        row = objects.images[:, None] * sum(len(x) for x in anchors) + bag
        index = bag[..., None] * 4 + torch.arange(4, device=bag.device)
        return _Bags(levels, objects, row, take([x[None] for x in levels], index))

    def _log_prob(
        self, bags: _Bags, bag_logits: Tensor, pred_anchor_deltas: list[Tensor]
    ) -> Tensor:
        """(M, K) logarithm of the matched probabilities of the (M, K) logits of the bags."""
        coordinate = torch.arange(4, device=bags.row.device)
        return matched_log_probability(
            bag_logits,
            take(pred_anchor_deltas, bags.row[..., None] * 4 + coordinate),
            encode_boxes(bags.objects.boxes[:, None], bags.anchors, self._box_coding.weights),
            self.bbox_reg_weight,
            self.smooth_l1_beta,
        )

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
            index = bags.row * self.num_classes + bags.objects.classes[:, None]
            bag_logits = take(pred_logits, index)
            dtype = torch.promote_types(bag_logits.dtype, torch.float32)
            prob = self._log_prob(bags, bag_logits.to(dtype), pred_anchor_deltas).exp()
        all_anchors = Boxes.cat(anchors)
        counts = [len(x) for x in gt_instances]
        result = []
        for instances, bag_anchors, bag_prob in zip(
            gt_instances, bags.anchors.split(counts), prob.split(counts)
        ):
            iou = pairwise_iou(instances.gt_boxes, all_anchors)  # (M, R)
            objects, labels = _RETINANET_MATCHER(iou)
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

    @torch.no_grad()
    def match_inputs(self, batched_inputs: list[dict[str, Any]]) -> list[Matching]:
        """Match the objects of images, see :meth:`match`.

        Args:
            batched_inputs: images with objects, as training gets them.

        Returns:
            The matching of each image, in the size of the network's input.
        """
        features = self.backbone(self.preprocess_image(batched_inputs).tensor)
        features = [features[name] for name in self.head_in_features]
        logits, deltas = self._transpose_dense_predictions(
            self.head(features), [self.num_classes, 4]
        )
        objects = [x["instances"].to(self.device) for x in batched_inputs]
        return self.match(self.anchor_generator(features), logits, deltas, objects)

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

    def _log_matching(
        self, log_prob: Tensor, positive: Tensor, max_iou: Tensor, num_images: int
    ) -> None:
        """What tells a user whether matching works, to the EventStorage."""
        storage = self._training_storage()
        if storage is None:
            return
        log_prob, positive = log_prob.detach(), positive.detach()
        storage.put_scalar(_FIRST_LOGGED, len(positive) / num_images)
        if len(positive) == 0:
            return
        # The share of each anchor in the likelihood of its bag, see `positive_bag_loss`.
        share = bag_logit(log_prob).softmax(dim=1)
        values = {
            "freeanchor/bag_likelihood": (-positive).exp().mean(),
            "freeanchor/anchors_per_bag": (1 / share.square().sum(dim=1)).mean(),
            "freeanchor/localized_objects": (max_iou > self.bbox_threshold).to(share.dtype).mean(),
        }
        self._delayed_scalars.put(list(values), torch.stack(list(values.values())))
