"""What several test files need."""

import json
import logging
import runpy
import sys
from pathlib import Path

import freeanchor  # isort: skip  # makes Detectron2 importable
import cv2
import numpy as np
import pytest
import torch
from detectron2 import layers
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from freeanchor import data
from freeanchor.checkpoint import write_checkpoint
from freeanchor.deploy import Predictor
from PIL import Image

# Detectron2's main branch has what 0.6 lacks; both call themselves "0.6".
IS_DETECTRON2_MAIN = hasattr(layers, "move_device_like")
REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
QUICK = REPOSITORY / "configs" / "quick" / "free_anchor_R_18_FPN.yaml"


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _storage():
    """The model logs to an EventStorage, as Detectron2's models do."""
    with EventStorage() as storage:
        yield storage


@pytest.fixture
def storage(_storage):
    return _storage


@pytest.fixture(autouse=True)
def _forget_datasets():
    """Data sets that a test registers are gone after it."""
    known = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def quick_cfg(name="quick/free_anchor_R_18_FPN.yaml"):
    """The quick config, or another one, on the CPU and with three classes."""
    cfg = get_cfg()
    freeanchor.add_freeanchor_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / "configs" / name))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    return cfg


@pytest.fixture
def cfg():
    return quick_cfg()


@pytest.fixture
def model(cfg):
    return build_model(cfg)


@torch.no_grad()
def make_it_detect(model):
    """Give a random model some scores above 0.05, and boxes off its anchors."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the one batch below
    head = model.head
    boxes = float(head.bbox_pred.bias[0])  # 0 for deltas, not for distances
    predictors = {head.cls_score: (-4.2, 0.7), head.bbox_pred: (boxes, 0.7)}
    for predictor in predictors:
        torch.nn.init.normal_(predictor.weight)
    features = model.train().backbone(torch.randn(4, 3, 128, 160))
    outputs = head([features[name] for name in model.head_in_features])
    for levels, (predictor, (mean, std)) in zip(outputs, predictors.items()):
        predictor.weight *= std / levels[0].std()
        predictor.bias.fill_(mean)
    model.eval()


def instances(boxes, classes, image_size=(64, 64)):
    """Ground truth of one image as Detectron2's mapper makes it."""
    result = Instances(image_size)
    result.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    return result


@pytest.fixture
def coco(tmp_path):
    """A small data set in COCO format, as a function of what is to be wrong with it."""

    def write(name="train", num_images=4, category_ids=(1, 2, 3), annotations=None, **changes):
        rng = np.random.default_rng(len(name))
        folder = tmp_path / name
        folder.mkdir()
        content = {"images": [], "annotations": [], "categories": []}
        for i in range(1, num_images + 1):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
            content["annotations"].append(
                {
                    "id": i,
                    "image_id": i,
                    "category_id": category_ids[i % len(category_ids)],
                    "bbox": [8 + i, 6, 30, 20],
                    "area": 600,
                    "iscrowd": 0,
                }
            )
        for i, extra in enumerate(annotations or (), start=num_images + 1):
            content["annotations"].append(
                {"id": i, "image_id": 1, "category_id": category_ids[0], "iscrowd": 0, **extra}
            )
        content["categories"] = [{"id": i, "name": f"class {i}"} for i in category_ids]
        content.update(changes)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return name, str(tmp_path / f"{name}.json"), str(folder)

    return write


@pytest.fixture
def dataset(coco):
    """A registered data set of two classes: its name, annotations and folder."""
    triple = coco(category_ids=(3, 9))
    data.register_datasets([triple])
    return triple


@pytest.fixture
def train_net(monkeypatch):
    """Runs `train_net.py` in this process, as a user would on the command line."""

    def run(*arguments, config=QUICK):
        command = ["train_net.py", "--config-file", str(config), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        return runpy.run_path(str(REPOSITORY / "train_net.py"), run_name="__main__")

    yield run
    for name in ("detectron2", "fvcore", "freeanchor"):  # Detectron2 logs to a file of this test
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


@pytest.fixture
def tiny(train_net, tmp_path):
    """Trains a tiny model, on the command line, and gives the folder that it wrote to."""
    from tiny_run import OPTIONS, write_data  # of tests/engine, where this is used

    write_data(tmp_path / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small layers, for which two threads only wait for each other

    def run(*options, output="output"):
        flags = [x for x in options if str(x).startswith("--")]
        values = [str(x) for x in options if x not in flags]
        triple = [tmp_path / "data" / x for x in ("train.json", "images")]
        keys = ["OUTPUT_DIR", tmp_path / output, "DATALOADER.NUM_WORKERS", "0"]
        keys += ["SOLVER.MAX_ITER", "6"]
        train_net(*flags, "--dataset", "tiny", *triple, *OPTIONS, *keys, *values)
        return tmp_path / output

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def before_step(monkeypatch):
    """Does something before a step: a function of the `TrainStep`."""
    from freeanchor.engine.step import TrainStep

    run_step = TrainStep.run_step

    def install(function):
        def run(step):
            function(step)
            run_step(step)

        monkeypatch.setattr(TrainStep, "run_step", run)

    return install


@pytest.fixture
def register(tmp_path):
    """Registers objects, (image, class, box, crowd), as a data set of 400 x 300 pixel images."""

    def write(name, objects, num_images=2, category_ids=(3, 7, 8)):
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 400, "height": 300}
                for i in range(1, num_images + 1)
            ],
            "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": category_ids[c],
                    "bbox": list(map(float, box)),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(crowd),
                }
                for i, (image, c, box, crowd) in enumerate(objects, start=1)
            ],
        }
        folder = tmp_path / name
        folder.mkdir()
        for i in range(1, num_images + 1):
            Image.new("RGB", (400, 300)).save(folder / f"{i}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        data.register_datasets([(name, str(tmp_path / f"{name}.json"), str(folder))])
        DatasetCatalog.get(name)  # fills the metadata
        return name

    return write


def random_image(rng, num_classes=3):
    """Detections near objects and elsewhere, and objects, some of them crowds."""

    def boxes(n):
        start = rng.uniform(0, 60, (n, 2))
        return np.concatenate([start, start + rng.uniform(4, 40, (n, 2))], axis=1)

    count = rng.integers(0, 7)
    crowd = rng.random(count) < 0.2
    truth = np.column_stack([boxes(count), rng.integers(0, num_classes, count), crowd])
    near = truth[rng.integers(0, count, 6)] if count else truth
    near = near + np.concatenate([rng.normal(0, 1.5, (len(near), 4)), np.zeros((len(near), 2))], 1)
    found = np.concatenate([near, np.column_stack([boxes(4), np.zeros((4, 2))])])
    others = rng.integers(0, num_classes, len(found))
    found[:, 4] = np.where(rng.random(len(found)) < 0.8, found[:, 4], others)
    found[:, 5] = rng.random(len(found)) * np.repeat([1, 0.5], [len(near), 4])
    found[:, 2:4] = np.maximum(found[:, 2:4], found[:, :2] + 1)
    return found[np.argsort(-found[:, 5], kind="stable")], truth


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a run whose model detects something in noise."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    cfg = quick_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    model = build_model(cfg)
    make_it_detect(model)
    (folder / "config.yaml").write_text(cfg.dump())
    write_checkpoint(folder / "model_final.pth", model.state_dict(), {})
    return folder


@pytest.fixture(scope="session")
def predictor(run_folder):
    return Predictor(run_folder, confidence=0.05, device="cpu")


@pytest.fixture(scope="session")
def images():
    """Smooth noise of five sizes and shapes, BGR."""
    rng = np.random.default_rng(0)
    sizes = (96, 64), (100, 75), (40, 90), (120, 64), (96, 64)
    return [
        cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), size, interpolation=cv2.INTER_LINEAR)
        for size in sizes
    ]


def assert_same(a, b, atol=1e-4, share=0.0):
    """Two Instances hold the same detections, in whatever order equal scores are.

    A share of them may differ: where rounding decides NMS, one detection stands for another.
    """
    assert a.image_size == b.image_size
    assert abs(len(a) - len(b)) <= share * len(b)
    if len(a) and len(b):
        rows_a, rows_b = (
            torch.cat([x.pred_boxes.tensor / 100, x.scores[:, None], x.pred_classes[:, None]], 1)
            for x in (a, b)
        )
        distance = torch.cdist(rows_a, rows_b, p=torch.inf)
        assert (distance.amin(0) > atol).sum() <= share * len(b)
        assert (distance.amin(1) > atol).sum() <= share * len(a)
