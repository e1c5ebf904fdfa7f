"""Trainer in a script, without train_net.py, and Detectron2's own in its place."""

import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from freeanchor.deploy import Predictor
from freeanchor.engine import Trainer
from freeanchor.errors import FreeAnchorError
from tiny_run import TINY_MODEL


@pytest.fixture
def script(cfg, coco, tmp_path):
    """The config of a script whose data sets Detectron2 has registered; classes in two orders."""
    flat = {"bbox": [5, 5, 0, 9], "area": 0}
    triples = [coco(), coco("val", category_ids=(30, 10, 20), annotations=[flat])]
    path = Path(triples[1][1])
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 10 * i, "name": f"class {4 - i}"} for i in (1, 2, 3)]
    path.write_text(json.dumps(content))
    for name, annotations, images in triples:
        register_coco_instances(name, {}, annotations, images)
    cfg.merge_from_list([*TINY_MODEL, "SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def test_script(script, images, caplog):
    """It trains as train_net.py does: classes by name, a folder that all commands take."""
    script.MODEL.RETINANET.NUM_CLASSES = 0
    trainer = Trainer(script)
    assert [x for x in caplog.messages if "val.json" in x and "no area" in x]
    names = ["class 1", "class 2", "class 3"]
    assert MetadataCatalog.get("train").thing_classes == names
    assert MetadataCatalog.get("val").thing_classes == names
    content = json.loads(Path(MetadataCatalog.get("val").json_file).read_text())
    own = {x["id"]: x["name"] for x in content["categories"]}
    expected = [own[x["category_id"]] for x in content["annotations"] if x["area"]]
    records = [x["annotations"] for x in DatasetCatalog.get("val")]
    assert [names[x["category_id"]] for (x,) in records] == expected
    trainer.resume_or_load(resume=False)
    assert "AP" in trainer.train()["bbox"]
    predictor = Predictor(script.OUTPUT_DIR)
    assert list(predictor.class_names) == names
    assert len(predictor(images[:1])) == 1
    assert script.MODEL.FREEANCHOR.CLASS_NAMES == []  # the script's config is its own


def test_script_that_evaluates(script):
    """By the config that the training has left, in a process that has not trained."""
    script.MODEL.FREEANCHOR.CLASS_NAMES = ["class 1", "class 2", "class 3"]
    Trainer.test(script, Trainer.build_model(script))
    own = {x: i for i, x in MetadataCatalog.get("val").thing_dataset_id_to_contiguous_id.items()}
    assert own == {0: 30, 1: 20, 2: 10}


@pytest.mark.parametrize(
    ("kind", "is_said"), [("coco", False), ("coco_panoptic_seg", False), ("lvis", True)]
)
def test_data_set_with_rules_of_its_own(script, caplog, kind, is_said):
    """LVIS's annotations name some of the classes of an image alone, which COCO's AP ignores."""
    vars(MetadataCatalog.get("val"))["evaluator_type"] = kind
    Trainer.build_evaluator(script, "val")
    assert (f"not that of its evaluator_type {kind}" in caplog.text) == is_said


def test_keypoints_are_not_evaluated(script, caplog):
    """They may be trained, by records of Python; AP of boxes alone is not all that was found."""
    Trainer.build_evaluator(script, "val")
    assert "KEYPOINT_ON" not in caplog.text
    script.MODEL.KEYPOINT_ON = True
    Trainer.build_evaluator(script, "val")
    assert "of what MODEL.KEYPOINT_ON finds, boxes and masks alone" in caplog.text


class Counter(DatasetEvaluator):
    """Counts the images that it sees."""

    def reset(self):
        self.seen = 0

    def process(self, inputs, outputs):
        self.seen += len(inputs)

    def evaluate(self):
        return {"own": {"seen": self.seen}}


def test_evaluator_of_the_users_own(script):
    """The usual override of Detectron2's tutorials; what looks into the model stays."""
    folders = []

    class Own(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            folders.append(output_folder)
            return Counter()

    script.MODEL.RETINANET.NUM_CLASSES = 3
    script.TEST.NMS_RECALL = script.TEST.AUG.ENABLED = True
    script.TEST.AUG.MIN_SIZES = (48,)
    trainer = Own(script)
    trainer.resume_or_load(resume=False)
    assert trainer.train().keys() == {"own", "own_TTA", "nms_recall"}
    assert folders == [None, str(Path(script.OUTPUT_DIR) / "inference_TTA")]
    last = (Path(script.OUTPUT_DIR) / "metrics.json").read_text().splitlines()[-1]
    assert json.loads(last)["own/seen"] == 4


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.RETINANET.NUM_CLASSES", 80, "train has 3 classes"),
        ("SOLVER.EMA_DECAY", 1.0, "SOLVER.EMA_DECAY"),
        ("TEST.EARLY_STOPPING", 3, "TEST.EARLY_STOPPING needs"),
        ("DATASETS.TRAIN", (), "DATASETS.TRAIN is empty"),
    ],
)
def test_script_with_values_that_are_refused(script, key, value, expected):
    """As on the command line, before any work."""
    script.merge_from_list([key, value])
    with pytest.raises(FreeAnchorError, match=expected):
        Trainer(script)
    assert not Path(script.OUTPUT_DIR).exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["SOLVER.OPTIMIZER", "AdamW", "INPUT.SCALE_JITTER", (0.5, 2.0)],
        ["SOLVER.AMP.PRECISION", "bfloat16", "MODEL.FREEANCHOR.IGNORE_REGIONS", True],
    ],
)
def test_detectron2s_trainer_says_what_it_does_not_read(script, options, caplog):
    script.merge_from_list(options)
    script.DATASETS.TEST = ()
    trainer = DefaultTrainer(script)
    with caplog.at_level(logging.WARNING, "freeanchor"):
        trainer.resume_or_load(resume=False)
    warnings = [x for x in caplog.messages if "freeanchor.engine.Trainer" in x]
    assert len(warnings) == bool(options)
    assert all(key in warnings[0] for key in options[::2])
