"""What has weights or a config. Importing it registers the names that configs have."""

from .anchors import RoundedAnchorGenerator
from .backbone import build_freeanchor_resnet_fpn_backbone
from .bag_detector import BagDetector, box_coding
from .bags import Matching
from .inference import apply_nms, candidates, detect
from .kinds import dense_detector, has_bags, is_one_stage, without_ddp
from .ltm import LTM
from .match import match_inputs
from .meta_arch import FreeAnchor
from .optimize import choose_device, fold_batch_norm, inference_settings, optimize_inference
from .proposals import FreeAnchorRPN
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone
from .tta import MultiScaleTest

__all__ = [
    "LTM",
    "BagDetector",
    "FreeAnchor",
    "FreeAnchorRPN",
    "Matching",
    "MultiScaleTest",
    "RoundedAnchorGenerator",
    "TimmBackbone",
    "apply_nms",
    "box_coding",
    "build_freeanchor_resnet_fpn_backbone",
    "build_timm_fpn_backbone",
    "candidates",
    "choose_device",
    "dense_detector",
    "detect",
    "fold_batch_norm",
    "has_bags",
    "inference_settings",
    "is_one_stage",
    "match_inputs",
    "optimize_inference",
    "without_ddp",
]
