"""Own data sets: what is accepted, what is dropped, and what the errors say."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from freeanchor import data
from freeanchor.errors import DatasetError


def message(error):
    """The message, which must be one clear sentence for the user, not a repr of a dict."""
    text = str(error.value)
    assert "\n" not in text
    return text


# Registration


def test_registers_and_knows_its_classes(coco):
    """Classes are known before the data is loaded, in the order of their ids, gaps and all."""
    name, path, images = coco(category_ids=(90, 3, 7))
    data.register_datasets([(name, path, images)])
    assert MetadataCatalog.get(name).thing_classes == ["class 3", "class 7", "class 90"]
    dicts = data.load_training_set([name], filter_empty=True)
    assert len(dicts) == 4
    assert {a["category_id"] for d in dicts for a in d["annotations"]} == {0, 1, 2}


def test_name_that_is_taken(coco):
    """A second data set of a name is refused, also a name of Detectron2's own."""
    _, path, images = coco()
    with pytest.raises(DatasetError, match="coco_2017_train: this name is taken"):
        data.register_datasets([("coco_2017_train", path, images)])


def test_registering_twice(coco):
    """The launched processes register what the launching one has; only other data is refused."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    data.register_datasets([(name, path, images)])
    with pytest.raises(DatasetError, match="this name is taken"):
        data.register_datasets([(name, coco(name="other")[1], images)])


def test_missing_annotation_file(coco, tmp_path):
    """The file is named."""
    _, _, images = coco()
    with pytest.raises(DatasetError, match=r"no annotation file .*nowhere\.json"):
        data.register_datasets([("mine", str(tmp_path / "nowhere.json"), images)])


def test_missing_image_directory(coco, tmp_path):
    """The directory is named."""
    _, path, _ = coco()
    with pytest.raises(DatasetError, match=r"no image directory .*nowhere"):
        data.register_datasets([("mine", path, str(tmp_path / "nowhere"))])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"images": [', "is not a JSON file"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b"[]", "holds no object"),
        (b"{}", "has no `images`"),
        (b'{"images": [{"id": 1}]}', "has no `categories`"),
        (b'{"images": [{"id": 1}], "categories": [{"name": "cat"}]}', "needs an `id` and a `name`"),
        (b'{"images": [{"id": 1}], "categories": ["cat"]}', "needs an `id` and a `name`"),
    ],
)
def test_broken_annotation_file(tmp_path, content, expected):
    """What is wrong with the file is said, with its name."""
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=expected) as error:
        data.register_datasets([("mine", str(path), str(tmp_path))])
    assert str(path) in message(error)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ({"bbox": [1, 1, 5, 5], "category_id": 8}, "category_id=8"),
        ({"bbox": [1, 1, 5, 5], "id": 1}, "not unique"),
        ({"bbox": []}, "empty 'bbox'"),
    ],
)
def test_annotations_that_detectron2_refuses(coco, annotation, expected):
    """Detectron2's own complaint is passed on with the name of the file."""
    name, path, images = coco(annotations=[annotation])
    data.register_datasets([(name, path, images)])
    with pytest.raises(DatasetError, match=expected) as error:
        data.check_images([name])
    assert path in str(error.value)


# Classes


def register(coco, **options):
    dataset = coco(**options)
    data.register_datasets([dataset])
    return dataset[0]


def test_number_of_classes_comes_from_the_data(cfg, coco):
    """As many as `categories` has, used or not."""
    cfg.MODEL.RETINANET.NUM_CLASSES = data.NUM_CLASSES_FROM_DATA
    name = register(coco, category_ids=(1, 5, 6, 7, 8))
    data.resolve_num_classes(cfg, [name])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 5


def test_number_of_classes_of_a_builtin_data_set(cfg):
    """COCO's 80 are known without its files."""
    cfg.MODEL.RETINANET.NUM_CLASSES = data.NUM_CLASSES_FROM_DATA
    data.resolve_num_classes(cfg, ["coco_2017_train", "coco_2017_val"])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 80


def test_number_of_classes_against_the_config(cfg, coco):
    """The message says both numbers."""
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    name = register(coco)
    with pytest.raises(DatasetError, match=r"NUM_CLASSES is 80, but train has 3 classes"):
        data.resolve_num_classes(cfg, [name])


def test_number_of_classes_against_the_test_set(cfg, coco):
    """The message says both numbers."""
    train = register(coco)
    val = register(coco, name="val", category_ids=(1, 2))
    with pytest.raises(DatasetError, match="train has 3 classes and val has 2"):
        data.resolve_num_classes(cfg, [train, val])


def test_names_of_classes_against_the_test_set(cfg, coco):
    """As many classes, but others: AP would be computed on the wrong ones."""
    train = register(coco)
    val = register(coco, name="val", category_ids=(1, 2, 4))
    with pytest.raises(DatasetError, match="class 2 of 3 is 'class 3' in train and 'class 4' in"):
        data.resolve_num_classes(cfg, [train, val])


def test_data_set_that_is_not_registered(cfg):
    """A misspelt name says how to register it."""
    with pytest.raises(DatasetError, match="data set coco_2018 is not known: register it with"):
        data.resolve_num_classes(cfg, ["coco_2018"])
    with pytest.raises(DatasetError, match="there is no data set"):
        data.resolve_num_classes(cfg, [])


def test_data_set_that_python_registered(cfg, coco):
    """Detectron2 learns the classes of such a data set only when it loads it."""
    _, path, images = coco()
    register_coco_instances("by_python", {}, path, images)
    cfg.MODEL.RETINANET.NUM_CLASSES = data.NUM_CLASSES_FROM_DATA
    data.resolve_num_classes(cfg, ["by_python"])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3


# Boxes


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="freeanchor.data")
    return caplog


def test_unusable_boxes_are_dropped_and_reported(coco, warnings):
    """Without area, outside, or not finite: dropped and counted, with image and reason."""
    bad = [
        {"bbox": [5, 5, 0, 10]},
        {"bbox": [5, 5, 10, 0]},
        {"bbox": [5, 5, -3, 10]},
        {"bbox": [64, 5, 10, 10]},
        {"bbox": [5, -10, 10, 10]},
        {"bbox": [5, 5, float("nan"), 10]},
        {"bbox": [5, 5, 10]},
        {"bbox": [None, 5, 10, 10]},
        {"bbox": ["5", "5", "10", "10"]},
    ]
    kept = [{"bbox": [60, 40, 10, 20]}, {"bbox": [5, 5, 9, 9], "iscrowd": 1}]
    name = register(coco, annotations=[*bad, *kept])
    dicts = data.load_training_set([name], filter_empty=True)
    assert sum(len(d["annotations"]) for d in dicts) == 4 + len(kept)
    (record,) = warnings.records
    assert "Dropped 9 boxes" in record.message
    assert "1.png" in record.message
    assert "has no area" in record.message
    assert "outside the image of 64 x 48" in record.message
    assert "and 4 more" in record.message


def test_data_that_python_registered(coco):
    """Detectron2's standard format allows NumPy numbers and images without their size."""
    _, _, images = coco()
    box = {
        "bbox": np.array([5, 5, 20, 20], dtype=np.float32),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
    }
    record = {"file_name": f"{images}/1.png", "image_id": 1, "annotations": [box]}
    DatasetCatalog.register("by_python", lambda: [record])
    MetadataCatalog.get("by_python").thing_classes = ["cell"]
    data.check_images(["by_python"])
    (loaded,) = data.load_training_set(["by_python"], filter_empty=True)
    assert len(loaded["annotations"]) == 1


@pytest.mark.parametrize("filter_empty", [True, False])
def test_images_that_lose_their_only_box(coco, filter_empty):
    """They leave training with FILTER_EMPTY_ANNOTATIONS, and stay as background without."""
    name = register(coco, num_images=3)
    path = Path(MetadataCatalog.get(name).json_file)
    content = json.loads(path.read_text())
    content["annotations"][1]["bbox"] = [100, 100, 5, 5]
    path.write_text(json.dumps(content))
    dicts = data.load_training_set([name], filter_empty)
    assert [len(d["annotations"]) for d in dicts] == ([1, 1] if filter_empty else [1, 0, 1])


@pytest.mark.parametrize(
    "annotations", [[], [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 0]}]]
)
def test_no_usable_box(coco, annotations):
    """Nothing to learn from is an error that names the file, not an endless random training."""
    name = register(coco, **{"annotations": None})
    path = Path(MetadataCatalog.get(name).json_file)
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": annotations}))
    with pytest.raises(DatasetError, match="no usable box in 4 images") as error:
        data.load_training_set([name], filter_empty=True)
    assert str(path) in message(error)
