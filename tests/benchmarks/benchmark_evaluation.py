"""Time of COCO AP: the evaluator's library against pycocotools, on detections like those of COCO.

    python tests/benchmarks/benchmark_evaluation.py [--images 5000] [--detections 100]

Prints both times and their ratio, from one process.
"""

import argparse
import contextlib
import io
import time

import freeanchor  # noqa: F401  # isort: skip  # makes Detectron2 importable
import numpy as np
from freeanchor.evaluation import COCO_API, boxes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def make(num_images, num_detections, num_classes=80, num_objects=7):
    """Objects and detections of one data set, in COCO's format."""
    rng = np.random.default_rng(0)

    def records(count):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (num_images * count, 2)))
        boxes = np.concatenate([rng.uniform(0, 1, sides.shape) * (640 - sides), sides], axis=1)
        classes = rng.integers(1, num_classes + 1, len(boxes))
        return [
            {"image_id": i // count + 1, "category_id": int(c), "bbox": box.tolist()}
            for i, (c, box) in enumerate(zip(classes, boxes))
        ]

    objects = [
        {**x, "id": i, "area": x["bbox"][2] * x["bbox"][3], "iscrowd": 0}
        for i, x in enumerate(records(num_objects), start=1)
    ]
    detections = [
        {**x, "score": s}
        for x, s in zip(records(num_detections), rng.random(num_images * num_detections))
    ]
    truth = {
        "images": [{"id": i} for i in range(1, num_images + 1)],
        "categories": [{"id": i} for i in range(1, num_classes + 1)],
        "annotations": objects,
    }
    return truth, detections


def seconds(coco_class, eval_class, truth, detections):
    """Time and AP of one evaluation, from the lists to the figures."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_class()
        coco.dataset = truth
        coco.createIndex()
        evaluated = eval_class(coco, coco.loadRes([dict(x) for x in detections]), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return time.perf_counter() - start, evaluated.stats


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    args = parser.parse_args()
    truth, detections = make(args.images, args.detections)
    ours, stats = seconds(boxes.COCO, boxes.COCOeval, truth, detections)
    theirs, expected = seconds(COCO, COCOeval, truth, detections)
    np.testing.assert_allclose(stats, expected, rtol=1e-9)
    print(
        f"{args.images} images x {args.detections} detections: {COCO_API} {ours:.1f} s, "
        f"pycocotools {theirs:.1f} s, {theirs / ours:.1f} times as fast, same figures"
    )


if __name__ == "__main__":
    main()
