"""Config keys of FreeAnchor."""

from detectron2.config import CfgNode


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
