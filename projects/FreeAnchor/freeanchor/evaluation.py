"""What the paper measures: COCO AP, also of slender and crowded objects, and NMS recall."""

import contextlib
import io
import itertools
import json
import logging
import os
import warnings
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.layers import batched_nms
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from .inference import candidates, dense_detector

try:  # the same figures as pycocotools, much faster
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval

    COCO_API = "faster-coco-eval"
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    COCO_API = "pycocotools"

__all__ = ["COCO_API", "BoxEvaluator", "NMSRecallEvaluator", "aspect_ratios", "crowding"]

logger = logging.getLogger(__name__)

# Name and highest value of each part; the one before ends where the next begins.
ASPECT_RATIOS = (("<=2", 2.0), ("2..3", 3.0), ("3..5", 5.0), (">5", float("inf")))
CROWDING = (("0", 0.0), ("<=0.3", 0.3), (">0.3", 1.0))


def aspect_ratios(boxes: NDArray[Any]) -> NDArray[Any]:
    """Longer over shorter side of (M, 4) boxes, x y width height: (M,), at least 1."""
    sides = np.maximum(boxes[:, 2:], 1e-6)
    ratios: NDArray[Any] = sides.max(axis=1) / sides.min(axis=1)
    return ratios


def crowding(boxes: NDArray[Any]) -> NDArray[Any]:
    """Largest IoU of each of the (M, 4) boxes of an image with another one: (M,)."""
    iou = _iou(boxes, boxes)
    np.fill_diagonal(iou, 0)
    largest: NDArray[Any] = iou.max(axis=1, initial=0)
    return largest


def _iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """(M, N) IoU of (M, 4) and (N, 4) boxes, x y width height."""
    start = np.maximum(a[:, None, :2], b[None, :, :2])
    end = np.minimum((a[:, :2] + a[:, 2:])[:, None], (b[:, :2] + b[:, 2:])[None])
    intersection = np.clip(end - start, 0, None).prod(axis=2)
    union = a[:, 2:].prod(axis=1)[:, None] + b[:, 2:].prod(axis=1)[None] - intersection
    iou: NDArray[Any] = intersection / np.maximum(union, np.finfo(np.float64).tiny)
    return iou


class BoxEvaluator(COCOEvaluator):
    """Detectron2's `COCOEvaluator` for boxes, faster and with the parts that FreeAnchor is about.

    Besides "bbox", the results have "aspect_ratio" and "crowding": AP and AR (100 detections) of
    the objects whose longer side is so many times the shorter, and of those whose largest IoU with
    another object is in a range. As with COCO's sizes, other objects are ignored, and a detection
    that matches none counts where it belongs itself: by its own aspect ratio, and by the crowding
    of the object that it overlaps most (0 if it overlaps none).

    Into the output folder it writes `precision_recall.png` too.
    """

    def __init__(self, dataset_name: str, distributed: bool = True, output_dir: str | None = None):
        """Build the evaluator of a data set, see :class:`COCOEvaluator`."""
        super().__init__(dataset_name, ("bbox",), distributed, output_dir, use_fast_impl=False)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        detections = list(itertools.chain(*(x["instances"] for x in predictions)))
        contiguous = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", {})
        dataset_ids = {new: old for old, new in contiguous.items()}
        for x in detections:
            x["category_id"] = dataset_ids.get(x["category_id"], x["category_id"])
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as f:
                json.dump(detections, f)
        if not self._do_evaluation:
            logger.info("The data set has no annotations: the detections are only written")
            return
        logger.info(f"Evaluating {len(detections)} detections with {COCO_API}")
        truth = self._coco_api.dataset
        evaluated = self._evaluate(truth, detections, img_ids) if detections else None
        if evaluated is not None:
            evaluated.summarize()
        class_names = self._metadata.get("thing_classes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Detectron2's `logger.warn`
            self._results["bbox"] = self._derive_coco_results(evaluated, "bbox", class_names)
        for name, parts, values in (
            ("aspect_ratio", ASPECT_RATIOS, _by_aspect_ratio),
            ("crowding", CROWDING, _by_crowding),
        ):
            self._results[name] = self._parts(truth, detections, img_ids, parts, values)
            logger.info(f"By {name}:\n{create_small_table(self._results[name])}")
        if evaluated is not None and self._output_dir:
            figure = draw_precision_recall(evaluated.eval["precision"][..., 0, -1])
            figure.savefig(os.path.join(self._output_dir, "precision_recall.png"), dpi=100)

    def _evaluate(
        self,
        truth: dict[str, Any],
        detections: list[dict[str, Any]],
        img_ids: Any,
        parts: tuple[tuple[str, float], ...] = (),
    ) -> Any:
        """COCOeval by area or by another value in its place."""
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            # It changes what it is given, and takes the area of the box whatever is there.
            found = coco.loadRes([dict(x) for x in detections])
            if parts:
                for x, given in zip(found.dataset["annotations"], detections):
                    x["area"] = given["area"]
            evaluated = COCOeval(coco, found, "bbox")
            evaluated.params.maxDets = self._max_dets_per_image
            if img_ids is not None:
                evaluated.params.imgIds = img_ids
            if parts:
                ends = [end for _, end in parts]
                starts = [-1.0, *(np.nextafter(end, np.inf) for end in ends[:-1])]
                evaluated.params.areaRng = [list(x) for x in zip(starts, ends)]
                evaluated.params.areaRngLbl = [label for label, _ in parts]
            evaluated.evaluate()
            evaluated.accumulate()
        return evaluated

    def _parts(
        self,
        truth: dict[str, Any],
        detections: list[dict[str, Any]],
        img_ids: Any,
        parts: tuple[tuple[str, float], ...],
        values: Any,
    ) -> dict[str, float]:
        objects, found = values(truth["annotations"], detections)
        if not detections:
            return {
                f"{metric}{label}": float("nan") for metric in ("AP", "AR") for label, _ in parts
            }
        truth = {
            **truth,
            "annotations": [
                {**x, "area": v} for x, v in zip(truth["annotations"], objects, strict=True)
            ],
        }
        detections = [{**x, "area": v} for x, v in zip(detections, found, strict=True)]
        results = self._evaluate(truth, detections, img_ids, parts).eval
        ap, ar = results["precision"][..., -1], results["recall"][..., -1]
        return {
            f"{metric}{label}": _mean(array[..., i])
            for metric, array in (("AP", ap), ("AR", ar))
            for i, (label, _) in enumerate(parts)
        }


def _mean(values: NDArray[Any]) -> float:
    """In percent, over what is defined."""
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


def _boxes(records: list[dict[str, Any]]) -> NDArray[Any]:
    return np.array([x["bbox"] for x in records], dtype=np.float64).reshape(-1, 4)


def _by_aspect_ratio(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    return aspect_ratios(_boxes(objects)).tolist(), aspect_ratios(_boxes(detections)).tolist()


def _by_crowding(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    in_image: dict[Any, tuple[list[int], list[int]]] = {}
    for kind, records in enumerate((objects, detections)):
        for i, x in enumerate(records):
            if not x.get("iscrowd"):  # a crowd region is no object
                in_image.setdefault(x["image_id"], ([], []))[kind].append(i)
    of_objects, of_detections = np.zeros(len(objects)), np.zeros(len(detections))
    for those, found in in_image.values():
        boxes = _boxes([objects[i] for i in those])
        of_objects[those] = values = crowding(boxes)
        if those and found:
            iou = _iou(_boxes([detections[i] for i in found]), boxes)
            of_detections[found] = np.where(iou.max(axis=1) > 0, values[iou.argmax(axis=1)], 0)
    return of_objects.tolist(), of_detections.tolist()


def draw_precision_recall(precision: NDArray[Any]) -> Figure:
    """Plot precision over recall, the mean of all classes.

    Args:
        precision: (10, 101, C) precision at IoU 0.5, 0.55 .. 0.95 and recall 0, 0.01 .. 1, -1 where
            a class has no object, as in `COCOeval.eval["precision"]`.

    Returns:
        A figure, to be saved.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    precision = precision[:, :, (precision > -1).all(axis=(0, 1))]
    recall = np.linspace(0, 1, precision.shape[1])
    for name, curve in (
        ("IoU 0.5", precision[0]),
        ("IoU 0.75", precision[5]),
        ("mean of IoU 0.5 to 0.95", precision.mean(axis=0)),
    ):
        curve = curve.mean(axis=1)
        axes.plot(recall, curve, label=f"{name}: AP {curve.mean():.1%}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure


class NMSRecallEvaluator(DatasetEvaluator):
    """NMS recall (paper, section 4.2): what share of the objects that are found NMS leaves.

    As the paper's repository: of all detections with a score above 0.05, without limits on their
    number, those before and after a per-class NMS with IoU 0.5. NR_t is the number of objects
    whose largest IoU with any box, of any class, is above t after NMS, over the number before. It
    is evaluated in the model's own forward pass, at the cost of a second decoding.

    Results are in percent: "NR", the mean over t = 0.5, 0.55 .. 0.9, and "NR50" .. "NR90".
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
            objects = self.objects[image["image_id"]]
            height, width = image["image"].shape[-2:]
            before = Instances((height, width), **found.get_fields())
            before.pred_boxes.clip((height, width))
            keep = batched_nms(
                before.pred_boxes.tensor, before.scores, before.pred_classes, self.NMS_THRESH
            )
            size = image.get("height", height), image.get("width", width)
            self._overlaps[image["image_id"]] = (
                self._largest_iou(objects, detector_postprocess(before[keep], *size)),
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
    boxes = Boxes(
        torch.tensor(
            [
                BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
                for x in record.get("annotations", ())
                if not x.get("iscrowd")
            ]
        ).reshape(-1, 4)
    )
    boxes.clip((record["height"], record["width"]))
    return boxes[boxes.nonempty()]
