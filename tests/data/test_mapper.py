"""From records to what the model takes: formats, depths, and images that break meanwhile."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from freeanchor import data
from freeanchor.errors import DatasetError, FreeAnchorError
from PIL import Image

PIXELS = {"L": 1, "RGBA": 4, "CMYK": 4}


@pytest.fixture
def records(dataset):
    return DatasetCatalog.get(dataset[0])


@pytest.mark.parametrize("image_format", ["L", "RGBA", "CMYK", "BGR", "YUV-BT.601"])
def test_formats_from_the_image_to_the_stem(cfg, records, image_format):
    """The model takes as many channels as the mapper gives, and the values are Pillow's."""
    channels = data.num_channels(image_format)
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0] * channels, [50.0] * channels
    cfg.INPUT.MIN_SIZE_TEST = 96
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.INPUT.RANDOM_FLIP = "none"
    model = build_model(cfg)
    assert model.backbone.bottom_up.stem.conv1.weight.shape[1] == channels
    mapped = data.Mapper(cfg, is_train=True)(records[0])
    assert mapped["image"].shape == (channels, 48, 64)
    if image_format in PIXELS:
        expected = np.asarray(Image.open(records[0]["file_name"]).convert(image_format))
        expected = expected.reshape(48, 64, channels).transpose(2, 0, 1)
        assert np.array_equal(mapped["image"].numpy(), expected)
    losses = model([mapped, mapped])
    assert all(x.isfinite() for x in losses.values())
    test = data.Mapper(cfg, is_train=False)(records[0])
    assert "annotations" not in test
    model.eval()([test])


@pytest.mark.parametrize("image_format", ["LA", "RGBA"])
def test_resizing_with_a_mask(cfg, records, image_format):
    """Each channel by itself: the last is no mask of the others, as Pillow would have it."""
    channels = data.num_channels(image_format)
    pixels = np.full((48, 64, channels), 200, dtype=np.uint8)
    pixels[..., -1] = 0
    Image.fromarray(pixels, image_format).save(records[0]["file_name"])
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = image_format, 30
    image = data.Mapper(cfg, is_train=False)(records[0])["image"]
    assert image.shape == (channels, 30, 40)
    assert (image[:-1] - 200).abs().max() < 0.01
    assert (image[-1] == 0).all()


@pytest.mark.parametrize("scales", [(0.2, 0.6), (1.0, 1.0), (1.5, 3.0)])
def test_scale_jitter(cfg, records, scales):
    """A square; the boxes stay on what they are of, and objects out of sight are left out."""
    cfg.INPUT.SCALE_JITTER, cfg.INPUT.MAX_SIZE_TRAIN = scales, 128
    mapper = data.Mapper(cfg, is_train=True)
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[10:30, 40:60] = 255
    Image.fromarray(pixels).save(records[0]["file_name"])
    record = {**records[0], "annotations": [{**records[0]["annotations"][0]}]}
    record["annotations"][0]["bbox"] = [40, 10, 20, 20]
    sizes, numbers = set(), set()
    for seed in range(20):
        np.random.seed(seed)
        mapped = mapper(record)
        assert mapped["image"].shape == (3, 128, 128)
        y, x = (mapped["image"][0] > 192).nonzero().T
        boxes = mapped["instances"].gt_boxes.tensor
        numbers.add(len(boxes))
        if len(x) < 20:  # none, or a sliver of which interpolation leaves nothing
            assert len(boxes) == 0 or min(boxes[0, 2:] - boxes[0, :2]) < 3
            continue
        found = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
        torch.testing.assert_close(boxes[0], found.float(), rtol=0, atol=2.5)
        sizes.add(round(float((boxes[0, 2:] - boxes[0, :2]).max()), 1))
    assert all(x <= 20 * 2 * scales[1] + 0.5 for x in sizes)
    assert (len(sizes) == 1) == (scales[0] == scales[1])
    assert numbers == ({0, 1} if scales[1] > 1 else {1})


@pytest.mark.parametrize("image_format", ["RGB", "L", "YUV-BT.601"])
def test_scale_jitter_pads_with_a_colour(cfg, records, image_format):
    """One that an image in this format may have: the padding is no brighter than white."""
    Image.new("RGB", (64, 48), "white").save(records[0]["file_name"])
    cfg.INPUT.FORMAT, cfg.INPUT.SCALE_JITTER, cfg.INPUT.MAX_SIZE_TRAIN = image_format, (1, 1), 128
    image = data.Mapper(cfg, is_train=True)(records[0])["image"].float()
    assert (image[0] <= image[0, 0, 0]).all()
    assert (image[0] < image[0, 0, 0]).any()


@pytest.mark.parametrize("kind", ["polygons", "encoded"])
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_scale_jitter_of_masks(cfg, records, kind, scale):
    """A mask stays where its object is, without the padding, and the box is around it."""
    cfg.MODEL.MASK_ON, cfg.INPUT.SCALE_JITTER, cfg.INPUT.MAX_SIZE_TRAIN = True, (scale,) * 2, 128
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[10:30, 24:48] = 255
    Image.fromarray(pixels).save(records[0]["file_name"])
    polygons = [np.array([24.0, 10, 48, 10, 48, 30, 24, 30])]
    mask = polygons if kind == "polygons" else data.encode_mask(pixels[..., 0] > 0)
    annotation = {**records[0]["annotations"][0], "bbox": [24, 10, 24, 20], "segmentation": mask}
    mapped = data.Mapper(cfg, is_train=True)({**records[0], "annotations": [annotation]})
    (found,) = mapped["instances"].gt_masks.tensor
    assert (found != (mapped["image"][0] == 255)).float().mean() < 0.02
    assert found.float().mean() < 0.4
    boxes = mapped["instances"].gt_masks.get_bounding_boxes()
    assert torch.equal(mapped["instances"].gt_boxes.tensor, boxes.tensor)


def test_bad_scale_jitter(cfg):
    cfg.INPUT.SCALE_JITTER = [2.0, 0.1]
    with pytest.raises(FreeAnchorError, match=r"INPUT\.SCALE_JITTER must be two scales"):
        data.Mapper(cfg, is_train=True)


def test_augmentation_that_fails(cfg, records, broken):
    """Its error is its own: the image is not broken, and no other takes its place."""
    mapper = data.Mapper(cfg, is_train=True, spares=broken)

    def fail(seen):
        raise ValueError("mine")

    mapper.augmentations = fail
    with pytest.raises(ValueError, match=r"^mine"):
        mapper(records[0])


@pytest.mark.parametrize("image_format", ["1", "P", "I", "F"])
def test_formats_without_channels(image_format):
    """Palettes, bits and deep pixels are nothing that a network takes."""
    with pytest.raises(DatasetError, match=rf"INPUT\.FORMAT '{image_format}' is not known: it is"):
        data.num_channels(image_format)


def test_unknown_format():
    """It says what there is."""
    with pytest.raises(DatasetError, match=r"INPUT\.FORMAT 'BRG' is not known: it is BGR"):
        data.num_channels("BRG")


@pytest.fixture
def broken(cfg, records):
    """The records of a data set whose third image is damaged, which only decoding finds."""
    path = Path(records[2]["file_name"])
    content = path.read_bytes()
    path.write_bytes(content[:41] + bytes([255] * 20) + content[61:])
    return records


def test_image_that_breaks_in_training(cfg, broken, caplog):
    """Another one takes its place, with its name in the log; too many are an error."""
    cfg.DATALOADER.MAX_BROKEN_IMAGES = 2
    mapper = data.Mapper(cfg, is_train=True, spares=broken[:2])
    with caplog.at_level(logging.WARNING, "freeanchor"):
        for _ in range(2):
            assert mapper(broken[2])["image_id"] in (1, 2)
    assert caplog.text.count(f"{broken[2]['file_name']} cannot be read") == 2
    assert "at most 2 times (DATALOADER.MAX_BROKEN_IMAGES)" in caplog.text
    with pytest.raises(DatasetError, match=r"3\.png cannot be read"):
        mapper(broken[2])


def test_image_that_is_back_at_the_second_try(cfg, records, monkeypatch, caplog):
    """A disk that fails once is no reason to take another image."""
    tries = []
    read = data.ImageReader.read

    def fail_once(self, path):
        tries.append(path)
        if len(tries) == 1:
            raise OSError("Input/output error")
        return read(self, path)

    monkeypatch.setattr(data.ImageReader, "read", fail_once)
    assert data.Mapper(cfg, is_train=True, spares=records)(records[3])["image_id"] == 4
    assert len(tries) == 2
    assert "cannot be read" not in caplog.text


@pytest.mark.parametrize("spares", [0, 3])
def test_image_that_breaks_in_evaluation(cfg, broken, spares):
    """No other one can take its place."""
    mapper = data.Mapper(cfg, is_train=False, spares=broken[:spares])
    with pytest.raises(DatasetError, match=r"3\.png cannot be read"):
        mapper(broken[2])


def test_ignore_regions(cfg, coco):
    """By their key, crowds reach the model as they lie in the resized and flipped image."""
    crowds = [
        {"bbox": [4, 6, 20, 30], "iscrowd": 1},
        {"bbox": [40, 2, 10, 10], "ignore": 1},
    ]
    name, *paths = coco(annotations=crowds)
    data.register_datasets([(name, *paths)])
    record = DatasetCatalog.get(name)[0]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 500  # twice the size
    cfg.MODEL.FREEANCHOR.IGNORE_REGIONS = False
    assert "ignore_regions" not in data.Mapper(cfg, is_train=True)(record)
    cfg.MODEL.FREEANCHOR.IGNORE_REGIONS = True
    expected = torch.tensor([[8.0, 12, 48, 72], [80, 4, 100, 24]])
    flipped = expected.clone()
    flipped[:, [0, 2]] = 128 - expected[:, [2, 0]]
    mapper, seen = data.Mapper(cfg, is_train=True), set()
    for _ in range(20):
        mapped = mapper(record)
        assert len(mapped["instances"]) == 1
        assert any(torch.equal(mapped["ignore_regions"], x) for x in (expected, flipped))
        seen.add(mapped["ignore_regions"][0, 0].item())
    assert len(seen) == 2
    assert "ignore_regions" not in data.Mapper(cfg, is_train=False)(record)

    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    model = build_model(cfg)
    with_regions = model([mapped, mapped])["loss_negative"].item()
    mapped["ignore_regions"] = mapped["ignore_regions"][:0]
    assert with_regions < model([mapped, mapped])["loss_negative"].item()


def test_image_that_is_resized_to_nothing(cfg, records):
    """One of its pixels stays, where Detectron2 would round their number to 0."""
    Image.new("RGB", (3000, 1)).save(records[0]["file_name"])
    record = {"file_name": records[0]["file_name"], "image_id": 1}
    for is_train in (True, False):
        assert data.Mapper(cfg, is_train=is_train)(dict(record))["image"].shape == (3, 1, 640)
