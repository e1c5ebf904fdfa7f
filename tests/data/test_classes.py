"""The classes of model and data sets are matched by name."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from freeanchor import data
from freeanchor.errors import DatasetError
from freeanchor.evaluation import read_truth


def register(coco, **options):
    dataset = coco(**options)
    data.register_datasets([dataset])
    return dataset[0]


@pytest.fixture
def open_cfg(cfg):
    """A config that takes the classes of the data."""
    cfg.MODEL.RETINANET.NUM_CLASSES = data.NUM_CLASSES_FROM_DATA
    return cfg


def test_classes_come_from_the_data(open_cfg, coco):
    """As many as `categories` has, used or not, with their names."""
    name = register(coco, category_ids=(1, 5, 6, 7, 8))
    data.resolve_classes(open_cfg, [name])
    assert open_cfg.MODEL.RETINANET.NUM_CLASSES == 5
    assert [f"class {i}" for i in (1, 5, 6, 7, 8)] == open_cfg.MODEL.FREEANCHOR.CLASS_NAMES


def test_classes_of_a_builtin_data_set(open_cfg):
    """COCO's 80 are known without its files."""
    data.resolve_classes(open_cfg, ["coco_2017_train", "coco_2017_val"])
    assert open_cfg.MODEL.RETINANET.NUM_CLASSES == 80
    assert open_cfg.MODEL.FREEANCHOR.CLASS_NAMES[:2] == ["person", "bicycle"]
    assert MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id[90] == 79


def test_number_of_classes_against_the_config(cfg, coco):
    """The message says both numbers."""
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    name = register(coco)
    with pytest.raises(DatasetError, match=r"NUM_CLASSES is 80, but train has 3 classes"):
        data.resolve_classes(cfg, [name])


def other_ids(coco, **changes):
    """A validation set with the same three classes, by other ids and in another order."""
    names = {11: "class 3", 12: "class 1", 13: "class 2"}
    return register(
        coco,
        name="val",
        category_ids=(11, 12, 13),
        categories=[{"id": i, "name": name} for i, name in names.items()],
        **changes,
    )


def test_another_order_and_other_ids(open_cfg, coco):
    """Records and truth have the model's classes, and metadata the user's ids of them."""
    train, val = register(coco), other_ids(coco)
    data.resolve_classes(open_cfg, [train, val])
    metadata = MetadataCatalog.get(val)
    assert metadata.thing_classes == ["class 1", "class 2", "class 3"]
    assert metadata.thing_dataset_id_to_contiguous_id == {11: 2, 12: 0, 13: 1}
    found = [a["category_id"] for x in DatasetCatalog.get(val) for a in x["annotations"]]
    # In the file: 12, 13, 11, 12.
    assert found == [0, 1, 2, 0]
    truth = read_truth(val).dataset
    assert [a["category_id"] - 1 for a in truth["annotations"]] == found
    assert [c["id"] - 1 for c in truth["categories"]] == [0, 1, 2]


def test_classes_of_the_model_come_first(cfg, coco):
    """Those that it was trained for decide, not the data that it is evaluated on."""
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = ["class 2", "class 3", "class 1"]
    val = other_ids(coco)
    data.resolve_classes(cfg, [val])
    assert MetadataCatalog.get(val).thing_dataset_id_to_contiguous_id == {11: 1, 12: 2, 13: 0}


def test_some_of_the_classes(open_cfg, coco, caplog):
    """A data set may have fewer; which ones it lacks is said."""
    train, val = register(coco), register(coco, name="val", category_ids=(2, 3))
    for _ in range(2):  # as train_net.py does, and what it launches
        data.resolve_classes(open_cfg, [train, val])
    assert MetadataCatalog.get(val).thing_dataset_id_to_contiguous_id == {2: 1, 3: 2}
    data.report_findings([val])
    (said,) = [x for x in caplog.messages if "does not have these classes" in x]
    assert "of the model: 'class 1'; they are not evaluated" in said


def test_classes_that_the_model_lacks(open_cfg, coco):
    """Their boxes could not be found: the message says what is surplus and what is missing."""
    train, val = register(coco), register(coco, name="val", category_ids=(1, 2, 4))
    expected = r"val\.json has classes that train does not have: 'class 4'; it lacks 'class 3'"
    with pytest.raises(DatasetError, match=expected) as error:
        data.resolve_classes(open_cfg, [train, val])
    # What the message says is taken.
    key, value = str(error.value).rstrip('"').rsplit(" by ", 1)[1].split(' "')
    open_cfg.merge_from_list([key, value])
    data.resolve_classes(open_cfg, [train, val])
    assert open_cfg.MODEL.RETINANET.NUM_CLASSES == 4


def test_classes_in_another_case(open_cfg, coco):
    """They are not taken for the same, and the message says what to do."""
    train = register(coco)
    val = register(
        coco, name="val", categories=[{"id": i, "name": f"Class {i}"} for i in (1, 2, 3)]
    )
    with pytest.raises(DatasetError, match="write them alike, also in case"):
        data.resolve_classes(open_cfg, [train, val])


def test_surplus_classes_without_boxes(open_cfg, coco, caplog):
    """An entry of `categories` that no box uses, as some tools add, is no obstacle."""
    train = register(coco)
    categories = [{"id": i, "name": f"class {i}"} for i in range(4)]
    val = register(coco, name="val", categories=categories)
    data.resolve_classes(open_cfg, [train, val])
    assert len(DatasetCatalog.get(val)) == 4
    data.report_findings([val])
    assert "have no boxes, and the model lacks them: 'class 0'" in caplog.text


def test_class_names_that_are_not_as_many(cfg, coco):
    """They must be as many as the model has outputs."""
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = ["class 1", "class 2"]
    with pytest.raises(DatasetError, match="CLASS_NAMES must be 3 different names"):
        data.resolve_classes(cfg, [register(coco)])


def test_data_set_that_is_not_registered(cfg):
    """A misspelt name says how to register it."""
    with pytest.raises(DatasetError, match="data set coco_2018 is not known: register it with"):
        data.resolve_classes(cfg, ["coco_2018"])
    with pytest.raises(DatasetError, match="there is no data set"):
        data.resolve_classes(cfg, [])


def test_coco_file_that_python_registered(open_cfg, coco):
    """It is read as with --dataset."""
    _, path, images = coco(annotations=[{"bbox": [5, 5, 0, 9], "iscrowd": None}])
    register_coco_instances("by_python", {}, path, images)
    data.resolve_classes(open_cfg, ["by_python"])
    assert open_cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert sum(len(x["annotations"]) for x in DatasetCatalog.get("by_python")) == 4


@pytest.fixture
def by_python(coco):
    """Registers records with classes of their own order."""
    _, _, images = coco()

    def write(boxes, classes=("b", "a"), mode=BoxMode.XYXY_ABS, **metadata):
        annotations = [{"bbox": box, "bbox_mode": mode, "category_id": c} for box, c in boxes]
        record = {"file_name": f"{images}/1.png", "width": 64, "height": 48, "image_id": "x"}
        DatasetCatalog.register("by_python", lambda: [{**record, "annotations": annotations}])
        MetadataCatalog.get("by_python").set(thing_classes=list(classes), **metadata)
        return annotations

    return write


@pytest.mark.parametrize("number", [int, float, np.int64])
def test_records_that_python_registered(cfg, by_python, number):
    """They are brought to the model's classes too, and what was registered is not changed."""
    given = by_python([((5, 5, 20, 20), number(0)), ((5, 5, 30, 20), number(1))])
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = ["a", "b", "c"]
    data.resolve_classes(cfg, ["by_python"])
    (record,) = DatasetCatalog.get("by_python")
    assert [a["category_id"] for a in record["annotations"]] == [1, 0]
    assert [a["category_id"] for a in given] == [0, 1]
    assert MetadataCatalog.get("by_python").thing_dataset_id_to_contiguous_id == {0: 1, 1: 0}
    truth = read_truth("by_python")
    assert truth.images == {"x": 1}
    annotations = truth.dataset["annotations"]
    assert [a["bbox"] for a in annotations] == [[5, 5, 15, 15], [5, 5, 25, 15]]
    assert [a["area"] for a in annotations] == [225, 375]


@pytest.mark.parametrize(
    ("boxes", "mode", "expected"),
    [
        ([((5, 5, 20, 20), 2)], BoxMode.XYXY_ABS, "has the category_id 2: it must be from 0 to 1"),
        ([((5, 5, 20, 20), 0)], BoxMode.XYWHA_ABS, "must be BoxMode.XYXY_ABS or"),
        ([((5, 5, 5, 20), 0)], BoxMode.XYXY_ABS, "1 of 1 boxes cannot be used"),
        ([((0.1, 0.1, 0.5, 0.5), 0)], BoxMode.XYWH_ABS, "as if they were fractions of the image"),
        ([((40, 30, 60, 45), 0)] * 3, BoxMode.XYWH_ABS, r"corners .*`bbox_mode`"),
    ],
)
def test_records_that_cannot_be_right(cfg, by_python, boxes, mode, expected):
    """The checks of files hold for them as well."""
    by_python(boxes, mode=mode)
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    data.resolve_classes(cfg, ["by_python"])
    with pytest.raises(DatasetError, match=expected):
        data.check_images(["by_python"])


@pytest.mark.parametrize("metadata", [{}, {"thing_classes": ["cell"]}])
def test_a_source_that_fails(metadata):
    """A function that was registered and finds no file is named, whoever asks it first."""

    def source():
        raise FileNotFoundError("cells.json")

    DatasetCatalog.register("by_python", source)
    MetadataCatalog.get("by_python").set(**metadata)
    with pytest.raises(DatasetError, match=r"^by_python cannot be loaded: .*cells\.json"):
        data.load_training_set(["by_python"], filter_empty=True)


def test_two_processes_see_the_same(open_cfg, coco):
    """A config that was resolved once resolves to the same again."""
    train, val = register(coco), other_ids(coco)
    data.resolve_classes(open_cfg, [train, val])
    again = open_cfg.clone()
    data.resolve_classes(again, [train, val])
    assert again == open_cfg
    assert json.dumps(read_truth(val).dataset)
