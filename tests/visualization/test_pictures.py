"""Pictures of a finished run."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from freeanchor.__main__ import main
from freeanchor.checkpoint import write_checkpoint
from freeanchor.errors import FileError
from freeanchor.visualization import match_images, read_metrics


def write_metrics(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_metrics(path)


def test_metrics_of_a_folder_that_was_used_twice(tmp_path):
    """A later run overtakes the records of an earlier one; a resumed run goes on."""
    iterations = [19, 39, 59, 19, 39, 40]
    lines = [{"iteration": i, "total_loss": n} for n, i in enumerate(iterations)]
    records = write_metrics(tmp_path / "metrics.json", lines)
    assert [(r["iteration"], r["total_loss"]) for r in records] == [(19, 3), (39, 4), (40, 5)]


def test_metrics_in_the_writers_order(tmp_path):
    """What was logged at an earlier iteration comes later in the file, and loses nothing."""
    lines = [
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 59, "total_loss": 1.0},
        {"iteration": 49, "bbox/AP": 7.0},
        {"iteration": 59, "bbox/AP": 8.0},
    ]
    records = write_metrics(tmp_path / "metrics.json", lines)
    assert records == [
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 49, "bbox/AP": 7.0},
        {"iteration": 59, "total_loss": 1.0, "bbox/AP": 8.0},
    ]


def test_metrics_of_a_run_that_was_killed(tmp_path):
    """Its last line may be cut off."""
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 19, "total_loss": 1.0}\n{"iteration": 39, "tot')
    assert read_metrics(path) == [{"iteration": 19, "total_loss": 1.0}]


def test_command_on_something_else(tmp_path):
    """A folder that is no output of a training is refused by name."""
    with pytest.raises(SystemExit, match=f"{tmp_path} has no config.yaml"):
        main(["visualize", str(tmp_path)])


def test_command_without_what_it_needs(cfg, coco, tmp_path):
    """A data set that is not given, and a run without evaluation, are named."""
    cfg.DATASETS.TEST = ("val",)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "metrics.json").write_text("")
    dataset = coco(name="val")
    for options, expected in (
        ([], "give data set val as --dataset val ANNOTATIONS.json IMAGE_DIR"),
        (["--dataset", "val", "nowhere.json", dataset[2]], "no annotation file nowhere.json"),
        (["--dataset", *dataset], "the run was not evaluated"),
    ):
        with pytest.raises(SystemExit, match=expected):
            main(["visualize", str(tmp_path), *options])


def test_matching_of_another_architecture(cfg, dataset):
    """A RetinaNet has no bags, nor has Detectron2's RPN; it is said by name."""
    records = DatasetCatalog.get(dataset[0])
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(FileError, match="RetinaNet has no bags"):
        match_images(cfg, [], records)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(FileError, match="GeneralizedRCNN with RPN has no bags"):
        match_images(cfg, [], records)


@pytest.mark.parametrize(
    "options",
    [
        ["INPUT.SCALE_JITTER", "(0.1, 2.0)"],
        ["INPUT.MIN_SIZE_TRAIN", "(48, 96)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"],
        ["INPUT.CROP.ENABLED", "True", "INPUT.RANDOM_FLIP", "vertical"],
    ],
)
def test_matching_whatever_the_augmentation(cfg, dataset, options):
    """Images are as in a test: whole, and their objects where they are."""
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.INPUT.MIN_SIZE_TEST = 2, 96
    path = str(Path(dataset[1]).with_name("model.pth"))
    write_checkpoint(path, build_model(cfg).state_dict(), {})
    cfg.merge_from_list(options)
    records = DatasetCatalog.get(dataset[0])
    for (pixels, matchings), record in zip(match_images(cfg, [path], records), records):
        assert pixels.shape == (96, 128, 3)
        x, y, width, height = record["annotations"][0]["bbox"]
        box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
        torch.testing.assert_close(matchings["model"].boxes, 2 * box)


def test_matching_of_checkpoints_of_one_name(cfg, dataset, tmp_path):
    """Those of two runs are both drawn."""
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    state = build_model(cfg).state_dict()
    paths = [str(tmp_path / run / "model_final.pth") for run in ("one", "two")]
    for path in paths:
        write_checkpoint(path, state, {})
    ((_, matchings),) = match_images(cfg, paths, DatasetCatalog.get(dataset[0])[:1])
    assert list(matchings) == paths
