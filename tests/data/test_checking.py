"""`freeanchor check`: a whole look at a data set."""

import json
import os
from pathlib import Path

import pytest
from freeanchor import data
from freeanchor.__main__ import main
from freeanchor.errors import DatasetError


def test_what_training_would_use(coco, capsys):
    """Counts of images, boxes, classes, sizes, shapes and crowding."""
    crowd = {"bbox": [0, 0, 60, 40], "iscrowd": 1}
    slender = {"bbox": [1, 1, 50, 4], "category_id": 2}
    name, path, images = coco(annotations=[crowd, slender, {"bbox": [1, 1, 0, 0]}])
    before = Path(path).read_bytes()
    main(["check", path, images])
    out = capsys.readouterr().out
    assert "1 boxes are left out, where a `bbox` has no area (annotation 7 of" in out
    assert "4 images, 6 boxes, 1 of them crowds" in out
    assert "boxes of each class: class 1 1, class 2 3, class 3 1" in out
    assert "sizes: small, up to 32 x 32 pixels: 100.0%" in out
    assert "longer over shorter side: <=2: 80.0%, 2..3: 0.0%, 3..5: 0.0%, >5: 20.0%" in out
    assert "boxes that no anchor of the config overlaps by 0.3: " in out
    assert Path(path).read_bytes() == before
    assert name


@pytest.mark.parametrize("spoil", ["missing", "damaged", "no boxes", "no JSON"])
def test_what_cannot_be_trained_on(coco, capsys, spoil):
    """Exit status 1, and the reason."""
    _, path, images = coco()
    image = Path(images) / "2.png"
    if spoil == "missing":
        image.unlink()
    elif spoil == "damaged":  # which only decoding finds
        content = image.read_bytes()
        image.write_bytes(content[:41] + bytes([255] * 20) + content[61:])
    elif spoil == "no boxes":
        content = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps({**content, "annotations": []}))
    else:
        Path(path).write_text("{")
    with pytest.raises(SystemExit) as status:
        main(["check", path, images])
    assert isinstance(status.value.code, str)  # Python prints it and exits with 1
    expected = {"missing": "2.png is missing", "damaged": "2.png is not a readable image"}
    said = capsys.readouterr().out + str(status.value)
    reasons = {**expected, "no boxes": "no usable box to train on", "no JSON": "not a JSON file"}
    assert reasons[spoil] in said


def test_cleaned_copy(coco, tmp_path):
    """It has what can be used, in its place, and passes the check."""
    bad = [{"bbox": [1, 1, 0, 0]}, {"bbox": None}]
    good = {"bbox": ["5", "5", "10", "10"], "iscrowd": None, "mine": {"a": 1}}
    _, path, images = coco(annotations=[*bad, good])
    (Path(images) / "2.png").write_text("no image")
    content = json.loads(Path(path).read_text())
    content["categories"][0] |= {"keypoints": ["eye"], "skeleton": [[1, 1]], "supercategory": "x"}
    Path(path).write_text(json.dumps({**content, "info": {"mine": 1}}))
    before = Path(path).read_bytes()
    out = tmp_path / "of another folder" / "clean.json"
    with pytest.raises(SystemExit, match="cannot be trained on as it is"):
        main(["check", path, images, "--write", str(out)])
    assert Path(path).read_bytes() == before
    categories = content["categories"]
    content = json.loads(out.read_text())
    assert content["info"] == {"mine": 1}
    assert content["categories"] == categories
    assert [x["id"] for x in content["images"]] == [1, 3, 4]
    kept = {x["id"]: x for x in content["annotations"]}
    assert sorted(kept) == [1, 3, 4, 7]
    assert kept[7]["bbox"] == [5, 5, 10, 10]
    assert kept[7]["mine"] == {"a": 1}
    assert kept[7]["iscrowd"] == 0
    main(["check", str(out), images])
    with pytest.raises(SystemExit, match="is the file that is checked"):
        main(["check", str(out), images, "--write", str(out)])


def test_several_processes(coco, cfg, monkeypatch):
    """They find the same as one."""
    _, path, images = coco(num_images=8)
    (Path(images) / "7.png").write_text("no image")
    one, _ = data.check_dataset(path, images, cfg)
    monkeypatch.setattr("freeanchor.data.checking._PER_PROCESS", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    several, is_trainable = data.check_dataset(path, images, cfg)
    assert several == one
    assert not is_trainable


def test_a_system_that_does_not_count_cores(coco, cfg, monkeypatch):
    """MacOS does not say which of them a process may use."""
    _, path, images = coco()
    monkeypatch.delattr("os.sched_getaffinity")
    assert data.check_dataset(path, images, cfg)[1]


class Deadly(data.ImageReader):
    """Ends the process that reads the third image, as the system does for lack of memory."""

    def check(self, record, decode=False):
        if record["file_name"].endswith("3.png"):
            os._exit(1)
        return super().check(record, decode)


def test_a_process_that_is_ended(coco, cfg, monkeypatch):
    """Is an error, and no wait for ever."""
    _, path, images = coco(num_images=8)
    monkeypatch.setattr("freeanchor.data.checking._PER_PROCESS", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(data.ImageReader, "from_config", lambda _: Deadly())
    with pytest.raises(DatasetError, match=r"train\.json: a process that was reading"):
        data.check_dataset(path, images, cfg)
