"""NMS recall (paper, section 4.2): does NMS leave the box that localises an object?"""

import logging
import math
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from torch import Tensor, nn

from ..modeling import apply_nms, candidates, dense_detector
from .outcomes import truth_rows

__all__ = ["NMSRecallEvaluator"]

logger = logging.getLogger(__name__)


class NMSRecallEvaluator(DatasetEvaluator):
    """NMS recall (paper, section 4.2): what share of the objects that are found NMS leaves.

    As the paper's repository: of all detections with a score above 0.05, without limits on their
    number, those before and after a per-class NMS with IoU 0.5. NR_t is the number of objects
    whose largest IoU with any box, of any class, is above t after NMS, over the number before. It
    is evaluated in the model's own forward pass, at the cost of a second decoding.

    Results are in percent: "NR", the mean over t = 0.5, 0.55 .. 0.9, and "NR50" .. "NR90".
    Those of objects of which none is found are 0, and without objects they are NaN.
    """

    SCORE_THRESH = 0.05
    NMS_THRESH = 0.5
    IOU_THRESHS = tuple(x / 100 for x in range(50, 95, 5))
    _MOST_PAIRS = 2**24  # of boxes and objects at once, for memory

    def __init__(self, dataset_name: str, model: nn.Module) -> None:
        """Build the evaluator of a data set.

        Args:
            dataset_name: a registered data set; crowd regions are left out.
            model: the RetinaNet or FreeAnchor that is then evaluated.
        """
        self.model = dense_detector(model)
        self.objects = {x["image_id"]: _objects(x) for x in DatasetCatalog.get(dataset_name)}
        self._hook: Any = None
        self._candidates: list[Instances] = []
        self._overlaps: dict[Any, tuple[Tensor, Tensor]] = {}

    def reset(self) -> None:
        self._overlaps = {}
        if self._hook is None:
            self._hook = self.model.head.register_forward_hook(self._record)

    def _record(self, head: nn.Module, inputs: tuple[Any, ...], predictions: Any) -> None:
        # At once, as the model's inference changes the predictions in place.
        features = inputs[0]
        sizes = [(0, 0)] * len(features[0])  # known only in `process`
        self._candidates = list(
            candidates(self.model, features, predictions, sizes, self.SCORE_THRESH)
        )

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, found in zip(inputs, self._candidates, strict=True):
            height, width = image["image"].shape[-2:]
            size = image.get("height", height), image.get("width", width)
            objects = self.objects[image["image_id"]].clone()
            objects.clip(size)
            objects = objects[objects.nonempty()]
            before = Instances((height, width), **found.get_fields())
            before.pred_boxes.clip((height, width))
            after = apply_nms(before, self.NMS_THRESH)
            self._overlaps[image["image_id"]] = (
                self._largest_iou(objects, detector_postprocess(after, *size)),
                self._largest_iou(objects, detector_postprocess(before, *size)),
            )

    def _largest_iou(self, objects: Boxes, found: Instances) -> Tensor:
        """(M,) on the CPU, 0 without detections."""
        objects = objects.to(found.pred_boxes.device)
        largest = torch.zeros(len(objects), device=objects.device)
        for boxes in found.pred_boxes.tensor.split(
            max(1, self._MOST_PAIRS // max(1, len(objects)))
        ):
            if len(boxes):
                largest = largest.maximum(pairwise_iou(Boxes(boxes), objects).amax(dim=0))
        return largest.cpu()

    def evaluate(self) -> dict[str, dict[str, float]]:
        self._hook.remove()
        self._hook = None
        self._candidates = []
        overlaps: dict[Any, tuple[Tensor, Tensor]] = {}
        for part in comm.gather(self._overlaps):
            overlaps.update(part)
        if not comm.is_main_process():
            return {}
        after, before = (
            torch.cat([torch.zeros(0), *(x[kind] for x in overlaps.values())]).double()
            for kind in (0, 1)
        )
        recalls = [math.nan] * len(self.IOU_THRESHS)
        if len(before):  # there are objects
            recalls = [
                100 * float((after > t).sum() / (before > t).sum().clamp(min=1))
                for t in self.IOU_THRESHS
            ]
        results = {"NR": sum(recalls) / len(recalls)}
        for t, recall in zip(self.IOU_THRESHS, recalls):
            results[f"NR{round(100 * t)}"] = recall
        logger.info(f"NMS recall of {len(after)} objects:\n{create_small_table(results)}")
        return {"nms_recall": results}


def _objects(record: dict[str, Any]) -> Boxes:
    rows = truth_rows(record)
    rows = np.zeros((0, 6)) if rows is None else rows
    return Boxes(rows[rows[:, 5] == 0, :4])
