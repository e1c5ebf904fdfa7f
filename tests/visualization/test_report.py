"""The report of a run."""

import html.parser
import json
import pathlib
import re

import pytest
import torch
from conftest import quick_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from freeanchor import data, engine
from freeanchor.__main__ import main
from freeanchor.checkpoint import write_checkpoint
from freeanchor.errors import FileError
from freeanchor.visualization import report, write_pictures
from PIL import Image
from torch import nn

METRICS = {
    "bbox/AP": 12.34,
    "bbox/AP50": 50.0,
    "bbox/AP75": 3.0,
    "bbox/AP-class 4": 1.25,
    "bbox/AP-<b>": 99.0,
    "bbox/AP-never": float("nan"),
    "nms_recall/NR": 77.7,
    "aspect_ratio/AP<=2": 41.5,
    "aspect_ratio/AR<=2": 42.5,
    "crowding/AP0": 43.5,
    "crowding/AR0": 44.5,
}


@pytest.fixture
def run(coco, tmp_path):
    """The output folder of a run, with its data set registered."""
    triple = coco(name="val")
    data.register_datasets([triple])
    output = tmp_path / "a <run>"
    (output / "inference" / "val").mkdir(parents=True)
    cfg = quick_cfg()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(output), ("val",)
    cfg.INPUT.MIN_SIZE_TEST = 64
    lines = [
        {"iteration": 19, "total_loss": 2.0, "loss_positive": 1.5, "loss_negative": 0.5},
        {"iteration": 19, **dict.fromkeys(METRICS, 1.0)},
        {"iteration": 39, "total_loss": 1.0, "freeanchor/bag_likelihood": 0.3},
        {"iteration": 40, **METRICS},
    ]
    (output / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (output / "config.yaml").write_text(cfg.dump())
    found = [{"image_id": 1, "category_id": 2, "bbox": [9, 6, 30, 20], "score": 0.9}]
    results = output / "inference" / "val" / "coco_instances_results.json"
    results.write_text(json.dumps(found))
    write_checkpoint(output / "model_final.pth", build_model(cfg).state_dict(), {})
    return cfg, triple, output


class Page(html.parser.HTMLParser):
    """The text, the pictures and the tags that are open at the end."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.sources, self.tags, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if text.strip():
            self.texts.append(text.strip())


def test_page(run):
    """Valid, with the last figures, all pictures inside and nothing from elsewhere."""
    cfg, _, output = run
    path = report.write_report(cfg, num_images=2, score_thresh=0.5)
    assert path == output / "report.html"
    page = Page(path.read_text())
    assert page.open == []
    assert all(x.startswith("data:image/") for x in page.sources)
    assert "script" not in page.tags
    # AP over time, curves, 3 x 2 images and the matching of 2
    assert len(page.sources) == 1 + 1 + 6 + 2
    text = " ".join(page.texts)
    for expected in ("FreeAnchor, a <run>", "12.3", "77.7", "41.5", "42.5", "43.5", "44.5"):
        assert expected in text
    assert text.index("<b> 99.0") < text.index("class 4 1.2") < text.index("never -")
    assert "40 iterations of 4 images" in text
    assert "1.png: F1 1.00" in text
    assert re.search(r"Worst images.*[234]\.png: F1 0\.00", text)


def test_page_of_a_run_that_was_not_evaluated_in_training(run):
    """What there is, is shown."""
    cfg, _, output = run
    (output / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
    (output / "model_final.pth").unlink()
    page = Page(report.write_report(cfg, num_images=1, score_thresh=0.5).read_text())
    assert "The run was not evaluated while it trained." in page.texts
    assert len(page.sources) == 1 + 3


def test_parts_in_the_order_of_their_limits(run):
    """Not in that of the alphabet, in which the file has them."""
    cfg, _, output = run
    parts = {"aspect_ratio": ("<=2", "2..3", "3..5", ">5"), "crowding": ("0", "<=0.3", ">0.3")}
    values = {f"{task}/{m}{x}": 1.0 for task in parts for m in ("AP", "AR") for x in parts[task]}
    line = json.dumps({"iteration": 9, **METRICS, **values}, sort_keys=True)
    (output / "metrics.json").write_text(f"{line}\n")
    text = " ".join(Page(report.write_report(cfg, 1, 0.5).read_text()).texts)
    for names in parts.values():
        assert " ".join(f"{name} 1.0 1.0" for name in names) in text


def test_page_of_several_data_sets(run, coco):
    """Each has its own figures, which Detectron2 puts under its name."""
    cfg, _, output = run
    data.register_datasets([coco(name="other")])
    cfg.DATASETS.TEST = ("val", "other")
    (output / "inference" / "other").mkdir()
    (output / "inference" / "other" / "coco_instances_results.json").write_text("[]")
    metrics = {f"val/{k}": v for k, v in METRICS.items()}
    metrics.update({f"other/{k}": 5.5 for k in METRICS})
    (output / "metrics.json").write_text(json.dumps({"iteration": 9, **metrics}) + "\n")
    text = " ".join(Page(report.write_report(cfg, 1, 0.5).read_text()).texts)
    assert text.index("val AP 12.3") < text.index("other AP 5.5")


HOSTILE = {1: "$a_b$ <script>alert('1')</script>", 2: '細胞 "x" & ^', 3: "_c\\ \ud800"}


@pytest.fixture
def hostile_run(run, tmp_path):
    """A run on a data set whose name, ids and class names are markup, paths and formulas."""
    cfg, (_, annotations, folder), output = run
    content = json.loads(pathlib.Path(annotations).read_text())
    ids = {1: "../x", 2: "a/b", 3: "/", 4: "4" * 300}
    for x in content["images"]:
        x["id"] = ids[x["id"]]
    for x in content["annotations"]:
        x["image_id"] = ids[x["image_id"]]
    for x in content["categories"]:
        x["name"] = HOSTILE[x["id"]]
    Image.new("RGB", (4000, 40)).save(pathlib.Path(folder) / "2.png")
    content["images"][1].update(width=4000, height=40)
    (tmp_path / "hostile.json").write_text(json.dumps(content))
    name = "../a/b <i>$x$"
    data.register_datasets([(name, str(tmp_path / "hostile.json"), folder)])
    cfg.DATASETS.TEST = (name,)
    evaluator = engine.build_evaluator(cfg, name, nn.Identity())
    evaluator.reset()
    for i in ids.values():
        found = Instances((40, 60))
        found.pred_boxes, found.scores = Boxes([[9.0, 6.0, 39.0, 26.0]]), torch.tensor([0.9])
        found.pred_classes = torch.tensor([1])
        evaluator.process([{"image_id": i}], [{"instances": found}])
    results = {f"bbox/{k}": v for k, v in evaluator.evaluate()["bbox"].items()}
    (output / "metrics.json").write_text(json.dumps({"iteration": 9, **results}) + "\n")
    yield cfg, output
    outside = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert outside == {"val", "val.json", "hostile.json", output.name}


def test_page_of_hostile_names(hostile_run):
    """All is text where it is shown; nothing is markup, and nothing lies outside the folder."""
    cfg, _ = hostile_run
    page = Page(report.write_report(cfg, num_images=4, score_thresh=0.5).read_text())
    assert page.open == []
    assert not {"script", "i"} & set(page.tags)
    text = " ".join(page.texts)
    assert "../a/b <i>$x$" in text
    # Half a pair of surrogates is no character, as browsers show it.
    assert all(name.replace("\ud800", "\ufffd") in text for name in HOSTILE.values())


def test_pictures_of_hostile_names(hostile_run):
    """One for each image, and its matching."""
    cfg, output = hostile_run
    pictures = write_pictures(cfg, 4, 0.5, [str(output / "model_final.pth")])
    assert len(list(pictures.glob("*.png"))) == 1 + 2 * 4
    assert pictures.parent == output


@pytest.mark.parametrize("key", ["annotations", "crowd"])
def test_page_without_truth(run, coco, key):
    """No figures of nothing: no F1, no best or worst image; detections are shown."""
    cfg, _, output = run
    name, annotations, folder = coco(name="test")
    content = json.loads(pathlib.Path(annotations).read_text())
    if key == "annotations":
        del content["annotations"]
    for x in content.get("annotations", ()):
        x["iscrowd"] = 1
    pathlib.Path(annotations).write_text(json.dumps(content))
    data.register_datasets([(name, annotations, folder)])
    cfg.DATASETS.TEST = (name,)
    (output / "inference" / "test").mkdir()
    found = [{"image_id": 1, "category_id": 2, "bbox": [9, 6, 30, 20], "score": 0.9}]
    path = output / "inference" / "test" / "coco_instances_results.json"
    path.write_text(json.dumps(found))
    (output / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
    (output / "model_final.pth").unlink()
    page = Page(report.write_report(cfg, num_images=2, score_thresh=0.5).read_text())
    text = " ".join(page.texts)
    assert not re.search(r"F1|Worst|Best|Ground truth", text)
    assert "no ground truth, so there are no figures" in text
    assert len(page.sources) == 1 + 2
    path.write_text(json.dumps([{**found[0], "image_id": 77}]))
    with pytest.raises(FileError, match="detections in image 77, which data set test does not"):
        report.write_report(cfg, num_images=2, score_thresh=0.5)


def test_command(run, capsys):
    """As on the command line, in a new process that does not know the data set."""
    _, triple, output = run
    DatasetCatalog.remove("val")
    MetadataCatalog.remove("val")
    main(["report", str(output), "--num-images", "1", "--dataset", *triple])
    assert f"The report is {output / 'report.html'}" in capsys.readouterr().out


def test_command_with_a_damaged_checkpoint(run):
    """It is named."""
    _, _, output = run
    (output / "model_final.pth").write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"model_final\.pth is damaged"):
        main(["report", str(output)])


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], 0.0),
        ([(0, 0.9, 0)], 1.0),
        ([(0, 0.4, 0)], 0.0),  # too low a score
        ([(0, 0.9, 1)], 0.0),  # another class
        ([(15, 0.9, 0)], 0.0),  # too far
        ([(0, 0.9, 0), (1, 0.8, 0)], 2 / 3),  # a duplicate
    ],
)
def test_f1_of_an_image(run, detections, expected):
    """By hand: one object, and detections that are moved to the right by some pixels."""
    record, metadata = DatasetCatalog.get("val")[0], MetadataCatalog.get("val")
    (truth,) = record["annotations"]
    ids = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
    found = [
        {
            "bbox": [truth["bbox"][0] + shift, *truth["bbox"][1:]],
            "score": score,
            "category_id": ids[(truth["category_id"] + other) % 3],
        }
        for shift, score, other in detections
    ]
    assert report.image_f1(record, found, metadata) == pytest.approx(expected)
    assert report.image_f1({**record, "annotations": []}, [], metadata) == 1
