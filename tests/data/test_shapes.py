"""The embedded data set."""

import hashlib
import json

import numpy as np
import pytest
from freeanchor.__main__ import main
from freeanchor.data import shapes
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    shapes.write_shapes(path, num_train=12, num_val=5, seed=3)
    return path


def digest(path):
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return [(str(p.relative_to(path)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Images and annotations, in a second run; another seed gives others."""
    shapes.write_shapes(tmp_path / "again", 12, 5, seed=3)
    shapes.write_shapes(tmp_path / "other", 12, 5, seed=4)
    assert digest(tmp_path / "again") == digest(folder)
    assert digest(tmp_path / "other") != digest(folder)


def test_is_coco_format(folder, capsys):
    """Pycocotools reads it; boxes are whole, inside the image and not crowd."""
    for split, count in (("train", 12), ("val", 5)):
        coco = COCO(str(folder / f"{split}.json"))
        assert len(coco.imgs) == count
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.CLASSES)
        for image in coco.imgs.values():
            with Image.open(folder / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
        for annotation in coco.anns.values():
            x, y, width, height = annotation["bbox"]
            assert min(x, y, width, height) > 0
            assert max(x + width, y + height) < image["width"]
            assert 0 < annotation["area"] <= width * height


def test_splits_do_not_share_images(folder):
    """Validation says something: none of its images is in the training set."""
    pixels = [hashlib.sha256(p.read_bytes()).digest() for p in (folder / "images").iterdir()]
    assert len(set(pixels)) == 17


def test_has_what_the_method_is_for():
    """Slender, overlapping and hollow objects occur, in every sample of some size."""
    slender = overlapping = hollow = 0
    for seed in range(20):
        image, objects = shapes.draw(np.random.default_rng(seed))
        assert image.dtype == np.uint8
        assert image.shape == (256, 256, 3)
        assert len(objects) >= 3
        boxes = np.array([o["bbox"] for o in objects])
        slender += (boxes[:, 2:].max(1) / boxes[:, 2:].min(1) > 3).sum()
        corner = boxes[:, :2] + boxes[:, 2:]
        for i in range(len(boxes)):
            for j in range(i):
                inter = np.minimum(corner[i], corner[j]) - np.maximum(boxes[i, :2], boxes[j, :2])
                overlapping += inter.min() > 0
        hollow += sum(shapes.CLASSES[o["category_id"] - 1] in ("ring", "crescent") for o in objects)
    assert slender > 10
    assert overlapping > 40
    assert hollow > 40


def test_command(folder, tmp_path, capsys):
    """`freeanchor shapes` writes what it says."""
    main(["shapes", str(tmp_path), "--num-train", "2", "--num-val", "1", "--seed", "3"])
    assert str(tmp_path) in capsys.readouterr().out
    assert len(json.loads((tmp_path / "train.json").read_text())["images"]) == 2


def test_masks(folder, tmp_path):
    """Those of the whole objects, exactly: their boxes and areas. Nothing else changes."""
    main(["shapes", str(tmp_path), "--num-train", "12", "--num-val", "5", "--seed", "3", "--masks"])
    assert digest(tmp_path / "images") == digest(folder / "images")
    for split in ("train", "val"):
        with_masks = json.loads((tmp_path / f"{split}.json").read_text())
        for annotation in with_masks["annotations"]:
            mask = annotation.pop("segmentation")
            assert mask_api.toBbox(mask).tolist() == annotation["bbox"]
            assert mask_api.area(mask) == annotation["area"]
        assert with_masks == json.loads((folder / f"{split}.json").read_text())
