"""The configs: each one builds a model, and says what its name says."""

import freeanchor
import pytest
import torch
from conftest import QUICK, REPOSITORY
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.config import LazyConfig, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from freeanchor import FreeAnchor, model_zoo
from freeanchor.checkpoint import catalog
from freeanchor.config import CONFIGS, read_config
from freeanchor.engine.defaults import scale_schedule
from freeanchor.errors import FileError
from freeanchor.modeling import LTM, FreeAnchorRPN
from freeanchor.values import check_values
from iopath.common.file_io import HTTPURLHandler

COCO = sorted((REPOSITORY / "configs" / "COCO-Detection").glob("*.yaml"))
LTM_MODELS = sorted((REPOSITORY / "configs" / "LTM").glob("*.yaml"))
TWO_STAGE = sorted((REPOSITORY / "configs").glob("*/*rcnn_free_anchor*.yaml"))
MMDETECTION = sorted((REPOSITORY / "configs" / "MMDetection").glob("*_1x.yaml"))
ACCURACY = sorted((REPOSITORY / "configs" / "MMDetection").glob("*_acc_test.yaml"))
JITTER = tuple(range(640, 801, 32))
ENHANCED = tuple(range(480, 961, 32))
# name: depth, groups x width, iterations, training sizes
EXPECTED = {
    "R_50_FPN_1x": (50, (1, 64), 90000, (800,)),
    "R_50_FPN_j1x": (50, (1, 64), 90000, JITTER),
    "R_50_FPN_3x": (50, (1, 64), 270000, JITTER),
    "R_101_FPN_1x": (101, (1, 64), 90000, (800,)),
    "R_101_FPN_j2x": (101, (1, 64), 180000, JITTER),
    "R_101_FPN_e2x": (101, (1, 64), 180000, ENHANCED),
    "X_101_32x4d_FPN_1x": (101, (32, 4), 90000, (800,)),
    "X_101_32x8d_FPN_2x": (101, (32, 8), 180000, JITTER),
    "X_101_64x4d_FPN_j2x": (101, (64, 4), 180000, JITTER),
    "X_101_64x4d_FPN_e2x": (101, (64, 4), 180000, ENHANCED),
}
EXPECTED.update({f"{name}_ms": EXPECTED[name] for name in ("R_101_FPN_e2x", "X_101_64x4d_FPN_e2x")})


def load(path):
    cfg = get_cfg()
    freeanchor.add_freeanchor_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_values_are_in_their_ranges(path):
    """No config is refused for a value before its training."""
    check_values(load(path), training=True)


def test_every_config_is_checked():
    """A config that is added is added here too."""
    assert {p.stem.removeprefix("free_anchor_") for p in COCO} == set(EXPECTED)


@pytest.mark.parametrize("path", ACCURACY, ids=lambda p: p.stem)
def test_accuracy_config(path):
    """It is the model of its base, with the published weights and AP, on COCO's val2017."""
    name = path.stem.removesuffix("_inference_acc_test")
    cfg, base = load(path), load(path.with_name(f"{name}_1x.yaml"))
    (model,) = (x for x in model_zoo.models() if x.config == f"MMDetection/{name}_1x.yaml")
    assert model.trained == cfg.MODEL.WEIGHTS
    assert [["bbox", "AP", model.published_ap, 0.1]] == cfg.TEST.EXPECTED_RESULTS
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
    base.MODEL.WEIGHTS, base.TEST.EXPECTED_RESULTS = cfg.MODEL.WEIGHTS, cfg.TEST.EXPECTED_RESULTS
    base.DATASETS.TEST = cfg.DATASETS.TEST
    assert cfg == base
    assert len(ACCURACY) == 3


@pytest.mark.parametrize("path", [*COCO, *MMDETECTION, QUICK], ids=lambda p: p.stem)
def test_config_builds_a_model(path):
    """The model has the parts that the config promises, and nothing in the yaml runs code."""
    assert "!!" not in path.read_text()
    model = build_model(load(path))
    assert isinstance(model, FreeAnchor)
    assert model.anchor_generator.num_cell_anchors == [9] * 5
    assert model.anchor_matcher is None


@pytest.mark.parametrize("path", TWO_STAGE, ids=lambda p: p.stem)
def test_config_builds_two_stages(path):
    """FreeAnchor proposes on P3 to P7, and Detectron2's own ROI heads have what the name says."""
    cfg = load(path)
    if "Lite0" in path.stem:
        pytest.importorskip("timm")
    model = build_model(cfg)
    assert type(model) is GeneralizedRCNN
    assert isinstance(model.proposal_generator, FreeAnchorRPN)
    stage = model.proposal_generator.detector
    assert stage.head_in_features == ["p3", "p4", "p5", "p6", "p7"]
    assert stage.anchor_generator.num_cell_anchors == [9] * 5
    assert stage.head.cls_score.out_channels == 9
    heads = model.roi_heads
    assert heads.box_in_features == ["p2", "p3", "p4", "p5"]
    assert heads.mask_on == ("mask" in path.stem)
    assert isinstance(heads, CascadeROIHeads) == ("cascade" in path.stem)
    assert (f"R_{cfg.MODEL.RESNETS.DEPTH}_FPN" in path.stem) == ("Lite0" not in path.stem)


@pytest.mark.parametrize("path", COCO, ids=lambda p: p.stem)
def test_config_is_the_official_one(path):
    """Architecture, schedule, training sizes and solver; see the paper's repository."""
    cfg = load(path)
    depth, groups, iterations, sizes = EXPECTED[path.stem.removeprefix("free_anchor_")]
    assert depth == cfg.MODEL.RESNETS.DEPTH
    assert groups == (cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP)
    assert (groups == (1, 64)) == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert iterations == cfg.SOLVER.MAX_ITER
    warm = {90000: (60000, 80000), 180000: (120000, 160000), 270000: (210000, 250000)}
    assert warm[iterations] == cfg.SOLVER.STEPS
    assert sizes == cfg.INPUT.MIN_SIZE_TRAIN
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert cfg.MODEL.FREEANCHOR == {
        "PRE_ANCHOR_TOPK": 50,
        "BBOX_THRESHOLD": 0.6,
        "BBOX_REG_WEIGHT": 0.75,
        "CLASS_NAMES": [],
        "P6_IN_FEATURE": "res5",
        "P7_RELU": True,
        "P6P7_NORM": False,
        "INCLUSIVE_CORNERS": False,
        "IGNORE_REGIONS": False,
        "NORMALIZER": "local",  # as the published results were obtained
    }


@pytest.mark.parametrize("path", COCO, ids=lambda p: p.stem)
def test_weights_are_in_the_catalogue(path):
    """Each name of ImageNet weights is one that Detectron2 resolves."""
    weights = load(path).MODEL.WEIGHTS
    if "32x4d" in path.stem:
        assert weights.removeprefix("mmdet://") in catalog.CHECKPOINTS  # Detectron2 has none
    elif weights.startswith("catalog://"):
        assert ModelCatalog.get(weights.removeprefix("catalog://")).endswith(".pkl")
    else:
        name = weights.removeprefix("detectron2://ImageNetPretrained/").removesuffix(".pkl")
        assert name in ModelCatalog.C2_IMAGENET_MODELS


# As above, and the learning rate with anchors; without, it is always that of R-50.
EXPECTED_LTM = {
    "R_50_FPN_1x": ((50, (1, 64), 90000, (800,)), 0.005),
    "R_101_FPN_1x": ((101, (1, 64), 90000, (800,)), 0.01),
    "R_101_FPN_2x": ((101, (1, 64), 180000, (640, 800)), 0.01),
    "X_101_64x4d_FPN_2x": ((101, (64, 4), 180000, (640, 800)), 0.01),
}


@pytest.mark.parametrize("name", EXPECTED_LTM)
@pytest.mark.parametrize("prefix", ["ltm_", "ltm_af_"])
def test_config_of_ltm_is_the_authors(prefix, name):
    """Architecture, schedule, sizes, solver and method."""
    cfg = load(LTM_MODELS[0].parent / f"{prefix}{name}.yaml")
    (depth, groups, iterations, sizes), rate = EXPECTED_LTM[name]
    is_points = prefix == "ltm_af_"
    assert depth == cfg.MODEL.RESNETS.DEPTH
    assert groups == (cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP)
    assert (groups == (1, 64)) == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert (iterations, sizes) == (cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TRAIN)
    steps = {90000: (60000, 80000), 180000: (120000, 160000)}
    assert steps[iterations] == cfg.SOLVER.STEPS
    sampling = "choice" if len(sizes) == 1 else "range"
    assert sampling == cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    assert (0.005 if is_points else rate) == cfg.SOLVER.BASE_LR
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 10)
    clip.ENABLED = False  # our step does it, not Detectron2's optimizer
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 32, 1), torch.nn.GroupNorm(32, 32))
    groups = build_optimizer(cfg, layers).param_groups
    assert {(x["lr"], x["weight_decay"]) for x in groups} == {(cfg.SOLVER.BASE_LR, 1e-4)}
    method = cfg.MODEL.FREEANCHOR.BBOX_REG_WEIGHT, cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE
    assert method == ((5.5, "giou") if is_points else (0.5, "smooth_l1"))
    assert ("points" if is_points else "anchors") == cfg.MODEL.LTM.CANDIDATES
    assert cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK == 40
    assert is_points == cfg.MODEL.FREEANCHOR.P6P7_NORM


@pytest.mark.parametrize(
    "path", [*LTM_MODELS, *sorted(QUICK.parent.glob("ltm*.yaml"))], ids=lambda p: p.stem
)
def test_config_of_ltm_builds_a_model(path):
    """There are the authors' eight and two quick ones, and with points they have no anchors."""
    assert len(LTM_MODELS) == 8
    model = build_model(load(path))
    assert isinstance(model, LTM)
    is_points = "_af_" in path.stem
    assert model.anchor_generator.num_cell_anchors == [1 if is_points else 9] * 5
    assert hasattr(model.head, "scales") == is_points


def test_learning_rates():
    """Warm-up over 500 iterations from a third; biases at twice the rate and without decay."""
    cfg = load(QUICK.parent.parent / "COCO-Detection" / "free_anchor_R_50_FPN_1x.yaml")
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"], group["weight_decay"]
    assert rates[model.head.cls_score.weight] == (0.01, 0.0001)
    assert rates[model.head.cls_score.bias] == (0.02, 0.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    weight_group = next(g for g in optimizer.param_groups if g["initial_lr"] == 0.01)
    assert weight_group["lr"] == pytest.approx(0.01 / 3)
    optimizer.step()
    for _ in range(500):
        scheduler.step()
    assert weight_group["lr"] == pytest.approx(0.01)


def test_one_gpu_scales_the_schedule():
    """Trap 14: on one GPU the learning rate of eight would give NaN."""
    cfg = DefaultTrainer.auto_scale_workers(load(COCO[0]), 1)
    assert cfg.SOLVER.IMS_PER_BATCH == 2
    assert pytest.approx(0.01 / 8) == cfg.SOLVER.BASE_LR
    assert cfg.SOLVER.WARMUP_ITERS == 4000


def test_schedule_that_rounds_to_nothing(monkeypatch):
    """On eight times as many processes, a short run still trains, evaluates and saves."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    cfg = load(QUICK)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 3
    for period, expected in ((3, 1), (80, 10), (0, 0)):
        cfg.TEST.EVAL_PERIOD = period
        scaled = scale_schedule(cfg)
        assert expected == scaled.TEST.EVAL_PERIOD
        assert scaled.SOLVER.MAX_ITER == scaled.SOLVER.CHECKPOINT_PERIOD == 1


def test_config_with_python_objects(tmp_path, monkeypatch):
    """Detectron2 would run it; here it is run only by who says so. Also in a _BASE_."""
    canary = tmp_path / "canary"
    base, leaf = tmp_path / "base.yaml", tmp_path / "leaf.yaml"
    base.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{canary}']\nVERSION: 2\n")
    leaf.write_text('_BASE_: "base.yaml"\nSEED: 1\n')
    for path in (base, leaf):
        with pytest.raises(FileError, match="Python objects could run code"):
            read_config(path)
    assert not canary.exists()
    monkeypatch.setenv("FREEANCHOR_UNSAFE_LOAD", "1")
    read_config(leaf)
    assert canary.is_dir()


def test_config_that_reads_pickles(tmp_path):
    """Detectron2 unpickles what DATASETS.PROPOSAL_FILES_TEST names, if the config asks for it."""
    path = tmp_path / "hostile.yaml"
    path.write_text("MODEL:\n  LOAD_PROPOSALS: True\nVERSION: 2\n")
    with pytest.raises(FileError, match=r"hostile\.yaml: MODEL\.LOAD_PROPOSALS"):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: [", "cannot be read"),
        ("MODEL:\n  NO_SUCH_KEY: 1\nVERSION: 2", r"Non-existent config key: MODEL\.NO_SUCH_KEY"),
        ("SEED: many\nVERSION: 2", "SEED"),
        ("\x00", "cannot be read"),
        ("", "."),
        ("just text", "."),
    ],
)
def test_bad_configs(tmp_path, text, message):
    """The file is named, and what is wrong with it."""
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(FileError, match=rf"(?s)bad\.yaml.*{message}"):
        read_config(path)


def test_lazyconfigs(tmp_path):
    """They are named as what they are, and nobody is told to load their Python objects."""
    source = CONFIGS / "lazy" / "free_anchor_R_50_FPN_1x.py"
    LazyConfig.save(LazyConfig.load(str(source)), str(tmp_path / "config.yaml"))
    for path in (source, tmp_path / "config.yaml"):
        with pytest.raises(FileError, match=rf"{path.name} is a LazyConfig: give a yaml"):
            read_config(path)


def test_missing_config(tmp_path):
    """Its name is in the message."""
    with pytest.raises(FileError, match=r"none\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_base_from_the_net(tmp_path, monkeypatch):
    """A config from anywhere does not make this machine fetch what it names, also by its base."""
    fetched = []
    monkeypatch.setattr(
        HTTPURLHandler, "_get_local_path", lambda self, path, **kwargs: fetched.append(path)
    )
    (tmp_path / "base.yaml").write_text('_BASE_: "http://127.0.0.1:1/base.yaml"\nVERSION: 2\n')
    (tmp_path / "leaf.yaml").write_text('_BASE_: ["base.yaml"]\nVERSION: 2\n')
    for name in ("base", "leaf"):
        with pytest.raises(FileError, match=r"base\.yaml takes its _BASE_ from http://127"):
            read_config(tmp_path / f"{name}.yaml")
    assert fetched == []


def test_config_that_is_its_own_base(tmp_path):
    """One sentence instead of a RecursionError, also where it is named by another path."""
    (tmp_path / "a.yaml").write_text('_BASE_: "b.yaml"\nVERSION: 2\n')
    (tmp_path / "b.yaml").write_text(f'_BASE_: "../{tmp_path.name}/a.yaml"\nVERSION: 2\n')
    with pytest.raises(FileError, match=r"a\.yaml is its own _BASE_"):
        read_config(tmp_path / "a.yaml")
