"""Pictures of arrays and records."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from freeanchor.modeling import Matching
from freeanchor.visualization import drawing, labels
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image


def test_detections_beside_ground_truth(dataset, monkeypatch):
    """Twice as wide; the right half shows the detections above the threshold, and only those."""
    name = dataset[0]
    record = DatasetCatalog.get(name)[0]
    metadata = MetadataCatalog.get(name)
    found = [{"bbox": [5, 5, 40, 30], "score": 0.8, "category_id": 9}]
    with_box = drawing.draw_detections(record, found, metadata, score_thresh=0.5)
    without = drawing.draw_detections(record, found, metadata, score_thresh=0.9)
    of_class = drawing.draw_detections(record, found, metadata, score_thresh=[0.9, 0.5])
    assert np.array_equal(of_class, with_box)
    of_class = drawing.draw_detections(record, found, metadata, score_thresh=[0.5, 0.9])
    assert np.array_equal(of_class, without)
    height = drawing._MIN_SIZE
    width = record["width"] * height // record["height"]
    assert with_box.shape == without.shape == (height, 2 * width, 3)
    assert with_box.dtype == np.uint8
    assert np.array_equal(with_box[:, :width], without[:, :width])
    assert not np.array_equal(with_box[:, width:], without[:, width:])
    # The ground truth is there too, and what is alike on both sides is drawn alike.
    assert not np.array_equal(without[:, :width], without[:, width:])
    truth = record["annotations"][0]
    original = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
    labels = []
    monkeypatch.setattr(
        drawing.Visualizer,
        "overlay_instances",
        lambda self, **drawn: (
            labels.append((drawn["labels"], drawn["boxes"].tolist())) or self.output
        ),
    )
    same = [{"bbox": truth["bbox"], "score": 1.0, "category_id": original[truth["category_id"]]}]
    drawing.draw_detections(record, same, metadata, score_thresh=0.5)
    (truth_label,), (found_label,) = labels[0][0], labels[1][0]
    assert truth_label == metadata.thing_classes[truth["category_id"]]
    assert found_label == f"{truth_label} 100%"
    assert labels[0][1] == labels[1][1]


def test_curves_show_every_logged_value():
    """Losses and matching figures are drawn at the iterations where they were logged."""
    records = [
        {"iteration": i, "total_loss": 1.0, "loss_positive": 0.7, "loss_negative": 0.3}
        for i in (0, 10)
    ]
    records[1]["freeanchor/bag_likelihood"] = 0.5  # not logged for a batch without objects
    figure = drawing.draw_curves(records)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert list(lines["total_loss"].get_xdata()) == [0, 10]
    assert list(lines["bag_likelihood"].get_ydata()) == [0.5]


def a_matching(num_objects=6):
    """Objects of growing size, with the third anchor of each bag as the best."""
    boxes = torch.arange(1, num_objects + 1)[:, None] * torch.tensor([2.0, 2.0, 8.0, 6.0])
    shift = torch.arange(5.0)[None, :, None]
    prob = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.0]).repeat(num_objects, 1)
    return Matching(
        boxes, boxes[:, None] + shift, prob, [b[None] - 1 for b in boxes], [torch.ones(1)] * 6
    )


def test_drawing_of_a_matching():
    """A row per object, a column per model and one for RetinaNet; the winner is thickest."""
    image = np.zeros((48, 64, 3), np.uint8)
    matching = a_matching()
    figure = drawing.draw_matching(image, {"a": matching, "b": matching})
    assert len(figure.axes) == 4 * 3
    first, last = figure.axes[0], figure.axes[9]
    for axes, i in ((first, 0), (last, 5)):  # the smallest and the largest object
        thickest = max(axes.patches, key=lambda p: p.get_linewidth())
        corner = matching.anchors[i, 2, :2] - 0.5
        assert thickest.get_xy() == pytest.approx(corner.tolist())
        assert "P = 0.4" in axes.get_title()
        assert axes.patches[4] is thickest  # after the others, so that they do not hide it
    assert len(first.patches) == 5 + 2  # its bag, the winner once more, and the object
    assert len(figure.axes[2].patches) == 1 + 2
    assert drawing.to_image(figure).ndim == 3


def test_drawing_of_an_object_that_nothing_is_assigned_to():
    """RetinaNet may leave an object without anchors, and a bag without any probability."""
    matching = a_matching(1)._replace(
        prob=torch.zeros(1, 5), assigned=[torch.zeros(0, 4)], assigned_iou=[torch.zeros(0)]
    )
    figure = drawing.draw_matching(np.zeros((9, 9, 3), np.uint8), {"a": matching})
    assert "0 anchors" in figure.axes[1].get_title()


HOSTILE = [
    "$x",
    "a$b$c",
    "_a",
    "<b>&\"'",
    "x^2_{",
    "\\frac",
    "細胞",
    "лист",
    "🙂",
    "\x00\t",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_class_names_are_drawn_as_they_are(dataset, name):
    """No formula, no warning of a missing letter, no crash; warnings are errors here."""
    record = DatasetCatalog.get(dataset[0])[0]
    metadata = MetadataCatalog.get(dataset[0])
    pictures = []
    for class_name in (name, "other"):
        metadata.__dict__["thing_classes"] = [class_name] * 2
        pictures.append(drawing.draw_detections(record, [], metadata, score_thresh=0.5))
    assert not np.array_equal(*pictures)
    figure = drawing.draw_matching(np.zeros((48, 64, 3), np.uint8), {name: a_matching(1)})
    drawing.to_image(figure)


def test_letters_of_other_fonts(monkeypatch):
    """Where the usual font lacks a letter, another of the system is taken; else it is escaped."""
    figure = Figure()
    serif = font_manager.findfont("DejaVu Serif")
    monkeypatch.setattr(labels, "_characters", lambda f: set("細") if f == serif else set("ab"))
    text = figure.text(0, 0, "a細b胞")
    labels.make_legible([text])
    assert text.get_text() == r"a細b\u80de"
    assert text.get_fontfamily() == ["sans-serif", "DejaVu Serif"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((97, 0x7D30), "a細"), ((10, 97), "a"), ((97, 0x7D30, 0xD800), "")],
    ids=["letters", "a line break", "boxes for all there is"],
)
def test_what_a_font_can_draw(monkeypatch, codes, expected):
    """What is not seen, or the same for all characters, tells no names apart."""
    font = SimpleNamespace(get_charmap=lambda: dict.fromkeys(codes, 1))
    monkeypatch.setattr(font_manager, "get_font", lambda name: font)
    assert labels._characters(str(codes)) == set(expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 40), (80, 4000)),  # width, height; height and width of the picture
        ((40, 4000), (4000, 80)),
        ((20000, 30), (24, 8192)),
        ((9000, 1), (2, 9000)),
        ((64, 48), (512, 2 * 682)),
        ((700, 600), (600, 1400)),
    ],
)
def test_strips(tmp_path, size, expected):
    """Pictures of strips have a size that files and memory allow."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    box = [0.0, 0.0, size[0] / 2, size[1] / 2]
    record = {"file_name": str(tmp_path / "strip.png"), "image_id": 1}
    record["annotations"] = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}]
    MetadataCatalog.get("strips").set(thing_classes=["thing"])
    found = [{"bbox": box, "score": 0.9, "category_id": 0}]
    picture = drawing.draw_detections(record, found, MetadataCatalog.get("strips"), 0.5)
    MetadataCatalog.pop("strips")
    assert picture.shape == (*expected, 3)
    matching = a_matching(2)
    matching = matching._replace(boxes=torch.tensor([box, [0.0, 0.0, 1.0, 1.0]]))
    drawing.to_image(drawing.draw_matching(np.zeros((*size[::-1], 3), np.uint8), {"m": matching}))
