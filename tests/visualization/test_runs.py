"""What a run left, seen with a data set that is not written as it was then."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog
from freeanchor import data
from freeanchor.errors import FileError
from freeanchor.visualization import read_detections


@pytest.fixture
def results(cfg, coco, tmp_path):
    """A detection of each class of a data set that now has other ids."""
    names = {11: "class 2", 12: "class 1"}
    triple = coco(
        name="val",
        category_ids=tuple(names),
        categories=[{"id": i, "name": name} for i, name in names.items()],
    )
    data.register_datasets([triple])
    cfg.OUTPUT_DIR = str(tmp_path)
    folder = tmp_path / "inference" / "val"
    folder.mkdir(parents=True)

    def write(ids, categories=None):
        found = [{"image_id": 1, "category_id": i, "bbox": [1, 1, 9, 9], "score": 0.5} for i in ids]
        (folder / "coco_instances_results.json").write_text(json.dumps(found))
        if categories is not None:
            content = [{"id": i, "name": name} for i, name in categories.items()]
            (folder / "categories.json").write_text(json.dumps(content))
        records = DatasetCatalog.get("val")
        return [d["category_id"] for d in read_detections(cfg, "val", records)[1]]

    return write


def test_classes_by_name(results):
    """Ids of another file are those of this one; without the names they are taken as they are."""
    assert results([12, 11, 12]) == [12, 11, 12]
    assert results([1, 2, 1], {1: "class 1", 2: "class 2"}) == [12, 11, 12]
    assert results(["11"], {"11": "class 1"}) == [12]


@pytest.mark.parametrize("categories", [None, {1: "class 1", 2: "class 3"}])
def test_classes_that_are_not_there(results, categories):
    """The id is named."""
    with pytest.raises(FileError, match=r"of the category 2, which data set val does not have"):
        results([2], categories)


def test_evaluation_writes_the_names(register, tmp_path):
    """Those of the data set, with the user's ids."""
    from freeanchor.evaluation import BoxEvaluator

    name = register("val", [(1, 0, (10, 10, 20, 20), False)])
    evaluator = BoxEvaluator(name, output_dir=str(tmp_path / "out"))
    Path(tmp_path / "out").mkdir()
    evaluator._write()
    written = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert written == [{"id": i, "name": f"class {i}"} for i in (3, 7, 8)]
