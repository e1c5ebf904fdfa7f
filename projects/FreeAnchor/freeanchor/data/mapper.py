"""From a record of a data set to what the model takes."""

import copy
import logging
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    annotations_to_instances,
    check_image_size,
    filter_empty_instances,
    transform_instance_annotations,
)
from detectron2.structures import Boxes, BoxMode

from ..errors import DatasetError, FreeAnchorError
from .images import ImageReader
from .masks import to_rle

__all__ = ["Mapper"]

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.2


class Mapper(DatasetMapper):
    """Detectron2's mapper, which reads images by :class:`freeanchor.data.ImageReader`.

    In training, an image that cannot be read, not even at a second try, is named and replaced by
    another one, so that a disk that fails once does not end the run.
    """

    @configurable
    def __init__(
        self,
        *args: Any,
        reader: ImageReader,
        max_broken: int,
        ignore_regions: bool = False,
        spares: Sequence[dict[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        """Build the mapper, by a config or by its arguments.

        Args:
            args: see :class:`detectron2.data.DatasetMapper`.
            reader: reads the images.
            max_broken: as many images that cannot be read are replaced, in each process that
                loads data.
            ignore_regions: whether the crowd regions go to the model, as (G, 4) boxes by the key
                "ignore_regions". As objects they are left out in every case.
            spares: records to replace them by; without, such an image is an error.
            kwargs: see :class:`detectron2.data.DatasetMapper`.
        """
        super().__init__(*args, **kwargs)
        self.reader = reader
        self.max_broken = max_broken
        self.ignore_regions = ignore_regions
        self.spares = spares
        self._num_broken = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        options = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.SCALE_JITTER:
            options["augmentations"] = _with_scale_jitter(cfg, options["augmentations"])
            options["recompute_boxes"] = cfg.MODEL.MASK_ON  # as of INPUT.CROP
        return {
            **options,
            "reader": ImageReader.from_config(cfg),
            "max_broken": cfg.DATALOADER.MAX_BROKEN_IMAGES,
            "ignore_regions": cfg.MODEL.FREEANCHOR.IGNORE_REGIONS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map a record, see :class:`detectron2.data.DatasetMapper`.

        Raises:
            DatasetError: an image cannot be read, and none may be in its place.
        """
        record, image = self._read_one(dataset_dict)
        seen = T.AugInput(image)
        transforms = self.augmentations(seen)
        image = seen.image
        record["image"] = torch.as_tensor(
            np.require(image.transpose(2, 0, 1), requirements=("C", "W"))
        )
        if self.is_train and "annotations" in record:
            if self.ignore_regions:
                record["ignore_regions"] = _regions(record["annotations"], transforms, image.shape)
            self._transform_annotations(record, transforms, image.shape[:2])
        record.pop("annotations", None)
        return record

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        # After a crop, sizes do not tell it, and INCLUSIVE_CORNERS needs it.
        resizes = [t for t in transforms.transforms if isinstance(t, T.ResizeTransform)]
        dataset_dict["resize_factors"] = (
            math.prod(t.new_w / t.w for t in resizes),
            math.prod(t.new_h / t.h for t in resizes),
        )
        objects = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        for annotation in objects:
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            if self.recompute_boxes and isinstance(annotation["segmentation"], list):
                # Detectron2 crops polygons with a package that it does not depend on.
                size = dataset_dict["width"], dataset_dict["height"]
                annotation["segmentation"] = to_rle(annotation["segmentation"], size)
            transform_instance_annotations(
                annotation,
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
            if isinstance(annotation.get("segmentation"), np.ndarray):
                mask = np.require(annotation["segmentation"], requirements=("C", "W"))
                annotation["segmentation"] = mask
        # Polygons cannot say what a run-length encoding says, now an array.
        has_array = any(isinstance(a.get("segmentation"), np.ndarray) for a in objects)
        mask_format = "bitmask" if has_array else self.instance_mask_format
        instances = annotations_to_instances(objects, image_shape, mask_format)
        if self.recompute_boxes and objects:  # what a crop leaves of the mask
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = filter_empty_instances(instances)

    def _read_one(self, record: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A copy of the record, or of one in its place, and its image."""
        while True:
            copied = copy.deepcopy(record)
            try:
                image = self._read(record["file_name"])
                check_image_size(copied, image)
                return copied, image
            except (OSError, ValueError, SyntaxError) as e:
                problem = f"{record['file_name']} cannot be read: {e}"
                if not (self.is_train and self.spares and self._num_broken < self.max_broken):
                    raise DatasetError(problem) from e
                self._num_broken += 1
                logger.warning(
                    f"{problem}. Another image takes its place, as at most {self.max_broken} "
                    "times (DATALOADER.MAX_BROKEN_IMAGES)"
                )
                # By a random number, which a run that goes on draws again.
                record = random.choice(self.spares)

    def _read(self, path: str) -> Any:
        try:
            return self.reader.read(path)
        except OSError:  # of a disk or a network, which may be back
            time.sleep(_RETRY_SECONDS)
            return self.reader.read(path)


def _with_scale_jitter(cfg: CfgNode, augmentations: list[T.Augmentation]) -> list[T.Augmentation]:
    """Large-scale jitter (https://arxiv.org/abs/2012.07177) in place of the resizing."""
    scales, size = cfg.INPUT.SCALE_JITTER, cfg.INPUT.MAX_SIZE_TRAIN
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise FreeAnchorError(
            f"INPUT.SCALE_JITTER must be two scales, the smaller first, got {scales}"
        )
    crop = T.FixedSizeCrop((size, size))
    if cfg.INPUT.FORMAT == "YUV-BT.601":  # whose values are up to 1: black for Detectron2's grey
        crop.pad_value = 0.0
    crop.seg_pad_value = 0  # 255 in Detectron2's main branch: the padding would be of each mask
    jitter = [T.ResizeScale(*scales, size, size), crop]
    result: list[T.Augmentation] = []
    for augmentation in augmentations:
        is_resize = isinstance(augmentation, T.ResizeShortestEdge)
        result += jitter if is_resize else [augmentation]
    return result


def _regions(
    annotations: list[dict[str, Any]], transforms: Any, image_shape: tuple[int, ...]
) -> torch.Tensor:
    """(G, 4) crowd regions as the transforms leave them, those that are out of sight left out."""
    boxes = [
        BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
        for x in annotations
        if x.get("iscrowd", 0)
    ]
    moved = Boxes(transforms.apply_box(np.array(boxes, dtype=np.float64).reshape(-1, 4)))
    moved.clip((image_shape[0], image_shape[1]))
    regions: torch.Tensor = moved[moved.nonempty()].tensor
    return regions
