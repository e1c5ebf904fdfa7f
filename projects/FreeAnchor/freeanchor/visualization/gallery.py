"""Images of a data set with what runs detected in them, for the viewer of a report."""

import html
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import read_image
from ..evaluation import FALSE_POSITIVES, count_errors
from ..modeling import Matching, has_bags
from .page import data_element, encode_picture, fit_masks
from .pictures import choose, match_images
from .runs import Dataset, Run

__all__ = ["gallery"]

_OVERLAY_SHARE = 0.3  # of what pictures have, about, for all masks and bags
_BAG_IMAGES = 24  # the model runs on as many
_MIN_SCORE = 0.05  # of the detections that the pictures can show


def _choose_images(data: Dataset, num_images: int, score_thresh: float) -> list[int]:
    """Some images of every kind: spread evenly, the best, and those with the most errors."""
    everything = list(range(len(data.records)))
    orders = [choose(everything, num_images)]
    if data.has_truth:
        judged = data.judged(0, score_thresh)
        counts = [count_errors(result) for _, _, result in judged]
        orders.append(sorted(everything, key=[-c["f1"] for c in counts].__getitem__))
        for kind in ("miss", *FALSE_POSITIVES):
            with_errors = [i for i in everything if counts[i][kind]]
            orders.append(sorted(with_errors, key=[-c[kind] for c in counts].__getitem__))
    orders.append(everything)
    chosen: dict[int, None] = {}
    for rank in range(len(everything)):
        for order in orders:
            if rank < len(order) and len(chosen) < num_images:
                chosen[order[rank]] = None
    return list(chosen)


def _matchings(run: Run, data: Dataset, chosen: list[int]) -> dict[int, tuple[Matching, int]]:
    """The matching of the first images, and the width that the network sees them in."""
    model = Path(run.cfg.OUTPUT_DIR) / "model_final.pth"
    if not (model.is_file() and has_bags(run.cfg) and data.has_truth):
        return {}
    chosen = chosen[:_BAG_IMAGES]
    images = match_images(run.cfg, [str(model)], [data.records[i] for i in chosen])
    return {
        i: (matching, pixels.shape[1])
        for i, (pixels, matchings) in zip(chosen, images)
        for matching in matchings.values()
    }


def _bags_of_image(matching: Matching, truth: NDArray[Any], scale: float) -> dict[int, Any]:
    """By the number of each object [anchors, assigned]: rows of a box and its P or IoU."""

    def rows(boxes: Any, values: Any) -> list[list[float]]:
        return [
            [*map(round, box), float(f"{value:.2g}")]
            for box, value in zip((boxes * scale).tolist(), values.tolist())
        ]

    bags = {}
    for m, box in enumerate((matching.boxes * scale).cpu().numpy()):
        # Training leaves some objects out, so that theirs is not their number.
        distance = np.abs(truth[:, :4] - box).max(axis=1) + 1e9 * truth[:, 5]
        bags[int(distance.argmin())] = [
            rows(matching.anchors[m], matching.prob[m]),
            rows(matching.assigned[m], matching.assigned_iou[m]),
        ]
    return bags


def gallery(
    runs: Sequence[Run], data: Dataset, num_images: int, max_bytes: int, score_thresh: float
) -> list[str]:
    """Detections over ground truth, for the viewer."""
    chosen = _choose_images(data, num_images, score_thresh)
    matchings = [_matchings(run, data, chosen) for run in runs]
    bag_bytes = _OVERLAY_SHARE * max_bytes
    has_masks = any(run.cfg.MODEL.MASK_ON for run in runs)
    are_bags = any(has_bags(run.cfg) for run in runs)
    images = []
    for i in chosen:
        pixels = read_image(data.records[i]["file_name"], "RGB", runs[0].cfg)
        truth = data.truth[i]
        truth_rows = [] if truth is None else _rounded(truth)
        found_rows = [_rounded(found[i][found[i][:, 5] >= _MIN_SCORE]) for found in data.found]
        if has_masks:
            size = pixels.shape[1], pixels.shape[0]
            most = int(_OVERLAY_SHARE * max_bytes / len(chosen))
            bag_bytes -= _add_masks(data, i, truth_rows, found_rows, size, most)
        bags: list[dict[int, Any]] = [{} for _ in runs]
        for of_run, into in zip(matchings, bags):
            if i in of_run and truth is not None and bag_bytes > 0:
                matching, width = of_run[i]
                into.update(_bags_of_image(matching, truth, pixels.shape[1] / width))
                bag_bytes -= len(str(into))
        images.append(
            {
                "name": Path(data.records[i]["file_name"]).name,
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "src": encode_picture(pixels, max_bytes // len(chosen)),
                "truth": None if truth is None else truth_rows,
                "found": found_rows,
                "bags": bags,
            }
        )
    content = {
        "classes": [{"id": i, "name": name} for i, name in enumerate(data.classes)],
        "runs": [run.name for run in runs],
        "images": images,
        "score": score_thresh,
        "hasTruth": data.has_truth,
        "hasMasks": has_masks,
        "hasBags": are_bags,
    }
    name = f"pictures of {data.name}"
    about = "Some of every kind of error, and some without."
    if are_bags:
        about += (
            " A click on a box, or arrow keys and Enter, shows the bag of its object: the anchors "
            "that compete for it, from dark to bright by their probability to match."
        )
    return [
        f"<h3>Pictures</h3><p>{about}</p>",
        "<noscript>The pictures need JavaScript, which this browser does not run.</noscript>",
        f'<div data-pictures="{html.escape(name)}"></div>',
        data_element(name, content),
    ]


def _add_masks(
    data: Dataset,
    i: int,
    truth_rows: list[list[Any]],
    found_rows: list[list[list[Any]]],
    size: tuple[int, int],
    max_bytes: int,
) -> int:
    """Give each row of an image its mask, and say how many bytes they are in the page."""
    annotations = data.records[i].get("annotations", ()) if truth_rows else ()
    masks = [a.get("segmentation") for a in annotations]
    for rows, found_masks in zip(found_rows, data.masks):
        masks += found_masks[i][: len(rows)]
    fitted = fit_masks(masks, size, max_bytes)
    for row, mask in zip(chain(truth_rows, *found_rows), fitted, strict=True):
        row.append(mask)
    return len(data_element("", fitted))


def _rounded(rows: NDArray[Any]) -> list[list[Any]]:
    return [
        [*(round(x, 1) for x in row[:4]), int(row[4]), round(row[5], 3)] for row in rows.tolist()
    ]
