"""Masks of a user's data: what can be read is read, and one sentence says what cannot."""

import logging

import numpy as np
import pytest
import torch
from conftest import quick_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from freeanchor import data
from freeanchor.data.masks import read_mask
from freeanchor.errors import DatasetError
from freeanchor.evaluation import read_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api

MASK_RCNN = "quick/mask_rcnn_free_anchor_R_18_FPN.yaml"
SQUARE = [8.0, 6, 28, 6, 28, 18, 8, 18]


def encode(mask):
    encoded = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def run_lengths(mask):
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_run_length_encodings(seed):
    """Compressed or not, the mask stays the same, and the box around it is pycocotools'."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        height, width = rng.integers(1, 70, 2)
        mask = rng.random((height, width)) < rng.random() ** 2
        mask[rng.integers(height), rng.integers(width)] = True
        encoded = encode(mask)
        for counts in (encoded["counts"], encoded["counts"].encode(), run_lengths(mask)):
            read, extent = read_mask({**encoded, "counts": counts}, (width, height))
            assert np.array_equal(mask_api.decode(read), mask)
            assert extent == tuple(mask_api.toBbox(encoded))
        for counts in (encoded["counts"][:-1], encoded["counts"] + "1", "é", "", [width], ["a"]):
            assert isinstance(read_mask({**encoded, "counts": counts}, (width, height)), str)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 70),
    st.floats(),
    st.floats(-3, 70),
    st.text(max_size=5),
    st.text("0123PQRSTo`", max_size=12),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=9),
    st.lists(st.lists(st.one_of(st.floats(-9, 70), SCALARS), max_size=8), max_size=3),
    st.fixed_dictionaries(
        {}, optional={"size": st.just([6, 8]) | SCALARS, "counts": SCALARS | st.lists(SCALARS)}
    ),
    st.lists(st.integers(0, 48), min_size=1, max_size=4).map(
        lambda x: {"size": [6, 8], "counts": [*x, max(0, 48 - sum(x))]}
    ),
)


@settings(max_examples=400, deadline=None)
@given(VALUES)
def test_any_value(value):
    """It is a mask that can be decoded, or one sentence says why not."""
    read = read_mask(value, (8, 6))
    if isinstance(read, str):
        assert read.startswith(("is ", "has "))
    else:
        mask, extent = read
        assert data.decode_mask(mask, (8, 6)).shape == (6, 8)
        assert data.decode_mask(mask, (8, 6)).any()
        assert np.isfinite(extent).all()


def test_how_polygons_may_be_nested():
    """As numbers, as points, and as OpenCV's contours; what may be two polygons is not joined."""
    points = np.reshape(SQUARE, (-1, 2)).tolist()
    contour = [[x] for x in points]
    for value in ([SQUARE], SQUARE, [points], [contour], [[SQUARE]]):
        (polygon,), extent = read_mask(value, (64, 48))
        assert polygon.tolist() == SQUARE
        assert extent == (8, 6, 20, 12)
    inner = [[x + 2, y] for x, y in points]
    with_height = [[x, y, 5.0] for x, y in points]
    for value in ([[points, inner]], [[SQUARE, SQUARE]], [with_height]):
        assert read_mask(value, (64, 48)) == "is neither polygons nor a run-length encoding"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is missing"),
        ([], "is missing"),
        ("", "is missing"),
        ("PPYo1", "is neither polygons nor a run-length encoding"),
        ({"polygon": 5}, "is neither polygons nor a run-length encoding"),
        ([["a", "b"]], "is neither polygons nor a run-length encoding"),
        ([[1.0, 2, 3, 4]], "has no polygon of three points or more"),
        ([[1.0, 2, 3, 4, 5, float("nan")]], "has no polygon of three points or more"),
        ([[70.0, 2, 80, 2, 80, 9]], "is outside its image"),
        ([[9.0, 9, 20, 20, 15, 15]], "covers no pixel"),  # a line
        ([[9.0, 9.4, 29, 29.4, 29, 29.8, 9, 9.8]], "covers no pixel"),  # between pixels
        ([[63.6, 0, 99, 0, 99, 48, 63.6, 48]], "covers no pixel"),  # beside its image
        ({"size": [64, 48], "counts": [10, 2, 3060]}, "is of another size than its image"),
        ({"size": [48, 64], "counts": [10, 2]}, "is a run-length encoding that does not fill"),
        ({"size": [48, 64], "counts": [3072]}, "has no pixel"),
    ],
)
def test_what_cannot_be_used(coco, value, problem, caplog):
    """One object without a usable mask is left out and named; if most are, it is an error."""
    assert problem in read_mask(value, (64, 48))
    good = {"bbox": [8, 6, 20, 12], "segmentation": [SQUARE]}
    name, *paths = coco(annotations=[good] * 6, num_images=1)
    file = data.read_coco(*paths, masks=True)
    assert (len(file.masks), len(file.boxes)) == (6, 6)  # the first has none
    bad = {"bbox": [8, 6, 20, 12], "segmentation": value}
    name, *paths = coco("bad", annotations=[good] * 3 + [bad], num_images=1)
    data.register_datasets([(name, *paths)], masks=True)
    with caplog.at_level(logging.WARNING, "freeanchor"):
        data.report_findings([name])
    _, *crowd = coco("crowd", annotations=[good, {**bad, "iscrowd": 1}], num_images=1)
    lines = data.read_coco(*crowd, masks=True).findings.lines()
    assert any("crowds have their box for a mask" in x for x in lines) == (problem != "is missing")
    assert f"objects are left out, whose `segmentation` {problem}" in caplog.text
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 3
    _, *paths = coco("worse", annotations=[bad] * 3, num_images=1)
    with pytest.raises(DatasetError, match=r"4 of 4 objects have no `segmentation` that can be"):
        data.read_coco(*paths, masks=True)
    assert len(data.read_coco(*paths).boxes) == 4  # as a data set of boxes it is fine


def test_what_a_second_model_of_a_script_leaves_out(coco, caplog):
    """Boxes are trained on first, and then masks: what has no mask is said then, and once."""
    good = {"bbox": [8, 6, 20, 12], "segmentation": [SQUARE]}
    name, *paths = coco(annotations=[good] * 4, num_images=1)  # the first has none
    data.register_datasets([(name, *paths)])
    for masks in (False, True, True):
        cfg = quick_cfg(MASK_RCNN)
        cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = masks, 0
        data.resolve_classes(cfg, [name])
        data.report_findings([name])
    (said,) = caplog.messages
    assert "objects are left out, whose `segmentation` is missing" in said


def test_masks_elsewhere_than_the_boxes(coco):
    """Fractions of the image, or y before x, are no masks of these objects."""
    for name, polygon, problem in (
        ("a", [v / 64 for v in SQUARE], "numbers are taken for pixels"),
        ("b", [6.0, 30, 6, 44, 18, 44, 18, 30], "`segmentation` that does not lie where"),
    ):
        annotations = [{"bbox": [30, 6, 14, 12], "segmentation": [polygon]}] * 4
        _, *paths = coco(name, annotations=annotations, num_images=1)
        with pytest.raises(DatasetError, match=f"(4 of 4|5 of 5) objects have .*{problem}"):
            data.read_coco(*paths, masks=True)


def test_records_and_truth(coco):
    """Polygons, a flat one and run lengths; a crowd without a mask has its box for one."""
    mask = np.zeros((48, 64), dtype=bool)
    mask[6:18, 8:28] = True
    annotations = [
        {"bbox": [8, 6, 20, 12], "segmentation": value}
        for value in ([SQUARE], SQUARE, {"size": [48, 64], "counts": run_lengths(mask)})
    ]
    annotations.append({"bbox": [8, 6, 20, 12], "iscrowd": 1})
    name, *paths = coco(annotations=annotations, num_images=1)
    data.register_datasets([(name, *paths)])
    assert "segmentation" not in DatasetCatalog.get(name)[0]["annotations"][1]
    cfg = quick_cfg(MASK_RCNN)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    data.resolve_classes(cfg, [name])
    records = DatasetCatalog.get(name)
    truth = read_truth(name).dataset["annotations"]
    assert len(records[0]["annotations"]) == len(truth) == 4
    for annotation, expected in zip(truth, records[0]["annotations"], strict=True):
        for value in (annotation["segmentation"], expected["segmentation"]):
            if isinstance(value, list):
                value = mask_api.merge(mask_api.frPyObjects(np.array(value).tolist(), 48, 64))
            assert np.array_equal(mask_api.decode(value), mask)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_masks_move_with_their_image(tmp_path, kind, orientation):
    """Resized and flipped, the mask lies where the object is to be seen, as the box does."""
    seen = np.zeros((48, 64), dtype=np.uint8)
    seen[6:18, 8:28] = 255
    image = Image.fromarray(np.repeat(seen[..., None], 3, axis=2))
    if orientation == 6:  # stored turned by a quarter, with the EXIF tag that says so
        image = image.transpose(Image.Transpose.ROTATE_90)
        image.getexif()[0x0112] = 6
    image.save(tmp_path / "a.png", exif=image.getexif())
    mask = [SQUARE] if kind == "polygon" else encode(seen > 0)
    record = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "width": 64,
        "height": 48,
        "annotations": [
            {
                "bbox": [8, 6, 20, 12],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": mask,
            }
        ],
    }
    cfg = quick_cfg(MASK_RCNN)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 500  # twice the size
    mapper, boxes = data.Mapper(cfg, is_train=True), set()
    for _ in range(12):
        mapped = mapper(record)
        (box,) = mapped["instances"].gt_boxes.tensor.tolist()
        boxes.add(tuple(box))
        size = 192
        # What the mask head is trained by, of the whole image.
        whole = torch.tensor([[0.0, 0, 128, 96]])
        found = mapped["instances"].gt_masks.crop_and_resize(whole, size)[0]
        picture = torch.nn.functional.interpolate(mapped["image"][None].float(), (size, size))
        expected = picture[0, 0] > 127
        assert (found != expected).float().mean() < 0.02
    assert boxes == {(16, 12, 56, 36), (72, 12, 112, 36)}
    cfg.MODEL.MASK_ON = False
    assert not data.Mapper(cfg, is_train=True)(record)["instances"].has("gt_masks")
    cfg.MODEL.MASK_ON, cfg.INPUT.CROP.ENABLED = True, True
    for _ in range(5):  # the boxes are those of what is left
        instances = data.Mapper(cfg, is_train=True)({**record})["instances"]
        left = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.allclose(instances.gt_boxes.tensor, left)
    empty = data.Mapper(cfg, is_train=True)({**record, "annotations": []})
    assert len(empty["instances"]) == 0


def test_records_of_python(tmp_path):
    """They are checked as files are, and need the size of their images."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    annotation = {"bbox": [8, 6, 20, 12], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "width": 64, "height": 48}
    record["annotations"] = [{**annotation, "segmentation": SQUARE}]
    DatasetCatalog.register("python", lambda: [record])
    MetadataCatalog.get("python").thing_classes = ["thing"]
    cfg = quick_cfg(MASK_RCNN)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    data.resolve_classes(cfg, ["python"])
    assert np.array_equal(
        DatasetCatalog.get("python")[0]["annotations"][0]["segmentation"], [SQUARE]
    )
    record["annotations"] = [annotation]
    with pytest.raises(DatasetError, match=r"python: 1 of 1 objects .*a\.png it is missing"):
        DatasetCatalog.get("python")
    del record["width"]
    with pytest.raises(DatasetError, match=r"a\.png needs `width` and `height`"):
        DatasetCatalog.get("python")
