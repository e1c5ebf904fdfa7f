"""Exported files detect what the model does, in other runtimes."""

import json
import logging
import math
import resource
import subprocess
import sys

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from conftest import assert_same
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from freeanchor.__main__ import main
from freeanchor.deploy import Predictor, export
from freeanchor.errors import FreeAnchorError

# PyTorch's opinion of TorchScript, and of the metadata of what it exported itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.export"),
]
ALL = ["TEST.DETECTIONS_PER_IMAGE", "320"]
# Height and width of the network's input. The last is smaller than a cell of the coarsest level.
SIZES = (160, 200), (131, 257), (224, 150), (129, 300), (40, 30)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Of torch.export's notes of each step, of which pytest would keep all."""
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True
    yield
    trace.disabled = False


@pytest.fixture(scope="module")
def pixels():
    """Smooth noise, (H, W, 3) uint8 of each size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 9, 9, generator=generator) * 255
    scaled = [torch.nn.functional.interpolate(noise, size, mode="bilinear") for size in SIZES]
    return [x[0].permute(1, 2, 0).to(torch.uint8).contiguous() for x in scaled]


@torch.no_grad()
def detect(predictor, pixels):
    """What the model itself finds."""
    return [predictor.model([{"image": x.permute(2, 0, 1)}])[0]["instances"] for x in pixels]


def many(run_folder):
    return Predictor(run_folder, confidence=0.005, device="cpu", options=ALL)


def one(run_folder, pixels):
    """Sure enough to find one object, in one of the images."""
    scores = [x.scores[:1] for x in detect(many(run_folder), pixels)]
    best, second = torch.cat(scores).topk(2).values.tolist()
    scores = torch.cat([x.scores for x in detect(many(run_folder), pixels)])
    second = scores[scores < best].max().item()
    return Predictor(run_folder, confidence=(best + second) / 2, device="cpu", options=ALL)


def load(path):
    """A function of a uint8 array, by the suffix of the file."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"images": x})
    module = torch.jit.load(path) if path.suffix == ".pt" else torch.export.load(path).module()
    return lambda x: [y.numpy() for y in module(torch.from_numpy(x))]


def load_openvino(path):
    core = openvino.Core()
    # OpenVINO takes bfloat16 of itself where the processor has it.
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: list(model(x).values())


def to_instances(outputs, size):
    """Of each image of a batch, after a look at what fills the rest."""
    found = []
    for boxes, scores, labels in zip(*map(torch.from_numpy, map(np.array, outputs)), strict=True):
        number = int((scores > 0).sum())
        assert not scores[number:].any()
        assert not boxes[number:].any()
        assert (labels[number:] == -1).all()
        fields = Boxes(boxes[:number]), scores[:number], labels[:number]
        names = "pred_boxes", "scores", "pred_classes"
        found.append(Instances(size, **dict(zip(names, fields, strict=True))))
    return found


@pytest.fixture(scope="module")
def files(run_folder, pixels, tmp_path_factory):
    """An exported file by model and suffix, written when it is asked for."""
    folder = tmp_path_factory.mktemp("exported")
    predictors = {"many": many(run_folder), "one": one(run_folder, pixels)}
    kinds = {"onnx": "onnx", "pt": "torchscript", "pt2": "torch-export"}

    def get(name, suffix):
        path = folder / f"{name}.{suffix}"
        if not path.exists():
            export(predictors[name], path, kinds[suffix])
        return predictors[name], path

    return get


RUNTIMES = {
    "onnxruntime": ("onnx", load),
    "openvino": ("onnx", load_openvino),
    "torchscript": ("pt", load),
    "torch-export": ("pt2", load),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["many", "one"])
def test_equals_model(files, pixels, name, runtime):
    """On images of five sizes, with over 300 detections, one or none, alone and in batches."""
    suffix, load_file = RUNTIMES[runtime]
    if (name, suffix) == ("one", "pt2"):
        pytest.skip("slow to export, and the graph is that of TorchScript")
    predictor, path = files(name, suffix)
    exported = load_file(path)
    used = pixels[:-1] if suffix == "pt2" else pixels  # which has a least size
    expected = detect(predictor, used)
    numbers = sorted(map(len, expected))
    assert numbers[-2:] == [0, 1] if name == "one" else numbers[-1] >= 300
    for image, truth in zip(used, expected, strict=True):
        batch = torch.stack([image, image.flip(0)]).numpy()
        found = to_instances(exported(batch), truth.image_size)
        assert_same(found[0], truth, share=0.01)
        assert_same(found[1], detect(predictor, [image.flip(0)])[0], share=0.01)
        (alone,) = to_instances(exported(batch[:1]), truth.image_size)
        assert_same(alone, truth, share=0.01)


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_raw_outputs(run_folder, pixels, kind, tmp_path):
    """Without NMS, boxes and scores are those of all anchors."""
    path = tmp_path / {"onnx": "raw.onnx", "torchscript": "raw.pt"}[kind]
    main(f"export {run_folder} {path} --no-nms --format {kind}".split())
    model = Predictor(run_folder, device="cpu").model
    boxes, scores = load(path)(pixels[1][None].numpy())
    with torch.no_grad():
        images = model.preprocess_image([{"image": pixels[1].permute(2, 0, 1)}])
        features = [model.backbone(images.tensor)[x] for x in model.head_in_features]
        logits, deltas = model._transpose_dense_predictions(model.head(features), [3, 4])
        anchors = Boxes.cat(model.anchor_generator(features)).tensor
        expected = model.box2box_transform.apply_deltas(torch.cat(deltas, 1)[0], anchors)
    # Anchors of a cell lie side by side there, cells of an anchor here.
    order = []
    for x in features:
        cells, start = x.shape[2] * x.shape[3], sum(map(len, order))
        order.append(start + torch.arange(9 * cells).view(cells, 9).t().flatten())
    order = torch.cat(order)
    torch.testing.assert_close(torch.tensor(boxes[0]), expected[order], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(
        torch.tensor(scores[0]), torch.cat(logits, 1)[0].sigmoid()[order], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("fails", [False, True])
def test_backbone_of_one_size(run_folder, tmp_path, fails):
    """One whose trace has the size of the example in it, as some of timm, is refused."""
    predictor = Predictor(run_folder, device="cpu")
    whole = predictor.model.backbone

    class OfOneSize(Backbone):
        size_divisibility = whole.size_divisibility

        def __init__(self):
            super().__init__()
            self.whole = whole

        def forward(self, x):
            height = math.ceil(x.shape[2])
            x = x.reshape(len(x), 3, height, -1) if fails else x * height / 320
            return self.whole(x)

    predictor.model.backbone = OfOneSize()
    for kind in ("onnx", "torchscript"):
        with pytest.raises(FreeAnchorError, match=f"{kind} file would be right for one size alone"):
            export(predictor, tmp_path / "x", kind)
    assert not [*tmp_path.iterdir()]


def test_pixels_of_another_type(run_folder, pixels, tmp_path):
    """Fractions of 255 are refused by the file, and not taken for a dark image."""
    predictor = Predictor(run_folder, confidence=0.05, device="cpu")
    export(predictor, tmp_path / "model.pt", "torchscript")
    module = torch.jit.load(tmp_path / "model.pt")
    assert len(module(pixels[0][None])) == 3
    with pytest.raises(Exception, match="images must be uint8"):
        module(pixels[0][None] / 255)


def test_rgb(run_folder, pixels, tmp_path):
    """A model trained on RGB takes BGR too."""
    options = [*ALL, "INPUT.FORMAT", "RGB"]
    predictor = Predictor(run_folder, confidence=0.05, device="cpu", options=options)
    export(predictor, tmp_path / "rgb.pt", "torchscript")
    outputs = load(tmp_path / "rgb.pt")(pixels[0][None].numpy())
    (truth,) = detect(predictor, [pixels[0].flip(2)])
    assert_same(to_instances(outputs, truth.image_size)[0], truth)


def test_run_that_is_tested_in_bfloat16(run_folder, tmp_path):
    """The file has the weights of the run, not rounded ones."""
    options = ["TEST.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    rounded = Predictor(run_folder, device="cpu", options=options)
    with pytest.raises(FreeAnchorError, match="has rounded the weights"):
        export(rounded, tmp_path / "x.pt", "torchscript")
    found = []
    for name, those in (("amp", ["--opts", *options]), ("plain", [])):
        path = tmp_path / f"{name}.pt"
        main(["export", str(run_folder), str(path), "--format", "torchscript", *those])
        found.append(dict(torch.jit.load(path).named_parameters()))
    amp, plain = found
    assert amp.keys() == plain.keys()
    assert all(torch.equal(amp[key], plain[key]) for key in plain)


def test_metadata(files):
    """Every file says how its inputs are made and what its outputs are."""
    predictor, path = files("many", "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    props = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(value) for key, value in props.items()}
    assert about["class_names"] == predictor.class_names
    assert about["outputs"] == [x.name for x in session.get_outputs()]
    assert (about["min_size"], about["max_size"]) == (64, 96)
    assert about["pixel_mean"] == predictor.cfg.MODEL.PIXEL_MEAN
    assert about["score_threshold"] == 0.005
    assert about["max_detections"] == 320
    extra = {"metadata.json": ""}
    torch.jit.load(files("many", "pt")[1], _extra_files=extra)
    assert json.loads(extra["metadata.json"]) == about
    extra = {"metadata.json": ""}
    torch.export.load(files("many", "pt2")[1], extra_files=extra)
    assert json.loads(extra["metadata.json"]) == {**about, "least_size": 129}


def test_files_stand_alone(files):
    """They load and run where neither this package nor Detectron2 is."""
    paths = [str(files("many", suffix)[1]) for suffix in ("onnx", "pt", "pt2")]
    code = (
        "import sys; sys.modules.update(freeanchor=None, detectron2=None)\n"
        "import onnxruntime, torch, torchvision\n"
        "x = torch.zeros(1, 160, 200, 3, dtype=torch.uint8)\n"
        "onnx, pt, pt2 = sys.argv[1:]\n"
        "onnxruntime.InferenceSession(onnx).run(None, {'images': x.numpy()})\n"
        "torch.jit.load(pt)(x)\n"
        "torch.export.load(pt2).module()(x)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *paths], check=True)


def test_errors(run_folder, predictor, tmp_path, monkeypatch):
    """Unknown formats, missing packages and places that cannot be written to."""
    with pytest.raises(FreeAnchorError, match="no format tflite, only onnx"):
        export(predictor, tmp_path / "x", "tflite")
    (tmp_path / "file").write_text("")
    with pytest.raises(FreeAnchorError, match="cannot be a folder to write to"):
        export(predictor, tmp_path / "file" / "x.pt", "torchscript")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FreeAnchorError, match=r"pip install 'freeanchor\[export\]"):
        export(predictor, tmp_path / "x.onnx")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file"]


def test_a_full_disk(predictor, tmp_path):
    """It is said in one sentence, and an earlier file is as it was: PyTorch would abort."""
    path = tmp_path / "x"
    path.write_text("whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FreeAnchorError, match=r"x cannot be written: .*File too large"):
            export(predictor, path, "torchscript")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
