"""The model zoo: configs in the package, and published weights by name from a local server."""

import functools
import hashlib
import http.server
import logging
import re
import subprocess
import sys
import threading

import pytest
import torch
from conftest import GOLDEN, REPOSITORY
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager
from freeanchor import model_zoo
from freeanchor.__main__ import main
from freeanchor.checkpoint import Checkpointer, catalog, convert, read_checkpoint
from freeanchor.errors import FileError

R_50 = "MMDetection/free_anchor_R_50_FPN_1x.yaml"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Notes what is asked for, and says nothing."""

    requests = []  # noqa: RUF012

    def do_GET(self):
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder; downloads go to an empty cache. Gives the folder, the URL and the paths."""
    (tmp_path / "www").mkdir()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Handler, "requests", [])
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield tmp_path / "www", f"http://127.0.0.1:{httpd.server_port}", Handler.requests
        httpd.shutdown()
        thread.join()


def publish(server, monkeypatch, name, content, sha256=None):
    """Put a file where the catalogue then says that `name` is."""
    folder, url, _ = server
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    (folder / f"model-{sha256[:8]}.pth").write_bytes(content)
    monkeypatch.setitem(catalog.CHECKPOINTS, name, f"{url}/model-{sha256[:8]}.pth")


def test_addresses():
    """Each file is read by https, and its name ends in what its content is checked against."""
    for url in catalog.CHECKPOINTS.values():
        assert re.fullmatch(r"https://download\.openmmlab\.com/[\w/.-]+-[0-9a-f]{8}\.pth", url)


def test_download_is_checked_converted_and_cached(server, monkeypatch):
    """The first use downloads, the second does not, and the weights are those of the source."""
    source = GOLDEN / "mmdet_r50.pth"
    publish(server, monkeypatch, "tiny", source.read_bytes())
    path = PathManager.get_local_path("mmdet://tiny")
    expected = convert(read_checkpoint(str(source)), "tiny")
    found = read_checkpoint(path)["model"]
    assert found.keys() == expected.weights.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.weights.items())
    monkeypatch.setattr(catalog, "_check_hash", None)  # neither checked nor converted again
    assert PathManager.get_local_path("mmdet://tiny") == path
    with PathManager.open("mmdet://tiny", "rb") as f:
        assert f.read(8) == open(path, "rb").read(8)  # noqa: SIM115
    assert len(server[2]) == 1

    cfg = expected.build_config()
    cfg.MODEL.DEVICE = "cpu"
    model = META_ARCH_REGISTRY.get("FreeAnchor")(cfg)
    Checkpointer(model, cfg).load("mmdet://tiny")
    assert torch.equal(model.head.cls_score.weight, expected.weights["head.cls_score.weight"])

    cfg.MODEL.WEIGHTS = "mmdet://tiny"
    predictor = DefaultPredictor(cfg)  # with Detectron2's own checkpointer
    for name, tensor in predictor.model.state_dict().items():
        assert torch.equal(tensor, expected.weights[name])


def test_download_that_is_not_what_its_name_says(server, monkeypatch):
    """It is deleted, so that the next try downloads it again."""
    publish(server, monkeypatch, "tiny", b"something else", sha256="0123abcd")
    for _ in range(2):
        with pytest.raises(FileError, match="its SHA-256 starts with"):
            PathManager.get_local_path("mmdet://tiny")
    assert len(server[2]) == 2
    monkeypatch.undo()


def test_download_of_unsafe_or_foreign_content(server, monkeypatch):
    """A right hash does not make content right."""
    for content in (b"no checkpoint", (GOLDEN / "mmdet_r50_outputs.npz").read_bytes()):
        publish(server, monkeypatch, "tiny", content)
        with pytest.raises(FileError, match=r"model-\w+\.pth is damaged"):
            PathManager.get_local_path("mmdet://tiny")


@pytest.mark.parametrize("url", ["mmdet://nothing", "mmdet://missing", "http"])
def test_what_cannot_be_downloaded(server, monkeypatch, url):
    """The name is said, and those that there are."""
    monkeypatch.setitem(catalog.CHECKPOINTS, "missing", f"{server[1]}/missing-01234567.pth")
    url = f"{server[1]}/nothing.pth" if url == "http" else url
    cfg = model_zoo.get_config(R_50)
    message = "only freeanchor_r50" if url == "mmdet://nothing" else "404"
    with pytest.raises(FileError, match=rf"{url.rpartition('/')[2]}.*{message}"):
        Checkpointer(torch.nn.Linear(1, 1), cfg).load(url)


def test_weights_from_http(server, cfg, model):
    """Any address can be given, and formats are converted on the fly."""
    folder, url, requests = server
    torch.save(model.state_dict(), folder / "own.pth")
    Checkpointer(model, cfg).load(f"{url}/own.pth")
    assert requests == ["/own.pth"]


def published(config, make):
    """A checkpoint with the names and shapes of MMDetection's for a config, by a function."""
    small = read_checkpoint(str(GOLDEN / "mmdet_r50.pth"))["state_dict"]
    cfg = model_zoo.get_config(config)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        state = META_ARCH_REGISTRY.get("FreeAnchor")(cfg).state_dict()
    names = dict(zip(_new_names(small), small))
    block = "backbone.bottom_up.res4.5."
    for name in state:
        match = re.match(r"backbone\.bottom_up\.res4\.(\d\d?)\.(.*)", name)
        if match and int(match[1]) > 5:  # R-101 has more blocks
            names[name] = names[block + match[2]].replace("layer3.5.", f"layer3.{match[1]}.")
        if match := re.match(r"head\.(cls|bbox)_subnet\.([46])\.(.*)", name):
            kind = {"cls": "cls", "bbox": "reg"}[match[1]]
            names[name] = f"bbox_head.{kind}_convs.{int(match[2]) // 2}.conv.{match[3]}"
    weights = {names[k]: make(v.shape) for k, v in state.items()}
    return {"meta": {"mmdet_version": "2.0.0"}, "state_dict": weights}


def _new_names(state):
    """The names that conversion gives, found by giving each tensor a value of its own."""
    marked = {k: torch.full_like(v, i) for i, (k, v) in enumerate(state.items())}
    weights = convert({"state_dict": marked}, "marked").weights
    by_value = {int(v.flatten()[0]): k for k, v in weights.items()}
    return [by_value.get(i) for i in range(len(state))]


def test_get_trained(server, monkeypatch, tmp_path, caplog):
    """A published model is one line: R-50 in its full size, through the whole path."""
    checkpoint = published(R_50, torch.rand)
    torch.save(checkpoint, tmp_path / "published.pth")
    publish(
        server,
        monkeypatch,
        "freeanchor_r50_fpn_1x_coco",
        (tmp_path / "published.pth").read_bytes(),
    )
    with caplog.at_level(logging.INFO):
        model = model_zoo.get(R_50, trained=True, device="cpu")
    assert re.search(r"Loaded (\d+) of \1 tensors from mmdet://freeanchor_r50_fpn", caplog.text)
    assert model.training
    assert model.num_classes == 80
    stem = model.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(stem, checkpoint["state_dict"]["backbone.conv1.weight"])


@pytest.mark.parametrize("name", model_zoo._TRAINED)
def test_configs_of_published_weights(name):
    """What the weights need of the model is what their config in the zoo says."""
    weights = published(f"{name}.yaml", torch.zeros)
    converted = convert(weights, name)
    Checkpointer(torch.nn.Linear(1, 1), model_zoo.get_config(f"{name}.yaml"))._check_config(
        converted.config
    )
    assert converted.config["MODEL.RETINANET.NUM_CLASSES"] == 80


def test_get_untrained(server, monkeypatch):
    """Training starts from a backbone of ImageNet, converted from torchvision's."""
    import torchvision

    folder, url, _ = server
    resnet = torchvision.models.resnet50()
    torch.save(resnet.state_dict(), folder / "resnet50.pth")
    cfg = model_zoo.get_config(R_50)
    cfg.MODEL.WEIGHTS = f"{url}/resnet50.pth"
    monkeypatch.setattr(model_zoo, "get_config", lambda *_: cfg)
    model = model_zoo.get(R_50, device="cpu")
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, resnet.conv1.weight)


def test_configs():
    """All configs of the repository are there, and trained weights come with their config."""
    names = [p.relative_to(REPOSITORY / "configs") for p in REPOSITORY.glob("configs/*/*.yaml")]
    assert len(names) > 10
    for name in names:
        assert model_zoo.get_config_file(str(name)).endswith(str(name))
    for name, weights in model_zoo._TRAINED.items():
        assert model_zoo.get_checkpoint_url(f"{name}.yaml") == weights
        cfg = model_zoo.get_config(f"{name}.yaml", trained=True)
        assert weights == cfg.MODEL.WEIGHTS
        assert weights.removeprefix("mmdet://") in catalog.CHECKPOINTS
        assert weights != model_zoo.get_config(f"{name}.yaml").MODEL.WEIGHTS


def test_list(capsys):
    """`freeanchor zoo` names every model once, with its weights and where its AP is from."""
    main(["zoo"])
    printed = capsys.readouterr().out
    models = model_zoo.models()
    configs = [model.config for model in models]
    assert len(set(configs)) == len(configs) > 10
    assert set(model_zoo._PUBLISHED) <= {x.removesuffix(".yaml") for x in configs}
    for model in models:
        assert f"{model.config}\n" in printed
        assert model.start == model_zoo.get_config(model.config).MODEL.WEIGHTS
        assert not model.trained or f"trained weights: {model.trained}\n" in printed
        assert (model.published_ap is None) == (not model.source)
    assert printed.count("in the literature (MMDetection), not run here") == 3


def test_unknown_names():
    """What there is instead is listed."""
    with pytest.raises(FileError, match=r"nothing\.yaml is not in .*COCO-Detection/free_anchor_R"):
        model_zoo.get_config_file("COCO-Detection/nothing.yaml")
    with pytest.raises(FileError, match="only of MMDetection/free_anchor_R_50_FPN_1x"):
        model_zoo.get_checkpoint_url("COCO-Detection/free_anchor_R_50_FPN_1x.yaml")


def test_configs_are_in_the_installed_package(tmp_path):
    """Not only in the repository."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        env={"PATH": "", "FORCE_CUDA": "0"},
        stderr=subprocess.DEVNULL,
    )
    installed = tmp_path / "freeanchor" / "configs"
    in_repository = REPOSITORY / "configs"
    assert sorted(p.relative_to(installed) for p in installed.rglob("*.yaml")) == sorted(
        p.relative_to(in_repository) for p in in_repository.rglob("*.yaml")
    )
