"""COCO AP, also of slender and crowded objects."""

import contextlib
import io
import itertools
import json
import logging
import os
import warnings
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from matplotlib.figure import Figure
from numpy.typing import NDArray

try:  # the same figures as pycocotools, much faster
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval

    COCO_API = "faster-coco-eval"
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    COCO_API = "pycocotools"

__all__ = ["ASPECT_RATIOS", "COCO_API", "CROWDING", "BoxEvaluator", "aspect_ratios", "crowding"]

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
