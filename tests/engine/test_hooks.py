"""What happens between two iterations."""

import pytest
import torch
from conftest import instances, quick_cfg
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import PeriodicWriter
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from freeanchor.engine import MatchingPictures, Trainer
from matplotlib.figure import Figure


@pytest.mark.parametrize("config", ["free_anchor", "faster_rcnn_free_anchor"])
def test_pictures_of_the_matching_while_training(config, storage):
    """Every so many iterations, of the first image with objects, and without other effects."""
    cfg = quick_cfg(f"quick/{config}_R_18_FPN.yaml")
    batch = [
        {"image": torch.zeros(3, 64, 64), "instances": instances(boxes, [0] * len(boxes))}
        for boxes in ([], [[8, 8, 40, 30]])
    ]
    states = {}
    for period in (0, 2):
        torch.manual_seed(0)
        model = build_model(cfg).train()
        trainer = SimpleTrainer(model, [batch] * 5, build_optimizer(cfg, model))
        hook = MatchingPictures(model, 2)
        hook.trainer = trainer
        seen = []
        for trainer.iter in range(5):
            storage.iter = trainer.iter
            if period:
                hook.before_step()
            trainer.run_step()
            if period:
                hook.after_step()
            seen += [(name, i) for name, _, i in storage._vis_data]
            for _, picture, _ in storage._vis_data:
                assert picture.shape[0] == 3
                assert picture.std() > 0
            storage.clear_images()
        assert seen == ([("matching", i) for i in (0, 2, 4)] if period else [])
        assert model.training
        states[period] = model.state_dict()
    assert all(torch.equal(states[0][k], v) for k, v in states[2].items())


def take_step(cfg, model, batch):
    """A step that a picture is made of."""
    hook = MatchingPictures(model, 1)
    hook.trainer = SimpleTrainer(model, [batch], build_optimizer(cfg, model))
    hook.trainer.iter = 0
    hook.before_step()
    hook.trainer.run_step()
    hook.after_step()


def test_no_picture_of_a_batch_without_objects(cfg, storage):
    """There is nothing to match."""
    model = build_model(cfg).train()
    batch = [{"image": torch.zeros(3, 64, 64), "instances": instances([], [])}] * 2
    take_step(cfg, model, batch)
    assert storage._vis_data == []


def test_pictures_show_the_objects_of_the_training(cfg, storage, monkeypatch):
    """INCLUSIVE_CORNERS moves their corners, once in both."""
    cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS = True
    model = build_model(cfg).train()
    losses, trained, drawn = model.losses, [], []

    def compute(*args):
        trained.append(args[3][0].gt_boxes.tensor)
        return losses(*args)

    def draw(pixels, matchings):
        drawn.append(matchings["now"].boxes)
        return Figure()

    monkeypatch.setattr(model, "losses", compute)
    monkeypatch.setattr("freeanchor.engine.hooks.draw_matching", draw)
    image = {"image": torch.zeros(3, 64, 64), "instances": instances([[8, 8, 40, 30]], [0])}
    batch = [{**image, "resize_factors": (2.0, 2.0)}] * 2
    take_step(cfg, model, batch)
    assert trained[0].tolist() == [[8, 8, 39, 29]]
    assert torch.equal(drawn[0], trained[0])


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ("free_anchor", [], 1),
        ("free_anchor", ["MODEL.META_ARCHITECTURE", "RetinaNet"], 0),
        ("faster_rcnn_free_anchor", [], 1),
        ("faster_rcnn_free_anchor", ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"], 0),
    ],
)
def test_trainer_adds_them_by_vis_period(config, options, expected, dataset, tmp_path):
    """To a model with bags alone, and before the writers, which would miss its pictures."""
    cfg = quick_cfg(f"quick/{config}_R_18_FPN.yaml")
    cfg.merge_from_list([*options, "VIS_PERIOD", 5])
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (dataset[0],), (), str(tmp_path)
    hooks = [type(x) for x in Trainer(cfg)._hooks]
    assert hooks.count(MatchingPictures) == expected
    if expected:
        assert hooks.index(MatchingPictures) < hooks.index(PeriodicWriter)
