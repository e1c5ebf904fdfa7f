"""Damaged COCO files: the right objects or one sentence, and never anything else.

`make test` runs 200 cases, always the same; FUZZ_CASES=2000 as many others.
"""

import copy
import json
import math
import os
import re

import hypothesis
import pytest
from freeanchor.data import read_coco
from freeanchor.errors import DatasetError
from hypothesis import strategies as st
from PIL import Image

NUM_CASES = int(os.environ.get("FUZZ_CASES", "0"))

VALID = {
    "images": [
        {"id": i, "file_name": f"{i}.png", "width": 64, "height": 48, "license": 1}
        for i in (1, 2, 3)
    ],
    "annotations": [
        {
            "id": i,
            "image_id": 1 + i % 3,
            "category_id": 1 + i % 2,
            "bbox": [3 * i, 2 * i, 10 + i, 9 + i],
            "area": 80.0 + i,
            "iscrowd": int(i == 5),
            "segmentation": [[1.0, 1.0, 2.0, 1.0, 2.0, 2.0]],
        }
        for i in range(1, 9)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(-5, 70),
    st.floats(),
    st.sampled_from(["", "0", "1", "007", "1.5", " 3 ", "x", "cat", "1,5", "nan", "../1.png", "é"]),
    st.sampled_from(["2.png", "2.PNG", "a\\2.png", "%32.png", "true", "\ud800", "\0", "1e3"]),
    st.text(max_size=4),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=5),
    st.dictionaries(st.sampled_from(["x", "id", "size"]), scalars, max_size=2),
)


@st.composite
def damaged(draw):
    """A valid file of which up to three values or keys are others, or gone, or twice."""
    content = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(["top", "entry", "key", "key", "key", "number", "twice"]))
        part = draw(st.sampled_from(["images", "annotations", "annotations", "categories"]))
        entries = content.get(part)
        if place == "top":
            if draw(st.booleans()):
                content.pop(part, None)
            else:
                content[part] = draw(values)
        elif not isinstance(entries, list) or not entries:
            continue
        elif place == "entry":
            entries[draw(st.integers(0, len(entries) - 1))] = draw(values)
        elif place == "twice":
            entries.append(copy.deepcopy(draw(st.sampled_from(entries))))
        else:
            entry = draw(st.sampled_from(entries))
            if not isinstance(entry, dict) or not entry:
                continue
            key = draw(st.sampled_from(sorted(entry)))
            if place == "number" and isinstance(entry.get("bbox"), list) and entry["bbox"]:
                entry["bbox"][draw(st.integers(0, len(entry["bbox"]) - 1))] = draw(scalars)
            elif draw(st.integers(0, 4)) == 0:
                del entry[key]
            else:
                entry[key] = draw(values)
    return content


# The reader as one would write it without a thought of speed: entry by entry, and every doubt
# is an error. It says of each valid-looking file which objects there are.


class RefusedError(Exception):
    """The file is to be refused."""


def number(value):
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
            return None
        return float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def identifier(value):
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        return None
    return value


def unique(entries):
    ids = [identifier(x.get("id")) for x in entries]
    if None in ids or len({str(x) for x in ids}) < len(ids):
        raise RefusedError
    return ids


def meant(value, ids):
    """The one id that is written so, or that is the same number."""
    value = identifier(value)
    if value is None:
        raise RefusedError

    def plain(x):
        text = x.strip() if isinstance(x, str) else str(x)
        return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) else x

    same = [x for x in ids if x == value and type(x) is type(value)]
    same = same or [x for x in ids if plain(x) == plain(value)]
    return same[0] if len(same) == 1 else None


def entries_of(content, part):
    entries = content.get(part)
    if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
        raise RefusedError
    return entries


def slow_reader(content):
    """{image id: [(class name, box, crowd)]}, or RefusedError."""
    images, categories = entries_of(content, "images"), entries_of(content, "categories")
    if not images or not categories:
        raise RefusedError
    image_ids, category_ids = unique(images), unique(categories)
    names = []
    for x in categories:
        name = x.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise RefusedError
        names.append(name)
    if len(set(names)) < len(names) or not all("id" in x for x in categories):
        raise RefusedError
    objects = {i: [] for i in image_ids}
    if content.get("annotations") is None:
        return None
    annotations = entries_of(content, "annotations")
    known = [identifier(x.get("id")) for x in annotations if x.get("id") is not None]
    if None in known or len({str(x) for x in known}) < len(known):
        raise RefusedError
    sizes = {i: size(x) for i, x in zip(image_ids, images)}
    left_out = of_images = 0
    for x in annotations:
        category, image = meant(x.get("category_id"), category_ids), x.get("image_id")
        if category is None:
            raise RefusedError
        image = meant(image, image_ids)
        if image is None:
            continue
        of_images += 1
        box = x.get("bbox")
        box = [number(v) for v in box] if isinstance(box, list) and len(box) == 4 else [None]
        if None in box or not usable(box, sizes[image]):
            left_out += 1
            continue
        crowd = any(flag(x.get(k)) for k in ("iscrowd", "ignore"))
        objects[image].append((names[category_ids.index(category)], box, crowd))
    if annotations and (not of_images or left_out > of_images / 2):
        raise RefusedError
    return objects


def flag(value):
    return (
        number(value) == 1
        or value is True
        or (isinstance(value, str) and value.strip().lower() == "true")
    )


def size(image):
    """That of the file, or else of the image."""
    sides = [number(image.get(k)) for k in ("width", "height")]
    is_known = all(x is not None and 1 <= x < 2**31 and x % 1 == 0 for x in sides)
    return sides if is_known else (64, 48)


def usable(box, size):
    x, y, w, h = box
    width, height = size
    if not all(map(math.isfinite, box)) or max(map(abs, box)) > 1e30 or w <= 0 or h <= 0:
        return False
    return (
        x < width
        and y < height
        and x + w > 0
        and y + h > 0
        and min(w, h) > 1e-5 * max(1, abs(x), abs(y))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "images").mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (64, 48)).save(root / "images" / f"{i}.png")
    return root


@hypothesis.given(content=damaged())
@hypothesis.settings(
    max_examples=NUM_CASES or 200,
    deadline=None,
    derandomize=not NUM_CASES,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_damaged_file(folder, content):
    """Never a traceback, never an object less, more or changed without a word."""
    path = folder / "file.json"
    path.write_text(json.dumps(content))
    content = json.loads(path.read_text())
    try:
        expected = slow_reader(content)
    except RefusedError:
        expected = RefusedError
    try:
        file = read_coco(str(path), str(folder / "images"))
    except DatasetError as e:
        message = str(e)
        assert "\n" not in message
        assert str(path) in message
        message.encode()
        if expected is not RefusedError:
            # Boxes that are no objects of these images, and files that are not there.
            assert re.search(
                r"file_name|cannot be read|same file|of the boxes leave|smaller than a pixel",
                message,
            )
        return
    assert expected is not RefusedError, "should have been refused"
    records = file.records(range(len(file.class_names)))
    for record in records:
        assert os.path.dirname(os.path.realpath(record["file_name"])) == os.path.realpath(
            folder / "images"
        )
    if expected is None:
        assert all("annotations" not in x for x in records)
        return
    found = {
        x["image_id"]: [
            (file.class_names[a["category_id"]], a["bbox"], bool(a["iscrowd"]))
            for a in x["annotations"]
        ]
        for x in records
    }
    assert found == expected
    assert all(a["area"] > 0 for x in records for a in x["annotations"])
    left_out = sum(len(x) for x in expected.values()) < len(content["annotations"])
    assert bool(left_out) == any("left out" in x for x in file.findings.lines())
