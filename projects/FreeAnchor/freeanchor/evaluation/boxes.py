"""COCO AP, also of slender and crowded objects."""

import contextlib
import io
import json
import logging
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..errors import DatasetError
from .calibration import calibration, score_thresholds
from .outcomes import JudgedImage, judge
from .truth import read_truth

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


class BoxEvaluator(DatasetEvaluator):
    """COCO AP of boxes, as Detectron2's `COCOEvaluator`, and of the parts that FreeAnchor is about.

    Besides "bbox", the results have "aspect_ratio" and "crowding": AP and AR of the objects whose
    longer side is so many times the shorter, and of those whose largest IoU with another object is
    in a range. As with COCO's sizes, other objects are ignored, and a detection that matches none
    counts where it belongs itself: by its own aspect ratio, and by the crowding of the object that
    it overlaps most (0 if it overlaps none). What no object can tell, as the AP of a class without
    any, is NaN.

    "calibration" and "threshold" are about the scores, see
    :func:`freeanchor.evaluation.calibration` and :func:`freeanchor.evaluation.score_thresholds`.

    Into the output folder it writes the detections with the ids of the user's file, in COCO's
    result format, as `coco_instances_results.json`, and `precision_recall.png`.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        max_dets_per_image: int = 100,
    ) -> None:
        """Build the evaluator of a data set.

        Args:
            dataset_name: a registered data set, see :func:`freeanchor.evaluation.read_truth`.
            distributed: whether to collect the detections of all processes.
            output_dir: a folder to write into, or None.
            max_dets_per_image: as many detections of a class in an image count, those with the
                highest scores. COCO's number is 100; give the model's where it is larger.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._truth = read_truth(dataset_name)
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets = [min(x, max_dets_per_image) for x in (1, 10, max_dets_per_image)]
        self._found: list[dict[str, Any]] = []
        self._num_images = 0

    def reset(self) -> None:
        self._found, self._num_images = [], 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            if image["image_id"] not in self._truth.images:
                raise DatasetError(
                    f"image {image['image_id']!r} is not in the data set that is evaluated"
                )
            self._num_images += 1
            instances = output["instances"].to("cpu")
            self._found += instances_to_coco_json(instances, image["image_id"])

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, dict[str, float]]:
        """Compute the results.

        Args:
            img_ids: the user's ids of the images that count, by default all.
        """
        parts = comm.gather((self._num_images, self._found)) if self._distributed else None
        if parts is not None:
            if not comm.is_main_process():
                return {}
            self._num_images = sum(number for number, _ in parts)
            self._found = [x for _, found in parts for x in found]
        if self._num_images == 0:
            logger.warning("There were no images to evaluate")
            return {}
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            self._write()
        if not self._truth.has_annotations:
            logger.info("The data set has no annotations: the detections are only written")
            return {}
        logger.info(f"Evaluating {len(self._found)} detections with {COCO_API}")
        truth = self._truth.dataset
        detections = [
            {**x, "image_id": self._truth.images[x["image_id"]], "category_id": c + 1}
            for x in self._found
            if (c := x["category_id"]) < len(truth["categories"])
        ]
        if img_ids is not None:
            img_ids = [self._truth.images[x] for x in img_ids]
        results: dict[str, dict[str, float]] = {}
        evaluated = self._evaluate(truth, detections, img_ids) if detections else None
        results["bbox"] = self._box_results(evaluated)
        for name, ranges, values in (
            ("aspect_ratio", ASPECT_RATIOS, _by_aspect_ratio),
            ("crowding", CROWDING, _by_crowding),
        ):
            results[name] = self._parts(truth, detections, img_ids, ranges, values)
            logger.info(f"By {name}:\n{create_small_table(results[name])}")
        results |= self._scores(judge(truth, detections, img_ids))
        if evaluated is not None and self._output_dir:
            figure = draw_precision_recall(evaluated["precision"][..., 0, -1])
            figure.savefig(os.path.join(self._output_dir, "precision_recall.png"), dpi=100)
        return results

    def _scores(self, images: Sequence[JudgedImage]) -> dict[str, dict[str, float]]:
        """Calibration and recommended thresholds."""
        names = self._metadata.get("thing_classes") or ()
        results = {"calibration": calibration(images), "threshold": score_thresholds(images, names)}
        logger.info(f"Calibration at IoU 0.5:\n{create_small_table(results['calibration'])}")
        width = max(map(len, results["threshold"]))
        lines = [f"{name:<{width}}  {x:.3f}" for name, x in results["threshold"].items()]
        logger.info("Thresholds with the highest F1:\n" + "\n".join(lines))
        return results

    def _write(self) -> None:
        """Write the detections with the user's ids."""
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        user_ids = {new: old for old, new in contiguous.items()} if contiguous else None
        written = [
            {**x, "category_id": x["category_id"] if user_ids is None else user_ids[c]}
            for x in self._found
            if user_ids is None or (c := x["category_id"]) in user_ids
        ]
        if len(written) < len(self._found):
            logger.warning(
                f"{len(self._found) - len(written)} detections are of classes that the data set "
                "does not have: they are not written"
            )
        # The names too, for who looks at them with a file that has other ids.
        names = enumerate(self._metadata.get("thing_classes") or ())
        categories = [
            {"id": i if user_ids is None else user_ids[i], "name": name}
            for i, name in names
            if user_ids is None or i in user_ids
        ]
        for file, content in (
            ("coco_instances_results.json", written),
            ("categories.json", categories),
        ):
            with PathManager.open(os.path.join(str(self._output_dir), file), "w") as f:
                json.dump(content, f, default=operator.methodcaller("item"))  # NumPy's numbers

    def _box_results(self, evaluated: dict[str, Any] | None) -> dict[str, float]:
        """COCO's metrics and the AP of each class, in Detectron2's names."""
        metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        if evaluated is None:
            logger.warning("No predictions from the model!")
            return dict.fromkeys(metrics, float("nan"))
        precision = evaluated["precision"][..., -1]  # IoU, recall, class, size
        every, sizes = precision[..., 0], [precision[..., i] for i in (1, 2, 3)]
        values = [every, every[0], every[5], *sizes]
        results = {metric: _mean(x) for metric, x in zip(metrics, values)}
        logger.info(f"Evaluation results for bbox:\n{create_small_table(results)}")
        names = self._metadata.get("thing_classes") or ()
        if len(names) > 1:
            classes = {f"AP-{name}": _mean(every[:, :, i]) for i, name in enumerate(names)}
            width = max(map(len, classes))
            lines = [f"{name:<{width}}  {ap:.3f}" for name, ap in classes.items()]
            logger.info("Of each class:\n" + "\n".join(lines))
            results.update(classes)
        return results

    def _evaluate(
        self,
        truth: dict[str, Any],
        detections: list[dict[str, Any]],
        img_ids: Sequence[int] | None,
        parts: tuple[tuple[str, float], ...] = (),
    ) -> dict[str, Any]:
        """COCOeval by area, or by another value in its place: what it calls `eval`."""
        with contextlib.redirect_stdout(io.StringIO()):
            coco, found = COCO(), COCO()
            coco.dataset = truth
            # COCO.loadRes would take the area of the box whatever is there.
            found.dataset = {
                **truth,
                "annotations": [
                    {"area": x["bbox"][2] * x["bbox"][3], **x, "id": i, "iscrowd": 0}
                    for i, x in enumerate(detections, start=1)
                ],
            }
            for index in (coco, found):
                index.createIndex()
            evaluator = COCOeval(coco, found, "bbox")
            evaluator.params.maxDets = self._max_dets
            if img_ids is not None:
                evaluator.params.imgIds = list(img_ids)
            if parts:
                ends = [end for _, end in parts]
                starts = [-1.0, *(np.nextafter(end, np.inf) for end in ends[:-1])]
                evaluator.params.areaRng = [list(x) for x in zip(starts, ends)]
                evaluator.params.areaRngLbl = [label for label, _ in parts]
            evaluator.evaluate()
            evaluator.accumulate()
        result: dict[str, Any] = evaluator.eval
        return result

    def _parts(
        self,
        truth: dict[str, Any],
        detections: list[dict[str, Any]],
        img_ids: Sequence[int] | None,
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
        results = self._evaluate(truth, detections, img_ids, parts)
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
