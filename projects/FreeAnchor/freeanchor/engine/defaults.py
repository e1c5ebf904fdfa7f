"""The command line of a training, its config, and what can be checked before it starts."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..checkpoint import find, read_class_names, replacing
from ..checkpoint.described import is_same
from ..checkpoint.run_folder import LAST, checkpoints_in, last_checkpoint, refuse_best_alone
from ..command_line import add_dataset_argument, number
from ..config import (
    is_two_stage,
    merge_config,
    merge_options,
    new_config,
    read_config,
)
from ..data import (
    NUM_CLASSES_FROM_DATA,
    ImageReader,
    check_images,
    num_channels,
    register_datasets,
    report_findings,
    resolve_classes,
)
from ..errors import FileError, FreeAnchorError, check_folder
from ..modeling import is_one_stage
from ..modeling.backbone import check_deformable
from ..modeling.precision import choose_precision
from ..values import check_values
from .checkpoints import has_best
from .precision import set_float32_precision

__all__ = [
    "argument_parser",
    "build_config",
    "check",
    "check_config",
    "check_run",
    "keep_config",
    "report_changes",
    "scale_schedule",
    "setup",
]

logger = logging.getLogger(__name__)

# How much larger than the config file's a learning rate per image may be without a warning.
_TOLERATED = 2.0
# Where a run is, and what it began with: that does not matter to one that goes on.
_NOT_OF_THE_RUN = ("OUTPUT_DIR", "MODEL.WEIGHTS", "SEED")


def argument_parser() -> argparse.ArgumentParser:
    """Build Detectron2's parser with the options of FreeAnchor."""
    parser: argparse.ArgumentParser = default_argument_parser()
    add_dataset_argument(parser)
    parser.add_argument(
        "--export-safetensors",
        action="store_true",
        help="also write the weights, trained or with --eval-only, to model_final.safetensors",
    )
    parser.add_argument(
        "--timeout",
        type=number(float),
        default=30,
        metavar="MINUTES",
        help="how long a process waits for the others before it gives up (default: 30)",
    )
    return parser


def build_config(args: argparse.Namespace) -> CfgNode:
    """Read the config and register the data sets.

    Args:
        args: what :func:`argument_parser` gives.

    Raises:
        FreeAnchorError: they cannot be read, or do not fit together.
    """
    if not os.path.isfile(args.config_file):
        raise FreeAnchorError(f"--config-file: there is no file {args.config_file!r}")
    cfg = new_config()
    for part in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):
        part.NUM_CLASSES = NUM_CLASSES_FROM_DATA
    merge_config(cfg, args.config_file)
    merge_options(cfg, args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(args.dataset, cfg.MODEL.MASK_ON)
    if args.eval_only and not cfg.MODEL.FREEANCHOR.CLASS_NAMES:
        cfg.MODEL.FREEANCHOR.CLASS_NAMES = _trained_classes(cfg, args)
    resolve_classes(cfg, _dataset_names(cfg, args))
    cfg.freeze()
    return cfg


def _trained_classes(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """The classes of the weights that are to be evaluated, as far as they say."""
    if args.resume and (found := checkpoints_in(cfg.OUTPUT_DIR)):
        try:
            return read_class_names(str(found[0]))
        except FileError:  # damaged: loading takes the one before, and compares the classes
            return []
    return read_class_names(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else []


def _dataset_names(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """The data sets that this run needs, training first."""
    return [*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]


def check(args: argparse.Namespace) -> None:
    """Find what would stop the run later, once and before any process is launched.

    Args:
        args: what :func:`argument_parser` gives. `num_gpus` becomes 1 where there is no GPU.

    Raises:
        FreeAnchorError: the command line, a data set, the config or the weights cannot be used.
    """
    _check_devices(args)
    cfg = build_config(args)
    if not cfg.OUTPUT_DIR:
        raise FreeAnchorError("OUTPUT_DIR is empty: name the folder of the run")
    check_folder(cfg.OUTPUT_DIR)
    check_config(cfg, training=not args.eval_only)
    if args.eval_only:
        if args.resume and not checkpoints_in(cfg.OUTPUT_DIR) and not cfg.MODEL.WEIGHTS:
            raise FreeAnchorError(
                f"--eval-only --resume: there is no checkpoint in {cfg.OUTPUT_DIR}: give the "
                "OUTPUT_DIR of a training, or MODEL.WEIGHTS instead of --resume"
            )
        if not cfg.MODEL.WEIGHTS and not args.resume:
            raise FreeAnchorError("--eval-only needs MODEL.WEIGHTS, or --resume")
    if args.resume:
        _check_place(args, cfg.OUTPUT_DIR)
    elif not args.eval_only:
        _check_output(cfg.OUTPUT_DIR)
    check_images(_dataset_names(cfg, args), ImageReader.from_config(cfg))
    if cfg.MODEL.WEIGHTS and not args.resume:
        find(cfg.MODEL.WEIGHTS)


def check_config(cfg: CfgNode, training: bool) -> None:
    """Refuse values with which a run would end late, or do something else without a word.

    Args:
        cfg: config of the run.
        training: whether it is to be trained, and not only evaluated.

    Raises:
        FreeAnchorError: the message names the keys.
    """
    check_values(cfg, training)
    choose_precision(cfg, cfg.SOLVER.AMP.ENABLED)
    check_deformable(cfg, training)
    if training:
        if cfg.TEST.EARLY_STOPPING and not has_best(cfg):
            raise FreeAnchorError(
                "TEST.EARLY_STOPPING needs TEST.EVAL_PERIOD, TEST.BEST_METRIC and DATASETS.TEST"
            )
        if not cfg.DATASETS.TRAIN:
            raise FreeAnchorError("DATASETS.TRAIN is empty, so there is nothing to train on")
        world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if world_size and cfg.SOLVER.IMS_PER_BATCH % world_size:
            raise FreeAnchorError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of "
                f"SOLVER.REFERENCE_WORLD_SIZE {world_size}, the number of GPUs that the config is "
                "for: add SOLVER.REFERENCE_WORLD_SIZE 0 to have your values taken as they are"
            )
    _check_pixels(cfg)
    _check_stages(cfg)
    _check_test(cfg)


def _check_pixels(cfg: CfgNode) -> None:
    channels = num_channels(cfg.INPUT.FORMAT)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise FreeAnchorError(
                f"INPUT.FORMAT {cfg.INPUT.FORMAT} has {channels} channels, and MODEL.{key} has "
                f"{len(cfg.MODEL[key])} values: give one for each channel"
            )


def _check_stages(cfg: CfgNode) -> None:
    """Refuse what a model of one stage, or of two, does not have."""
    test, one_stage = cfg.TEST, is_one_stage(cfg)
    # Architectures of the user's own are neither, and may have masks.
    for kind, key, is_wrong in (
        ("two stages", "MODEL.MASK_ON", cfg.MODEL.MASK_ON and one_stage),
        ("two stages", "TEST.PROPOSAL_RECALL", test.PROPOSAL_RECALL and not is_two_stage(cfg)),
        ("one stage", "TEST.NMS_RECALL", test.NMS_RECALL and not one_stage),
        ("one stage", "TEST.AUG.ENABLED", test.AUG.ENABLED and not one_stage),
    ):
        if is_wrong:
            raise FreeAnchorError(
                f"{key} is of models with {kind}, and MODEL.META_ARCHITECTURE is "
                f"{cfg.MODEL.META_ARCHITECTURE}: leave it out, or take another config"
            )


def _check_test(cfg: CfgNode) -> None:
    """Refuse what would end the first evaluation."""
    names = list(cfg.DATASETS.TEST)
    if len(set(names)) < len(names):
        raise FreeAnchorError(f"DATASETS.TEST has a data set twice: {', '.join(names)}")
    if cfg.TEST.AUG.ENABLED and not cfg.TEST.AUG.MIN_SIZES:
        raise FreeAnchorError("TEST.AUG.MIN_SIZES is empty: name a size of the shorter side")
    for expected in cfg.TEST.EXPECTED_RESULTS:
        match expected:
            case [str(), str(), int() | float(), int() | float()]:
                continue
        raise FreeAnchorError(
            f"TEST.EXPECTED_RESULTS has {expected!r}: give lists of task, metric, value and "
            "tolerance, as [['bbox', 'AP', 38.7, 0.1]]"
        )
    if cfg.TEST.EXPECTED_RESULTS and len(names) != 1:
        raise FreeAnchorError(
            f"TEST.EXPECTED_RESULTS is of one data set, and DATASETS.TEST has {len(names)}"
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise FreeAnchorError(
            "MODEL.LOAD_PROPOSALS: proposals are made here and not read, so leave it out"
        )


def _check_devices(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        if args.num_gpus > 1 or args.num_machines > 1:
            nodes = f"--nnodes {args.num_machines} " if args.num_machines > 1 else ""
            raise FreeAnchorError(
                f"--num-gpus {args.num_gpus}: there is no CUDA GPU. Several processes on CPUs are "
                f"started by: torchrun {nodes}--nproc-per-node {args.num_gpus} {sys.argv[0]} ..."
            )
        args.num_gpus = 1  # one process, on the CPU
    elif args.num_gpus > torch.cuda.device_count():
        raise FreeAnchorError(
            f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}"
        )
    own_address = ("auto", argument_parser().get_default("dist_url"))
    if args.num_machines > 1 and args.dist_url in own_address:  # where nobody else would come
        raise FreeAnchorError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, on all of them "
            "that of the first machine and a free port of it"
        )


def keep_config(cfg: CfgNode) -> None:
    """Write the config of a run to its folder, where all commands look for it."""
    if comm.is_main_process():
        with replacing(Path(cfg.OUTPUT_DIR) / "config.yaml") as f:
            f.write(cfg.dump().encode())


def report_changes(cfg: CfgNode) -> None:
    """Say which values a run goes on with that it did not have before, by its `config.yaml`.

    An option that was forgotten at `--resume` would never be seen: the file is written anew.
    """
    path = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if not comm.is_main_process() or not path.is_file():
        return
    try:
        changes = list(_changes(CfgNode.load_cfg(path.read_text(encoding="utf-8")), cfg))
    except (AssertionError, AttributeError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # cut off, or written by something else
    if changes:
        logger.warning(f"Going on with other values than before ({path}): {'; '.join(changes)}")


def _changes(before: CfgNode, now: CfgNode, prefix: str = "") -> Iterator[str]:
    """The keys that both have, with other values."""
    for key in sorted(before.keys() & now.keys()):
        name, old, new = f"{prefix}{key}", before[key], now[key]
        if isinstance(old, CfgNode) and isinstance(new, CfgNode):
            yield from _changes(old, new, f"{name}.")
        elif name not in _NOT_OF_THE_RUN and not is_same(old, new):
            yield f"{name} {new!r} instead of {old!r}"


def _check_place(args: argparse.Namespace, output_dir: str) -> None:
    """Refuse to start anew beside what is left of a run, or one that was moved."""
    if checkpoints_in(output_dir):
        return
    refuse_best_alone(output_dir)
    config = Path(args.config_file)
    if last_checkpoint(config.parent) and "OUTPUT_DIR" not in args.opts:
        raise FreeAnchorError(
            f"--resume: there is no checkpoint in {output_dir}, the OUTPUT_DIR of {config}, but "
            f"beside that file: add OUTPUT_DIR {config.parent}"
        )


def check_run(cfg: CfgNode) -> None:
    """Refuse to go on, after a restart, with a run that the first start was refused for.

    Args:
        cfg: config of the run, which is that in its folder.

    Raises:
        FreeAnchorError: another run is there.
    """
    config = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if config.is_file() and config.read_bytes() != cfg.dump().encode():
        _check_output(cfg.OUTPUT_DIR)


def _check_output(output_dir: str) -> None:
    """Refuse to mix two runs in one folder, or a training with what other weights have found."""
    folder = Path(output_dir)
    results = folder / "inference" / "results.json"
    left = (folder / LAST, *folder.glob("model_*.pth"), folder / "metrics.json", results)
    for path in left:
        if path.is_file() and path.stat().st_size:
            raise FreeAnchorError(
                f"OUTPUT_DIR {output_dir} holds the results of an evaluation ({path.name}): choose "
                "another folder"
                if path == results
                else f"OUTPUT_DIR {output_dir} holds a run already ({path.name}): add --resume to "
                "go on with it, or choose another folder"
            )


def _device_warning(cfg: CfgNode, args: argparse.Namespace) -> str:
    """What to say of a run that no GPU is used for, empty if one is or none is wanted."""
    if not torch.cuda.is_available():
        return "There is no CUDA GPU: running on the CPU"
    if cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE" not in args.opts:
        return (
            f"Running on the CPU, as {args.config_file} says, perhaps of a machine without a GPU: "
            "add MODEL.DEVICE cuda to use the GPU of this one"
        )
    return ""


def _learning_rate_warning(cfg: CfgNode, file: CfgNode) -> str:
    """What to say of a learning rate that is for larger batches, empty if it is not.

    A file without a rate of its own (0) has none to compare with.

    Args:
        cfg: config of the run, scaled by `SOLVER.REFERENCE_WORLD_SIZE`.
        file: the config file as it is.
    """
    ours, theirs = cfg.SOLVER, file.SOLVER
    scale = ours.IMS_PER_BATCH / theirs.IMS_PER_BATCH
    if not theirs.BASE_LR or _TOLERATED * theirs.BASE_LR * scale >= ours.BASE_LR:
        return ""
    scaled = {
        "BASE_LR": f"{theirs.BASE_LR * scale:.4g}",
        "MAX_ITER": round(theirs.MAX_ITER / scale),
        "STEPS": f'"{tuple(round(x / scale) for x in theirs.STEPS)}"',
        "WARMUP_ITERS": round(theirs.WARMUP_ITERS / scale),
    }
    return (
        f"SOLVER.BASE_LR {ours.BASE_LR:.4g} with batches of {ours.IMS_PER_BATCH} images is "
        f"{ours.BASE_LR / (theirs.BASE_LR * scale):.3g} times what the config file has for each "
        f"image ({theirs.BASE_LR:.4g} with {theirs.IMS_PER_BATCH}), and the losses may become NaN. "
        "Scaled, it is: " + " ".join(f"SOLVER.{key} {value}" for key, value in scaled.items())
    )


def scale_schedule(cfg: CfgNode) -> CfgNode:
    """Scale a config to the processes, as Detectron2 does by `SOLVER.REFERENCE_WORLD_SIZE`.

    What rounds to 0 there, as the period of the evaluations in a short run, would never happen: it
    happens in each iteration.
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
    scaled.defrost()
    for part, key in (
        ("SOLVER", "MAX_ITER"),
        ("SOLVER", "CHECKPOINT_PERIOD"),
        ("TEST", "EVAL_PERIOD"),
    ):
        if cfg[part][key] > 0:
            scaled[part][key] = max(1, scaled[part][key])
    scaled.freeze()
    return scaled


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the config of a launched process, and set up logging and random numbers.

    As Detectron2's `default_setup`, which writes `config.yaml` in every case. Here that of a run
    that is there already stays: an evaluation may have other values, and a training writes its own
    when it has loaded, see :meth:`freeanchor.engine.Trainer.train`.
    """
    cfg = build_config(args)
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "freeanchor"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{cfg.dump()}")
    holds_run = (Path(cfg.OUTPUT_DIR) / "config.yaml").is_file() and checkpoints_in(cfg.OUTPUT_DIR)
    if args.eval_only and not holds_run:
        keep_config(cfg)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    set_float32_precision(cfg)
    if comm.is_main_process():
        report_findings(_dataset_names(cfg, args))
    if warning := _device_warning(cfg, args):
        logger.warning(warning)
    file = read_config(args.config_file)
    if not args.eval_only and (warning := _learning_rate_warning(scale_schedule(cfg), file)):
        logger.warning(warning)
    return cfg
