"""A model on a Hub, and back."""

import json
import logging
import shutil
import sys

import pytest
import yaml
from conftest import assert_same
from freeanchor.__main__ import main
from freeanchor.checkpoint import Thresholds, read_checkpoint, write_thresholds
from freeanchor.deploy import Predictor
from freeanchor.deploy.push import write_package
from hub import Hub, serve_hub

PLACE = "/me/cells/resolve/main/"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    yield from serve_hub(library, tmp_path / "hub", monkeypatch)


@pytest.fixture
def run(run_folder, tmp_path):
    """A run with thresholds and figures."""
    folder = shutil.copytree(run_folder, tmp_path / "run")
    state = read_checkpoint(str(folder / "model_final.pth"))["model"]
    found = Thresholds("a|b", 0.2, {f"class {i}": 0.1 + i / 100 for i in range(3)})
    write_thresholds(folder, state, found)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["DATASETS"]["TEST"] = ["a|b"]
    config["OUTPUT_DIR"] = "/srv/somebody/secret"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"iteration": 40, "bbox/AP": 12.34, "bbox/AP-<b>": 56.78}
    (folder / "metrics.json").write_text(json.dumps(record) + "\n")
    return folder


def test_figures_of_earlier_weights(run, tmp_path):
    """The card says of which, where the training went on after the last evaluation."""
    write_package(run, "me/cells", tmp_path)
    assert r"On a\|b, in %:" in (tmp_path / "README.md").read_text()
    with (run / "metrics.json").open("a") as f:
        f.write(json.dumps({"iteration": 59, "total_loss": 1.0}) + "\n")
    write_package(run, "me/cells", tmp_path)
    assert r"On a\|b, after 40 iterations, in %:" in (tmp_path / "README.md").read_text()


def test_there_and_back(hub, run, images, capsys, caplog):
    """What is detected by hf:// is what the run detects, with its thresholds; it is private."""
    files, private = hub
    with caplog.at_level(logging.DEBUG):
        main(["push", str(run), "me/cells"])
    assert private == {"me/cells": True}
    names = {x.removeprefix(PLACE) for x in files}
    assert names == {"model.safetensors", "config.yaml", "thresholds.json", "README.md"}
    assert not any(b"somebody" in x for x in files.values())
    output = capsys.readouterr()
    assert Hub.token not in output.out + output.err + caplog.text
    assert "/me/cells" in output.out
    card = files[PLACE + "README.md"].decode()
    assert "| AP | 12.3 |" in card
    assert r"| AP-\<b\> | 56.8 |" in card
    assert r"a\|b" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "detectron2"
    ours, theirs = Predictor(run, device="cpu"), Predictor("hf://me/cells", device="cpu")
    assert theirs.describe_thresholds() == ours.describe_thresholds()
    assert "class 2 0.12" in theirs.describe_thresholds()
    expected = ours(images)
    assert sum(map(len, expected)) > 10
    for a, b in zip(theirs(images), expected, strict=True):
        assert_same(a, b)


def test_public(hub, run):
    """Only if it is said, also where the repository is there already."""
    files, private = hub
    private["me/cells"] = False
    with pytest.raises(SystemExit, match="me/cells is there already and public: add --public"):
        main(["push", str(run), "me/cells"])
    assert not files
    main(["push", str(run), "me/cells", "--public"])
    assert len(files) == 4
    main(["push", str(run), "me/other", "--public"])
    assert private == {"me/cells": False, "me/other": False}


def test_refused(hub, run, monkeypatch, capsys):
    """In one sentence, without the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(
        SystemExit, match=r"freeanchor push: me/cells cannot be pushed to: .*401"
    ) as e:
        main(["push", str(run), "me/cells"])
    assert "hf_another" not in str(e.value) + "".join(capsys.readouterr())
    for wrong in ("cells", "a/b/c", "/x"):
        with pytest.raises(SystemExit, match=f"{wrong} is not of the form OWNER/REPO"):
            main(["push", str(run), wrong])
    with pytest.raises(SystemExit, match="There is no nowhere"):
        main(["push", "nowhere", "me/cells"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="pip install huggingface_hub"):
        main(["push", str(run), "me/cells"])
