"""Pictures of a finished run."""

import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from freeanchor import data, visualize


@pytest.fixture
def dataset(coco):
    triple = coco(category_ids=(3, 9))
    data.register_datasets([triple])
    data.load([triple[0]])
    return triple


def test_detections_beside_ground_truth(dataset):
    """Twice as wide; the right half shows the detections above the threshold, and only those."""
    name = dataset[0]
    record = data.load([name])[0]
    metadata = MetadataCatalog.get(name)
    found = [{"bbox": [5, 5, 40, 30], "score": 0.8, "category_id": 9}]
    with_box = visualize.draw_detections(record, found, metadata, score_thresh=0.5)
    without = visualize.draw_detections(record, found, metadata, score_thresh=0.9)
    height, width = record["height"], record["width"]
    assert with_box.shape == without.shape == (height, 2 * width, 3)
    assert with_box.dtype == np.uint8
    assert np.array_equal(with_box[:, :width], without[:, :width])
    assert not np.array_equal(with_box[:, width:], without[:, width:])


def test_metrics_of_a_folder_that_was_used_twice(tmp_path):
    """A later run overtakes the records of an earlier one; a resumed run goes on."""
    path = tmp_path / "metrics.json"
    iterations = [19, 39, 59, 19, 39, 40]
    path.write_text(
        "".join(json.dumps({"iteration": i, "n": n}) + "\n" for n, i in enumerate(iterations))
    )
    records = visualize.read_metrics(path)
    assert [(r["iteration"], r["n"]) for r in records] == [(19, 3), (39, 4), (40, 5)]


def test_curves_show_every_logged_value():
    """Losses and matching figures are drawn at the iterations where they were logged."""
    records = [
        {"iteration": i, "total_loss": 1.0, "loss_positive": 0.7, "loss_negative": 0.3}
        for i in (0, 10)
    ]
    records[1]["freeanchor/bag_likelihood"] = 0.5  # not logged for a batch without objects
    figure = visualize.draw_curves(records)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert list(lines["total_loss"].get_xdata()) == [0, 10]
    assert list(lines["bag_likelihood"].get_ydata()) == [0.5]


def test_command_on_something_else(tmp_path, monkeypatch, capsys):
    """A folder that is no output of a training is refused by name."""
    monkeypatch.setattr("sys.argv", ["visualize", str(tmp_path)])
    with pytest.raises(SystemExit):
        visualize.main()
    assert f"{tmp_path} has no config.yaml" in capsys.readouterr().err
