"""What became of each detection and each object: hits, misses, and what is wrong with the rest.

Detections and objects are rows of numbers, in pixels of the image: x0, y0, x1, y1, the index of the
class in the model, and the score or 1 for a crowd. boxes.js of the viewer does the same in a page.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from numpy.typing import NDArray

__all__ = [
    "FALSE_POSITIVES",
    "JudgedImage",
    "Outcomes",
    "class_index",
    "confusion",
    "count_errors",
    "found_rows",
    "judge",
    "outcomes",
    "precision_recall",
    "truth_rows",
]

FALSE_POSITIVES = ("wrong class", "duplicate", "poor box", "background")
_TOUCHING = 0.1  # IoU from which a detection is a poor box of an object, not background
_RECALLS = np.linspace(0, 1, 101)  # COCO's


class Outcomes(NamedTuple):
    """Of the N detections and M objects of an image.

    Attributes:
        found: what each detection is: "hit", one of `FALSE_POSITIVES`, or "ignored" (in a crowd).
        objects: (N,) the object that it hits or else overlaps most, -1 for none.
        truth: what each object is: "hit", "miss" or "crowd".
    """

    found: list[str]
    objects: NDArray[Any]
    truth: list[str]


def truth_rows(record: dict[str, Any]) -> NDArray[Any] | None:
    """(M, 6) objects of an image in Detectron2's standard format, or None without annotations."""
    if "annotations" not in record:
        return None
    rows = [
        [
            *BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
            a["category_id"],
            a.get("iscrowd", 0),
        ]
        for a in record["annotations"]
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def class_index(metadata: Any, category_id: Any) -> int:
    """The index of a class, of the id that the user's data set has for it."""
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    return int(contiguous[category_id] if contiguous else category_id)


def found_rows(detections: list[dict[str, Any]], metadata: Any) -> NDArray[Any]:
    """(N, 6) detections in COCO's result format, of an image, the highest score first.

    Args:
        detections: those of the image.
        metadata: of the data set; with `thing_dataset_id_to_contiguous_id` where the ids of its
            classes are not their indices.
    """
    rows = [
        [
            *BoxMode.convert(d["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
            class_index(metadata, d["category_id"]),
            d["score"],
        ]
        for d in detections
    ]
    rows.sort(key=lambda row: -row[5])
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def outcomes(found: NDArray[Any], truth: NDArray[Any], min_iou: float = 0.5) -> Outcomes:
    """Assign detections to objects as COCO's evaluation does, and say what the others are.

    The detection with the highest score chooses first, the free object of its class that it
    overlaps most. So what a detection is does not depend on those with lower scores.

    Args:
        found: (N, 6) detections, the highest score first.
        truth: (M, 6) objects.
        min_iou: of a hit.

    Returns:
        "wrong class" is a detection that would hit an object of another class, "duplicate" one
        whose object is taken, "poor box" one that overlaps an object by an IoU of 0.1 or more, and
        "background" one that does not.
    """
    iou, inside = _overlaps(found, truth)
    is_same = found[:, None, 4] == truth[None, :, 4]
    is_crowd = truth[:, 5] > 0
    iou[:, is_crowd] = 0
    near = iou.max(axis=1, initial=0)
    same = np.where(is_same, iou, 0).max(axis=1, initial=0)
    in_crowd = (is_same & is_crowd & (inside >= min_iou)).any(axis=1)
    objects = np.where(near > 0, iou.argmax(axis=1) if len(truth) else -1, -1)
    free = ~is_crowd
    kinds = []
    for i in range(len(found)):
        kind = "background"
        if same[i] >= min_iou and (fits := free & is_same[i] & (iou[i] >= min_iou)).any():
            kind = "hit"
            objects[i] = np.where(fits, iou[i], -1).argmax()
            free[objects[i]] = False
        elif in_crowd[i]:
            kind = "ignored"
        elif same[i] >= min_iou:
            kind = "duplicate"
        elif near[i] >= min_iou:
            kind = "wrong class"
        elif near[i] >= _TOUCHING:
            kind = "poor box"
        else:
            objects[i] = -1
        kinds.append(kind)
    states = np.where(is_crowd, "crowd", np.where(free, "miss", "hit"))
    return Outcomes(kinds, objects, states.tolist())


def _overlaps(found: NDArray[Any], truth: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(N, M) IoU, and (N, M) share of the detection that lies in the object."""
    start = np.maximum(found[:, None, :2], truth[None, :, :2])
    end = np.minimum(found[:, None, 2:4], truth[None, :, 2:4])
    both = np.clip(end - start, 0, None).prod(axis=2)
    found_area, truth_area = ((x[:, 2:4] - x[:, :2]).prod(axis=1) for x in (found, truth))
    tiny = np.finfo(np.float64).tiny
    union = found_area[:, None] + truth_area[None] - both
    return both / np.maximum(union, tiny), both / np.maximum(found_area[:, None], tiny)


def count_errors(result: Outcomes) -> dict[str, float]:
    """How many of each kind an image has, and its F1: 1 with neither object nor detection."""
    count: dict[str, float] = {kind: result.found.count(kind) for kind in FALSE_POSITIVES}
    hits, misses = result.truth.count("hit"), result.truth.count("miss")
    total = 2 * hits + misses + sum(count.values())
    return {**count, "hit": hits, "miss": misses, "f1": 2 * hits / total if total else 1.0}


# Detections, objects, and what they are.
JudgedImage = tuple[NDArray[Any], NDArray[Any], Outcomes]


def judge(
    dataset: dict[str, Any], detections: list[dict[str, Any]], images: Sequence[int] | None = None
) -> list[JudgedImage]:
    """Judge detections in COCO's result format.

    Args:
        dataset: see :class:`freeanchor.evaluation.truth.Truth`; the id of a category is 1 + the
            index of its class.
        detections: with the same ids.
        images: the ids of those that count, by default all.
    """
    ids = [x["id"] for x in dataset["images"]] if images is None else images
    rows: tuple[dict[int, list[Any]], ...] = tuple({i: [] for i in ids} for _ in range(2))
    for of_image, records, last in (
        (rows[0], detections, "score"),
        (rows[1], dataset["annotations"], "iscrowd"),
    ):
        for x in records:
            if x["image_id"] in of_image:
                box = BoxMode.convert(x["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
                of_image[x["image_id"]].append([*box, x["category_id"] - 1, x[last]])
    judged = []
    for i in ids:
        found = sorted(rows[0][i], key=lambda row: -row[5])
        a, b = (np.array(x, dtype=np.float64).reshape(-1, 6) for x in (found, rows[1][i]))
        judged.append((a, b, outcomes(a, b)))
    return judged


def precision_recall(images: Sequence[JudgedImage], num_classes: int) -> NDArray[Any]:
    """Precision at COCO's 101 recalls, of each class, over all detections.

    Returns:
        (C, 101) precision, not a number for a class without objects. Its mean is the AP at the
        IoU that the outcomes were taken with.
    """
    curves = np.full((num_classes, len(_RECALLS)), np.nan)
    scores = np.concatenate([found[:, 5] for found, _, _ in images])
    labels = np.concatenate([found[:, 4] for found, _, _ in images])
    kinds = np.array([kind for _, _, result in images for kind in result.found], dtype="<U16")
    objects = np.concatenate([truth[truth[:, 5] == 0, 4] for _, truth, _ in images])
    order = np.argsort(-scores, kind="stable")
    order = order[kinds[order] != "ignored"]
    for c in range(num_classes):
        num_objects = (objects == c).sum()
        if not num_objects:
            continue
        is_hit = kinds[order[labels[order] == c]] == "hit"
        hits = is_hit.cumsum()
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        index = np.searchsorted(hits / num_objects, _RECALLS)
        curves[c] = np.append(precision, 0)[np.minimum(index, len(precision))]
    return curves


def confusion(images: Sequence[JudgedImage], num_classes: int) -> NDArray[Any]:
    """What objects were detected as.

    A row sums to the objects of its class: hits, those that a detection of another class would
    have hit, and missed ones in the last column. Other false positives are in the last row.

    Returns:
        (C + 1, C + 1) counts, by class of the object and of the detection.
    """
    table = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for found, truth, result in images:
        seen = [state != "miss" for state in result.truth]
        for kind, label, j in zip(result.found, found[:, 4].astype(int), result.objects):
            if kind == "hit":
                table[label, label] += 1
            elif kind == "wrong class" and not seen[j]:
                seen[j] = True
                table[int(truth[j, 4]), label] += 1
            elif kind != "ignored":
                table[num_classes, label] += 1
        for is_seen, row in zip(seen, truth):
            table[int(row[4]), num_classes] += not is_seen
    return table
