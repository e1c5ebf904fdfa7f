"""Images that cannot be used are found before any work is done."""

import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from freeanchor import data
from freeanchor.errors import DatasetError
from PIL import Image, PngImagePlugin

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


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syn'
    'tax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    "</rdf:RDF></x:xmpmeta>"
)


def turned(kind, how, path):
    """Save an image that says that it is to be turned by 90 degrees, as a viewer then shows it."""
    pixels = np.zeros((64, 48, 3), dtype=np.uint8)
    pixels[:20, :, 0] = 255  # red above
    image, options = Image.fromarray(pixels), {}
    if how == "EXIF":
        options["exif"] = Image.Exif()
        options["exif"][EXIF_ORIENTATION] = 6
    elif kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP)
    else:
        options["xmp"] = XMP.encode()
    if kind == "TIFF":
        options = {"tiffinfo": {EXIF_ORIENTATION: 6} if how == "EXIF" else {700: XMP.encode()}}
    image.save(path, kind, **options)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, how) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for how in ("EXIF", "XMP")],
)
def test_image_that_is_to_be_turned(coco, kind, how):
    """The check takes its size as a viewer shows it, and the reader gives those pixels."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    turned(kind, how, Path(images) / "1.png")
    data.check_images([name])
    pixels = data.read_image(f"{images}/1.png", "RGB")
    assert pixels.shape == (48, 64, 3)
    assert (pixels[:, 50:, 0] > 200).all()  # red on the right
    assert (pixels[:, :40, 0] < 50).all()


def test_exif_behind_the_pixels(coco):
    """PNG allows it, and a viewer has read it before it shows anything."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    turned("PNG", "EXIF", Path(images) / "1.png")
    content = (Path(images) / "1.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    moved = content[:start] + content[end:last] + content[start:end] + content[last:]
    (Path(images) / "1.png").write_bytes(moved)
    data.check_images([name])
    assert (data.read_image(f"{images}/1.png", "RGB")[:, 50:, 0] == 255).all()


def test_sizes_that_are_swapped(coco):
    """The message says so."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    Image.new("RGB", (48, 64)).save(Path(images) / "1.png")
    with pytest.raises(DatasetError, match=r"but 64 x 48 in its annotation \(width and height are"):
        data.check_images([name])


def deep(kind, path, largest=65535):
    """Save an image of many values, the largest of which is as given."""
    values = np.linspace(0, 1, 48 * 64).reshape(48, 64)
    if kind == "float":
        Image.fromarray((values * largest).astype(np.float32)).save(path, "TIFF")
    elif kind == "int":
        Image.fromarray((values * largest).round().astype(np.int32)).save(path, "TIFF")
    else:
        image = Image.fromarray((values * largest).round().astype(np.uint16))
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 3
        image.save(path, "PNG", exif=exif)
        values = values[::-1, ::-1]
    return values


@pytest.mark.parametrize(
    ("kind", "largest", "max_value"),
    [("PNG", 65535, 0.0), ("PNG", 4095, 4095.0), ("int", 10**6, 1e6), ("float", 0.8, 0.8)],
)
@pytest.mark.parametrize("image_format", ["L", "RGB"])
def test_deep_images(cfg, tmp_path, kind, largest, max_value, image_format):
    """White is 65535, or what the key says; orientation holds for them too."""
    values = deep(kind, tmp_path / "a", largest)
    cfg.INPUT.MAX_VALUE = max_value
    pixels = data.read_image(str(tmp_path / "a"), image_format, cfg)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - values[..., None] * 255).max() <= 0.55


def test_deep_images_whose_white_is_unknown(coco):
    """They are refused before training, with the key; so are 16 bits that are nearly black."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    deep("float", Path(images) / "1.png")
    with pytest.raises(DatasetError, match=r"1\.png .*float pixels: INPUT\.MAX_VALUE must say"):
        data.check_images([name])
    data.check_images([name], data.ImageReader(max_value=65535.0))
    deep("PNG", Path(images) / "1.png", 4095)
    with pytest.raises(DatasetError, match=r"largest value is 4095.*INPUT\.MAX_VALUE 4095"):
        data.check_images([name])
    deep("PNG", Path(images) / "1.png")
    data.check_images([name])


def test_image_that_is_too_large(cfg, coco):
    """The message has its size and the key; with the key it is read."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    cfg.INPUT.MAX_PIXELS = 3000
    reader = data.ImageReader.from_config(cfg)
    expected = r"it has 64 x 48 = 3072 pixels, and INPUT\.MAX_PIXELS allows 3000"
    with pytest.raises(DatasetError, match=expected):
        data.check_images([name], reader)
    with pytest.raises(DatasetError, match=expected):
        data.read_image(f"{images}/1.png", "RGB", cfg)
    limit = Image.MAX_IMAGE_PIXELS
    data.check_images([name], data.ImageReader(max_pixels=3072))
    assert limit == Image.MAX_IMAGE_PIXELS


FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("cut", [1, 30, 1000])
def test_image_that_is_cut_off(coco, kind, cut):
    """Its header is whole: it is found before training, unless all of its pixels are there."""
    name, path, images = coco()
    data.register_datasets([(name, path, images)])
    broken = Path(images) / "2.png"
    with Image.open(broken) as image:
        image.load()
        image.save(broken, kind)
    whole = data.read_image(str(broken), "RGB")
    data.check_images([name])
    broken.write_bytes(broken.read_bytes()[:-cut])
    try:
        data.check_images([name])
    except DatasetError as e:
        assert re.search(r"2\.png is not a readable image", str(e))  # noqa: PT017
    else:
        assert np.array_equal(data.read_image(str(broken), "RGB"), whole)
        assert cut < 1000


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
