"""FreeAnchor with Detectron2's LazyConfig: the config, and the script of docs/lazyconfig.md."""

import json
import re
import runpy
import sys

import pytest
from conftest import REPOSITORY
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from freeanchor import FreeAnchor
from freeanchor.config import CONFIGS, read_config

LAZY = CONFIGS / "lazy" / "free_anchor_R_50_FPN_1x.py"
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/lazyconfig.md").read_text(), re.S)


def test_it_is_the_yaml():
    """The same tensors, hyperparameters and anchors; the same learning rate over time."""
    cfg = read_config(CONFIGS / "COCO-Detection" / "free_anchor_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    lazy = LazyConfig.load(str(LAZY))
    theirs, ours = build_model(cfg), instantiate(lazy.model)
    assert type(ours) is FreeAnchor
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    plain = [
        {k: v for k, v in vars(m).items() if isinstance(v, int | float | str)}
        for m in (theirs, ours)
    ]
    assert plain[0] == plain[1]
    assert theirs.normalizer.kind == ours.normalizer.kind
    assert {"pre_anchor_topk", "focal_loss_alpha", "smooth_l1_beta"} <= plain[0].keys()
    for name in ("weights", "scale_clamp"):
        values = [getattr(m.box2box_transform, name) for m in (theirs, ours)]
        assert values[0] == values[1]
    assert list(lazy.model.pixel_mean) == cfg.MODEL.PIXEL_MEAN
    assert list(lazy.model.pixel_std) == cfg.MODEL.PIXEL_STD
    anchors = lazy.model.anchor_generator
    for expected, found in zip(cfg.MODEL.ANCHOR_GENERATOR.SIZES, anchors.sizes, strict=True):
        assert list(found) == pytest.approx(expected)
    multiplier = instantiate(lazy.lr_multiplier)
    assert lazy.optimizer.lr * multiplier(0.0) == pytest.approx(
        cfg.SOLVER.BASE_LR * cfg.SOLVER.WARMUP_FACTOR
    )
    for iteration, factor in ((500, 1), (59999, 1), (60000, 0.1), (80000, 0.01)):
        assert multiplier(iteration / 90000) == pytest.approx(factor)


SMALL = """
from detectron2.config import LazyCall
from detectron2.modeling.backbone import ResNet

model.backbone.bottom_up.stages = LazyCall(ResNet.make_default_stages)(depth=18, norm="BN")
model.backbone.bottom_up.stem.norm = "BN"
model.backbone.top_block.in_channels = 512
"""


def test_the_script_of_the_document(coco, tmp_path, monkeypatch):
    """It trains, saves and evaluates, with the document's config of one's own data."""
    own, script = BLOCKS
    for name in ("train", "val"):
        _, annotations, folder = coco(name=name)
        own = own.replace(f"cells/{name}.json", annotations)
        own = own.replace('"cells/images"', repr(folder), 1)
    (tmp_path / "own.py").write_text(own + SMALL)
    (tmp_path / "train_lazy.py").write_text(script)
    output = tmp_path / "output"
    overrides = [
        "train.device=cpu",
        "train.max_iter=3",
        "train.eval_period=3",
        "train.log_period=1",
        f"train.output_dir={output}",
        "train.init_checkpoint=''",
        "model.backbone.bottom_up.freeze_at=0",
        "model.head.conv_dims=[256]",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ]
    monkeypatch.setattr(sys, "argv", ["train_lazy.py", str(tmp_path / "own.py"), *overrides])
    runpy.run_path(str(tmp_path / "train_lazy.py"), run_name="__main__")
    lines = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    losses = [x for x in lines if "total_loss" in x]
    assert [x["iteration"] for x in losses] == [0, 1, 2]
    assert {"loss_positive", "freeanchor/bag_likelihood"} <= losses[0].keys()
    assert any("bbox/AP" in x for x in lines)
    assert (output / "model_final.pth").is_file()
