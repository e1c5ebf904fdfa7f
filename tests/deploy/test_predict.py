"""`freeanchor predict`: sources in, files out."""

import csv
import io
import json
import os
import resource
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from freeanchor.__main__ import main
from freeanchor.deploy import draw_boxes, predict
from freeanchor.deploy.outputs import WRITERS, Detected
from freeanchor.deploy.sources import find_sources
from freeanchor.errors import DatasetError, FreeAnchorError


@pytest.fixture
def folder(images, tmp_path):
    """Two images, one that is none, and a video of three frames."""
    folder = tmp_path / "in"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), images[0])
    cv2.imwrite(str(folder / "c.png"), images[1])
    (folder / "notes.txt").write_text("not an image by its name")
    (folder / "._a.png").write_text("what a Mac has beside it")
    write_video(folder / "v.avi", [images[0]] * 3)
    return folder


def write_video(path, frames):
    """Without loss, so that its frames are the images."""
    size = frames[0].shape[1], frames[0].shape[0]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), 10, size)
    assert video.isOpened()
    for frame in frames:
        video.write(frame)
    video.release()


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("coco", f"detections.json.{os.getpid()}.unfinished"),
        ("csv", f"detections.csv.{os.getpid()}.unfinished"),
        ("yolo", "classes.txt"),
        ("yolo", "labels/a.txt"),
        ("pictures", "pictures/a.png"),
    ],
)
def test_a_full_disk_is_one_sentence(run_folder, folder, tmp_path, kind, file):
    """Whatever is written when it is full."""
    full = tmp_path / "out" / file
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    command = f"predict {run_folder} {folder}/a.png --out {tmp_path}/out --formats {kind}"
    with pytest.raises(SystemExit, match=r"^freeanchor predict: .*No space left on device"):
        main(f"{command} --device cpu --confidence 0".split())


ALL_FORMATS = ["pictures", "coco", "csv", "yolo"]


class Interrupted:
    """A predictor that finds nothing in two images, and then raises."""

    class_names = ("cell",)

    def __init__(self, error):
        self.error = error

    def stream(self, images, _):
        pixels = np.zeros((48, 64, 3), np.uint8)
        for image, _ in zip(images, range(2)):
            yield image, pixels, some_instances()
        raise self.error


@pytest.mark.parametrize("source", ["v.avi", "*.png"])
def test_an_error_keeps_an_earlier_result(folder, tmp_path, source):
    """What is not whole does not take the place of what was."""
    names = ["detections.json", "detections.csv", "pictures/v.mp4"]
    (tmp_path / "pictures").mkdir()
    for name in names:
        (tmp_path / name).write_text("whole")
    failing = Interrupted(RuntimeError("CUDA"))
    with pytest.raises(RuntimeError, match="CUDA"):
        predict(lambda: failing, [str(folder / source)], tmp_path, ALL_FORMATS)
    assert {(tmp_path / name).read_text() for name in names} == {"whole"}
    assert not list(tmp_path.rglob("*unfinished*"))


@pytest.mark.parametrize(("is_endless", "expected"), [(True, ""), (False, "KeyboardInterrupt")])
def test_ctrl_c(folder, tmp_path, monkeypatch, capsys, is_endless, expected):
    """What was found is there; the status says so too, but for a camera, which is ended so."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder / 'a.png'}\n{folder / 'c.png'}\n"))
    sources = ["-"] if is_endless else [str(folder / "[ac].png")]
    ended = ""
    try:
        predict(lambda: Interrupted(KeyboardInterrupt()), sources, tmp_path, ALL_FORMATS)
    except KeyboardInterrupt:
        ended = "KeyboardInterrupt"
    assert ended == expected
    assert "what was found until then" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "detections.json").read_text())["images"]) == 2


def test_labels_of_a_data_set_are_kept(tmp_path):
    """With its folder as --out, what people drew would be lost; detections may be made anew."""
    (tmp_path / "labels").mkdir()
    for name, text in (("a", "0 0.5 0.5 0.2 0.2 0.9\n"), ("b", "")):  # detections
        (tmp_path / "labels" / f"{name}.txt").write_text(text)
    WRITERS["yolo"](tmp_path, ["cell"])
    (tmp_path / "classes.txt").write_text("mine\n")
    for line in ("0 0.5 0.5 0.2 0.2", "0 0.1 0.1 0.9 0.1 0.9 0.9"):
        (tmp_path / "labels" / "a.txt").write_text(f"{line}\n")
        with pytest.raises(FreeAnchorError, match=r"a\.txt holds labels .* give another --out"):
            WRITERS["yolo"](tmp_path, ["cell"])
    assert (tmp_path / "classes.txt").read_text() == "mine\n"


def test_a_video_on_a_full_disk(tmp_path):
    """OpenCV says nothing: it would be a file that no player opens."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    writer = WRITERS["pictures"](tmp_path, ["cell"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for frame in range(100):
            picture = pixels + np.uint8(frame)
            writer.write(Detected("v.avi", picture, some_instances(), frame, 9))
        with pytest.raises(FreeAnchorError, match=r"v\.mp4 cannot be written: is the disk full"):
            writer.__exit__(None, None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "pictures").iterdir())


def test_all_formats(run_folder, predictor, folder, images, tmp_path):
    """Images and the frames of a video are detected alike, and every format says the same."""
    out = tmp_path / "out"
    main(
        f"predict {run_folder} {folder} --out {out} --device cpu --confidence 0.05 --batch-size 2 "
        "--formats pictures coco csv yolo".split()
    )
    expected = dict(zip("ac", predictor(images[:2]), strict=True))
    coco = json.loads((out / "detections.json").read_text())
    assert [x["name"] for x in coco["categories"]] == predictor.class_names
    assert len({x["id"] for x in coco["annotations"]}) == len(coco["annotations"])
    names = [str(folder / "a.png"), str(folder / "c.png"), *[str(folder / "v.avi")] * 3]
    assert [x["file_name"] for x in coco["images"]] == names
    assert [x.get("frame") for x in coco["images"]] == [None, None, 0, 1, 2]
    with (out / "detections.csv").open(newline="") as f:
        table = list(csv.DictReader(f))
    assert len(table) == len(coco["annotations"])
    labels = ["a.txt", "c.txt", "v_000000.txt", "v_000001.txt", "v_000002.txt"]
    assert sorted(x.name for x in (out / "labels").iterdir()) == labels
    assert (out / "classes.txt").read_text().split("\n")[:-1] == predictor.class_names
    for image, label, truth in zip(coco["images"], labels, [*"ac", *"aaa"], strict=True):
        width, height = image["width"], image["height"]
        truth = expected[truth]
        boxes, scores, classes = truth.pred_boxes.tensor, truth.scores, truth.pred_classes
        assert truth.image_size == (height, width)
        found = [x for x in coco["annotations"] if x["image_id"] == image["id"]]
        x, y, w, h = torch.tensor([x["bbox"] for x in found]).unbind(1)
        torch.testing.assert_close(torch.stack([x, y, x + w, y + h], 1), boxes, atol=0.01, rtol=0)
        assert [x["category_id"] - 1 for x in found] == classes.tolist()
        rows = [
            row
            for row in table
            if row["image"] == image["file_name"] and row["frame"] == str(image.get("frame", ""))
        ]
        of_csv = torch.tensor([[float(row[k]) for k in ("x1", "y1", "x2", "y2")] for row in rows])
        torch.testing.assert_close(of_csv, boxes, atol=0.01, rtol=0)
        assert [row["class"] for row in rows] == [predictor.class_names[i] for i in classes]
        yolo = torch.tensor(np.loadtxt(out / "labels" / label, dtype=np.float32, ndmin=2))
        center, size = yolo[:, 1:3], yolo[:, 3:5]
        of_yolo = torch.cat([center - size / 2, center + size / 2], 1)
        of_yolo *= torch.tensor([width, height, width, height])
        torch.testing.assert_close(of_yolo, boxes, atol=0.01, rtol=0)
        for column in (
            [x["score"] for x in found],
            [float(row["score"]) for row in rows],
            yolo[:, 5].tolist(),
        ):
            torch.testing.assert_close(torch.tensor(column), scores, atol=1e-4, rtol=0)
    picture = cv2.imread(str(out / "pictures" / "a.png"))
    assert picture.shape == images[0].shape
    assert (picture != images[0]).any()
    video = cv2.VideoCapture(str(out / "pictures" / "v.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert video.get(cv2.CAP_PROP_FPS) == 10


def test_unreadable_inputs(run_folder, folder, tmp_path, capsys):
    """Each is reported, all else is detected, and the status is 1."""
    (folder / "b.png").write_text("no image")
    (folder / "w.mp4").write_text("no video")
    out = tmp_path / "out"
    arguments = f"predict {run_folder} {folder} --out {out} --device cpu --formats coco".split()
    with pytest.raises(SystemExit, match="2 of the inputs could not be read"):
        main(arguments)
    printed = capsys.readouterr().out
    assert "b.png cannot be read" in printed
    assert "w.mp4 cannot be read" in printed
    coco = json.loads((out / "detections.json").read_text())
    assert len(coco["images"]) == 5


def test_standard_input(run_folder, folder, tmp_path):
    """Names come from there too, and the status of the process tells that one was unreadable."""
    done = subprocess.run(
        [sys.executable, "-m", "freeanchor", "predict", str(run_folder), "-", "--device=cpu"],
        input=f"{folder / 'gone.png'}\n{folder / 'a.png'}\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "gone.png cannot be read" in done.stdout
    assert (tmp_path / "predictions" / "pictures" / "a.png").is_file()


def test_missing_sources(folder, tmp_path):
    """What is not there ends the command before the model is loaded."""
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "none.jpg", "There is no image"),
        (tmp_path / "*.jpg", "There is no image"),
        (tmp_path / "empty", "a folder without images"),
    ):
        with pytest.raises(DatasetError, match=message):
            predict(lambda: pytest.fail("loaded"), [str(folder), str(source)], tmp_path, ["csv"])


def test_kinds_of_sources(folder, monkeypatch):
    """Files, folders, patterns and lists (of Windows too) give their images, then come videos."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("x.png\n\r\ny.png\r\n"))
    sources = [str(folder / "v.avi"), str(folder / "[ab].png"), "-", str(folder)]
    stills, *videos = find_sources(sources, pytest.fail, pytest.fail)
    a, c = str(folder / "a.png"), str(folder / "c.png")
    assert list(stills.images) == [a, a, c, "x.png", "y.png"]
    assert [(x.name, x.length, len(list(x.images))) for x in videos] == [
        (str(folder / "v.avi"), 3, 3)
    ] * 2


def test_folders_within(folder):
    """Their images are not taken, which is said, with what takes them."""
    (folder / "more" / "deep").mkdir(parents=True)
    for name in ("more/d.jpg", "more/deep/e.jpg", "more/notes.txt"):
        (folder / name).write_bytes(b"")
    said = []
    stills, _ = find_sources([str(folder)], pytest.fail, said.append)
    assert stills.length == 2
    assert len(said) == 1
    assert f"2 images or videos in folders within {folder} are left out" in said[0]
    assert find_sources([said[0].split("'")[1]], pytest.fail, pytest.fail)[0].length == 2
    (folder / "more" / "d.jpg").unlink()
    with pytest.raises(DatasetError, match=r"without images or videos: give '.*/\*\*/\*\.jpg'"):
        find_sources([str(folder / "more")], pytest.fail, pytest.fail)


def test_camera(monkeypatch):
    """A number is a camera, of unknown length."""
    opened = []

    class Camera:
        def __init__(self, source):
            opened.append(source)
            self.left = 2

        def get(self, _):
            return -1.0

        def read(self):
            self.left -= 1
            return self.left >= 0, np.zeros((4, 4, 3), np.uint8)

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    (camera,) = find_sources(["0"], pytest.fail, pytest.fail)
    assert camera.length is None
    assert camera.frame_rate > 0
    assert len(list(camera.images)) == 2
    assert set(opened) == {0}


def test_cut_off_video(folder, monkeypatch):
    """A video that ends long before its container says is reported."""
    errors = []
    get = cv2.VideoCapture.get
    monkeypatch.setattr(cv2.VideoCapture, "get", lambda self, key: 4 * get(self, key))
    (video,) = find_sources([str(folder / "v.avi")], errors.append, pytest.fail)
    assert len(list(video.images)) == 3
    assert "ends after 3 of 12 frames" in str(errors[0])


def some_instances(box=(2.0, 3.0, 20.0, 30.0)):
    return Instances(
        (48, 64),
        pred_boxes=Boxes(torch.tensor([box])),
        scores=torch.tensor([0.75]),
        pred_classes=torch.tensor([0]),
    )


@pytest.mark.parametrize("kind", ["pictures", "yolo"])
def test_equal_names(kind, tmp_path):
    """Images of one name in different folders do not overwrite each other."""
    image = np.zeros((48, 64, 3), np.uint8)
    with WRITERS[kind](tmp_path, ["cell"]) as writer:
        for name in ("a/x.png", "b/x.png", "b/x_2.png", "c/x.webp"):
            writer.write(Detected(name, image, some_instances()))
    assert len(list(tmp_path.rglob("x*"))) == 4


def test_labels_of_equal_names(tmp_path):
    """Labels by the name of an image are its own, and never those of another one."""
    image = np.zeros((48, 64, 3), np.uint8)
    with WRITERS["yolo"](tmp_path, ["cell"]) as writer:
        for i, name in enumerate(("a/x.jpg", "a/x.png", "b/x.jpg", "a/x_2.jpg")):
            writer.write(Detected(name, image, some_instances((i + 2.0, 3, 20, 30))))
    labels = {x.name: x.read_text().split()[1] for x in (tmp_path / "labels").iterdir()}
    assert labels["x_2.txt"] == f"{(5 + 20) / 2 / 64:.6f}"
    assert labels["x.txt"] == f"{(2 + 20) / 2 / 64:.6f}"
    assert labels.keys() == {"x.txt", "x.png_2.txt", "x.jpg_2.txt", "x_2.txt"}


def test_frames_beside_stills(tmp_path):
    """A video and pictures that were taken from it have files of their own."""
    image = np.zeros((48, 64, 3), np.uint8)
    with WRITERS["yolo"](tmp_path, ["cell"]) as writer:
        for name, frame in (("v_000001.png", -1), *(("v.mp4", i) for i in range(3))):
            writer.write(Detected(name, image, some_instances((frame + 2.0, 3, 20, 30)), frame))
    labels = {x.name: x.read_text() for x in (tmp_path / "labels").iterdir()}
    assert len(labels) == len(set(labels.values())) == 4


def test_names_that_are_not_utf8(run_folder, images, tmp_path, monkeypatch):
    """Pictures of such names are detected, those that are broken reported, videos refused."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    name = os.fsdecode(b"k\xe4se.png")
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    (tmp_path / "a.png").rename(tmp_path / name)
    (tmp_path / f"broken_{name}").write_text("no image")
    out = tmp_path / "out"
    formats = ["pictures", "coco", "csv", "yolo"]
    arguments = f"--out {out} --device cpu --confidence 0.05 --formats".split()
    with pytest.raises(SystemExit, match="1 of the inputs could not be read"):
        main(["predict", str(run_folder), str(tmp_path), *arguments, *formats])
    assert cv2.imdecode(np.fromfile(out / "pictures" / name, np.uint8), -1).shape == (64, 96, 3)
    assert (out / "labels" / name).with_suffix(".txt").is_file()
    coco = json.loads((out / "detections.json").read_text())
    assert [x["file_name"] for x in coco["images"]] == [str(tmp_path / name)]
    assert coco["annotations"]
    assert "\\udce4" in (out / "detections.csv").read_text(encoding="utf-8")
    video = tmp_path / os.fsdecode(b"\xe4.mp4")
    video.write_text("")
    with pytest.raises(DatasetError, match=r"udce4.mp4' is no name in UTF-8"):
        find_sources([str(video)], pytest.fail, pytest.fail)


def test_inputs_are_not_overwritten(images, tmp_path):
    """Not even where they lie in the folder of the pictures."""
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "a.png"
    cv2.imwrite(str(path), images[0])
    with (
        WRITERS["pictures"](tmp_path, ["cell"]) as writer,
        pytest.raises(Exception, match="is an input"),
    ):
        writer.write(Detected(str(path), images[0], some_instances()))
    assert (cv2.imread(str(path)) == images[0]).all()


@pytest.mark.parametrize("box", [(0, 0, 64, 48), (60, 40, 64, 48), (2, 3, 20, 30)])
def test_drawing(box):
    """Only the box and its label are drawn, within the picture and not on the input."""
    image = np.zeros((48, 64, 3), np.uint8)
    drawn = draw_boxes(image, some_instances(tuple(map(float, box))), ["Zelle ä"])
    assert drawn.shape == image.shape
    assert not image.any()
    assert drawn.any()


def test_names_in_any_script():
    """Classes can be told apart by their labels, also where no font has the letters."""
    image = np.zeros((60, 300, 3), np.uint8)
    names = ["细胞", "血球", "a\nb", "a b"]
    drawn = [draw_boxes(image, some_instances((10.0, 20.0, 200.0, 50.0)), [x]) for x in names]
    assert len({x.tobytes() for x in drawn}) == len(names)
