"""Own data sets: what is accepted, what is dropped, and what the errors say."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from freeanchor import data
from freeanchor.errors import DatasetError
from freeanchor.evaluation import read_truth


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
    with pytest.raises(DatasetError, match="the name is empty"):
        data.register_datasets([("", path, images)])


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


def register(coco, **options):
    dataset = coco(**options)
    data.register_datasets([dataset])
    return dataset[0]


# Boxes


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="freeanchor.data")
    return caplog


def test_unusable_boxes_are_dropped_and_reported(coco, warnings):
    """Without area, outside, or not finite: left out and counted, with an example, in any set."""
    bad = [
        {"bbox": [5, 5, 0, 10]},
        {"bbox": [5, 5, 10, 0]},
        {"bbox": [5, 5, -3, 10]},
        {"bbox": [64, 5, 10, 10]},
        {"bbox": [5, -10, 10, 10]},
        {"bbox": [5, 5, float("nan"), 10]},
        {"bbox": [5, 5, 10]},
        {"bbox": [None, 5, 10, 10]},
    ]
    kept = [{"bbox": [60, 40, 10, 20]}, {"bbox": [5, 5, 9, 9], "iscrowd": 1}]
    name = register(coco, num_images=8, annotations=[*bad, *kept])
    dicts = data.load_training_set([name], filter_empty=True)
    assert sum(len(d["annotations"]) for d in dicts) == 8 + len(kept)
    assert len(read_truth(name).dataset["annotations"]) == 8 + len(kept)
    text = " ".join(r.message for r in warnings.records)
    assert (
        "2 boxes are left out, where a `bbox` is not four numbers (annotation 15: [5, 5, 10])"
        in text
    )
    assert "3 boxes are left out, where a `bbox` has no area (annotation 9 of " in text
    assert "2 boxes are left out, where a `bbox` is outside its image" in text
    assert "1 boxes are left out, where a `bbox` is not finite" in text


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


@pytest.mark.parametrize("area", [None, 0, -1, np.nan, np.inf, np.float32(7)])
def test_area_of_an_object_that_python_registered(area):
    """As in a COCO file, that of the box where it can be none: no evaluation would count it."""
    box = {"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "area": area}
    DatasetCatalog.register(
        "by_python", lambda: [{"file_name": "1.png", "image_id": 1, "annotations": [box]}]
    )
    MetadataCatalog.get("by_python").thing_classes = ["cell"]
    (loaded,) = data.load_training_set(["by_python"], filter_empty=True)
    assert loaded["annotations"][0]["area"] == (7 if area == 7 else 225)


def test_records_of_python_without_annotations(coco):
    """Images without objects need not say so; a data set of which none has any is refused."""
    data.register_datasets([coco()])
    records = DatasetCatalog.get("train")
    metadata = {"thing_classes": MetadataCatalog.get("train").thing_classes}
    for record in (records[0], records[-1]):
        del record["annotations"]
    DatasetCatalog.register("some", lambda: records)
    MetadataCatalog.get("some").set(**metadata)
    loaded = data.load_training_set(["some"], filter_empty=False)
    assert [len(x["annotations"]) for x in loaded] == [0, 1, 1, 0]
    assert len(data.load_training_set(["some"], filter_empty=True)) == 2
    bare = [{k: v for k, v in x.items() if k != "annotations"} for x in records]
    DatasetCatalog.register("none", lambda: bare)
    MetadataCatalog.get("none").set(**metadata)
    with pytest.raises(DatasetError, match="none has no `annotations`"):
        data.load_training_set(["none"], filter_empty=False)


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
    ("annotations", "expected"),
    [
        ([], "no usable box in 4 images"),
        (
            [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 0]}],
            r"1 of 1 boxes cannot be used \(1 has no area\)",
        ),
        (None, "has no `annotations`"),
    ],
)
def test_no_usable_box(coco, annotations, expected):
    """Nothing to learn from is an error that names the file, not an endless random training."""
    name = register(coco, **{"annotations": None})
    path = Path(MetadataCatalog.get(name).json_file)
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": annotations}))
    with pytest.raises(DatasetError, match=expected) as error:
        data.load_training_set([name], filter_empty=True)
    assert str(path) in message(error)


# Images of several data sets


@pytest.fixture
def of_two_tools(coco, tmp_path):
    """Two files of the same images, by folders that are written in two ways, and their objects."""
    name, path, images = coco()
    content = json.loads(Path(path).read_text())
    other = tmp_path / "other.json"
    folder = tmp_path / "link"
    folder.symlink_to(images)

    def write(change):
        annotations = [x for x in map(change, content["annotations"]) if x]
        other.write_text(json.dumps({**content, "annotations": annotations}))
        data.register_datasets([(name, path, images), ("other", str(other), str(folder))])
        return name, "other"

    return write


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x if x["id"] > 1 else None,
        lambda x: {**x, "category_id": 1},
        lambda x: {**x, "bbox": [5, 5, 9, 9]},
    ],
    ids=["fewer", "another class", "another box"],
)
def test_image_with_other_objects_in_another_training_set(of_two_tools, change):
    """What one file lacks would be background in it."""
    names = of_two_tools(change)
    with pytest.raises(DatasetError, match=r"images are in .*train\.json and with other obj.*png"):
        data.check_overlap(names, ())


def test_image_twice(of_two_tools, caplog):
    """A data set twice, or one that is part of another, is trained on more often."""
    names = of_two_tools(lambda x: x)
    data.check_overlap([*names, names[0]], ())
    assert not caplog.messages


def test_test_set_that_is_trained_on(of_two_tools, caplog):
    """How many of its images are; whatever their objects."""
    train, test = of_two_tools(lambda x: x if x["id"] > 1 else None)
    data.check_overlap([train], [test])
    (said,) = caplog.messages
    assert "other.json: 4 of its images are trained on" in said
