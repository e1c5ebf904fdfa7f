"""`freeanchor import`: other formats and other boxes become COCO files that train."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from freeanchor import data
from freeanchor.__main__ import main
from freeanchor.errors import DatasetError
from PIL import Image


def voc_xml(name, objects, size=(64, 48)):
    text = "".join(
        f"<object><name>{c}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for c, (x1, y1, x2, y2), difficult in objects
    )
    width, height = size
    return (
        f"<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}"
        f"</height><depth>3</depth></size>{text}</annotation>"
    )


@pytest.fixture
def voc(tmp_path):
    """A folder as Pascal VOC has it, with two split files."""
    for folder in ("Annotations", "JPEGImages", "ImageSets"):
        (tmp_path / folder).mkdir()
    objects = {
        "a": [("cat", (5, 6, 20, 30), 0), ("dog", (1, 1, 64, 48), 1)],
        "b": [],
        "c.d": [("ant", (10, 10, 12, 40), 0)],
    }
    for name, those in objects.items():
        Image.new("RGB", (64, 48)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        xml = voc_xml(f"{name}.jpg", those)
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml)
    (tmp_path / "ImageSets" / "train.txt").write_text("a\nb  1\n\n")
    (tmp_path / "ImageSets" / "val.txt").write_text("c.d.jpg\n")
    return tmp_path


def read(path, images):
    """{file: [(class, box, crowd)]} of a COCO file, by our reader."""
    file = data.read_coco(str(path), str(images))
    return file.class_names, {
        x["file_name"].rsplit("/", 1)[1]: [
            (file.class_names[a["category_id"]], a["bbox"], a["iscrowd"]) for a in x["annotations"]
        ]
        for x in file.records(range(len(file.class_names)))
    }


@pytest.mark.parametrize("source", [".", "Annotations"])
def test_voc(voc, tmp_path, capsys, source):
    """One command for each part of a split; both have the classes of the whole folder."""
    found = {}
    for part in ("train", "val"):
        split, out = tmp_path / "ImageSets" / f"{part}.txt", tmp_path / f"{part}.json"
        main(["import", "--from", "voc", str(voc / source), str(out), "--split", str(split)])
        assert f"--dataset NAME {out} {voc / 'JPEGImages'}" in capsys.readouterr().out
        names, found[part] = read(out, voc / "JPEGImages")
        assert names == ["ant", "cat", "dog"]
    assert found["train"] == {
        "a.jpg": [("cat", [4.0, 5.0, 16.0, 25.0], 0), ("dog", [0.0, 0.0, 64.0, 48.0], 1)],
        "b.jpg": [],
    }
    assert found["val"] == {"c.d.jpg": [("ant", [9.0, 9.0, 3.0, 31.0], 0)]}


@pytest.mark.parametrize("first", ["0", "0.0", ".75"])
def test_voc_that_counts_from_0(voc, tmp_path, capsys, first):
    """Its boxes are not moved by a pixel, also of files where nothing tells."""
    xml = voc_xml("b.jpg", [("cat", (first, 6, 20, 30), 0)])
    (tmp_path / "Annotations" / "b.xml").write_text(xml)
    for split in (None, str(tmp_path / "ImageSets" / "val.txt")):
        data.import_voc(voc, tmp_path / "out.json", split=split)
        assert "b.xml has a corner below 1" in capsys.readouterr().out
        _, found = read(tmp_path / "out.json", voc / "JPEGImages")
        assert found["c.d.jpg"] == [("ant", [10.0, 10.0, 2.0, 30.0], 0)]
        if not split:
            x = float(first)
            assert found["b.jpg"] == [("cat", [x, 6.0, 20 - x, 24.0], 0)]
            assert found["a.jpg"][0] == ("cat", [5.0, 6.0, 15.0, 24.0], 0)


def test_boxes_that_leave_their_image(tmp_path):
    """They end where it does on every side, as in training: evaluation then asks for no more."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    (tmp_path / "classes.txt").write_text("ant\n")
    boxes = (0, 0, 20, 20), (60, 44, 20, 20), (100, 20, 10, 10)  # centre, width, height
    lines = [" ".join(["0", *(str(v / s) for v, s in zip(b, (64, 48) * 2))]) for b in boxes]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    data.import_yolo(tmp_path, tmp_path / "out.json")
    _, found = read(tmp_path / "out.json", tmp_path)
    inside = [[round(v, 2) for v in box] for _, box, _ in found["a.jpg"]]
    assert inside == [[0, 0, 10, 10], [50, 34, 14, 14]]


def test_imported_data_trains(voc, tmp_path):
    """It passes all checks, and no class is without a name."""
    data.import_voc(voc, tmp_path / "all.json")
    data.register_datasets([("voc", str(tmp_path / "all.json"), str(voc / "JPEGImages"))])
    data.check_images(["voc"])
    assert len(data.load_training_set(["voc"], filter_empty=True)) == 2
    assert len(DatasetCatalog.get("voc")) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<annotation>", "is no XML file"),
        ("<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>&x;</annotation>", "is no XML file"),
        (voc_xml("a.jpg", [], (48, 64)), "says that its image has 48 x 64 pixels, but .*64 x 48"),
        (voc_xml("a.jpg", [("cat", ("x", 1, 2, 3), 0)]), r"a\.xml: "),
        (voc_xml("a.jpg", [("cat", ("nan", 1, 2, 3), 0)]), r"a\.xml: "),
        (voc_xml("a.jpg", [(" ", (1, 1, 2, 3), 0)]), r"a\.xml has an object with an empty name"),
        (voc_xml("a.jpg", [("cat", (1, 1, 2, 3), 2)]), r"a\.xml: `difficult` is '2', and should"),
    ],
)
def test_voc_that_cannot_be_right(voc, tmp_path, content, expected):
    """The file is named, and nothing is written."""
    (voc / "Annotations" / "a.xml").write_text(content)
    with pytest.raises(DatasetError, match=expected):
        data.import_voc(voc, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_voc_image_of_another_name(voc, tmp_path):
    """The image of the same name, else the one that the file says; sizes of 0 are not known."""
    xml = voc / "Annotations" / "a.xml"
    xml.rename(xml.with_name("e.xml"))
    xml.with_name("e.xml").write_text(voc_xml("a.jpg", [("a", (1, 1, 9, 9), 0)], (0, 0)))
    data.import_voc(voc, tmp_path / "out.json")
    _, found = read(tmp_path / "out.json", voc / "JPEGImages")
    assert found["a.jpg"] == [("a", [0.0, 0.0, 9.0, 9.0], 0)]
    xml.with_name("x.xml").write_text(voc_xml("gone.jpg", []))
    with pytest.raises(DatasetError, match=r"x\.xml: there is no image of this name, nor 'gone\.j"):
        data.import_voc(voc, tmp_path / "out.json")


def test_voc_as_editors_leave_it(voc, tmp_path):
    """Names laid out over lines, XML in capitals, and the image that is said of two of one name."""
    xml = voc / "Annotations" / "a.xml"
    text = xml.read_text().replace("<name>cat<", "<name>\n      cat\n    <")
    xml.with_suffix(".XML").write_text(text.replace("a.jpg", "a.png"))
    xml.unlink()
    Image.new("RGB", (64, 48)).save(voc / "JPEGImages" / "a.png")
    data.import_voc(voc, tmp_path / "out.json")
    names, found = read(tmp_path / "out.json", voc / "JPEGImages")
    assert names == ["ant", "cat", "dog"]
    assert {x: len(boxes) for x, boxes in found.items()} == {"a.png": 2, "b.jpg": 0, "c.d.jpg": 1}


@pytest.mark.parametrize(
    ("written", "expected"), [("1", 1), (" True\n", 1), ("0", 0), ("false", 0), ("", 0)]
)
def test_difficult_objects(voc, tmp_path, written, expected):
    """They are none to be found, however a tool says yes."""
    xml = voc_xml("a.jpg", [("cat", (1, 1, 9, 9), written)])
    (voc / "Annotations" / "a.xml").write_text(xml)
    data.import_voc(voc, tmp_path / "out.json")
    _, found = read(tmp_path / "out.json", voc / "JPEGImages")
    assert found["a.jpg"] == [("cat", [0.0, 0.0, 9.0, 9.0], expected)]


def test_voc_in_folders(voc, tmp_path):
    """Files of one name in two folders are two, and no split takes one for the other."""
    for place in ("s", "t", ".hidden"):
        for kind, file in (("Annotations", "a.xml"), ("JPEGImages", "a.jpg")):
            (voc / kind / place).mkdir()
            (voc / kind / place / file).write_bytes((voc / kind / file).read_bytes())
    (voc / "Annotations" / "s" / "back").symlink_to(voc / "Annotations")
    for place in ("s", "t"):
        xml = voc_xml("a.jpg", [(f"of {place}", (1, 1, 9, 9), 0)])
        (voc / "Annotations" / place / "a.xml").write_text(xml)

    def taken(*lines):
        (tmp_path / "split.txt").write_text("\n".join(lines))
        data.import_voc(voc, tmp_path / "out.json", split=str(tmp_path / "split.txt"))
        content = json.loads((tmp_path / "out.json").read_text())
        return [x["file_name"] for x in content["images"]]

    data.import_voc(voc, tmp_path / "out.json")
    assert read(tmp_path / "out.json", voc / "JPEGImages")[0][3:] == ["of s", "of t"]
    assert len(json.loads((tmp_path / "out.json").read_text())["images"]) == 5
    assert taken("s/a", "/data/JPEGImages/t/a.jpg", "a.jpg") == ["s/a.jpg", "t/a.jpg", "a.jpg"]
    assert taken("a 1", "b -1") == ["a.jpg", "b.jpg"]
    with pytest.raises(DatasetError, match=r"names 'a' and 'u/a', which are both 'a' in"):
        taken("a", "u/a")
    (voc / "Annotations" / "a.xml").unlink()
    with pytest.raises(DatasetError, match=r"names 'a', which is 's/a' and 't/a' in .*the folder"):
        taken("a")


def test_another_supervision(voc, tmp_path, monkeypatch):
    """An old one that is there already is refused: its boxes are smaller by a pixel."""
    import supervision

    monkeypatch.setattr(supervision, "__version__", "0.27.0.post2")
    with pytest.raises(DatasetError, match=r"supervision 0\.27\.0\.post2 reads other boxes"):
        data.import_voc(voc, tmp_path / "out.json")


def test_voc_twice(voc, tmp_path):
    """Of two files for one image, neither is left out silently."""
    (voc / "Annotations" / "a.XML").write_text((voc / "Annotations" / "a.xml").read_text())
    with pytest.raises(DatasetError, match="is there twice"):
        data.import_voc(voc, tmp_path / "out.json")


def test_split_that_names_what_is_not_there(voc, tmp_path):
    """It is refused, not left out."""
    (tmp_path / "split.txt").write_text("a\nz\n")
    with pytest.raises(DatasetError, match="names 'z', which has no XML file"):
        data.import_voc(voc, tmp_path / "out.json", split=str(tmp_path / "split.txt"))


@pytest.fixture
def yolo(tmp_path):
    """A folder as Ultralytics has it."""
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (64, 48)).save(tmp_path / "images" / part / f"{name}.png")
    (tmp_path / "labels" / "train" / "a.txt").write_text(
        "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.5\n"
    )
    (tmp_path / "labels" / "val" / "b.txt").write_text("0 0 0 0.5 0.0 0.5 0.5\n")  # a polygon
    (tmp_path / "data.yaml").write_text(
        "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"
    )
    return tmp_path


@pytest.mark.parametrize("source", ["data.yaml", "."])
def test_yolo(yolo, tmp_path, capsys, source):
    """Names of the classes come from data.yaml; an image without labels is background."""
    out = tmp_path / "out.json"
    main(["import", "--from", "yolo", str(yolo / source), str(out), "--split", "train"])
    assert "1 of 2 images have no label file" in capsys.readouterr().out
    assert read(out, yolo / "images" / "train") == (
        ["cat", "dog"],
        {
            "a.png": [("dog", [24.0, 12.0, 16.0, 24.0], 0), ("cat", [0.0, 0.0, 32.0, 24.0], 0)],
            "b.png": [],
        },
    )
    main(["import", "--from", "yolo", str(yolo / source), str(out), "--split", "val"])
    _, found = read(out, yolo / "images" / "val")
    assert found["b.png"] == [("cat", [0.0, 0.0, 32.0, 24.0], 0)]


def test_yolo_polygons_are_masks(yolo, tmp_path):
    """Those of YOLO's segmentation; a box has none, and a confidence is no coordinate."""
    (yolo / "labels" / "train" / "b.txt").write_text(
        "1 0.25 0.25 0.75 0.25 0.75 0.5 0.9\n0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5 0.9\n"
    )
    out = tmp_path / "out.json"
    data.import_yolo(yolo, out, split="train")
    polygon, *boxes = json.loads(out.read_text())["annotations"][2:]
    assert polygon["segmentation"] == [[16, 12, 48, 12, 48, 24]]
    assert polygon["bbox"] == [16, 12, 32, 12]
    assert polygon["area"] == pytest.approx(32 * 12 / 2, abs=16)  # of pixels
    assert [("segmentation" in x, x["area"]) for x in boxes] == [(False, 32 * 24)] * 2


def test_yolo_labels_are_found_as_images_are(yolo, tmp_path):
    """In letters of another case too; of one image alone; and copies that tools hide are none."""
    images, labels = (yolo / kind / "train" for kind in ("images", "labels"))
    (labels / "a.txt").rename(labels / "A.TXT")
    (images / ".cache").mkdir()
    for hidden in ("._a.png", ".cache/a.png"):
        (images / hidden).write_bytes((images / "a.png").read_bytes())
    data.import_yolo(yolo, tmp_path / "out.json", split="train")
    _, found = read(tmp_path / "out.json", images)
    assert {x: len(boxes) for x, boxes in found.items()} == {"a.png": 2, "b.png": 0}
    (images / "a.jfif").write_bytes((images / "a.png").read_bytes())
    with pytest.raises(DatasetError, match=r"A\.TXT is .* file of .*a\.jfif and of .*a\.png"):
        data.import_yolo(yolo, tmp_path / "out.json", split="train")


@pytest.mark.parametrize("names", ["[no, 007]", "{0: no, 1: 007}", "{'0': no, '1': 007}"])
def test_yolo_names_are_as_they_are_written(yolo, tmp_path, names):
    """Not what YAML makes of them: False and 7."""
    (yolo / "data.yaml").write_text(f"train: images/train\nnames: {names}\n")
    data.import_yolo(yolo, tmp_path / "out.json", split="train")
    names, _ = read(tmp_path / "out.json", yolo / "images" / "train")
    assert names == ["no", "007"]


@pytest.mark.parametrize("file", ["classes.txt", "labels/classes.txt", "obj.names"])
def test_yolo_line_without_a_name(yolo, tmp_path, file):
    """Those behind it would be other classes; at the end there may be some."""
    (yolo / "data.yaml").unlink()
    (yolo / file).write_text("cat\ndog\n\n")
    data.import_yolo(yolo, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["categories"][1]["name"] == "dog"
    (yolo / file).write_text("\ncat\ndog\n")
    with pytest.raises(DatasetError, match="line 1 has no name"):
        data.import_yolo(yolo, tmp_path / "out.json")


@pytest.mark.parametrize("file", ["classes.txt", "list.txt", "labels/train/a.txt"])
def test_files_that_are_no_text_in_utf8(yolo, tmp_path, file):
    """Each is named, whatever it is for."""
    if file == "classes.txt":
        (yolo / "data.yaml").unlink()
    (yolo / file).write_bytes("café\n".encode("latin-1"))
    split = str(yolo / file) if file == "list.txt" else None if file == "classes.txt" else "train"
    with pytest.raises(DatasetError, match=f"{file} cannot be read"):
        data.import_yolo(yolo, tmp_path / "out.json", split=split)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("labels/train/a.txt", "2 0.5 0.5 0.1 0.1\n", "has the class 2, and there are 2 names"),
        ("labels/train/a.txt", "0 0.5 0.5 0.1\n", r"a\.txt: .*at least 5"),
        ("labels/train/a.txt", "cat 0.5 0.5 0.1 0.1\n", r"a\.txt: .*class id"),
        ("data.yaml", "names: 5\ntrain: images/train", "`names` must list the classes, and is 5"),
        ("labels/train/a.txt", "0 0.5 0.5 0.2 0.4 0.9 7", r"a\.txt: .* 7, .* the id of a tracker"),
        ("labels/train/a.txt", "0 0.1 0.1 0.2 0.1 0.2 0.2 0.9 3", "the id of a tracker"),
        ("data.yaml", "names: {0: a, 2: b}\ntrain: images/train", "numbered from 0, without a gap"),
        ("data.yaml", "names: [a, b]\nval: images/val", "has no `train`"),
        ("data.yaml", "names: [a, b]\ntrain: nowhere", "names 'nowhere', which is not in"),
        ("data.yaml", "names: [", r"data\.yaml cannot be read"),
    ],
)
def test_yolo_that_cannot_be_right(yolo, tmp_path, file, content, expected):
    """The file is named."""
    (yolo / file).write_text(content)
    with pytest.raises(DatasetError, match=expected) as error:
        data.import_yolo(yolo, tmp_path / "out.json", split="train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("readings", "convert"),
    [
        (["xyxy"], lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]])),
        (["cxcywh"], lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]])),
        (["normalised"], lambda b: b / [64, 48, 64, 48]),
        (
            ["normalised", "cxcywh"],
            lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]]) / [64, 48, 64, 48],
        ),
    ],
)
def test_boxes_of_another_convention(coco, tmp_path, readings, convert):
    """They become x, y, width, height in pixels, as the message of the check promises."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(3, 20, (60, 2))
    boxes = np.concatenate([rng.uniform(0, 1, (60, 2)) * ([64, 48] - sides), sides], axis=1)
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 1e9, "mine": i}
        for i, box in enumerate(convert(boxes).tolist())
    ]
    _, path, images = coco(**{"annotations": None})
    content = {**json.loads(Path(path).read_text()), "annotations": annotations}
    raw = json.dumps(content)
    (tmp_path / "raw.json").write_text(raw)
    with pytest.raises(DatasetError) as error:
        data.read_coco(str(tmp_path / "raw.json"), images)
    options = [x for reading in readings for x in ("--boxes", reading)]
    assert " ".join(options) in str(error.value)
    main(["import", *options, str(tmp_path / "raw.json"), str(tmp_path / "out.json")])
    file = data.read_coco(str(tmp_path / "out.json"), images)
    assert np.allclose(file.boxes, boxes, atol=1e-3)
    assert np.allclose(file.areas, sides.prod(axis=1), rtol=1e-3)
    assert json.loads((tmp_path / "out.json").read_text())["annotations"][7]["mine"] == 7
    assert (tmp_path / "raw.json").read_text() == raw


def test_boxes_that_are_not_what_is_said(coco, tmp_path):
    """Nothing is written, nothing is overwritten, and the file that is there is named."""
    _, path, _ = coco()
    refused = rf"freeanchor import: read as normalised, {path}: .*cannot be used"
    for before in ([], ["of an import before"]):
        for text in before:
            (tmp_path / "out.json").write_text(text)
        there = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit, match=refused):
            main(["import", "--boxes", "normalised", path, str(tmp_path / "out.json")])
        assert sorted(tmp_path.iterdir()) == there
    assert (tmp_path / "out.json").read_text() == "of an import before"
    with pytest.raises(SystemExit, match="--images and --split go with --from"):
        main(["import", "--boxes", "xyxy", path, str(tmp_path / "out.json"), "--images", "x"])
    with pytest.raises(SystemExit, match="is the file that is to be read"):
        main(["import", "--boxes", "xyxy", path, path])


@pytest.mark.parametrize("kind", [["--from", "voc"], ["--from", "yolo"], ["--boxes", "xyxy"]])
def test_source_that_is_not_there(kind, tmp_path):
    """It is named."""
    source = str(tmp_path / "data.yaml")
    with pytest.raises(SystemExit, match=f"^freeanchor import: there is no {source}$"):
        main(["import", *kind, source, str(tmp_path / "out.json")])
