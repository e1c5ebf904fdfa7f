"""The objects of a data set for COCOeval, whatever its ids are."""

import json
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

__all__ = ["Truth", "read_truth"]


class Truth(NamedTuple):
    """A data set in COCO's format with ids that every COCOeval takes.

    They count images and annotations from 1, and the id of a category is 1 + the index of its
    class: an annotation with the id 0 counts as never found in pycocotools, and text or negative
    ids are not for other implementations.

    Attributes:
        dataset: the COCO dictionary. Annotations have what COCOeval reads and no more.
        images: from the user's id of an image to the one in `dataset`.
        has_annotations: whether there is anything to compare with, even if that is no object.
        has_masks: whether each object has a mask.
    """

    dataset: dict[str, Any]
    images: dict[Hashable, int]
    has_annotations: bool
    has_masks: bool


def read_truth(dataset_name: str) -> Truth:
    """Read the objects of a registered data set.

    Args:
        dataset_name: its name. The objects are those of the `json_file` of its metadata, or of its
            records where there is none or :mod:`freeanchor.data` has checked them.
    """
    metadata = MetadataCatalog.get(dataset_name)
    contiguous = None
    if metadata.get("json_file") is not None and not metadata.get("is_checked"):
        known = metadata.get("thing_dataset_id_to_contiguous_id") is not None
        if not known and dataset_name in DatasetCatalog.list():
            DatasetCatalog.get(dataset_name)  # Detectron2 learns the ids only then
        with PathManager.open(metadata.json_file, encoding="utf-8-sig") as f:
            content = json.load(f)
        contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    else:
        content = _from_records(DatasetCatalog.get(dataset_name))
    if contiguous is None:  # the ids are the indices
        contiguous = {c["id"]: c["id"] for c in content.get("categories", ())}
    images = {x["id"]: i for i, x in enumerate(content["images"], start=1)}
    annotations = [
        _annotation(i, x, images[x["image_id"]], contiguous[x["category_id"]] + 1)
        for i, x in enumerate(content.get("annotations", ()), start=1)
        if x["category_id"] in contiguous
    ]
    num_classes = max(len(metadata.get("thing_classes") or ()), 1 + max(contiguous.values()))
    dataset = {
        "images": [{**x, "id": images[x["id"]]} for x in content["images"]],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(num_classes)],
        "annotations": annotations,
    }
    has_masks = all("segmentation" in x for x in annotations)
    return Truth(dataset, images, "annotations" in content, has_masks)


def _annotation(
    number: int, annotation: dict[str, Any], image: int, category: int
) -> dict[str, Any]:
    box = [float(v) for v in annotation["bbox"]]
    area = annotation.get("area")
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        # COCO's own tools take no arrays.
        mask = [x.tolist() if isinstance(x, np.ndarray) else x for x in mask]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3] if area is None else float(area),
        "iscrowd": int(annotation.get("iscrowd") or 0),
        **({"segmentation": mask} if mask else {}),
    }


def _from_records(records: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's format of records in Detectron2's, whose categories are the indices of classes."""
    content: dict[str, Any] = {
        "images": [
            {"id": r["image_id"], **{k: r[k] for k in ("width", "height") if k in r}}
            for r in records
        ],
    }
    if any("annotations" in r for r in records):
        content["annotations"] = [
            {
                **a,
                "image_id": r["image_id"],
                "bbox": BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS),
            }
            for r in records
            for a in r.get("annotations", ())
        ]
    classes = {a["category_id"] for a in content.get("annotations", ())}
    content["categories"] = [{"id": c} for c in sorted(classes | {0})]
    return content
