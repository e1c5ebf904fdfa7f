"""The examples of docs/deploy.md run as they are."""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from conftest import REPOSITORY
from freeanchor.__main__ import main
from freeanchor.deploy import Predictor

DOCUMENT = (REPOSITORY / "docs" / "deploy.md").read_text()


def example(word):
    """The one with a word, with a threshold for a model that is never sure."""
    (found,) = [x for x in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if word in x]
    return found.replace("0.5", "0.1")


@pytest.fixture
def place(run_folder, images, tmp_path, monkeypatch):
    """A folder with the run, the picture and the clip of the document."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "cells").symlink_to(run_folder)
    cv2.imwrite(str(tmp_path / "picture.jpg"), images[0])
    size = images[0].shape[1], images[0].shape[0]
    video = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, size)
    for _ in range(3):
        video.write(images[0])
    video.release()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_predictor(place, run_folder, capsys):
    """A line for each detection."""
    exec(example("(found,) = predictor"), {})
    (found,) = Predictor(run_folder, confidence=0.1)(["picture.jpg"])
    assert capsys.readouterr().out.count("class ") == len(found) > 0


def detect(model):
    """What the example of onnxruntime prints of a file and the picture."""
    Path("detect.py").write_text(example("import onnxruntime"))
    done = subprocess.run(
        [sys.executable, "detect.py", model, "picture.jpg"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_onnxruntime(place):
    """Detects about what the model does, whose images Pillow resizes."""
    main(["export", "output/cells", "model.onnx", "--opts", "TEST.DETECTIONS_PER_IMAGE", "50"])
    found = [line.split() for line in detect("model.onnx")]
    (expected,) = Predictor("output/cells", confidence=0.1)(["picture.jpg"])
    assert len(example("import onnxruntime").splitlines()) <= 40
    assert abs(len(found) - len(expected)) <= 0.1 * len(expected)
    assert abs(float(found[0][2]) - expected.scores[0]) < 0.02
    assert cv2.imread("detected.jpg").shape == cv2.imread("picture.jpg").shape


@pytest.mark.filterwarnings("ignore")
def test_int8(place):
    """The file is smaller, and the example of onnxruntime takes it, with what ONNX adds to it."""
    (place / "cells").mkdir()
    (place / "cells" / "images").symlink_to(place)
    main(["export", "output/cells", "model.onnx"])
    exec(example("quantize_static"), {})
    assert (place / "int8.onnx").stat().st_size < 0.5 * (place / "model.onnx").stat().st_size
    assert any("class " in line for line in detect("int8.onnx"))


@pytest.mark.filterwarnings("ignore")
def test_tracking(place):
    """Every frame is tracked, each object with a number."""
    pytest.importorskip("supervision")
    pytest.importorskip("trackers")
    printed = []
    exec(example("import supervision"), {"print": lambda *x: printed.append(x)})
    assert len(printed) == 3
    assert all(len(numbers) == len(boxes) for numbers, boxes in printed)


@pytest.mark.filterwarnings("ignore")
def test_slices(place):
    """Detections of pieces come back in pixels of the picture."""
    pytest.importorskip("sahi")
    names = {}
    exec(example("import get_sliced_prediction"), names)
    found = names["result"].object_prediction_list
    (expected,) = Predictor("output/cells", confidence=0.1)(["picture.jpg"])
    assert found
    assert abs(max(x.score.value for x in found) - expected.scores[0]) < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_slices_of_a_larger_picture(place):
    """The whole picture, which SAHI detects in too, and pieces, which are moved to their places."""
    pytest.importorskip("sahi")
    cv2.imwrite("picture.jpg", cv2.resize(cv2.imread("picture.jpg"), (400, 300)))
    names = {}
    exec(example("import get_sliced_prediction"), names)
    boxes = [x.bbox.to_xyxy() for x in names["result"].object_prediction_list]
    assert max(x[2] for x in boxes) > 256
    assert all(x[2] <= 400 and x[3] <= 300 for x in boxes)
