"""The JSON API of `freeanchor serve`: right answers, and what is refused."""

import asyncio
import contextlib
import io
import json
import pickle
import socket
import struct
import sys
import threading
import time
import zlib

import cv2
import numpy as np
import pytest
import torch
import uvicorn
from conftest import quick_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from freeanchor.__main__ import main
from freeanchor.checkpoint import Thresholds, write_checkpoint
from freeanchor.deploy import Predictor
from freeanchor.deploy.answers import find_bag
from freeanchor.deploy.app import make_app
from freeanchor.deploy.serve import choose_token, serve
from freeanchor.deploy.uploads import Gate, Limits, RefusedError
from freeanchor.errors import FreeAnchorError
from freeanchor.modeling import match_inputs
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serve_load import ask, load

LIMITS = Limits(max_bytes=300_000, max_pixels=1_000_000, rate=0, upload_seconds=1)
PNG = {"Content-Type": "image/png"}


@contextlib.contextmanager
def serving(predictor, limits=LIMITS, token="", is_ending=lambda: False):
    """A server in a thread; its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as bound:
        app = make_app(predictor, 0.5, limits, token, is_ending)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port(predictor):
    with serving(predictor) as port:
        yield port


def encode(pixels, kind="PNG", **options):
    content = io.BytesIO()
    Image.fromarray(pixels[:, :, ::-1]).save(content, kind, **options)
    return content.getvalue()


def send(port, body, path="/api/detect", headers=PNG):
    status, headers, content = ask(port, "POST", path, body, headers)
    return status, json.loads(content), headers


class Slow:
    """A model that takes its time: until it is told to go on."""

    model, class_names, confidence, cfg = None, ("a",), 0.05, quick_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"

    def __init__(self):
        self.is_called, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, images):
        self.is_called.set()
        assert self.may_go_on.wait(30)
        found = Instances(images[0].shape[:2])
        found.pred_boxes, found.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        found.pred_classes = torch.zeros(0, dtype=torch.int64)
        return [found]


def test_detections_are_the_predictors(port, predictor, images):
    """Boxes in COCO's form, in pixels of the picture, also of JPEG, WebP, grey and turned ones."""
    for pixels in images:
        (expected,) = predictor([pixels])
        assert len(expected) > 0
        status, answer, _ = send(port, encode(pixels))
        assert status == 200
        assert (answer["height"], answer["width"]) == pixels.shape[:2]
        boxes = expected.pred_boxes.tensor.numpy()
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        found = answer["detections"]
        np.testing.assert_allclose([d["bbox"] for d in found], boxes, atol=0.02)
        np.testing.assert_allclose([d["score"] for d in found], expected.scores, atol=1e-4)
        assert [d["category_id"] - 1 for d in found] == expected.pred_classes.tolist()
        webp = encode(pixels, "WEBP", lossless=True)
        assert send(port, webp, headers={"Content-Type": "image/webp"})[1] == answer
        turned = Image.Exif()
        turned[274] = 6  # stored on its side
        sideways = np.ascontiguousarray(np.rot90(pixels))
        assert send(port, encode(sideways, exif=turned))[1] == answer


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "LA", "1"])
def test_modes_of_pictures(port, predictor, images, tmp_path, mode):
    """Grey, deep, with a palette or transparent: as the predictor reads the file."""
    if mode == "I;16":
        picture = Image.fromarray(images[0].astype(np.uint16)[:, :, 0] * 257)
    else:
        picture = Image.fromarray(images[0][:, :, ::-1]).convert(mode)
    picture.save(tmp_path / "a.png")
    (expected,) = predictor([tmp_path / "a.png"])
    status, answer, _ = send(port, (tmp_path / "a.png").read_bytes())
    assert status == 200
    scores = [d["score"] for d in answer["detections"]]
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)


def test_bag_is_the_models(port, predictor):
    """Of a box in pixels of the picture, which the model sees at another size."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (192, 128))  # twice the size
    query = "x=40&y=30&width=60&height=50&category_id=2"
    status, answer, _ = send(port, encode(pixels), f"/api/bag?{query}")
    assert status == 200
    inputs = predictor.to_input(pixels)
    instances = Instances(tuple(inputs["image"].shape[1:]))
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 15.0, 50.0, 40.0]]))
    instances.gt_classes = torch.tensor([1])
    (expected,) = match_inputs(predictor.model, [{**inputs, "instances": instances}])
    for rows, anchors, values, name in (
        (answer["bag"], expected.anchors[0], expected.prob[0], "prob"),
        (answer["assigned"], expected.assigned[0], expected.assigned_iou[0], "iou"),
    ):
        corners = 2 * anchors.numpy()
        corners[:, 2:] -= corners[:, :2]
        np.testing.assert_allclose([r["bbox"] for r in rows], corners, atol=0.1)
        np.testing.assert_allclose([r[name] for r in rows], values, rtol=0.01)
    assert len(answer["bag"]) == 50


def test_bag_of_a_model_that_was_trained_on_crops(cfg, tmp_path):
    """A picture here is whole, so INPUT.CROP of its training does not matter."""
    cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS, cfg.INPUT.MIN_SIZE_TEST = True, 128
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    write_checkpoint(cfg.MODEL.WEIGHTS, build_model(cfg).state_dict(), {})
    bags = []
    for cfg.INPUT.CROP.ENABLED in (False, True):
        predictor = Predictor(cfg, device="cpu")
        bags.append(find_bag(predictor, np.zeros((64, 64, 3), np.uint8), (5, 5, 20, 20), 0))
    assert bags[0] == bags[1]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("x=1&y=1&width=9&height=9", "category_id: field required"),
        ("x=1&y=1&width=9&height=9&category_id=4", "category_id: input should be less than"),
        ("x=1&y=1&width=9&height=nan&category_id=1", "height: input should be"),
        ("x=1&y=1&width=inf&height=9&category_id=1", "width: input should be"),
        ("x=1&y=1&width=0&height=9&category_id=1", "width: input should be greater"),
        ("x=60&y=1&width=90&height=9&category_id=1", "The box is not inside the picture of 96 x"),
        ("x=-1e300&y=1&width=9&height=9&category_id=1", "The box is not inside"),
        ("x=../../etc&y=1&width=9&height=9&category_id=1", "x: input should be a valid number"),
    ],
)
def test_boxes_that_are_none(port, images, query, message):
    """Each is named, in one sentence."""
    status, answer, _ = send(port, encode(images[0]), f"/api/bag?{query}")
    assert status == 422
    assert answer["error"].startswith(message)


def chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def a_png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


NOISE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
ZEROS = zlib.compress(bytes(100_000_000))
HOSTILE = {
    "nothing": (b"", 400),
    "text": (b"hello", 415),
    "script": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415),
    "pickle": (pickle.dumps({"a": 1}), 415),
    "another format": (encode(NOISE, "GIF"), 415),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", 415),
    "cut jpeg": (encode(NOISE, "JPEG")[:-500], 422),
    "cut png": (encode(NOISE)[:-500], 422),
    "cut webp": (encode(NOISE, "WEBP")[:-500], 422),
    "header alone": (a_png(60, 60), 422),
    "damaged": (encode(NOISE).replace(b"IDAT", b"IDAX"), 415),
    "1.1 million pixels": (a_png(1100, 1001), 413),
    "10^9 pixels": (a_png(31623, 31623, chunk(b"IDAT", ZEROS)), 413),
    "10^19 pixels": (a_png(2**31 - 1, 2**31 - 1), 413),
    "bomb in a text": (a_png(60, 60, chunk(b"zTXt", b"a\0\0" + ZEROS)), 422),
    "more bytes": (encode(NOISE) + bytes(LIMITS.max_bytes), 413),
    "slender": (encode(np.zeros((1, 5000, 3), np.uint8)), 422),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads(port, name):
    """Each is refused in one sentence, soon, and the next picture is served."""
    body, expected = HOSTILE[name]
    start = time.process_time()
    status, answer, _ = send(port, body)
    assert time.process_time() - start < 5
    assert (status, list(answer)) == (expected, ["error"])
    assert 10 < len(answer["error"]) < 200
    assert "Traceback" not in answer["error"]
    assert send(port, encode(NOISE))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("GET", "/api/detect", {}, 405),
        ("GET", "/../../../etc/passwd", {}, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, 404),
        ("POST", "/api/detect/..%2f..%2fx.png", PNG, 404),
        ("GET", "/docs", {}, 404),
        # What a page of another site could send without asking.
        ("POST", "/api/detect", {"Content-Type": "text/plain"}, 415),
        ("POST", "/api/detect", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("POST", "/api/detect", {}, 415),
        ("OPTIONS", "/api/detect", {"Origin": "http://evil.example"}, 405),
        # By a name that leads here.
        ("GET", "/api/model", {"Host": "evil.example"}, 403),
        ("GET", "/metrics", {"Host": "localhost.evil.example:80"}, 403),
        ("GET", "/metrics", {"Host": "localhost:80"}, 200),
    ],
)
def test_other_requests(port, method, path, headers, expected):
    """Neither files nor other sites get anywhere."""
    status, answered, _ = ask(port, method, path, encode(NOISE) if headers else None, headers)
    assert status == expected
    assert "Access-Control-Allow-Origin" not in answered


def test_head(port):
    """It is answered as GET, without the body."""
    for path in ("/", "/health"):
        status, headers, body = ask(port, "HEAD", path)
        assert (status, body) == (200, b"")
        assert headers["Content-Type"] == ask(port, "GET", path)[1]["Content-Type"]


def test_token(predictor):
    """Without it there is nothing but the page and its health, which hold nothing."""
    with serving(predictor, token="0123456789abcdef") as port:
        for path, free in (("/", True), ("/health", True), ("/metrics", False)):
            assert ask(port, "GET", path)[0] == (200 if free else 401)
        for given in ("", "Bearer ", "Bearer 0123456789abcdeg", "Basic x", "Bearer \xff"):
            status, answer, _ = send(port, encode(NOISE), headers={**PNG, "Authorization": given})
            assert status == 401
            assert "token" in answer["error"]
        good = {"Authorization": "Bearer 0123456789abcdef", "Host": "by.name"}
        assert send(port, encode(NOISE), headers={**PNG, **good})[0] == 200
        assert b"0123456789abcdef" not in ask(port, "GET", "/")[2]


def test_token_where_others_could_come(monkeypatch):
    """None on this machine, a random one elsewhere, the user's where it is long enough."""
    monkeypatch.delenv("FREEANCHOR_TOKEN", raising=False)
    assert [choose_token(x) for x in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [""] * 4
    others = [choose_token(x) for x in ("0.0.0.0", "::", "192.168.1.2", "my.name", "0.0.0.0")]
    assert len(set(others)) == 5
    assert min(map(len, others)) >= 32
    monkeypatch.setenv("FREEANCHOR_TOKEN", "0123456789abcdef")
    assert [choose_token(x) for x in ("127.0.0.1", "0.0.0.0")] == ["0123456789abcdef"] * 2
    monkeypatch.setenv("FREEANCHOR_TOKEN", "short")
    with pytest.raises(FreeAnchorError, match="FREEANCHOR_TOKEN needs 16 characters"):
        choose_token("127.0.0.1")


def test_rate(predictor):
    """More than the burst is refused with the time to wait, after which it is served."""
    with serving(predictor, LIMITS._replace(rate=60)) as port:
        seen = [send(port, b"no picture") for _ in range(13)]
        statuses = [status for status, _, _ in seen]
        assert statuses[:10] == [415] * 10
        assert 429 in statuses
        _, answer, headers = next(x for x in seen if x[0] == 429)
        assert "60 pictures per minute" in answer["error"]
        assert headers["Retry-After"] == "1"
        time.sleep(1.1)
        assert send(port, b"no picture")[0] == 415


def test_rates_of_addresses():
    """One does not take from another, and not all addresses of the world are remembered."""

    async def check():
        gate = Gate(Limits(rate=6))
        for i in range(20_000):
            gate.check_rate(f"address {i}")
        assert len(gate._tokens) <= 10_000
        with pytest.raises(RefusedError):
            gate.check_rate("address 19999")
        gate.check_rate("another")

    asyncio.run(check())


def in_thread(function, *args):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    return thread, results


def test_full_queue():
    """Who comes then is sent away at once with a time; who is in it is served."""
    model = Slow()
    with serving(model, LIMITS._replace(max_queue=2)) as port:
        threads = []
        for n in (1, 2):
            threads.append(in_thread(send, port, encode(NOISE)))
            while json.loads(ask(port, "GET", "/health")[2])["queue"] < n:
                time.sleep(0.01)
        assert model.is_called.wait(30)
        status, answer, headers = send(port, encode(NOISE))
        assert status == 503
        assert "2 pictures are waiting" in answer["error"]
        assert 1 <= int(headers["Retry-After"]) <= 60
        model.may_go_on.set()
        for thread, results in threads:
            thread.join()
            assert results[0][0] == 200
        assert send(port, encode(NOISE))[0] == 200


def test_end_while_pictures_wait():
    """The one that is computed is answered; who waits is sent away in the words of the API."""
    model, ending = Slow(), threading.Event()
    with serving(model, is_ending=ending.is_set) as port:
        first, results = in_thread(send, port, encode(NOISE))
        assert model.is_called.wait(30)
        second, others = in_thread(send, port, encode(NOISE))
        while json.loads(ask(port, "GET", "/health")[2])["queue"] < 2:
            time.sleep(0.01)
        ending.set()
        model.may_go_on.set()
        first.join()
        second.join()
        assert results[0][0] == 200
        status, answer, headers = others[0]
        assert status == 503
        assert answer == {"error": "The server is being shut down"}
        assert int(headers["Retry-After"]) >= 1


def test_interrupted(predictor, monkeypatch):
    """Ctrl-C ends the command, as it says, and not with a traceback."""

    def run(server, sockets):
        server.should_exit = True
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    has_ended = False
    with contextlib.suppress(KeyboardInterrupt):  # it would end the tests
        serve(lambda: predictor, 0.5, "127.0.0.1", 0, LIMITS)
        has_ended = True
    assert has_ended


def test_description(port):
    """/openapi.json says what is to be sent, and how refusals look."""
    api = json.loads(ask(port, "GET", "/openapi.json")[2])
    for path in ("/api/detect", "/api/bag"):
        operation = api["paths"][path]["post"]
        body = operation["requestBody"]
        assert body["required"]
        assert [*body["content"]] == ["image/jpeg", "image/png", "image/webp"]
        assert operation["responses"].keys() == {"200", "default"}
        refused = operation["responses"]["default"]["content"]["application/json"]["schema"]
        status, answer, _ = send(port, b"", path)
        assert status >= 400
        assert [*answer] == refused["required"]


def test_client_that_leaves():
    """What it waited for is not computed, and the next one is served."""
    model = Slow()
    with serving(model) as port:
        first, results = in_thread(send, port, encode(NOISE))
        assert model.is_called.wait(30)
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            body = encode(NOISE)
            head = f"POST /api/detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            leaving.sendall(f"{head}\r\nContent-Type: image/png\r\n\r\n".encode() + body)
            while json.loads(ask(port, "GET", "/health")[2])["queue"] < 2:
                time.sleep(0.01)
        model.may_go_on.set()
        first.join()
        assert results[0][0] == 200
        assert send(port, encode(NOISE))[0] == 200
        text = ask(port, "GET", "/metrics")[2].decode()
        assert 'freeanchor_refused_total{reason="left"} 1.0' in text
        assert 'freeanchor_seconds_count{step="work"} 2.0' in text


def test_slow_upload(port):
    """It does not keep its place."""
    with socket.create_connection(("127.0.0.1", port)) as slow:
        head = "POST /api/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png"
        slow.sendall(f"{head}\r\nContent-Length: 1000\r\n\r\nabc".encode())
        slow.settimeout(20)
        answer = slow.recv(10_000)
    assert b"408" in answer.split(b"\r\n")[0]
    assert json.loads(ask(port, "GET", "/health")[2]) == {"status": "ok", "queue": 0}


def test_failure_inside(caplog):
    """The client learns nothing of it but that it is, the log everything; it goes on."""

    class Broken(Slow):
        def __call__(self, images):
            raise ZeroDivisionError("a secret")

    with serving(Broken()) as port:
        for _ in range(2):
            status, answer, _ = send(port, encode(NOISE))
            assert (status, list(answer)) == (500, ["error"])
            assert "secret" not in answer["error"]
        assert json.loads(ask(port, "GET", "/health")[2])["queue"] == 0
    assert "a secret" in caplog.text


def test_model_without_bags():
    """It says so, and what it detects."""
    with serving(Slow()) as port:
        model = json.loads(ask(port, "GET", "/api/model")[2])
        assert not model["bags"]
        assert model["categories"] == [{"id": 1, "name": "a"}]
        query = "x=1&y=1&width=9&height=9&category_id=1"
        status, answer, _ = send(port, encode(NOISE), f"/api/bag?{query}")
        assert (status, answer["error"]) == (404, "The model is a RetinaNet, which has no bags")


@pytest.mark.parametrize(("image_format", "is_refused"), [("RGBA", True), ("L", False)])
def test_formats(image_format, is_refused):
    """A model that sees transparency, say, which no picture of the page has, is refused."""
    predictor = Slow()
    predictor.cfg = predictor.cfg.clone()
    predictor.cfg.INPUT.FORMAT = image_format
    refused = pytest.raises(FreeAnchorError, match="RGBA")
    with refused if is_refused else contextlib.nullcontext():
        make_app(predictor, 0.5, LIMITS)


def test_metrics(port):
    """Prometheus can read them, and they count."""

    def read():
        text = ask(port, "GET", "/metrics")[2].decode()
        return {
            (s.name, *s.labels.values()): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    before = read()
    found = send(port, encode(NOISE))[1]["detections"]
    send(port, b"no picture")
    after = read()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("freeanchor_requests_total", "/api/detect", "200") == 1
    assert grown("freeanchor_requests_total", "/api/detect", "415") == 1
    assert grown("freeanchor_refused_total", "type") == 1
    assert grown("freeanchor_detections_total") == len(found)
    assert grown("freeanchor_seconds_count", "work") == 1
    assert after["freeanchor_queue",] == 0


def test_load(port):
    """Fifty clients at once: nothing lost, nothing mixed up. See serve_load.py for more."""
    answers, repeated, _, _ = load(port, clients=50, requests=2)
    assert answers == 100
    assert repeated > 0  # the queue has 16 places


def test_first_score(predictor, monkeypatch, capsys):
    """Where the slider begins, and why, is printed and what the page is told."""
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda server, sockets: apps.append(server.config.app)
    )
    known = Thresholds("cells", 0.43, {})
    for given, recommended, expected, why in (
        (None, None, 0.5, "the default, as no thresholds.json is of these weights"),
        (None, known, 0.43, "with the best F1 on cells (thresholds.json)"),
        (0.2, known, 0.2, "as given"),
    ):
        apps = []
        monkeypatch.setattr(predictor, "recommended", recommended)
        serve(lambda: predictor, given, "127.0.0.1", 0, LIMITS)
        first = capsys.readouterr().out.splitlines()[0]
        assert first == f"The slider of the scores begins at {expected:g}, {why}"
        (app,) = apps
        (route,) = [x for x in app.routes if x.path == "/api/model"]
        assert asyncio.run(route.endpoint())["score"] == expected


@pytest.mark.parametrize(
    ("given", "least"), [([], 0.05), (["--confidence", "0"], 0), (["--confidence", "0.3"], 0.05)]
)
def test_least_score(run_folder, monkeypatch, given, least):
    """There are detections from where the slider begins."""
    apps = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda server, sockets: apps.append(server.config.app)
    )
    main(["serve", str(run_folder), "--port", "0", *given])
    (route,) = [x for x in apps[0].routes if x.path == "/api/model"]
    assert asyncio.run(route.endpoint())["least_score"] == least


def test_command(run_folder, monkeypatch):
    """A port that is taken, and a package that is missing, are named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"--port {number} cannot be used"):
            main(["serve", str(run_folder), "--port", number])
    for wrong, message in (
        (["--port", "99999"], "--port 99999 cannot be used"),
        (["--confidence", "2"], "--confidence must be in 0 to 1"),
        (["--queue", "0"], "Limits must be positive"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["serve", str(run_folder), *wrong])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "freeanchor.deploy.serve")
    with pytest.raises(SystemExit, match=r"pip install 'freeanchor\[serve\]'"):
        main(["serve", str(run_folder)])
