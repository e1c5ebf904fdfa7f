"""Multi-scale testing: the model itself at one scale, one NMS over several, bounded memory."""

import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_it_detect, quick_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from freeanchor import data
from freeanchor.config import read_config
from freeanchor.modeling import MultiScaleTest
from PIL import Image
from torchvision.ops import nms

CONFIGS = ["free_anchor", "ltm", "ltm_af"]


def same(found, expected):
    for name in ("scores", "pred_classes"):
        assert torch.equal(found.get(name), expected.get(name))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert found.image_size == expected.image_size


@pytest.fixture
def scene(tmp_path):
    """A model that detects something, a file, and the input that the mapper makes of it."""

    def make(min_sizes, *options, shape=(120, 160), config="free_anchor"):
        cfg = quick_cfg(f"quick/{config}_R_18_FPN.yaml")
        cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 96, "TEST.AUG.MIN_SIZES", min_sizes, *options])
        torch.manual_seed(1)
        model = build_model(cfg).eval()
        make_it_detect(model)
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        record = {"file_name": str(tmp_path / "a.png"), "height": shape[0], "width": shape[1]}
        mapped = data.Mapper(cfg, is_train=False)({**record, "image_id": 1})
        return cfg, model, mapped

    return make


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("inclusive", [False, True])
@torch.no_grad()
def test_one_scale_is_the_model_itself(scene, inclusive, config):
    """Bit for bit, from the file and from the image alone."""
    options = ("TEST.AUG.FLIP", False, "MODEL.FREEANCHOR.INCLUSIVE_CORNERS", inclusive)
    cfg, model, image = scene((96,), *options, config=config)
    (expected,) = model([image])
    (found,) = MultiScaleTest(cfg, model)([image])
    assert len(found["instances"]) > 10
    same(found["instances"], expected["instances"])
    del image["file_name"]
    (found,) = MultiScaleTest(cfg, model)([image])
    same(found["instances"], expected["instances"])


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_scales_and_flips_go_into_one_nms(scene, monkeypatch, config):
    """The result is that of NMS over what the model finds at each scale and in the mirror."""
    cfg, model, image = scene((96, 128, 64), "TEST.AUG.FLIP", True, config=config)
    found = MultiScaleTest(cfg, model)([image])[0]["instances"]

    def resize_only(found, height, width):  # NMS is before boxes are clipped
        found.pred_boxes.scale(width / found.image_size[1], height / found.image_size[0])
        return found

    postprocess = "detectron2.modeling.meta_arch.dense_detector.detector_postprocess"
    monkeypatch.setattr(postprocess, resize_only)
    plain = copy.deepcopy(model)
    plain.test_nms_thresh, plain.max_detections_per_image = 1.0, 10**9
    boxes, scores, classes = [], [], []
    for size, flip in itertools.product((96, 128, 64), (False, True)):
        cfg.INPUT.MIN_SIZE_TEST = size
        x = data.Mapper(cfg, is_train=False)({k: v for k, v in image.items() if k != "image"})
        x["image"] = x["image"].flip(2) if flip else x["image"]
        result = plain([x])[0]["instances"]
        tensor = result.pred_boxes.tensor
        if flip:
            tensor = torch.stack(
                [160 - tensor[:, 2], tensor[:, 1], 160 - tensor[:, 0], tensor[:, 3]], dim=1
            )
        boxes.append(tensor)
        scores.append(result.scores)
        classes.append(result.pred_classes)
    boxes, scores, classes = map(torch.cat, (boxes, scores, classes))
    kept = [
        (scores[i].item(), c, boxes[i])
        for c in range(3)
        for i in (classes == c).nonzero()[:, 0][nms(boxes[classes == c], scores[classes == c], 0.5)]
        if Boxes(boxes[i : i + 1]).nonempty()  # distances may be 0
    ]
    kept.sort(key=lambda x: -x[0])
    assert len(found) == min(100, len(kept))
    torch.testing.assert_close(found.scores, torch.tensor([x[0] for x in kept[:100]]))
    expected = Boxes(torch.stack([x[2] for x in kept[:100]]))
    expected.clip((120, 160))
    torch.testing.assert_close(found.pred_boxes.tensor, expected.tensor, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_memory_does_not_grow_with_the_number_of_scales(scene):
    """The features of one scale are gone when the next begins, on an image of Cityscapes' shape."""
    cfg, model, image = scene((64, 96, 128, 160), "TEST.AUG.FLIP", True, shape=(256, 512))
    alive, most = set(), []

    def watch(backbone, inputs, features):
        most.append(len(alive))
        for name, tensor in features.items():
            key = (len(most), name)
            alive.add(key)
            weakref.finalize(tensor, alive.discard, key)

    model.backbone.register_forward_hook(watch)
    MultiScaleTest(cfg, model)([image])
    assert len(most) == 8
    assert max(most) == 0


def test_longest_sides_of_the_official_recipe():
    """1.666 times the shorter one, whatever the scale."""
    cfg = read_config(REPOSITORY / "configs/COCO-Detection/free_anchor_X_101_64x4d_FPN_e2x_ms.yaml")
    assert cfg.TEST.AUG.ENABLED
    assert cfg.SOLVER.MAX_ITER == 180000
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 50
    test = MultiScaleTest(cfg, build_model(cfg))
    pixels = np.zeros((100, 400, 3), np.uint8)
    sizes = [resize.get_transform(pixels).apply_image(pixels).shape[1] for resize in test.resizes]
    assert sizes == [800, 1066, 1333, 1600, 1866, 2133]


def test_what_cannot_be_tested_at_several_scales(cfg, model):
    """Another model, and no scale."""
    with pytest.raises(TypeError, match="Linear is not a RetinaNet"):
        MultiScaleTest(cfg, torch.nn.Linear(1, 1))
    cfg.TEST.AUG.MIN_SIZES = ()
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES is empty"):
        MultiScaleTest(cfg, model)
