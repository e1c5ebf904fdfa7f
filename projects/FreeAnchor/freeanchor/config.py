"""Config keys of FreeAnchor."""

from pathlib import Path

from detectron2.config import CfgNode

# The configs of the repository, in the package: files and folders by their names there.
CONFIGS = Path(__file__).parent / "configs"


def add_freeanchor_config(cfg: CfgNode) -> None:
    """Add the keys of FreeAnchor that `MODEL.RETINANET` does not have.

    Everything else (focal loss, Smooth L1, box weights, prior, test) is read from `MODEL.RETINANET`
    and set in `configs/Base-FreeAnchor.yaml`.

    Args:
        cfg: a Detectron2 config, changed in place.
    """
    cfg.MODEL.FREEANCHOR = CfgNode()
    # Number of anchors in the bag of an object: those with the highest IoU.
    cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK = 50
    # IoU of a predicted box with an object from which its anchor stops being pure background.
    cfg.MODEL.FREEANCHOR.BBOX_THRESHOLD = 0.6
    # Weight of the localisation loss inside exp(), which makes it a probability.
    cfg.MODEL.FREEANCHOR.BBOX_REG_WEIGHT = 0.75

    # How models of other implementations differ from Detectron2's RetinaNet; see also
    # RoundedAnchorGenerator, a name for MODEL.ANCHOR_GENERATOR.NAME.
    # Feature that P6 is computed from: "res5" (Detectron2, MMDetection) or "p5" (the paper's
    # repository). This and the next key need the backbone build_freeanchor_resnet_fpn_backbone.
    cfg.MODEL.FREEANCHOR.P6_IN_FEATURE = "res5"
    # Whether P7 is computed from ReLU(P6) or, as in MMDetection, from P6.
    cfg.MODEL.FREEANCHOR.P7_RELU = True
    # Whether boxes end on their last pixel, as in the paper's repository, instead of behind it.
    # The two conventions differ by a fraction of a pixel where an image is resized.
    cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS = False

    # Also evaluate NMS recall (paper, section 4.2).
    cfg.TEST.NMS_RECALL = False
    # Longest side of an image in TEST.AUG, over its shortest as in MIN_SIZES; 0 for MAX_SIZE alone.
    cfg.TEST.AUG.MAX_SIZE_RATIO = 0.0
