"""What passes between the host and the device in a training step, without waiting for the device.

A step that waits leaves the device without work while the host prepares the next kernels.
"""

from collections import deque
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor


def to_device(
    batch: list[dict[str, Any]], device: torch.device, num_classes: int
) -> list[dict[str, Any]]:
    """Check objects while they are on the host, and copy a batch to the device.

    Args:
        batch: inputs of a model in training, see Detectron2's `DenseDetector`.
        device: where the model is.
        num_classes: C.

    Returns:
        The batch with images and objects on the device.

    Raises:
        ValueError: a box that is not finite or inverted, or a class out of range. For objects that
            are on a CUDA device already, the operators raise it.
    """
    return [_image_to_device(image, device, num_classes) for image in batch]


def _image_to_device(
    image: dict[str, Any], device: torch.device, num_classes: int
) -> dict[str, Any]:
    fields = dict(image["instances"].get_fields())
    boxes, classes = fields["gt_boxes"].tensor, fields["gt_classes"]
    if boxes.is_cpu and classes.is_cpu:
        name = image.get("file_name", "an image")
        size = boxes[:, 2:] - boxes[:, :2]  # NaN or inf if a coordinate is
        if not bool(((size >= 0) & (size < torch.inf)).all()):
            raise ValueError(
                f"gt_boxes of {name} must have finite coordinates with x1 <= x2 and y1 <= y2"
            )
        if not bool(((classes >= 0) & (classes < num_classes)).all()):
            raise ValueError(f"gt_classes of {name} must be in [0, {num_classes})")
    fields["gt_boxes"] = Boxes(_copy(boxes, device))
    fields["gt_classes"] = _copy(classes, device)
    instances = Instances(image["instances"].image_size, **fields)
    result = {**image, "image": _copy(image["image"], device), "instances": instances}
    if "ignore_regions" in image:
        result["ignore_regions"] = _copy(image["ignore_regions"], device)
    return result


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class DelayedScalars:
    """Scalars for the current `EventStorage`, which need not wait for the device.

    Those of a CUDA device are put there by the first call after they have arrived on the host,
    mostly one iteration later.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[list[str], Tensor, torch.cuda.Event | None]] = deque()

    def put(self, names: list[str], values: Tensor) -> None:
        """Put `values`, one for each name, as soon as they are known."""
        arrival = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
        self._pending.append((names, values, arrival))
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            names, values, _ = self._pending.popleft()
            get_event_storage().put_scalars(**dict(zip(names, values.tolist())))

    def __reduce__(self) -> tuple[type["DelayedScalars"], tuple[()]]:
        """Copy without what is pending: a copy of a model has nothing to put."""
        return DelayedScalars, ()
