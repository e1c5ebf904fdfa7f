"""Pictures: of arrays and plain records, without a model or a config."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..data import decode_mask, read_image
from ..evaluation import class_index
from ..modeling import Matching
from .labels import make_legible

__all__ = ["draw_curves", "draw_detections", "draw_matching", "overlay_masks", "to_image"]

_MIN_SIZE = 512  # shorter side of a picture, so that labels do not hide small images
_MAX_ENLARGED = 2048  # its longer side, where that makes a strip too large
_MAX_SIZE = 8192  # of any, as file formats and memory end somewhere


class _Drawn(NamedTuple):
    """A box x1 y1 x2 y2, its class, what to say after the class, and its mask, if any."""

    box: list[float]
    label: int
    suffix: str = ""
    mask: Any = None


def draw_detections(
    record: dict[str, Any],
    detections: list[dict[str, Any]],
    metadata: Any,
    score_thresh: float | Sequence[float],
    cfg: CfgNode | None = None,
) -> NDArray[Any]:
    """Draw the ground truth of an image and, to its right, its detections; below it for a strip.

    With `MODEL.MASK_ON`, masks too.

    Args:
        record: the image in Detectron2's standard format.
        detections: its detections in COCO's result format.
        metadata: classes of the data set, and its `thing_dataset_id_to_contiguous_id`.
        score_thresh: detections with a lower score are left out; one number, or one per class.
        cfg: of the run, for how images are read.

    Returns:
        (H, 2 * W, 3) uint8 RGB image, where small images are enlarged; (2 * H, W, 3) if an image is
        more than twice as wide as it is high.
    """
    image = read_image(record["file_name"], "RGB", cfg)
    key = "segmentation" if cfg is not None and cfg.MODEL.MASK_ON else ""
    truth = [
        _Drawn(
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
            a["category_id"],
            mask=a.get(key),
        )
        for a in record.get("annotations", ())
    ]
    thresholds = np.broadcast_to(score_thresh, len(metadata.thing_classes))
    found = [
        _Drawn(
            BoxMode.convert(d["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
            label,
            f" {d['score']:.0%}",
            d.get(key),
        )
        for d in detections
        if d["score"] >= thresholds[label := class_index(metadata, d["category_id"])]
    ]
    axis = 0 if image.shape[1] > 2 * image.shape[0] else 1
    return np.concatenate([_draw_boxes(image, x, metadata) for x in (truth, found)], axis=axis)


def overlay_masks(
    image: NDArray[Any], masks: Sequence[NDArray[Any]], labels: Sequence[int]
) -> NDArray[Any]:
    """Tint the pixels of objects, the first ones on top.

    Args:
        image: (H, W, 3) uint8 RGB image, not changed.
        masks: of each object, (H, W) whether a pixel is of it.
        labels: the index of its class, which has a colour.

    Returns:
        (H, W, 3) uint8 RGB image.
    """
    colors = colormap(rgb=True, maximum=255)
    tinted: NDArray[Any] = image.copy()
    for mask, label in zip(reversed(masks), reversed(labels), strict=True):
        tinted[mask] = (tinted[mask] + colors[label % len(colors)]) / 2
    return tinted


def _scale(height: int, width: int) -> float:
    """By which a picture is larger than its image."""
    shorter, longer = sorted((height, width))
    scale = max(1.0, min(_MIN_SIZE / shorter, _MAX_ENLARGED / longer))
    return max(min(scale, _MAX_SIZE / longer), 1 / shorter)


def _draw_boxes(image: NDArray[Any], objects: list[_Drawn], metadata: Any) -> NDArray[Any]:
    """Draw objects on an image, a colour for each class."""
    colors = colormap(rgb=True, maximum=1)
    masked = [x for x in objects if x.mask is not None]
    size = image.shape[1], image.shape[0]
    masks = [decode_mask(x.mask, size) for x in masked]
    image = overlay_masks(image, masks, [x.label for x in masked])
    visualizer = Visualizer(image, metadata, scale=_scale(*image.shape[:2]))
    visualizer.overlay_instances(
        boxes=np.array([x.box for x in objects]).reshape(-1, 4),
        labels=[metadata.thing_classes[x.label] + x.suffix for x in objects],
        assigned_colors=[colors[x.label % len(colors)] for x in objects],
    )
    make_legible(visualizer.output.ax.texts)
    drawn: NDArray[Any] = visualizer.output.get_image()
    return drawn


def curves(records: list[dict[str, float]]) -> list[tuple[str, list[str]]]:
    """What is drawn over the iterations: titles, and the keys of the logged values."""
    losses = dict.fromkeys(k for r in records for k in r if k.startswith("loss_"))
    return [
        ("Losses", ["total_loss", *losses]),
        ("Likelihood of a bag", ["freeanchor/bag_likelihood", "freeanchor/localized_objects"]),
        ("Anchors that carry a bag", ["freeanchor/anchors_per_bag"]),
    ]


def draw_curves(records: list[dict[str, float]]) -> Figure:
    """Plot the losses and what FreeAnchor logs of its matching, over the iterations.

    Args:
        records: see :func:`freeanchor.visualization.read_metrics`.

    Returns:
        A figure, to be saved.
    """
    figure = Figure(figsize=(6, 9), layout="constrained")
    wanted = curves(records)
    for axes, (title, keys) in zip(figure.subplots(len(wanted), sharex=True), wanted):
        for key in keys:
            logged = [r for r in records if key in r]
            axes.plot(
                [r["iteration"] for r in logged],
                [r[key] for r in logged],
                label=key.split("/")[-1],
            )
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_xlabel("iteration")
    return figure


def draw_matching(
    image: NDArray[Any], matchings: dict[str, Matching], max_objects: int = 4
) -> Figure:
    """Draw the bags of an image's objects, and RetinaNet's assignment to their right.

    Anchors are coloured by their matched probability relative to the best of the bag (RetinaNet's:
    by IoU), from dark to bright, and the best is thick and dashed white. The object is red.

    Args:
        image: (H, W, 3) uint8 RGB image.
        matchings: of this image, by what to call them, as the iteration of the model.
        max_objects: as many objects are drawn, spread evenly from the smallest to the largest.

    Returns:
        A figure, a row per object, to be saved.
    """
    first = next(iter(matchings.values()))
    areas = (first.boxes[:, 2:] - first.boxes[:, :2]).prod(dim=1)
    chosen = areas.argsort()[
        np.linspace(0, len(areas) - 1, min(max_objects, len(areas))).round().astype(int)
    ].tolist()
    width = len(matchings) + 1
    figure = Figure(figsize=(3 * width, 3.2 * max(1, len(chosen))), layout="constrained")
    rows = figure.subplots(max(1, len(chosen)), width, squeeze=False)
    for row, i in zip(rows, chosen):
        box = first.boxes[i].cpu().numpy()
        for axes, (name, matching) in zip(row, matchings.items()):
            prob, anchors = matching.prob[i].cpu().numpy(), matching.anchors[i].cpu().numpy()
            title = f"{name}: best of {len(prob)} anchors P = {prob.max():.2g}"
            make_legible([axes.set_title(title, fontsize=8)])
            _draw_anchors(axes, image, box, anchors, prob / max(prob.max(), 1e-30))
        iou = first.assigned_iou[i].cpu().numpy()
        row[-1].set_title(
            f"RetinaNet: {len(iou)} anchors, best IoU {max(iou, default=0):.2f}", fontsize=8
        )
        _draw_anchors(row[-1], image, box, first.assigned[i].cpu().numpy(), iou)
    for axes in rows[len(chosen) :].flat:
        axes.axis("off")
    return figure


def _draw_anchors(
    axes: Axes, image: NDArray[Any], box: NDArray[Any], anchors: NDArray[Any], value: NDArray[Any]
) -> None:
    axes.imshow(image, interpolation="nearest")
    for j in value.argsort():  # the best is drawn last
        is_best = j == value.argmax()
        color = colormaps["viridis"](float(value[j]))
        _draw_box(axes, anchors[j], color, 2.5 if is_best else 0.5 + value[j])
        if is_best:
            _draw_box(axes, anchors[j], "white", 1, linestyle="--")
    _draw_box(axes, box, "red", 1.5)
    # The object in its surroundings, where most of its anchors end.
    center, side = (box[:2] + box[2:]) / 2, max(32, 2.2 * (box[2:] - box[:2]).max())
    height, width = image.shape[:2]
    axes.set_xlim(max(0, center[0] - side / 2) - 0.5, min(width, center[0] + side / 2) - 0.5)
    axes.set_ylim(min(height, center[1] + side / 2) - 0.5, max(0, center[1] - side / 2) - 0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_box(axes: Axes, box: NDArray[Any], color: Any, width: float, **style: Any) -> None:
    size = box[2:] - box[:2]
    corner = (box[0] - 0.5, box[1] - 0.5)  # pixels are drawn around whole numbers
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=width, **style))


def to_image(figure: Figure) -> NDArray[Any]:
    """(H, W, 3) uint8 RGB image of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba: NDArray[Any] = np.asarray(canvas.buffer_rgba())
    return rgba[..., :3]
