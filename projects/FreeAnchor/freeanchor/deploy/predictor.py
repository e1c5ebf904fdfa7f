"""Detections in images, by a trained model."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..checkpoint import Checkpointer, describe_scores, find, read_thresholds
from ..config import is_two_stage, merge_options, scored_part
from ..data import ImageReader, num_channels, read_image
from ..errors import DatasetError, FreeAnchorError, shorten
from ..modeling import (
    MultiScaleTest,
    choose_device,
    inference_settings,
    is_one_stage,
    optimize_inference,
)
from ..modeling.backbone import check_deformable
from ..values import building, check_values
from .checkpoints import class_names, find_checkpoint
from .selection import Selection, detect_only

__all__ = ["CONFIDENCE", "NONE_RECOMMENDED", "Predictor"]

CONFIDENCE = 0.5  # where none is recommended
NONE_RECOMMENDED = "the default, as no thresholds.json is of these weights"

Image = NDArray[np.uint8]


class Predictor:
    """A trained detector, called with images.

    Images are paths, or (H, W, 3) uint8 arrays in the order BGR, as OpenCV reads them and as
    Detectron2's `DefaultPredictor` takes them, whatever the order the model was trained with. A
    model of another `INPUT.FORMAT` (L, RGBA, CMYK, ...) sees files as in its training, and arrays
    as a file with these colours.
    Calls from several threads do not disturb each other.

    Attributes:
        cfg: the config of the model.
        class_names: names of the classes, in the order of `pred_classes`.
        confidence: detections have higher scores.
        thresholds: what those of each class have, (C,).
        recommended: the recommended thresholds that came with the weights, if any.
        model: the model, in evaluation mode.
        lock: what runs the model holds it.
    """

    def __init__(
        self,
        source: str | Path | CfgNode,
        weights: str | Path = "",
        *,
        confidence: float | None = None,
        classes: Sequence[str | int] = (),
        device: str | None = None,
        batch_size: int = 1,
        aug: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        """Load a trained model.

        Args:
            source: the folder of a run, a file of weights with its config beside it, a config file,
                a name in :mod:`freeanchor.model_zoo` or a config.
            weights: what `MODEL.WEIGHTS` takes, instead of those that belong to the source.
            confidence: detections with a score up to it are left out. By default the thresholds
                of the classes that are recommended for these weights (`thresholds.json` beside
                them, see :mod:`freeanchor.checkpoint.thresholds`), or else 0.5; 0.5 with `aug`.
            classes: names or indices of the classes to be detected; none for all.
            device: where the model runs, by default on a GPU if there is one.
            batch_size: as many images of one size go through the model together.
            aug: whether to detect at the scales of `TEST.AUG`, see
                :class:`freeanchor.modeling.MultiScaleTest`.
            options: keys and values, one after another, that change the config.

        Raises:
            FreeAnchorError: something that was given cannot be used.
        """
        if confidence is not None and not 0 <= confidence < 1:
            raise FreeAnchorError(f"confidence must be in [0, 1), got {confidence}")
        if batch_size < 1:
            raise FreeAnchorError(f"batch size must be at least 1, got {batch_size}")
        cfg = find_checkpoint(source, weights)
        merge_options(cfg, options)
        cfg.MODEL.DEVICE = choose_device(device)
        settings = inference_settings(cfg)
        check_values(cfg, training=False)
        check_deformable(cfg, training=False)
        self.cfg, self.batch_size = cfg, batch_size
        self.class_names = class_names(cfg)
        wanted = self._indices(classes)  # before the model is built
        self._reader = ImageReader.from_config(cfg)
        num_channels(cfg.INPUT.FORMAT)  # an unknown one is an error
        if not (is_two_stage(cfg) or is_one_stage(cfg)):
            raise FreeAnchorError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} is no FreeAnchor, "
                "RetinaNet or GeneralizedRCNN"
            )
        if aug and is_two_stage(cfg):
            raise FreeAnchorError("aug is of one-stage models: several scales are not merged here")
        with building("The model", cfg, "MODEL"):
            self.model = build_model(cfg).eval()
        Checkpointer(self.model, cfg).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        folder = Path(find(cfg.MODEL.WEIGHTS)).parent
        self.recommended = read_thresholds(folder, self.model.state_dict())
        self._selection = Selection(self.model, self._choose_scores(confidence, aug))
        self.thresholds, self.confidence = self._selection.thresholds, self._selection.confidence
        scored_part(cfg)[1].SCORE_THRESH_TEST = self.confidence
        cfg.freeze()
        if classes:
            detect_only(self.model, wanted, len(self.class_names))
        optimize_inference(self.model, *settings)
        self._run = MultiScaleTest(cfg, self.model) if aug else self.model
        # Detectron2's batch norm of heads counts the levels that it has seen.
        self.lock = threading.Lock()
        self._resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        if aug:
            self._resize = ResizeShortestEdge(0, 0)  # MultiScaleTest resizes

    def __call__(self, images: Sequence[str | Path | Image]) -> list[Instances]:
        """Detect in images.

        Args:
            images: paths or arrays, see :class:`Predictor`, in any number.

        Returns:
            Per image, on the CPU: `pred_boxes`, in pixels of the image as it was given, `scores`
            and `pred_classes`; the highest scores first. Of a model that finds masks, also
            `pred_masks`, (n, H, W) whether a pixel is of the object.

        Raises:
            DatasetError: an image cannot be read, or is no such array.
        """
        return [instances for _, _, instances in self.stream(images)]

    def stream(
        self,
        images: Iterable[str | Path | Image],
        on_error: Callable[[FreeAnchorError], None] | None = None,
    ) -> Iterator[tuple[str | Path | Image, Image, Instances]]:
        """Detect in images one after another, of which few are in memory at any time.

        While the model computes, the next batch is read.

        Args:
            images: paths or arrays, see :class:`Predictor`. It may be endless.
            on_error: called with the error of an image that cannot be read, which is left out. By
                default it is raised.

        Yields:
            In the order of `images`, the image as given, its pixels, (H, W, 3) uint8 BGR, and what
            is found there, see :meth:`__call__`.
        """
        iterator = iter(images)
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read_batch, iterator)
            while batch := ahead.result():
                ahead = pool.submit(self._read_batch, iterator)
                ready = []
                for x in batch:
                    if isinstance(x, _Read):
                        ready.append(x)
                    elif on_error is None:
                        raise x
                    else:
                        on_error(x)
                for read, instances in zip(ready, self._detect(ready), strict=True):
                    yield read.image, read.pixels, instances

    def to_input(self, pixels: Image) -> dict[str, Any]:
        """Make of (H, W, 3) uint8 BGR pixels what the model takes, resized as in a test."""
        if self.cfg.INPUT.FORMAT == "BGR":
            return self._input(pixels)
        if self.cfg.INPUT.FORMAT == "RGB":
            return self._input(pixels[:, :, ::-1])
        picture = PILImage.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
        return self._input(self._reader.convert(picture))

    def _input(self, pixels: NDArray[Any]) -> dict[str, Any]:
        """Make of (H, W, C) pixels in the model's format what it takes."""
        height, width = pixels.shape[:2]
        if self._run is self.model:
            pixels = self._resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(np.require(pixels.transpose(2, 0, 1), requirements=("C", "W")))
        return {"image": tensor, "height": height, "width": width}

    def _read_batch(self, images: Iterator[str | Path | Image]) -> list["_Read | FreeAnchorError"]:
        """The next images; empty at the end."""
        batch: list[_Read | FreeAnchorError] = []
        for image in islice(images, self.batch_size):
            try:
                pixels = _pixels(image, self.cfg)
                if self.cfg.INPUT.FORMAT in ("BGR", "RGB") or isinstance(image, np.ndarray):
                    inputs = self.to_input(pixels)
                else:  # with what a picture of three colours does not have
                    inputs = self._input(read_image(str(image), self.cfg.INPUT.FORMAT, self.cfg))
                batch.append(_Read(image, pixels, inputs))
            except FreeAnchorError as e:
                batch.append(e)
        return batch

    @torch.inference_mode()
    def _detect(self, batch: list["_Read"]) -> list[Instances]:
        # Only images that are padded alike go together: each is then detected as if it was alone.
        groups: dict[tuple[int, ...], list[int]] = {}
        stride = max(1, self.model.backbone.size_divisibility)
        for i, read in enumerate(batch):
            size = read.input["image"].shape[1:]
            groups.setdefault(tuple(-(-x // stride) for x in size), []).append(i)
        found: dict[int, Instances] = {}
        for group in groups.values():
            with self.lock, self._selection.unlimited():
                outputs = self._run([batch[i].input for i in group])
            for i, output in zip(group, outputs, strict=True):
                found[i] = self._selection.best(output["instances"].to("cpu"))
        return [found[i] for i in range(len(batch))]

    def _choose_scores(self, confidence: float | None, aug: bool) -> list[float]:
        """The thresholds of the classes."""
        self._scores: float | dict[str, float]
        known = self.recommended
        if confidence is not None:
            self._scores, self._reason = confidence, "as given"
        elif known is None:
            self._scores, self._reason = CONFIDENCE, NONE_RECOMMENDED
        elif aug:
            self._scores, self._reason = CONFIDENCE, "as several scales give other scores than one"
        else:
            self._scores = {x: known.classes.get(x, known.score) for x in self.class_names}
            self._reason = known.reason
            return [*self._scores.values()]
        return [self._scores] * len(self.class_names)

    def describe_thresholds(self) -> str:
        """A line that says which scores detections have, and why."""
        return f"Detections have scores above {describe_scores(self._scores, self._reason)}"

    def _indices(self, classes: Sequence[str | int]) -> list[int]:
        names = {name: i for i, name in enumerate(self.class_names)}
        names |= {str(i): i for i in range(len(names)) if str(i) not in names}
        unknown = [str(x) for x in classes if str(x) not in names]
        if unknown:
            raise FreeAnchorError(
                f"The model has no class {shorten(unknown)}, only {shorten(self.class_names)}"
            )
        return [names[str(x)] for x in classes]


class _Read(NamedTuple):
    """An image that was read."""

    image: str | Path | Image  # as given
    pixels: Image
    input: dict[str, Any]


def _pixels(image: str | Path | Image, cfg: CfgNode) -> Image:
    """(H, W, 3) uint8 BGR pixels."""
    if isinstance(image, (str, Path)):
        return read_image(str(image), "BGR", cfg)
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or 0 in image.shape
    ):
        what = (
            f"{image.dtype} array of shape {image.shape}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise DatasetError(f"An image is a path or a (H, W, 3) uint8 array in BGR, not a {what}")
    return image
