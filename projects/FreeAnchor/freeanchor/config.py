"""Config keys of FreeAnchor, and configs read without running what may be in them.

Yaml with Python tags can call any function while it is read. Here, plain values are all that a
file can make. Who trusts the source of another file sets FREEANCHOR_UNSAFE_LOAD=1: an environment
variable, because a config could set a config key.
"""

import os
import re
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .errors import FileError, FreeAnchorError

__all__ = [
    "CONFIGS",
    "add_freeanchor_config",
    "is_two_stage",
    "merge_config",
    "merge_options",
    "new_config",
    "parse_config",
    "read_config",
    "scored_part",
    "trainer_options",
    "value_of",
]

_UNSAFE = "FREEANCHOR_UNSAFE_LOAD"
OPT_IN = f"If you trust where it comes from, set the environment variable {_UNSAFE}=1"

# The configs of the repository, in the package: files and folders by their names there.
CONFIGS = Path(__file__).parent / "configs"


def add_freeanchor_config(cfg: CfgNode) -> None:
    """Add the keys of FreeAnchor that `MODEL.RETINANET` does not have.

    Everything else (focal loss, Smooth L1, box weights, prior, test) is read from `MODEL.RETINANET`
    and set in `configs/Base-FreeAnchor.yaml`.

    Args:
        cfg: a Detectron2 config, changed in place.
    """
    cfg.MODEL.FREEANCHOR = CfgNode()
    # Number of anchors in the bag of an object: those with the highest IoU.
    cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK = 50
    # IoU of a predicted box with an object from which its anchor stops being pure background.
    cfg.MODEL.FREEANCHOR.BBOX_THRESHOLD = 0.6
    # Weight of the localisation loss inside exp(), which makes it a probability. 0.75 is for
    # MODEL.RETINANET.BBOX_REG_LOSS_TYPE "smooth_l1". Set 5.5 where you set that to "giou" or "iou":
    # these losses are at most 2 and 1.
    cfg.MODEL.FREEANCHOR.BBOX_REG_WEIGHT = 0.75

    # Names of the classes, in the order of the model's outputs; empty: those of the first data set.
    # Data sets are brought to them by name.
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = []
    # Whether crowd regions (`iscrowd`, `ignore`) are neither object nor background in training: an
    # anchor whose predicted box lies mostly inside one has no negative loss. Off as in the paper.
    cfg.MODEL.FREEANCHOR.IGNORE_REGIONS = False

    # Whose objects the losses are divided by: those of all processes ("global"), which gives the
    # gradient of one large batch, or as in the paper those of each one ("local").
    cfg.MODEL.FREEANCHOR.NORMALIZER = "global"

    # How models of other implementations differ from Detectron2's RetinaNet; see also
    # RoundedAnchorGenerator, a name for MODEL.ANCHOR_GENERATOR.NAME.
    # Feature that P6 is computed from: "res5" (Detectron2, MMDetection) or "p5" (the paper's
    # repository). This and the next two need the backbone build_freeanchor_resnet_fpn_backbone.
    cfg.MODEL.FREEANCHOR.P6_IN_FEATURE = "res5"
    # Whether P7 is computed from ReLU(P6) or, as in MMDetection, from P6.
    cfg.MODEL.FREEANCHOR.P7_RELU = True
    # Whether P6 and P7 have MODEL.FPN.NORM as P3 to P5 do, which neither has in Detectron2.
    cfg.MODEL.FREEANCHOR.P6P7_NORM = False
    # Whether boxes end on their last pixel, as in the paper's repository, instead of behind it.
    # The two conventions differ by a fraction of a pixel where an image is resized.
    cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS = False

    # LTM has the keys of FreeAnchor, BBOX_THRESHOLD for its log alone, and this one. What an object
    # chooses from: "anchors", or "points", the centres of all cells, from which boxes are predicted
    # by their four sides; MODEL.ANCHOR_GENERATOR.SIZES are then the strides, with ratio 1.
    cfg.MODEL.LTM = CfgNode()
    cfg.MODEL.LTM.CANDIDATES = "anchors"

    # The backbone build_timm_fpn_backbone: a model of timm with a feature pyramid.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = ""
    # Which of its features are res3, res4 and res5; without any, those of stride 8, 16 and 32.
    cfg.MODEL.TIMM.OUT_INDICES = []
    # As many features, from the first, are computed by layers that are not trained.
    cfg.MODEL.TIMM.FREEZE_AT = 0
    # "FrozenBN" fixes statistics and weights of its batch norms, "" trains them.
    cfg.MODEL.TIMM.NORM = ""
    # Rate of stochastic depth, for models that have it.
    cfg.MODEL.TIMM.DROP_PATH = 0.0

    # The dtype of SOLVER.AMP: "bfloat16", "float16", or "auto": float16 on a GPU, and on a CPU
    # bfloat16 where it has instructions for it, float32 elsewhere.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # How images and weights lie in memory: "contiguous" (NCHW), "channels_last" (NHWC), or "auto",
    # which is channels_last where that was measured to be faster: in bfloat16 on a CPU.
    cfg.MODEL.MEMORY_FORMAT = "auto"
    # Whether torch.compile compiles backbone and head. It takes minutes before the first iteration.
    cfg.MODEL.COMPILE = False
    # Two scales, as (0.1, 2.0), for large-scale jitter: a training image is resized by a random
    # multiple, between them, of what makes it fit into a square of MAX_SIZE_TRAIN, and then cropped
    # and padded to that square. MIN_SIZE_TRAIN has no meaning then. Empty for none.
    cfg.INPUT.SCALE_JITTER = []
    # The value of 16-bit, 32-bit and float images that becomes 255; 0: 65535 for 16 bits, and the
    # others are refused.
    cfg.INPUT.MAX_VALUE = 0.0
    # Larger images are refused: by default at Pillow's limit, which keeps hostile files out.
    cfg.INPUT.MAX_PIXELS = 178956970
    # So many images that cannot be read are replaced by others while training, in each process
    # that loads data, before it is an error.
    cfg.DATALOADER.MAX_BROKEN_IMAGES = 10

    # Detectron2 0.6 has the sampler RandomSubsetTrainingSampler, but not its key.
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # What makes the step: "SGD", Detectron2's, or "AdamW", which wants a lower learning rate.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the network under the pyramid, as a multiple of that of all else.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0
    # Parts that the batch of a process is computed in, one after another: less memory, same result.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Moving average of the weights, which is then evaluated and loaded: 0.999, say; 0 for none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # A checkpoint is also written every so many minutes; 0 for never.
    cfg.SOLVER.CHECKPOINT_MINUTES = 15
    # The newest of the checkpoints with an iteration in their names that are kept; 0 for all.
    cfg.SOLVER.CHECKPOINTS_KEPT = 5
    # Steps with a loss or gradient that is not finite which are left out before the run ends.
    cfg.SOLVER.SKIP_NON_FINITE = 0

    # The metric of model_best.pth, with TEST.EVAL_PERIOD. With several data sets it is that of the
    # first; "NAME/bbox/AP" is that of another.
    cfg.TEST.BEST_METRIC = "bbox/AP"
    # Evaluations without a better TEST.BEST_METRIC after which the training ends; 0 for never.
    cfg.TEST.EARLY_STOPPING = 0
    # Detect in the precision of SOLVER.AMP.PRECISION; boxes, scores and NMS stay in float32.
    cfg.TEST.AMP = CfgNode({"ENABLED": False})
    # Also evaluate NMS recall (paper, section 4.2).
    cfg.TEST.NMS_RECALL = False
    # Also evaluate the proposals of a two-stage model: which objects they find at all.
    cfg.TEST.PROPOSAL_RECALL = False
    # Longest side of an image in TEST.AUG, over its shortest as in MIN_SIZES; 0 for MAX_SIZE alone.
    cfg.TEST.AUG.MAX_SIZE_RATIO = 0.0


def trainer_options(cfg: CfgNode) -> list[str]:
    """The keys with which `freeanchor.engine.Trainer` is told what no other trainer does.

    Returns:
        Those of the keys that :func:`add_freeanchor_config` adds outside of the model that have
        other values than its own, and `IGNORE_REGIONS`, which is of the model and of the data.
    """
    found = []

    def compare(ours: CfgNode, theirs: CfgNode, cfg: CfgNode, name: str) -> None:
        for key, value in ours.items():
            if key not in theirs:
                if key in cfg and cfg[key] != value:
                    found.append(f"{name}.{key}")
            elif isinstance(value, CfgNode):
                compare(value, theirs[key], cfg[key], f"{name}.{key}")

    ours, theirs = new_config(), get_cfg()
    for part in ("INPUT", "DATALOADER", "SOLVER", "TEST"):
        compare(ours[part], theirs[part], cfg[part], part)
    if cfg.MODEL.FREEANCHOR.IGNORE_REGIONS:
        found.append("MODEL.FREEANCHOR.IGNORE_REGIONS")
    return found


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as `MODEL.MASK_ON`.

    Raises:
        KeyError, TypeError: there is no such key.
    """
    return reduce(getitem, key.split("."), cfg)


def is_two_stage(cfg: CfgNode) -> bool:
    """Whether the model of a config has a first stage for proposals and ROI heads."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN")


def scored_part(cfg: CfgNode) -> tuple[str, CfgNode]:
    """The part of a model that tells classes: its node in the config, and what that is called.

    It has the keys NUM_CLASSES and SCORE_THRESH_TEST.
    """
    name = "ROI_HEADS" if is_two_stage(cfg) else "RETINANET"
    return f"MODEL.{name}", cfg.MODEL[name]


def is_unsafe_allowed() -> bool:
    """Whether the user trusts all files, see the top of this module."""
    return os.environ.get(_UNSAFE) == "1"


def new_config() -> CfgNode:
    """The defaults of Detectron2 and FreeAnchor."""
    cfg: CfgNode = get_cfg()
    add_freeanchor_config(cfg)
    return cfg


def read_config(path: str | Path) -> CfgNode:
    """Read a config file on top of the defaults of Detectron2 and FreeAnchor.

    Raises:
        FileError: see :func:`merge_config`.
    """
    cfg = new_config()
    merge_config(cfg, path)
    return cfg


def parse_config(text: str) -> CfgNode:
    """The config that `cfg.dump()` wrote.

    Raises:
        FreeAnchorError: it has keys or values that this version does not have.
    """
    cfg = new_config()
    try:
        cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise FreeAnchorError(_reason(e)) from e
    return cfg


def merge_config(cfg: CfgNode, path: str | Path) -> None:
    """Merge a yaml file into a config, like `cfg.merge_from_file` but never by unsafe loading.

    Raises:
        FileError: the file is not there or no yaml, a LazyConfig, holds Python objects or unknown
            keys, has a `_BASE_` from the net, or makes Detectron2 read pickles.
    """
    if _is_lazy(Path(path)):
        raise FileError(
            f"{path} is a LazyConfig: give a yaml config of the same model, and the weights with "
            "it, see docs/lazyconfig.md"
        )
    if not is_unsafe_allowed():
        _check_bases(str(path), ())
    try:
        cfg.merge_from_file(str(path), allow_unsafe=is_unsafe_allowed())
    except yaml.constructor.ConstructorError as e:
        raise FileError(
            f"{path}: {e.problem} {e.problem_mark}. Python objects could run code: write the value "
            f"out, or: {OPT_IN[0].lower()}{OPT_IN[1:]}"
        ) from e
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise FileError(f"{path} cannot be read: {e}") from e
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        # What yacs and Detectron2 make of unknown keys and of values of another type.
        raise FileError(f"{path}: {_reason(e)}") from e
    if cfg.MODEL.LOAD_PROPOSALS and not is_unsafe_allowed():
        raise FileError(
            f"{path}: MODEL.LOAD_PROPOSALS has Detectron2 read pickles, which could run code; "
            "FreeAnchor needs no proposals, so leave it out"
        )


def _is_lazy(path: Path) -> bool:
    """Whether a file is a LazyConfig: its Python, or what Detectron2's trainer writes of it."""
    if path.suffix == ".py":
        return path.is_file()
    try:
        return re.search(r"^\s*_target_:", path.read_text(encoding="utf-8"), re.M) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _check_bases(path: str, seen: tuple[str, ...]) -> None:
    """Refuse a `_BASE_` from the net, which Detectron2 would fetch, and one that is its own base.

    Files that cannot be read are left to Detectron2.

    Raises:
        FileError: the message says which file has the base.
    """
    real = os.path.realpath(path)  # by whatever way it is named
    if real in seen:
        raise FileError(f"{path} is its own _BASE_, by {' and '.join(seen)}")
    try:
        with PathManager.open(path) as f:
            content = yaml.safe_load(f)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return
    bases = content.get("_BASE_", []) if isinstance(content, dict) else []
    for base in [bases] if isinstance(bases, str) else bases:
        if "://" in str(base):
            raise FileError(
                f"{path} takes its _BASE_ from {base}: get that file and name it in _BASE_, or: "
                f"{OPT_IN[0].lower()}{OPT_IN[1:]}"
            )
        name = os.path.expanduser(str(base))
        _check_bases(os.path.join(os.path.dirname(path), name), (*seen, real))


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> None:
    """Change a config by the keys and values of a command line, one after another.

    Raises:
        FreeAnchorError: a key is unknown or has no value, or a value is of another type.
    """
    for i in range(0, len(options), 2):
        option = list(options[i : i + 2])
        if str(option[0]).startswith("--"):
            raise FreeAnchorError(
                f"{option[0]} comes behind keys of the config: put it before them"
            )
        try:
            cfg.merge_from_list(option)
        except (AssertionError, KeyError, TypeError, ValueError) as e:
            raise FreeAnchorError(f"{' '.join(map(str, option))}: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    """What yacs and Detectron2 say, without the quotes of a KeyError."""
    return str(error.args[0]) if error.args else repr(error)
