"""Images that cannot be used are found before any work is done."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog
from freeanchor import data
from freeanchor.errors import DatasetError
from PIL import Image

EXIF_ORIENTATION = 274


def test_missing_images(coco):
    """Counted, and the first ones named."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    for i in (2, 3):
        (Path(images) / f"{i}.png").unlink()
    with pytest.raises(DatasetError, match="2 of 4 images cannot be used") as error:
        data.check_images([name])
    assert f"{images}/2.png is missing; {images}/3.png is missing" in str(error.value)


def test_image_that_is_not_one(coco):
    """A text file with the name of an image is found before training."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    (Path(images) / "3.png").write_text("not found")
    with pytest.raises(DatasetError, match=r"3\.png is not a readable image"):
        data.check_images([name])


def test_image_of_another_size(coco):
    """The boxes would be wrong; both sizes are said."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    Image.new("RGB", (32, 48)).save(Path(images) / "1.png")
    with pytest.raises(DatasetError, match=r"1\.png has 32 x 48 pixels, but 64 x 48 in its"):
        data.check_images([name])


def test_image_that_exif_turns(coco):
    """Detectron2 turns such an image on reading, so its size is that of the turned image."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (48, 64)).save(Path(images) / "1.png", exif=exif)
    data.check_images([name])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_image_that_is_cut_off(coco, kind):
    """Its header is whole, so only its end tells, before training."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    broken = Path(images) / "2.png"
    with Image.open(broken) as image:
        image.load()
        image.save(broken, kind)
    data.check_images([name])
    broken.write_bytes(broken.read_bytes()[:-1000])
    with pytest.raises(DatasetError, match=r"2\.png is not a readable image"):
        data.check_images([name])


def test_image_with_something_behind_its_end(coco):
    """Cameras append data to a JPEG; the image is whole all the same."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    Image.new("RGB", (64, 48)).save(Path(images) / "1.png", "JPEG")
    with (Path(images) / "1.png").open("ab") as f:
        f.write(bytes(10_000))
    data.check_images([name])


def test_image_with_damaged_exif(coco):
    """Detectron2 ignores such EXIF, and so does the check."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    Image.new("RGB", (64, 48)).save(Path(images) / "1.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    data.check_images([name])


def test_damage_that_only_decoding_finds(cfg, coco):
    """Reading the image in training names it."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    broken = Path(images) / "2.png"
    broken.write_bytes(broken.read_bytes()[:-4000])
    record = DatasetCatalog.get(name)[1]
    with pytest.raises(DatasetError, match=r"2\.png cannot be read: .*truncated"):
        data.Mapper(cfg, is_train=True)(record)
