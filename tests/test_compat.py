"""Detectron2 0.6 on today's packages. What imports change runs in a fresh interpreter."""

import subprocess
import sys
import warnings

import detectron2.layers
import detectron2.structures
import pytest
import torch
from conftest import IS_DETECTRON2_MAIN
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import anchor_generator, build_model
from detectron2.modeling.meta_arch import retinanet
from freeanchor import compat


def run(code):
    """Output of `code` in a new interpreter; its traceback if it fails."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_that_detectors_need_can_be_imported():
    """Model zoo, trainer, evaluators and visualiser import after `freeanchor`."""
    code = """
import freeanchor
import detectron2.engine, detectron2.evaluation, detectron2.model_zoo, detectron2.utils.visualizer
import detectron2.data.transforms
print(len(detectron2.model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")) > 0)
"""
    assert run(code) == "True"


def test_every_numpy_alias_that_detectron2_uses_is_there():
    """Not only those that a training happens to reach."""
    code = """
import freeanchor, numpy, pathlib, re, detectron2
used = set()
for file in pathlib.Path(detectron2.__file__).parent.rglob("*.py"):
    code = re.sub("#.*", "", file.read_text())
    used |= set(re.findall(r"\\bnp\\.([a-z]+)\\b", code))
print(len(used) > 50, sorted(name for name in used if not hasattr(numpy, name)))
"""
    assert run(code) == "True []"


def test_without_pkg_resources():
    """Setuptools 81 and later do not have it: the stand-in finds the configs of the model zoo."""
    code = """
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *a: None if name == "pkg_resources" else find(name, *a)
sys.modules.pop("pkg_resources", None)
import freeanchor
import os, pkg_resources
assert not hasattr(pkg_resources, "__file__"), "this is the real one"
from detectron2 import model_zoo
print(os.path.isfile(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")))
"""
    assert run(code) == "True"


def test_what_is_there_is_left_alone():
    """Names that NumPy and Pillow still have are not replaced."""
    code = """
import numpy, PIL.Image
numpy.int, PIL.Image.LINEAR = "mine", "mine too"
real_bool = numpy.bool_
import freeanchor
assert numpy.int == "mine" and PIL.Image.LINEAR == "mine too"
assert "bool" not in numpy.__dict__ or numpy.bool in (real_bool, bool)
print(numpy.float is float, numpy.object is object)
"""
    assert run(code) == "True True"


def test_compiled_ops_that_are_there_are_used():
    """A Detectron2 with compiled ops keeps them."""
    code = """
import importlib.machinery as machinery, importlib.util as util, sys, types
find = util.find_spec
spec = machinery.ModuleSpec("detectron2._C", None)
util.find_spec = lambda name, *a: spec if name == "detectron2._C" else find(name, *a)
sys.modules["detectron2._C"] = real = types.ModuleType("detectron2._C")
from freeanchor import compat
print(compat.HAS_COMPILED_OPS, sys.modules["detectron2._C"] is real)
"""
    assert run(code) == "True True"


@pytest.mark.skipif(compat.HAS_COMPILED_OPS, reason="this Detectron2 has its compiled ops")
@pytest.mark.parametrize(
    "use",
    [
        "from detectron2.layers import batched_nms_rotated as f; t = torch.rand(2, 5);"
        " f(t, t[:, 0], t[:, 0].long(), 0.5)",
        "from detectron2.structures import RotatedBoxes as B, pairwise_iou_rotated as f;"
        " b = B(torch.rand(2, 5)); f(b, b)",
        "from detectron2 import _C; _C.COCOevalEvaluateImages",
        "torch.ops.detectron2.roi_align_rotated_forward(torch.rand(1, 1, 4, 4))",
    ],
    ids=["nms_rotated", "box_iou_rotated", "coco_eval", "torch_ops"],
)
def test_a_missing_op_says_how_to_get_it(use):
    """The use of a compiled op ends in a message, not in an AttributeError."""
    code = f"""
import freeanchor, torch
try:
    {use}
except RuntimeError as e:
    print(e)
"""
    message = run(code)
    assert "without its compiled ops" in message
    assert "INSTALL.md" in message


def test_without_detectron2():
    """A missing Detectron2 is named, with what to do."""
    code = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
try:
    import freeanchor
except ImportError as e:
    print(e)
"""
    message = run(code)
    assert "needs Detectron2, which is not installed" in message
    assert "make setup" in message


def test_the_tutorials_evaluator(register, tmp_path):
    """`COCOEvaluator(name, output_dir=...)` evaluates, also without compiled ops."""
    box = [10.0, 10.0, 40.0, 30.0]
    evaluator = COCOEvaluator(register("a", [(1, 0, box, False)]), output_dir=str(tmp_path))
    evaluator.reset()
    found = detectron2.structures.Instances((300, 400))
    found.pred_boxes = detectron2.structures.Boxes([[10.0, 10.0, 50.0, 40.0]])
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_export_and_analysis(cfg):
    """`detectron2.export` and `detectron2.utils.analysis` do without Caffe2."""
    from detectron2.export import TracingAdapter, scripting_with_instances
    from detectron2.utils.analysis import FlopCountAnalysis, parameter_count

    model = build_model(cfg).eval()
    inputs = [{"image": torch.zeros(3, 64, 64)}]
    counts = [FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).total()]
    inputs = [{"image": torch.zeros(3, 128, 64)}]
    counts.append(FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).total())
    assert counts[1] == pytest.approx(2 * counts[0], rel=0.05)
    assert parameter_count(model)[""] == sum(p.numel() for p in model.parameters())
    assert callable(scripting_with_instances)
    assert len(TracingAdapter(model, inputs).flattened_inputs) == 1


@pytest.mark.parametrize(
    ("norm", "kind"), [("GN", torch.nn.GroupNorm), ("SyncBN", torch.nn.SyncBatchNorm)]
)
def test_norms_in_the_head(cfg, norm, kind):
    """`MODEL.RETINANET.NORM` takes what Detectron2 has, group norm in 32 groups too."""
    cfg.MODEL.RETINANET.NORM = norm
    found = [x for x in build_model(cfg).head.modules() if isinstance(x, kind)]
    assert len(found) >= 2 * cfg.MODEL.RETINANET.NUM_CONVS
    if norm == "GN":
        assert {x.num_groups for x in found} == {32}


@pytest.mark.skipif(IS_DETECTRON2_MAIN, reason="the main branch is left alone, and warns")
def test_anchors_without_a_warning(cfg):
    """The same anchors as ever, and nothing of torch.meshgrid in the log."""
    cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[8]], [[1.0]]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    spec = [detectron2.layers.ShapeSpec(stride=4)]
    torch.set_warn_always(True)
    try:
        generator = anchor_generator.build_anchor_generator(cfg, spec)
        (anchors,) = generator([torch.zeros(1, 1, 2, 3)])
    finally:
        torch.set_warn_always(False)
    centers = [(2.0, 2.0), (6.0, 2.0), (10.0, 2.0), (2.0, 6.0), (6.0, 6.0), (10.0, 6.0)]
    assert [tuple(x) for x in anchors.get_centers().tolist()] == centers


def test_what_detectron2_does_right_is_left_alone():
    """Functions are replaced in 0.6 only."""
    assert (retinanet.get_norm is detectron2.layers.get_norm) == IS_DETECTRON2_MAIN
    offsets = anchor_generator._create_grid_offsets
    assert offsets.__module__.startswith("detectron2") == IS_DETECTRON2_MAIN
