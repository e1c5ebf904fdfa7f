"""The viewer of pictures: what it computes, and what it is like to use."""

import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from chromium import PATH, Chromium
from conftest import random_image
from freeanchor.data import decode_mask, encode_mask
from freeanchor.evaluation import outcomes
from freeanchor.visualization import VIEWER, data_element, make_page, page, read_asset

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
needs_chromium = pytest.mark.skipif(PATH is None, reason="needs Chromium")


def in_node(expression, data):
    """The value of an expression of Boxes (assets/boxes.js) and `data`, computed by Node.js."""
    script = (
        read_asset("boxes.js")
        + "const data = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        + f"console.log(JSON.stringify({expression}));"
    )
    done = subprocess.run(
        ["node", "-e", script], input=json.dumps(data), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def boxes(rows):
    keys = ("x0", "y0", "x1", "y1", "label", "score", "crowd")
    return [dict(zip(keys, [*row, row[-1]])) for row in rows.tolist()]


@needs_node
def test_page_and_python_judge_alike():
    """Outcomes of random images are the same in the page, at each score and IoU."""
    rng = np.random.default_rng(2)
    images = [random_image(rng) for _ in range(60)]
    settings = [(score, iou) for score in (0, 0.5) for iou in (0.3, 0.5, 0.75)]
    data = [
        {"found": boxes(found), "truth": boxes(truth), "score": score, "iou": iou}
        for found, truth in images
        for score, iou in settings
    ]
    results = in_node("data.map((d) => Boxes.outcomes(d.found, d.truth, d.score, d.iou))", data)
    seen = set()
    for result, ((found, truth), (score, iou)) in zip(
        results, itertools.product(images, settings), strict=True
    ):
        kept = found[:, 5] >= score
        expected = outcomes(found[kept], truth, iou)
        found_kinds = [x["kind"] for x in result["found"]]
        assert found_kinds == expected.found + [None] * (~kept).sum()
        objects = [x["object"] for x in result["found"]][: kept.sum()]
        assert objects == [
            j if kind != "ignored" else objects[i]
            for i, (kind, j) in enumerate(zip(expected.found, expected.objects.tolist()))
        ]
        assert result["truth"] == expected.truth
        seen.update(expected.found)
    assert seen == {"hit", "duplicate", "wrong class", "poor box", "background", "ignored"}


@needs_node
def test_labels_do_not_hide_each_other():
    """Nor leave the picture; of many, those that come first have a place, and most of few."""
    rng = np.random.default_rng(3)
    data = []
    for count, size in ((1, 40), (6, 300), (60, 500), (300, 900)):
        start = rng.uniform(0, 0.8 * size, (count, 2))
        ends = np.minimum(start + rng.uniform(5, 0.4 * size, (count, 2)), size)
        rows = np.concatenate([start, ends], axis=1).tolist()
        labels = [
            {"x0": a, "y0": b, "x1": c, "y1": d, "w": float(rng.uniform(20, 90)), "h": 15}
            for a, b, c, d in rows
        ]
        data.append({"labels": labels, "size": size})
    places = in_node("data.map((d) => Boxes.placeLabels(d.labels, d.size, d.size))", data)
    for picture, placed in zip(data, places, strict=True):
        rects = [
            (p["x"], p["y"], p["x"] + x["w"], p["y"] + x["h"])
            for x, p in zip(picture["labels"], placed)
            if p
        ]
        for x0, y0, x1, y1 in rects:
            assert min(x0, y0) >= -1e-9
            assert max(x1, y1) <= picture["size"] + 1e-9
        for a, b in itertools.combinations(rects, 2):
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
        covered = sum((c - a) * (d - b) for a, b, c, d in rects)
        assert covered <= 0.2 * picture["size"] ** 2
    assert all(places[1])
    assert places[2][0]
    assert places[3][0]


@needs_node
def test_boxes_as_coco_json():
    """What is downloaded can be read as annotations in COCO format."""
    image = {"name": "ü <b>.png", "width": 9, "height": 8, "src": "x"}
    box = {"x0": 1, "y0": 2, "x1": 4.126, "y1": 7, "label": 1, "score": 0.5}
    data = {
        "classes": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}],
        "images": [{**image, "boxes": []}, {**image, "boxes": [box]}],
    }
    annotation = {"id": 1, "image_id": 2, "category_id": 9, "iscrowd": 0, "score": 0.5}
    size = {"file_name": "ü <b>.png", "width": 9, "height": 8}
    assert in_node("Boxes.toCoco(data.classes, data.images)", data) == {
        "images": [{"id": 1, **size}, {"id": 2, **size}],
        "categories": data["classes"],
        "annotations": [{**annotation, "bbox": [1, 2, 3.13, 5], "area": 15.63}],
    }


@needs_node
def test_masks_in_the_page():
    """Their pixels are those of the mask, and the areas and encodings of the json are COCO's."""
    rng = np.random.default_rng(0)
    masks = [rng.random((37, 23)) < share for share in (0, 0.02, 0.5, 0.98, 1)]
    big = np.zeros((900, 1300), bool)
    big[300:, 200:900] = big[10, 1299] = True
    masks += [big, ~big]
    encoded = [encode_mask(x) for x in masks]
    paths = in_node("data.map(Boxes.maskPath)", encoded)
    for mask, path in zip(masks, paths, strict=True):
        found = np.zeros_like(mask)
        for x, y, n in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path):
            column = found[int(y) : int(y) + int(n), int(x)]
            assert len(column) == int(n)  # within the mask
            assert not column.any()
            column[:] = True
        assert (found == mask).all()
    boxes = [{"x0": 0, "y0": 0, "x1": 9, "y1": 9, "label": 0, "score": 1, "mask": encoded[2]}]
    data = {"classes": [{"id": 1, "name": "a"}], "images": [{"name": "a", "boxes": boxes}]}
    (annotation,) = in_node("Boxes.toCoco(data.classes, data.images)", data)["annotations"]
    assert annotation["segmentation"] == encoded[2]
    assert annotation["area"] == masks[2].sum()


def test_masks_fit():
    """Coarser where they are many, at the same place; as they are where they are few."""
    masks = []
    for x, y in np.random.default_rng(1).integers(0, 400, (60, 2)):
        ys, xs = np.ogrid[:450, :600]
        masks.append((xs - x) ** 2 + (ys - y) ** 2 < 80**2)
    encoded = [None, *map(encode_mask, masks)]
    assert page.fit_masks(encoded, (600, 450), 1_000_000) == encoded
    for limit in (20_000, 7_000):
        fitted = page.fit_masks(encoded, (600, 450), limit)
        assert limit / 4 < len(data_element("", fitted)) <= limit
        assert fitted[0] is None
        for mask, other in zip(masks, fitted[1:], strict=True):
            rows, columns = other["size"]
            assert rows / columns == pytest.approx(450 / 600, rel=0.02)
            small = decode_mask(other, (columns, rows))
            large = np.repeat(np.repeat(small, 450 // rows + 1, 0), 600 // columns + 1, 1)
            ys, xs = (np.arange(n) * m // n for n, m in zip((450, 600), large.shape))
            both = large[ys[:, None], xs]
            assert (both & mask).sum() / (both | mask).sum() > 0.85


def test_pictures_fit():
    """The address of a picture is as long as allowed, whatever the picture; small ones stay."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 1300, 3), dtype=np.uint8)
    for limit in (60_000, 300_000):
        assert limit / 4 < len(page.encode_picture(noise, limit)) <= limit
    assert len(page.encode_picture(noise, 10)) < 150_000
    assert page.encode_picture(noise[:8, :8], 10_000).startswith("data:image/jpeg;base64,")


def test_data_cannot_leave_its_element():
    """Names of classes and files come from elsewhere."""
    data = {"name": "</script><script>alert(1)</script><!--"}
    element = data_element("x", data)
    start, end = element.index(">") + 1, element.rindex("<")
    assert "<" not in element[start:end]
    assert json.loads(element[start:end]) == data


# At half the size of its picture, where it is from 20, 20 to 40, 60.
_PIXELS = np.zeros((50, 100), bool)
_PIXELS[10:30, 10:20] = True
MASK = encode_mask(_PIXELS)
HOSTILE = "<img src=x onerror=alert(1)> $x_ 細胞"


@pytest.fixture(scope="module")
def browser():
    if PATH is None:
        pytest.skip("needs Chromium")
    with Chromium() as browser:
        yield browser


@pytest.fixture
def shown(browser, tmp_path):
    """A page with three pictures: hits, misses and false positives, and bags that it hands out."""
    source = page.encode_picture(np.full((100, 200, 3), 128, np.uint8), 100_000)
    truth = [[10, 10, 60, 60, 0, 0], [120, 20, 180, 80, 1, 0]]
    images = [
        {"name": name, "width": 200, "height": 100, "src": source, "truth": truth, "found": [found]}
        for name, found in (
            ("all.jpg", [[10, 10, 60, 60, 0, 0.9, MASK], [120, 20, 180, 80, 1, 0.8]]),
            (HOSTILE, [[10, 10, 60, 60, 1, 0.9], [120, 20, 180, 70, 1, 0.4]]),
            ("none.jpg", []),
        )
    ]
    classes = [{"id": 1, "name": "cell"}, {"id": 2, "name": HOSTILE}]
    data = {"classes": classes, "runs": ["run"], "images": images}
    script = (
        "const data = JSON.parse(document.getElementById('data').textContent);"
        "const bag = async (image, run, box) => (window.asked = [image.name, run, box]) &&"
        " ({anchors: [[5, 5, 50, 50, 0.2], [9, 9, 60, 60, 0.4]], assigned: [[9, 9, 60, 60, 0.7]]});"
        "const viewer = new Viewer(document.querySelector('div'), data,"
        " {hasTruth: true, hasMasks: true, bag, canDraw: true});"
    )
    text = make_page(
        HOSTILE,
        "<div></div>" + data_element("data", data),
        [read_asset("viewer.css")],
        [*(read_asset(name) for name in VIEWER), script],
    )
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    browser.requests.clear()
    browser.problems.clear()
    browser.resize(1200, 900)
    browser.open(path.as_uri())
    browser.wait("document.querySelectorAll('g.box').length === 7")
    yield browser
    assert browser.problems == []
    assert [x for x in browser.requests if not x.startswith("data:")] == [path.as_uri()]


def slide(browser, name, value):
    browser.run(
        f"(() => {{const x = document.querySelector('input[aria-label=\"{name}\"]');"
        f"x.value = {value}; x.dispatchEvent(new Event('input'))}})()"
    )


def counts(browser):
    """The boxes of each kind that are drawn."""
    browser.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    kinds = browser.run("[...document.querySelectorAll('g.box')].map((g) => g.classList[1])")
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def test_sliders_and_filters_act_at_once(shown):
    """Without asking the network; what a name holds is shown and not run."""
    assert counts(shown) == {"false": 1, "hit": 2, "miss": 4}
    slide(shown, "Score", 0.3)  # one more is found
    assert counts(shown) == {"false": 1, "hit": 3, "miss": 3}
    slide(shown, "IoU of a hit", 0.9)  # and is too coarse now
    assert counts(shown) == {"false": 2, "hit": 2, "miss": 4}
    slide(shown, "Score", 0.95)
    assert counts(shown) == {"miss": 6}
    shown.run("document.querySelector('.classes input').click()")
    assert counts(shown) == {"miss": 3}
    names = shown.run("[...document.querySelectorAll('figcaption b')].map((x) => x.textContent)")
    assert sorted(names) == sorted(["all.jpg", HOSTILE, "none.jpg"])


def test_masks(shown):
    """They lie on their pixels in whatever size the picture is shown, and can be left out."""
    place = "(r => [r.x, r.y, r.width, r.height])(document.querySelector('{}').{})"
    path, picture = (
        shown.run(place.format(f"figure:has(.mask) {x}", "getBoundingClientRect()"))
        for x in (".mask", "svg")
    )
    scale = picture[2] / 200
    expected = [picture[0] + 20 * scale, picture[1] + 20 * scale, 20 * scale, 40 * scale]
    assert path == pytest.approx(expected, abs=1)
    colors = "[...document.querySelectorAll('{}')].map((x) => getComputedStyle(x).{})"
    assert shown.run(colors.format(".mask", "fill")) == ["rgb(53, 194, 255)"]  # of hits
    shown.run(
        "(() => {for (const x of document.querySelectorAll('.check'))"
        " if (x.textContent.includes('masks')) x.querySelector('input').click()})()"
    )
    shown.wait("document.querySelectorAll('.mask').length === 0")


def test_order_of_pictures(shown):
    """The worst first, or by a kind of error."""
    order = "[...document.querySelectorAll('figcaption b')].map((x) => x.textContent)"
    assert shown.run(order)[-1] == "all.jpg"
    shown.run("viewer.sort('wrong class')")
    assert shown.run(order)[0] == HOSTILE
    shown.run("viewer.sort('miss')")
    assert shown.run(order)[-1] == "all.jpg"


def test_keyboard(shown):
    """Arrows go from box to box, Enter shows the bag, Escape goes back; a box can be drawn."""
    shown.run("(x => x.focus())([...document.querySelectorAll('svg')].pop())")
    active = "document.activeElement.querySelector('.active')?.getAttribute('aria-label')"
    shown.press("ArrowRight")
    first = shown.run(active)
    shown.press("ArrowRight")
    assert {first, shown.run(active)} == {f"{HOSTILE}, score 80 %, hit", "cell, score 90 %, hit"}
    pointer = "document.activeElement.getAttribute('aria-activedescendant')"
    assert shown.run(f"document.getElementById({pointer}).getAttribute('aria-label') === {active}")
    shown.press("Enter")
    shown.wait("document.querySelectorAll('.anchor').length === 3")
    status = "document.activeElement.closest('figure').querySelector('.info').textContent"
    assert "2 anchors, the best (thick) with P = 0.40" in shown.run(status)
    assert "gives it 1 anchor (dashed)" in shown.run(status)
    shown.press("Escape")
    assert shown.run("document.querySelectorAll('.anchor').length") == 0
    shown.press("b", "ArrowRight")
    shown.press("ArrowDown", modifiers=8)  # shift
    shown.press("Enter")
    shown.wait("document.querySelectorAll('.anchor').length === 3")
    box = shown.run("window.asked[2]")
    assert [box[k] for k in ("x0", "y0", "x1", "y1", "label")] == [54, 25, 104, 52, 0]


def begin_drawing(browser):
    browser.run(
        "(() => {for (const x of document.querySelectorAll('.check'))"
        " if (x.textContent.includes('draw')) x.querySelector('input').click()})()"
    )


def test_drawing_with_the_mouse(shown):
    """A box that is drawn is asked about in pixels of the image, whatever its size in the page."""
    begin_drawing(shown)
    rect = shown.run(
        "(r => [r.x, r.y, r.width])(document.querySelector('svg').getBoundingClientRect())"
    )
    x, y, scale = rect[0], rect[1], rect[2] / 200
    corners = [(150, 80), (90, 60), (100, 20)]
    shown.mouse(*((x + u * scale, y + v * scale) for u, v in corners))
    shown.wait("document.querySelectorAll('.anchor').length === 3")
    box = shown.run("window.asked[2]")
    assert [box[k] for k in ("x0", "y0", "x1", "y1")] == pytest.approx([100, 20, 150, 80], abs=1)


def test_drawing_that_is_interrupted(shown):
    """A touch that the system takes away, or a second finger, leaves nothing behind."""
    begin_drawing(shown)
    shown.run(
        "document.querySelector('svg').setPointerCapture = () => {};"  # of pointers that are none
        "window.point = (type, x, isPrimary = true) => document.querySelector('svg').dispatchEvent("
        "new PointerEvent(type, {clientX: x, clientY: x, isPrimary, bubbles: true}))"
    )
    drafts = "document.querySelectorAll('.draft').length"
    shown.run("point('pointerdown', 60); point('pointerdown', 90, false); point('pointermove', 80)")
    assert shown.run(drafts) == 1
    shown.run("point('pointercancel', 80); point('pointermove', 100)")
    assert shown.run(drafts) == 0
    shown.run("point('pointerup', 100)")
    assert shown.run("window.asked") is None


@pytest.mark.parametrize("width", [390, 1200])
def test_phone_and_desktop(shown, width):
    """Nothing is wider than the window, and everything that can be used has a name."""
    shown.resize(width, 844)
    shown.wait(f"innerWidth === {width}")
    assert shown.run("document.documentElement.scrollWidth") <= width
    widths = shown.run("[...document.querySelectorAll('svg')].map((x) => x.clientWidth)")
    assert min(widths) > 300
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    roles = [n["role"]["value"] for n in nodes if not n["ignored"]]
    for role in ("slider", "checkbox", "button", "combobox", "listbox", "option"):
        named = [n for n in nodes if not n["ignored"] and n["role"]["value"] == role]
        assert named, roles
        assert all(n["name"]["value"].strip() for n in named), role
