"""The page of `freeanchor serve`, as a person uses it."""

import json
import time

import numpy as np
import pytest
import torch
from chromium import PATH, Chromium
from detectron2.structures import Boxes, Instances
from freeanchor.data import decode_mask
from test_serve import LIMITS, NOISE, Slow, encode, in_thread, send, serving

pytestmark = pytest.mark.skipif(PATH is None, reason="needs Chromium")
HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def port(predictor):
    with serving(predictor) as port:
        yield port


@pytest.fixture
def shown(browser, port, images, tmp_path):
    """The page with two pictures dropped, and a third file that is none."""
    browser.requests.clear()
    browser.problems.clear()
    browser.resize(1200, 900)
    browser.open(f"http://127.0.0.1:{port}/")
    for name, content in (
        (HOSTILE, encode(images[0])),
        ("b.png", encode(images[1])),
        ("c.png", encode(NOISE)[:-500]),
    ):
        (tmp_path / name).write_bytes(content)
    drop(browser, *(tmp_path / name for name in (HOSTILE, "b.png", "c.png")))
    browser.wait("document.getElementById('status').textContent.includes('done')")
    slide(browser, 0.05)  # the model is sure of nothing
    browser.wait("document.querySelectorAll('g.box').length > 50")
    yield browser
    own = f"http://127.0.0.1:{port}/"
    others = [x for x in browser.requests if not x.startswith((own, f"blob:{own}", "data:"))]
    assert others == []


def drop(browser, *paths):
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(p) for p in paths], nodeId=node)


def asked(browser):
    return [x for x in browser.requests if "/api/" in x]


def test_pictures_are_dropped(shown, predictor, images):
    """Each has its boxes, or says what is wrong with it; names are shown and not run."""
    captions = shown.run("[...document.querySelectorAll('figcaption b')].map((x) => x.textContent)")
    assert captions == [HOSTILE, "b.png"]
    errors = shown.run("document.getElementById('errors').textContent")
    assert errors.startswith("c.png: The picture cannot be read")
    drawn = shown.run("[...document.querySelectorAll('svg')].map((x) => x.children.length)")
    labels = shown.run(
        "[...document.querySelectorAll('svg')].map((x) => x.querySelectorAll('.label').length)"
    )
    expected = [len(x) for x in predictor([images[0], images[1]])]
    assert [a - b for a, b in zip(drawn, labels)] == expected


def test_names_say_nothing(browser, port, images, tmp_path):
    """A picture without a suffix is shown, and a text is told to be no picture."""
    browser.open(f"http://127.0.0.1:{port}/")
    (tmp_path / "picture").write_bytes(encode(images[0]))
    (tmp_path / "notes.txt").write_text("not a picture")
    drop(browser, tmp_path / "picture", tmp_path / "notes.txt")
    browser.wait("document.getElementById('status').textContent.includes('done')")
    errors = "[...document.querySelectorAll('#errors li')].map((x) => x.textContent)"
    assert browser.run(errors) == ["notes.txt: The file is no JPEG, PNG or WEBP picture"]
    assert browser.run("document.querySelectorAll('svg').length") == 1


def slide(browser, value):
    browser.run(
        f"(x => {{x.value = {value}; x.dispatchEvent(new Event('input'))}})"
        "(document.querySelector('input[type=range]'))"
    )


def test_score_and_classes_act_without_the_server(shown):
    """What is shown changes, and nothing is asked."""
    count = "document.querySelectorAll('g.box').length"
    before, everything = asked(shown), shown.run(count)
    shown.run("document.querySelectorAll('.classes input')[0].click()")
    shown.wait(f"{count} < {everything}")
    some = shown.run(count)
    assert some > 0
    slide(shown, 0.1)
    shown.wait(f"{count} < {some}")
    slide(shown, 1)
    shown.wait(f"{count} === 0")
    assert asked(shown) == before


def test_bag_on_click(shown):
    """The server is asked for the bag of the box, which is drawn."""
    shown.run("document.querySelector('svg').focus()")
    shown.press("ArrowRight", "Enter")
    shown.wait("document.querySelectorAll('.anchor').length >= 50")
    assert "its bag: 50 anchors" in shown.run("document.querySelector('.info').textContent")
    assert "/api/bag?x=" in asked(shown)[-1]


def test_download(shown, tmp_path):
    """What is shown, as COCO json."""
    shown.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    count = shown.run("document.querySelectorAll('g.box').length")
    shown.run("document.getElementById('download').click()")
    end = time.monotonic() + 20
    path = tmp_path / "detections.json"
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    content = json.loads(path.read_text())
    assert [x["file_name"] for x in content["images"]] == [HOSTILE, "b.png"]
    assert len(content["annotations"]) == count
    assert {x["image_id"] for x in content["annotations"]} == {1, 2}


def test_pictures_are_removed(shown):
    """And others can come."""
    shown.run("document.getElementById('clear').click()")
    assert shown.run("document.querySelectorAll('figure').length") == 0
    assert shown.run("document.getElementById('viewer').hidden")


@pytest.mark.parametrize("width", [390, 1200])
def test_phone_and_desktop(shown, width):
    """Nothing is wider than the window, and everything that can be used has a name."""
    shown.resize(width, 844)
    shown.wait(f"innerWidth === {width}")
    assert shown.run("document.documentElement.scrollWidth") <= width
    nodes = [n for n in shown.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    for role in ("slider", "checkbox", "button", "combobox", "listbox", "option"):
        named = [n for n in nodes if n["role"]["value"] == role]
        assert named, role
        assert all(n["name"]["value"].strip() for n in named), role


def test_token(browser, predictor):
    """It comes with the address, is not left there, and is asked for where it is missing."""
    with serving(predictor, token="0123456789abcdef") as port:
        address = f"http://127.0.0.1:{port}/"
        browser.open(address)
        browser.wait("!document.getElementById('ask-token').hidden")
        browser.run(
            "document.getElementById('token').value = '0123456789abcdef';"
            "document.querySelector('#ask-token button').click()"
        )
        browser.wait("document.getElementById('limits').textContent !== ''")
        browser.run("sessionStorage.clear()")
        browser.call("Page.navigate", url="about:blank")
        browser.call("Page.navigate", url=f"{address}#token=0123456789abcdef")
        browser.wait("document.getElementById('limits')?.textContent")
        assert browser.run("location.href") == address


def test_server_with_another_token(browser, predictor, images, tmp_path):
    """A server that was started again is asked anew, and the page is as it was at first."""
    with serving(predictor, token="0123456789abcdef") as port:
        address = f"http://127.0.0.1:{port}/"
        browser.open("about:blank")
        browser.call("Page.navigate", url=f"{address}#token=0123456789abcdef")
        browser.wait("document.getElementById('limits')?.textContent")
        browser.run("sessionStorage.setItem('token', 'of another run')")
        (tmp_path / "a.png").write_bytes(encode(images[0]))
        drop(browser, tmp_path / "a.png")
        browser.wait("!document.getElementById('ask-token').hidden")
        browser.run(
            "document.getElementById('token').value = '0123456789abcdef';"
            "document.querySelector('#ask-token button').click()"
        )
        browser.wait("document.getElementById('ask-token').hidden")
        drop(browser, tmp_path / "a.png")
        browser.wait("document.getElementById('status').textContent.includes('done')")
        assert browser.run("document.querySelectorAll('figure').length") == 1
        assert browser.run("document.querySelectorAll('#viewer input[type=range]').length") == 1


def test_busy_server(browser, tmp_path):
    """The page waits and asks again, as it is told, and the picture is not lost."""
    model = Slow()
    with serving(model, LIMITS._replace(max_queue=1)) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.getElementById('limits').textContent !== ''")
        (tmp_path / "a.png").write_bytes(encode(np.zeros((50, 50, 3), np.uint8)))
        # A picture of another client keeps the server busy.
        thread, _ = in_thread(send, port, encode(NOISE))
        assert model.is_called.wait(30)
        browser.requests.clear()
        drop(browser, tmp_path / "a.png")
        end = time.monotonic() + 20
        while len(asked(browser)) < 2:
            browser.run("0")
            assert time.monotonic() < end
            time.sleep(0.05)
        model.may_go_on.set()
        thread.join()
        browser.wait("document.getElementById('status').textContent.includes('done')")
        assert browser.run("document.getElementById('errors').textContent") == ""


class Masked(Slow):
    """A model that finds the same two masks in every picture."""

    cfg = Slow.cfg.clone()
    cfg.MODEL.MASK_ON = True

    def __call__(self, images):
        found = Instances(images[0].shape[:2])
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 20, 30], [10, 10, 40, 40]]))
        found.scores, found.pred_classes = torch.tensor([0.9, 0.6]), torch.tensor([0, 0])
        found.pred_masks = torch.zeros(2, *found.image_size, dtype=torch.bool)
        found.pred_masks[0, :30, :10] = found.pred_masks[1, 10:40, 20:40] = True
        return [found]


def test_masks(browser, tmp_path):
    """They are drawn with the boxes that are shown, and downloaded with them."""
    with serving(Masked()) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.getElementById('limits').textContent !== ''")
        (tmp_path / "a.png").write_bytes(encode(np.zeros((50, 80, 3), np.uint8)))
        drop(browser, tmp_path / "a.png")
        browser.wait("document.querySelectorAll('.mask').length === 2")
        slide(browser, 0.7)
        browser.wait("document.querySelectorAll('.mask').length === 1")
        browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.run("document.getElementById('download').click()")
        path, end = tmp_path / "detections.json", time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        (annotation,) = json.loads(path.read_text())["annotations"]
        expected = np.zeros((50, 80), bool)
        expected[:30, :10] = True
        assert (decode_mask(annotation["segmentation"], (80, 50)) == expected).all()
        assert annotation["area"] == 300
