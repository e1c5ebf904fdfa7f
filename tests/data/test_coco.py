"""The reader of COCO files: what people have is right, or one sentence says what is wrong."""

import copy
import gzip
import json
import os

import numpy as np
import pytest
from freeanchor.data import read_coco, register_datasets
from freeanchor.errors import DatasetError
from PIL import Image

BOXES = [[8, 6, 20, 12], [30, 20, 25, 25], [2, 2, 9, 9], [40, 4, 20, 40]]
RLE = {"size": [48, 64], "counts": "PPYo1"}


@pytest.fixture
def content():
    """A file of two images, two classes and four boxes, to be changed."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 64, "height": 48},
            {"id": 2, "file_name": "sub/b.png", "width": 64, "height": 48},
        ],
        "annotations": [
            {
                "id": i,
                "image_id": 1 + i // 3,
                "category_id": 3 + i % 2,
                "bbox": box,
                "area": 100.5,
                "iscrowd": 0,
                "segmentation": [],
            }
            for i, box in enumerate(BOXES, start=1)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


@pytest.fixture
def read(tmp_path):
    """Writes a file and its images, and reads it."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (64, 48)).save(root / name)

    def run(content, name="file.json", root=root):
        path = tmp_path / name
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(raw)
        file = read_coco(str(path), str(root))
        return file, file.records(range(len(file.class_names)))

    run.root = root
    return run


def objects(records):
    """(image id, class, box, crowd, area) of all annotations."""
    return [
        (x["image_id"], a["category_id"], a["bbox"], a["iscrowd"], a["area"])
        for x in records
        for a in x["annotations"]
    ]


def plain(content):
    """What the reader gives of an ordinary file."""
    return [
        (1 + i // 3, (3 + i % 2) - 3, [float(v) for v in box], 0, 100.5)
        for i, box in enumerate(BOXES, start=1)
    ]


def test_ordinary_file(content, read):
    """Its objects, image by image, in Detectron2's standard format."""
    file, records = read(content)
    assert objects(records) == plain(content)
    assert [(x["width"], x["height"]) for x in records] == [(64, 48)] * 2
    assert [os.path.isfile(x["file_name"]) for x in records] == [True, True]
    assert file.class_names == ["cat", "dog"]
    assert file.findings.lines() == []


def change(content, key, value):
    """Give all annotations, or images or categories (`images.id`), other values.

    A function makes each of them from the old one.
    """
    content = copy.deepcopy(content)
    part, _, key = key.rpartition(".")
    for entry in content[part or "annotations"]:
        if value is ...:
            del entry[key]
        else:
            entry[key] = value(entry[key]) if callable(value) else value
    return content


# What is written in another way, but can only mean one thing.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iscrowd", None),
        ("iscrowd", ...),
        ("iscrowd", False),
        ("iscrowd", "0"),
        ("iscrowd", "no idea"),
        ("ignore", 0),
        ("ignore", None),
        ("segmentation", None),
        ("segmentation", ...),
        ("segmentation", [[1.0, 2.0, 3.0, 4.0]]),  # two corners
        ("segmentation", [1.0, 2.0, 3.0, 2.0, 3.0, 4.0, 1.0, 4.0]),  # flat, as of VIA
        ("segmentation", RLE),
        ("segmentation", "PPYo1"),
        ("segmentation", {"polygon": 5}),
        ("keypoints", "none"),
        ("bbox", lambda box: [str(v) for v in box]),
        ("bbox", lambda box: [f" {v}.0" for v in box]),
        ("area", "100.5"),
        ("id", lambda i: -i),
        ("id", lambda i: f"box/{i}"),
        ("id", lambda i: 10**30 + i),
        ("id", ...),
        ("id", None),
        ("image_id", str),
        ("image_id", lambda i: f"00{i}"),
        ("image_id", float),
        ("category_id", str),
        ("category_id", float),
        ("images.width", "64"),
        ("images.height", 48.0),
        ("images.width", None),  # the size is read from the image
        ("images.width", ...),
        ("images.height", 0),
        ("images.height", "unknown"),
        ("images.file_name", lambda name: f"./{name}"),
        ("images.file_name", lambda name: name.replace("/", "\\")),
        ("images.file_name", lambda name: f"images\\{name}"),
        ("images.file_name", lambda name: f"images/{name}"),
        ("images.file_name", lambda name: name.replace("a", "%61").replace("b", "%62")),
        ("images.file_name", lambda name: name.replace(".png", ".PNG")),
        ("images.file_name", lambda name: f"sub/../{name}"),
        ("categories.id", str),
        ("categories.supercategory", None),
    ],
)
def test_one_meaning(content, read, key, value):
    """The same objects, images and classes as without the change."""
    _, records = read(change(content, key, value))
    assert objects(records) == plain(content)
    assert [os.path.isfile(x["file_name"]) for x in records] == [True, True]
    assert [(x["width"], x["height"]) for x in records] == [(64, 48)] * 2


@pytest.mark.parametrize("area", [None, ..., 0, -5, "big", [], float("nan"), float("inf")])
def test_area_of_the_box(content, read, area):
    """It counts where the file has no usable one."""
    _, records = read(change(content, "area", area))
    assert [x[4] for x in objects(records)] == [w * h for _, _, w, h in BOXES]


@pytest.mark.parametrize(
    ("key", "value"), [("iscrowd", 1), ("iscrowd", True), ("iscrowd", "true"), ("ignore", 1)]
)
def test_crowd(content, read, key, value):
    """`ignore` is COCO's crowd by another name."""
    _, records = read(change(content, key, value))
    assert [x[3] for x in objects(records)] == [1] * 4


@pytest.mark.parametrize(
    "change_id", [lambda i: f"00000{i}", lambda i: i - 1, lambda i: -i, lambda i: f"a/{i}", float]
)
def test_ids_of_images(content, read, change_id):
    """Numbers and text, as they are: the records have the user's."""
    changed = change(change(content, "images.id", change_id), "image_id", change_id)
    _, records = read(changed)
    assert {x["image_id"] for x in records} == {change_id(1), change_id(2)}
    boxes = {x["image_id"]: [a["bbox"] for a in x["annotations"]] for x in records}
    assert boxes[change_id(1)] == [[float(v) for v in box] for box in BOXES[:2]]


def test_images_are_in_the_order_of_their_ids(content, read):
    """Also of numbers that are text, so that a run is the same on every machine."""
    content["images"] = [
        {"id": i, "file_name": name, "width": 64, "height": 48}
        for i, name in (("10", "a.png"), ("9", "sub/b.png"))
    ]
    content["annotations"] = []
    _, records = read(content)
    assert [x["image_id"] for x in records] == ["9", "10"]


# What is left out, with what is said of it.
@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        (..., "is not four numbers (annotation 4: None)"),
        (None, "is not four numbers (annotation 4: None)"),
        ([], "is not four numbers (annotation 4: [])"),
        ([1, 2, 3], "is not four numbers"),
        ([1, 2, 3, 4, 5], "is not four numbers"),
        ("1 2 3 4", "is not four numbers (annotation 4: '1 2 3 4')"),
        ({"x": 1}, "is not four numbers (annotation 4: {'x': 1})"),
        (["a", 2, 3, 4], "is not four numbers"),
        (["1,5", 2, 3, 4], "is not four numbers"),
        ([True, 2, 3, 4], "is not four numbers"),
        ([[1], 2, 3, 4], "is not four numbers"),
        ([float("nan"), 2, 3, 4], "is not finite"),
        ([float("inf"), 2, 3, 4], "is not finite"),
        ([10**400, 2, 3, 4], "is not finite"),
        ([1, 2, 0, 4], "has no area (annotation 4 of "),
        ([1, 2, 3, -4], "has no area"),
        ([1e9, 2, 1e-9, 4], "has no area"),
        ([64, 2, 3, 4], "is outside its image"),
        ([2, -9, 3, 4], "is outside its image"),
    ],
)
def test_boxes_that_are_left_out(content, read, bbox, expected):
    """One of four; the others stay, and the counts have an example."""
    if bbox is ...:
        del content["annotations"][3]["bbox"]
    else:
        content["annotations"][3]["bbox"] = bbox
    file, records = read(content)
    assert objects(records) == plain(content)[:3]
    (line,) = file.findings.lines()
    assert line.startswith("1 boxes are left out, where a `bbox` ")
    assert expected in line


def test_most_boxes_are_unusable(content, read):
    """There is a limit to what is left out."""
    for i in (0, 1, 3):
        content["annotations"][i]["bbox"] = None
    with pytest.raises(DatasetError, match=r"3 of 4 boxes cannot be used \(3 is not four numbers"):
        read(content)


def test_annotations_of_other_images(content, read):
    """They are left out and counted; if all are, the ids are wrong."""
    content["annotations"][0]["image_id"] = 99
    file, records = read(content)
    assert objects(records) == plain(content)[1:]
    assert "1 annotations are of images that are not listed" in file.findings.lines()[0]
    with pytest.raises(DatasetError, match="none of the annotations belongs to an image"):
        read(change(content, "image_id", 99))


def scatter(rng, convert, count=200):
    """Boxes in images of 64 x 48, (x, y, width, height), written by another convention."""
    sides = rng.uniform(3, 20, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * ([64, 48] - sides)
    return convert(np.concatenate([corner, sides], axis=1)).tolist()


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (lambda b: b / [64, 48, 64, 48], r"fractions of .*freeanchor import --boxes normalised \S"),
        (
            lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
            "corners .*`freeanchor import --boxes xyxy ",
        ),
        (
            lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]]),
            "centre, width, height .*`freeanchor import --boxes cxcywh ",
        ),
        (
            lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]]) / [64, 48, 64, 48],
            "`freeanchor import --boxes normalised --boxes cxcywh ",
        ),
        (lambda b: b * 3, "of the boxes leave their image"),
        (lambda b: b * [1 / 64] * 4 / 100, "most boxes are smaller than a pixel"),
    ],
)
def test_boxes_of_another_convention(content, read, convert, expected):
    """The message says which reading would fit, and the command that imports it."""
    boxes = scatter(np.random.default_rng(0), convert)
    content["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)
    ]
    with pytest.raises(DatasetError, match=expected):
        read(content)


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_boxes_are_not_suspected(content, read, seed):
    """Also where some leave the image, and where all lie in one corner of it."""
    rng = np.random.default_rng(seed)
    boxes = scatter(rng, lambda b: b)
    corner = [[x / 4, y / 4, w / 4, h / 4] for x, y, w, h in boxes]
    sloppy = [[x, y, w + 9 * (i % 10 == 0), h] for i, (x, y, w, h) in enumerate(boxes)]
    for some in (boxes, corner, sloppy, boxes[:1], boxes[:3], [[60, 40, 10, 20]]):
        content["annotations"] = [
            {"id": i, "image_id": 1, "category_id": 3, "bbox": box} for i, box in enumerate(some)
        ]
        assert [x[2] for x in objects(read(content)[1])] == some


def entry(part, index, **values):
    def change(content):
        for key, value in values.items():
            if value is ...:
                del content[part][index][key]
            else:
                content[part][index][key] = value

    return change


def top(key, value):
    return lambda content: content.update({key: value})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (entry("images", 1, id=1), r"'a\.png'.* and .*'sub/b\.png'.* have the same id 1"),
        (entry("images", 1, id="1"), r"have the same id '1'"),
        (entry("images", 1, id=1.0), r"have the same id 1\.0"),
        (entry("images", 1, id=None), r"entry 2 of `images` \('sub/b.png'\) has the id None"),
        (entry("images", 1, id=...), "has the id None"),
        (entry("images", 1, id=True), "has the id True"),
        (entry("images", 1, id=1.5), r"has the id 1\.5"),
        (entry("images", 1, id=[1]), r"has the id \[1\]"),
        (entry("images", 1, id=float("nan")), "has the id nan"),
        (entry("images", 1, file_name=...), "image 2 has the `file_name` None: name its file"),
        (entry("images", 1, file_name=7), "image 2 has the `file_name` 7"),
        (entry("images", 1, file_name=""), "image 2 has the `file_name` ''"),
        (entry("images", 1, file_name="a.png"), r"images 1 and 2 are the same file .*a\.png"),
        (entry("images", 1, file_name="A.PNG"), r"images 1 and 2 are the same file .*a\.png"),
        (entry("images", 1, file_name="a\0.png"), "is no file name"),
        (entry("images", 1, file_name="\ud800.png"), "is no file name"),
        (entry("images", 1, width=None, file_name="c.png"), "and .*c.png cannot be read"),
        (entry("annotations", 2, category_id=None), "annotation 3 has the `category_id` None: giv"),
        (entry("annotations", 2, category_id=...), "annotation 3 has the `category_id` None"),
        (entry("annotations", 2, category_id=9), "annotation 3 has the `category_id` 9"),
        (entry("annotations", 2, category_id=True), "annotation 3 has the `category_id` True"),
        (entry("annotations", 2, category_id=[3]), r"annotation 3 has the `category_id` \[3\]"),
        (entry("annotations", 2, category_id="cat"), "annotation 3 has the `category_id` 'cat'"),
        (entry("annotations", 2, image_id=None), "annotation 3 has the `image_id` None"),
        (entry("annotations", 2, image_id={}), "annotation 3 has the `image_id` {}"),
        (entry("annotations", 2, id=1), "entry 1 .* entry 3 .* have the same id 1"),
        (entry("annotations", 2, id="x\ny", image_id=None), r"annotation 'x\\ny' has"),
        (entry("annotations", 2, id=[1]), r"entry 3 of `annotations` has the id \[1\]"),
        (entry("categories", 1, name="cat"), "categories 3 and 4 have the same name 'cat'"),
        (
            entry("categories", 1, name=None),
            r"entry 2 of `categories` \(id 4\) has the `name` None",
        ),
        (entry("categories", 1, name=...), "has the `name` None"),
        (entry("categories", 1, name=" "), "has the `name` ' '"),
        (entry("categories", 1, name=["dog"]), r"has the `name` \['dog'\]"),
        (entry("categories", 1, name="do\ng"), r"'do\\ng' in `categories` cannot be printed"),
        (entry("categories", 1, id=3), "category 'cat' and category 'dog' have the same id 3"),
        (entry("categories", 1, id=None), "category 'dog' has the id None"),
        (entry("categories", 1, id=...), "needs an `id` and a `name`"),
        (top("categories", {"3": "cat"}), "`categories` is .*, and should be a list of objects"),
        (top("categories", ["cat"]), "entry 1 of `categories` is 'cat', and should be an object"),
        (top("categories", []), "has no `categories`"),
        (top("images", {"1": "a.png"}), "`images` is .*, and should be a list"),
        (top("images", []), "has no `images`"),
        (top("annotations", {"1": {}}), "`annotations` is .*, and should be a list"),
        (top("annotations", [[1, 2, 3, 4]]), r"entry 1 of `annotations` is \[1, 2, 3, 4\]"),
        (top("annotations", "none"), "`annotations` is 'none'"),
    ],
)
def test_what_could_mean_two_things(content, read, spoil, expected):
    """It is refused in one sentence that names the file and the entry."""
    spoil(content)
    with pytest.raises(DatasetError, match=expected) as error:
        read(content)
    assert "file.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("names", "said"), [(("cat", "Cat "), True), (("cat", "cats"), False)])
def test_names_that_differ_in_case_alone(content, read, names, said):
    """They stay classes of their own, which is said."""
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    content["annotations"] = []
    file, _ = read(content)
    assert tuple(file.class_names) == names
    lines = file.findings.lines()
    assert len(lines) == said
    assert not said or lines[0].endswith("of their own ('Cat ' from 'cat')")


def test_names_that_are_numbers(content, read):
    """They are written as text; two that are then the same are refused."""
    content["categories"][0]["name"] = 7
    file, _ = read(content)
    assert file.class_names == ["7", "dog"]
    content["categories"][1]["name"] = "7"
    with pytest.raises(DatasetError, match="have the same name '7'"):
        read(content)


@pytest.mark.parametrize("value", [None, ...])
def test_file_without_annotations(content, read, value):
    """A test set: there is no truth, which is not the same as no objects."""
    del content["annotations"]
    if value is None:
        content["annotations"] = None
    file, records = read(content)
    assert not file.has_truth
    assert all("annotations" not in x for x in records)
    _, records = read({**content, "annotations": []})
    assert [x["annotations"] for x in records] == [[], []]


# Encodings and containers

VOC = b"<annotation><filename>a.png</filename></annotation>"


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: b" \n", "is empty"),
        (lambda raw: raw[:-10], "is not a JSON file: "),
        (lambda raw: b"[" * 100000, "is not a JSON file: "),
        (lambda raw: raw.decode().encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (lambda raw: raw.decode().encode("utf-16-le"), "zero bytes"),
        (lambda raw: raw.replace(b"cat", b"caf\xe9"), r"is not a JSON file in UTF-8 \(byte"),
        (gzip.compress, "is compressed by gzip: unpack it"),
        (lambda raw: b"PK\x03\x04" + raw, "is a zip archive"),
        (lambda raw: b'{"a": 1}\n{"a": 2}\n', "it is JSON lines"),
        (lambda raw: VOC, "it is Pascal VOC's XML; `freeanchor import --from voc FOLDER"),
        (lambda raw: b"0 0.5 0.5 0.2 0.2\n", "YOLO's text format; `freeanchor import --from yolo"),
        (lambda raw: b"name,x,y,w,h\na.png,1,2,3,4\n", "it looks like CSV"),
        (lambda raw: b"[]", "it holds a list"),
        (lambda raw: b"7", "it holds 7"),
        (lambda raw: b"{}", "it has no `images`"),
        (lambda raw: b'{"images": [{"id": 1}]}', "it has no `categories`"),
        (lambda raw: b'{"a.png12": {"filename": "a.png", "regions": []}}', "Annotator (VIA)"),
        (lambda raw: b'{"_via_settings": {}, "_via_img_metadata": {}}', "Annotator (VIA)"),
        (lambda raw: b'{"shapes": [], "imagePath": "a.png"}', "it is labelme's format"),
        (lambda raw: b'[{"image_id": 1, "bbox": [], "score": 1}]', "a list of detections"),
        (lambda raw: b'[{"image": "a.png", "annotations": []}]', "it is CreateML's format"),
    ],
)
def test_other_files(content, read, convert, expected):
    """They are named as what they are, with what to do."""
    with pytest.raises(DatasetError, match=expected.replace("(VIA)", r"\(VIA\)")) as error:
        read(convert(json.dumps(content).encode()))
    assert "file.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_byte_order_mark(content, read):
    """It is read."""
    _, records = read(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert objects(records) == plain(content)


@pytest.mark.parametrize(("name", "kind"), [("a.xml", "voc"), ("a.txt", "yolo"), ("a.jpg", None)])
def test_folder_instead_of_a_file(tmp_path, name, kind):
    """The command that imports it is named."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / name).touch()
    expected = f"`freeanchor import --from {kind} " if kind else "give the annotation file"
    with pytest.raises(DatasetError, match=expected):
        read_coco(str(tmp_path / "labels"), str(tmp_path))


# Names of images


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "..\\secret.png",
        "%2e%2e/secret.png",
        "out/../secret.png",  # lexically in the folder, but `out` is a link
        "/etc/secret.png",
        "link/../../images/../secret.png",
    ],
)
def test_no_name_leads_out_of_the_folder(content, read, tmp_path, name):
    """Whether by text or by a link: a report would show what the data set has smuggled in."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        Image.new("RGB", (64, 48)).save(folder / "secret.png")
    (read.root / "out").symlink_to(tmp_path / "elsewhere" / "deep")
    content["images"][1]["file_name"] = name
    with pytest.raises(
        DatasetError, match=r"`file_name` of image 2: .* leads out of the image fol"
    ):
        read(content)


def test_names_that_stay_in_the_folder(content, read, tmp_path):
    """An absolute one within it, and a folder or an image that is linked into it."""
    (read.root.parent / "more").mkdir()
    (read.root / "b.png").symlink_to(read.root / "sub" / "b.png")
    for name in (str(read.root / "sub" / "b.png"), "b.png"):
        content["images"][1]["file_name"] = name
        _, records = read(content)
        assert os.path.samefile(records[1]["file_name"], read.root / "sub" / "b.png")


def test_two_files_that_could_be_meant(content, read):
    """None is taken, so that the check of the images says that it is missing."""
    for name in ("x.Png", "x.pNG"):
        Image.new("RGB", (64, 48)).save(read.root / name, "PNG")
    content["images"][1]["file_name"] = "x.png"
    _, records = read(content)
    assert not os.path.exists(records[1]["file_name"])


def test_composed_and_decomposed_letters(content, read):
    """The file system of a Mac writes accents in another way than the file does."""
    Image.new("RGB", (64, 48)).save(read.root / "e\u0301.png")
    content["images"][1]["file_name"] = "\u00e9.png"
    file, records = read(content)
    assert os.path.isfile(records[1]["file_name"])
    assert "1 images are there by another name" in file.findings.lines()[0]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("a.xml", "voc"),
        ("Annotations/a.xml", "voc"),
        ("a.txt", "yolo"),
        ("labels/a.txt", "yolo"),
        ("labels/train/a.txt", "yolo"),
    ],
)
def test_folders_of_other_formats(tmp_path, file, kind):
    """Also the folder above: the message has the command that imports it."""
    root = tmp_path / "set"
    (root / file).parent.mkdir(parents=True)
    (root / file).write_text("")
    with pytest.raises(DatasetError, match=f"freeanchor import --from {kind} {root} OUT.json"):
        register_datasets([("set", str(root), str(tmp_path))])


def test_folder_of_no_format(tmp_path):
    """The file in it is asked for."""
    with pytest.raises(DatasetError, match="is a folder: give the annotation file in it"):
        register_datasets([("set", str(tmp_path), str(tmp_path))])
