"""COCO AP of boxes and masks, also of slender and crowded objects."""

import contextlib
import io
import json
import logging
import operator
import os
from collections.abc import Iterator, Sequence
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
from pycocotools import mask as mask_api

from ..errors import DatasetError
from .calibration import calibration, score_thresholds
from .outcomes import JudgedImage, judge
from .parts import ASPECT_RATIOS, CROWDING, by_aspect_ratio, by_crowding
from .truth import read_truth

try:  # the same figures as pycocotools, much faster
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval

    COCO_API = "faster-coco-eval"
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    COCO_API = "pycocotools"

__all__ = ["COCO_API", "BoxEvaluator", "box_metrics"]

logger = logging.getLogger(__name__)

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_PARTS = (
    ("aspect_ratio", ASPECT_RATIOS, by_aspect_ratio),
    ("crowding", CROWDING, by_crowding),
)


def box_metrics(classes: Sequence[str], masks: bool) -> list[str]:
    """The figures of :class:`BoxEvaluator` that are the better the higher, as `task/metric`.

    Args:
        classes: the names of the classes.
        masks: whether the model finds masks.
    """
    of_classes = [f"AP-{x}" for x in classes] if len(classes) > 1 else []
    return [
        *(f"{x}/{y}" for x in ("bbox", "segm")[: 1 + masks] for y in (*_METRICS, *of_classes)),
        *(f"{x}/{y}{z}" for x, parts, _ in _PARTS for y in ("AP", "AR") for z, _ in parts),
    ]


class BoxEvaluator(DatasetEvaluator):
    """COCO AP of boxes, as Detectron2's `COCOEvaluator`, and of the parts that FreeAnchor is about.

    Of a model that finds masks, the results have their AP too, as "segm".

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
        self.reset()

    def reset(self) -> None:
        self._found: list[dict[str, Any]] = []
        self._num_images = 0
        self._has_masks = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            if image["image_id"] not in self._truth.images:
                raise DatasetError(
                    f"image {image['image_id']!r} is not in the data set that is evaluated"
                )
            self._num_images += 1
            instances = output["instances"].to("cpu")
            self._found += instances_to_coco_json(instances, image["image_id"])
            self._has_masks = instances.has("pred_masks")

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, dict[str, float]]:
        """Compute the results.

        Args:
            img_ids: the user's ids of the images that count, by default all.
        """
        state = self._num_images, self._found, self._has_masks
        parts = comm.gather(state) if self._distributed else None
        if parts is not None:
            if not comm.is_main_process():
                return {}
            self._num_images = sum(number for number, _, _ in parts)
            self._found = [x for _, found, _ in parts for x in found]
            self._has_masks = any(has_masks for _, _, has_masks in parts)
        if self._num_images == 0:
            logger.warning("There were no images to evaluate")
            return {}
        if self._output_dir:
            with self._going_on():
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
        results["bbox"] = self._results(evaluated, "bbox")
        if self._has_masks and self._truth.has_masks:
            masks = self._evaluate(truth, detections, img_ids, "segm") if detections else None
            results["segm"] = self._results(masks, "segm")
        elif self._has_masks:
            logger.warning("The objects of the data set have no masks to compare those found with")
        for name, ranges, values in _PARTS:
            results[name] = self._parts(truth, detections, img_ids, ranges, values)
            logger.info(f"By {name}:\n{create_small_table(results[name])}")
        results |= self._scores(judge(truth, detections, img_ids))
        if evaluated is not None and self._output_dir:
            precision = evaluated["precision"][..., 0, -1]
            if (precision > -1).any():
                figure = draw_precision_recall(precision)
                with self._going_on():
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

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Log that something cannot be written: a training need not end for it."""
        try:
            yield
        except OSError as e:
            if not self._truth.has_annotations:  # the detections are all that there is
                raise
            logger.error(f"{self._output_dir} cannot be written to: {e}. The evaluation goes on")

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

    def _results(self, evaluated: dict[str, Any] | None, kind: str) -> dict[str, float]:
        """COCO's metrics and the AP of each class, in Detectron2's names."""
        if evaluated is None:
            logger.warning("No predictions from the model!")
            return dict.fromkeys(_METRICS, float("nan"))
        precision = evaluated["precision"][..., -1]  # IoU, recall, class, size
        every, sizes = precision[..., 0], [precision[..., i] for i in (1, 2, 3)]
        values = [every, every[0], every[5], *sizes]
        results = {metric: _mean(x) for metric, x in zip(_METRICS, values)}
        logger.info(f"Evaluation results for {kind}:\n{create_small_table(results)}")
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
        kind: str = "bbox",
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
                    {"area": _area(x, kind), **x, "id": i, "iscrowd": 0}
                    for i, x in enumerate(detections, start=1)
                ],
            }
            for index in (coco, found):
                index.createIndex()
            evaluator = COCOeval(coco, found, kind)
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
        results = self._evaluate(truth, detections, img_ids, "bbox", parts)
        ap, ar = results["precision"][..., -1], results["recall"][..., -1]
        return {
            f"{metric}{label}": _mean(array[..., i])
            for metric, array in (("AP", ap), ("AR", ar))
            for i, (label, _) in enumerate(parts)
        }


def _area(detection: dict[str, Any], kind: str) -> float:
    if kind == "segm":
        return float(mask_api.area(detection["segmentation"]))
    return float(detection["bbox"][2] * detection["bbox"][3])


def _mean(values: NDArray[Any]) -> float:
    """In percent, over what is defined."""
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


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
