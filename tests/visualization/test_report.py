"""The report of a run."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from freeanchor import data, engine
from freeanchor.__main__ import main
from freeanchor.checkpoint import write_checkpoint
from freeanchor.data import encode_mask
from freeanchor.errors import FileError
from freeanchor.visualization import NOT_LEARNING, gallery, write_pictures, write_report
from freeanchor.visualization.charts import Line, line_chart
from PIL import Image

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
    """The text, the tags that are open at the end, and the data of the viewers."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.open, self.viewers = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.is_data = ("type", "application/json") in attributes
        assert not {"src", "href"} & {k for k, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        """Of SVG."""

    def handle_data(self, text):
        if self.open[-1:] == ["script"]:
            self.viewers += [json.loads(text)] if self.is_data else []
        elif self.open[-1:] != ["style"] and text.strip():
            self.texts.append(text.strip())

    @property
    def text(self):
        return " ".join(self.texts)


def test_page(run):
    """Valid, with the last figures, all pictures inside and nothing from elsewhere."""
    cfg, _, output = run
    (output / NOT_LEARNING).write_text("This run does not <learn>\n")
    path = write_report([cfg], num_images=2, score_thresh=0.5)
    assert path == output / "report.html"
    page = Page(path)
    assert page.open == []
    for expected in ("a <run>", "does not <learn>", "12.3", "77.7", "41.5", "42.5", "43.5", "44.5"):
        assert expected in page.text
    assert page.text.index("<b> 99.0") < page.text.index("class 4 1.2") < page.text.index("never -")
    assert "40 iterations of 4 images" in page.text
    assert "AP over time" in page.text
    assert "total_loss 1 loss_positive 1.5" in page.text
    # One hit of the class of image 1, whose ids are those of the file, and three objects missed.
    assert "class 1 0 0 0 1 class 2 0 1 0 1 class 3 0 0 0 1 nothing there 0 0 0" in page.text
    assert "class 2 AP50 50.5" in page.text  # one of two, at COCO's 101 recalls
    (viewer,) = page.viewers
    assert viewer["hasTruth"]
    assert viewer["score"] == 0.5
    assert [c["name"] for c in viewer["classes"]] == ["class 1", "class 2", "class 3"]
    assert len(viewer["images"]) == 2
    image = next(x for x in viewer["images"] if x["name"] == "1.png")
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert (image["width"], image["height"]) == (64, 48)
    assert image["truth"] == [[9, 6, 39, 26, 1, 0]]
    assert image["found"] == [[[9, 6, 39, 26, 1, 0.9]]]


def test_recommended_scores(run):
    """Calibration, thresholds and kinds of errors are shown; the slider begins where they say."""
    cfg, _, output = run
    (viewer,) = Page(write_report([cfg], num_images=1, score_thresh=None)).viewers
    assert viewer["score"] == 0.5
    scores = {"threshold/score": 0.81, "threshold/score-class 1": 0.33}
    scores |= {"calibration/ECE": 17.3, "calibration/duplicate>0.5": 1.4}
    with (output / "metrics.json").open("a") as f:
        f.write(json.dumps({"iteration": 40, **scores}) + "\n")
    page = Page(write_report([cfg], num_images=1, score_thresh=None))
    assert page.viewers[0]["score"] == 0.81
    assert "score with the best F1 class 1 0.33 class 2 0.81 class 3 0.81" in page.text
    assert "calibration error 17.3" in page.text
    assert "duplicate 1.4" in page.text
    assert Page(write_report([cfg], 1, score_thresh=0.2)).viewers[0]["score"] == 0.2


def test_scores_of_the_pictures(run, capsys):
    """It is said which detections they show, and why."""
    cfg, _, output = run
    start = "Pictures of val show detections with scores of at least"

    def say(score_thresh):
        write_pictures(cfg, 1, score_thresh, [])
        (line,) = capsys.readouterr().out.splitlines()
        return line

    assert say(0.2) == f"{start} 0.2, as given"
    assert say(None).startswith(f"{start} 0.5, the default")
    for scores, expected in (
        ({"threshold/score": 0.81}, "0.81, with the best F1 on val (last evaluation)"),
        (
            {"threshold/score": 0.81, "threshold/score-class 1": 0.33},
            "those with the best F1 on val (last evaluation): "
            "class 1 0.33, class 2 0.81, class 3 0.81",
        ),
    ):
        with (output / "metrics.json").open("a") as f:
            f.write(json.dumps({"iteration": 40, **scores}) + "\n")
        assert say(None) == f"{start} {expected}"


def test_bags_of_the_objects(run):
    """Of the model, by the number of the object, in pixels of the image."""
    cfg, _, _ = run
    (viewer,) = Page(write_report([cfg], num_images=4, score_thresh=0.5)).viewers
    for image in viewer["images"]:
        ((key, (anchors, assigned)),) = image["bags"][0].items()
        assert key == "0"
        assert len(anchors) == cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK
        assert all(0 <= p <= 1 for *_, p in anchors)
        x0, y0, x1, y1 = image["truth"][0][:4]
        assert any(
            abs(a - x0) + abs(b - y0) + abs(c - x1) + abs(d - y1) < 30 for a, b, c, d, _ in anchors
        )
        assert assigned


def test_bags_that_do_not_fit(run, monkeypatch):
    """They are left out, those of the last images first."""
    cfg, _, _ = run
    monkeypatch.setattr(gallery, "_OVERLAY_SHARE", 0.0003)
    (viewer,) = Page(write_report([cfg], num_images=4, score_thresh=0.5)).viewers
    assert sorted(len(x["bags"][0]) for x in viewer["images"]) == [0, 0, 0, 1]
    assert viewer["images"][0]["bags"][0]


def test_images_of_every_kind(run):
    """Those with each error, and one without, are among the few that are shown."""
    cfg, _, output = run
    results = output / "inference" / "val" / "coco_instances_results.json"
    found = [
        (1, 2, [9, 6, 30, 20]),
        *[(2, 3, [10, 6, 30, 20])] * 2,  # a duplicate
        (3, 3, [11, 6, 30, 20]),  # wrong class
        (4, 2, [12, 16, 30, 30]),  # poor box
    ]
    keys = ("image_id", "category_id", "bbox")
    results.write_text(json.dumps([{**dict(zip(keys, x)), "score": 0.9} for x in found]))
    (viewer,) = Page(write_report([cfg], num_images=4, score_thresh=0.5)).viewers
    assert sorted(x["name"] for x in viewer["images"]) == [f"{i}.png" for i in (1, 2, 3, 4)]
    (viewer,) = Page(write_report([cfg], num_images=1, score_thresh=0.5)).viewers
    assert len(viewer["images"]) == 1


def test_fifty_images_fit_into_five_megabytes(run, coco, tmp_path):
    """Of photographs with more detail than any has, and with many detections and masks each."""
    cfg, _, output = run
    name, annotations, folder = coco(name="large", num_images=50)
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    content = json.loads(Path(annotations).read_text())
    for image in content["images"]:
        image.update(width=900, height=600)
        Image.fromarray(noise).save(f"{folder}/{image['file_name']}", compress_level=1)
    Path(annotations).write_text(json.dumps(content))
    data.register_datasets([(name, annotations, folder)])
    found = [
        {
            "image_id": i,
            "category_id": 1,
            "bbox": [1.2345, 2.3456, 100.123, 98.765],
            "score": 0.12345,
        }
        for i in range(1, 51)
        for _ in range(100)
    ]
    mask = encode_mask(np.add(*np.ogrid[:600, :900]) % 200 < 50)
    for detection in found[::5]:
        detection["segmentation"] = mask
    (output / "inference" / "large").mkdir()
    (output / "inference" / "large" / "coco_instances_results.json").write_text(json.dumps(found))
    cfg.DATASETS.TEST = ("large",)
    (output / "model_final.pth").unlink()
    cfg.MODEL.MASK_ON = True
    path = write_report([cfg], num_images=50, score_thresh=0.5)
    (viewer,) = Page(path).viewers
    assert len(viewer["images"]) == 50
    for image in viewer["images"]:
        masks = [row[6] is not None for row in image["found"][0]]
        assert (sum(masks), len(masks)) == (20, 100)
    assert 2_000_000 < path.stat().st_size < 5_000_000


def test_page_of_two_runs(run, tmp_path):
    """Each figure is there for both, and each picture once, with the detections of both."""
    cfg, _, output = run
    other = tmp_path / "other"
    shutil.copytree(output, other)
    (other / "inference" / "val" / "coco_instances_results.json").write_text("[]")
    line = {"iteration": 9, **METRICS, "bbox/AP": 56.78}
    (other / "metrics.json").write_text(json.dumps(line) + "\n")
    cfg_other = cfg.clone()
    cfg_other.OUTPUT_DIR = str(other)
    cfg_other.SOLVER.BASE_LR = 0.123
    path = write_report([cfg, cfg_other], num_images=2, score_thresh=0.5)
    assert path == output / "report.html"
    page = Page(path)
    assert page.open == []
    assert "run a <run> other AP 12.3 56.8 AP50" in page.text
    assert "AP a <run> AP other AR a <run> AR other <=2 41.5 41.5 42.5 42.5" in page.text
    assert re.search(r"Only in other:\s+OUTPUT_DIR: .*other\s+BASE_LR: 0.123\s+All keys", page.text)
    (viewer,) = page.viewers
    assert viewer["runs"] == ["a <run>", "other"]
    assert sorted(len(x["found"][0]) for x in viewer["images"]) == [0, 1]
    assert all(x["found"][1] == [] for x in viewer["images"])
    cfg_other.MODEL.FREEANCHOR.CLASS_NAMES = ["class 2", "class 1", "class 3"]
    with pytest.raises(FileError, match=r"other and a <run> do not have the same classes"):
        write_report([cfg, cfg_other], num_images=2, score_thresh=0.5)
    cfg_other.DATASETS.TEST = ("val", "val2")
    with pytest.raises(FileError, match=r"other was evaluated on val, val2 and a <run> on val"):
        write_report([cfg, cfg_other], num_images=2, score_thresh=0.5)


def test_page_of_a_run_that_was_not_evaluated_in_training(run):
    """What there is, is shown."""
    cfg, _, output = run
    (output / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
    (output / "model_final.pth").unlink()
    page = Page(write_report([cfg], num_images=1, score_thresh=0.5))
    assert "The run was not evaluated while it trained." in page.texts
    (viewer,) = page.viewers
    assert viewer["images"][0]["bags"] == [{}]


def test_pages_of_an_evaluation_alone(run):
    """--eval-only into a folder of its own: its figures and pictures, and no curves."""
    _, triple, output = run
    (output / "metrics.json").unlink()
    (output / "model_final.pth").unlink()
    arguments = [str(output), "--dataset", *triple, "--num-images", "1"]
    with pytest.raises(SystemExit, match=r"no metrics\.json or inference/results\.json: it is not"):
        main(["report", *arguments])
    (output / "inference" / "results.json").write_text(json.dumps({"val": METRICS}))
    arguments += ["--opts", "MODEL.WEIGHTS", "x<y>.pth"]
    main(["report", *arguments])
    page = Page(output / "report.html")
    assert "an evaluation of x<y>.pth." in page.text
    assert f"{METRICS['bbox/AP']:.1f}" in page.texts
    main(["visualize", *arguments])
    assert [x.name for x in (output / "pictures").iterdir()] != []
    assert not (output / "pictures" / "curves.png").exists()


def test_curves_with_values_that_are_not_finite():
    """An evaluation without detections, say: browsers draw nothing of a line with such a point."""
    figures = [float("nan"), 5.0, float("inf"), 10.0, float("nan")]
    whole, part = (
        line_chart("AP", [Line("AP", x, y, "#000", note="10")], "iteration")
        for x, y in (([2, 4], [5.0, 10.0]), (range(1, 6), figures))
    )
    assert part == whole
    chart = line_chart("AP", [Line("AP", range(1, 6), figures, "#000")], "iteration")
    assert "<b>nan</b>" in chart  # it is the last one
    assert line_chart("AP", [Line("AP", [1], figures[:1], "#000")], "iteration") == ""


def test_parts_in_the_order_of_their_limits(run):
    """Not in that of the alphabet, in which the file has them."""
    cfg, _, output = run
    parts = {"aspect_ratio": ("<=2", "2..3", "3..5", ">5"), "crowding": ("0", "<=0.3", ">0.3")}
    values = {f"{task}/{m}{x}": 1.0 for task in parts for m in ("AP", "AR") for x in parts[task]}
    line = json.dumps({"iteration": 9, **METRICS, **values}, sort_keys=True)
    (output / "metrics.json").write_text(f"{line}\n")
    text = Page(write_report([cfg], 1, 0.5)).text
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
    text = Page(write_report([cfg], 1, 0.5)).text
    assert text.index("val AP 12.3") < text.index("other AP 5.5")


HOSTILE = {1: "$a_b$ <script>alert('1')</script>", 2: '細胞 "x" & ^', 3: "_c\\"}


@pytest.fixture
def hostile_run(run, tmp_path):
    """A run on a data set whose name, ids and class names are markup, paths and formulas."""
    cfg, (_, annotations, folder), output = run
    content = json.loads(Path(annotations).read_text())
    ids = {1: "../x", 2: "a/b", 3: "/", 4: "4" * 300}
    for x in content["images"]:
        x["id"] = ids[x["id"]]
    for x in content["annotations"]:
        x["image_id"] = ids[x["image_id"]]
    for x in content["categories"]:
        x["name"] = HOSTILE[x["id"]]
    Image.new("RGB", (4000, 40)).save(Path(folder) / "2.png")
    content["images"][1].update(width=4000, height=40)
    (tmp_path / "hostile.json").write_text(json.dumps(content))
    name = "../a/b <i>$x$"
    data.register_datasets([(name, str(tmp_path / "hostile.json"), folder)])
    cfg.DATASETS.TEST = (name,)
    evaluator = engine.Trainer.build_evaluator(cfg, name)
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
    page = Page(write_report([cfg], num_images=4, score_thresh=0.5))
    assert page.open == []
    assert "../a/b <i>$x$" in page.text
    assert all(name in page.text for name in HOSTILE.values())
    (viewer,) = page.viewers
    assert [c["name"] for c in viewer["classes"]] == list(HOSTILE.values())


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
    content = json.loads(Path(annotations).read_text())
    if key == "annotations":
        del content["annotations"]
    for x in content.get("annotations", ()):
        x["iscrowd"] = 1
    Path(annotations).write_text(json.dumps(content))
    data.register_datasets([(name, annotations, folder)])
    cfg.DATASETS.TEST = (name,)
    (output / "inference" / "test").mkdir()
    found = [{"image_id": 1, "category_id": 2, "bbox": [9, 6, 30, 20], "score": 0.9}]
    path = output / "inference" / "test" / "coco_instances_results.json"
    path.write_text(json.dumps(found))
    (output / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
    (output / "model_final.pth").unlink()
    page = Page(write_report([cfg], num_images=2, score_thresh=0.5))
    assert "Confusion" not in page.text
    assert "no ground truth, so there are no figures" in page.text
    (viewer,) = page.viewers
    assert not viewer["hasTruth"]
    assert sorted(len(x["found"][0]) for x in viewer["images"]) == [0, 1]
    assert all(x["truth"] is None for x in viewer["images"])
    path.write_text(json.dumps([{**found[0], "image_id": 77}]))
    with pytest.raises(FileError, match="detections in image 77, which data set test does not"):
        write_report([cfg], num_images=2, score_thresh=0.5)


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
