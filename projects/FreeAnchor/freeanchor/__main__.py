"""The command line: `freeanchor COMMAND`, or `python -m freeanchor COMMAND`.

Each command is a function that adds its arguments and one that runs it, which imports what it
needs: --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .command_line import (
    Command,
    add_dataset_argument,
    add_options_argument,
    number,
    one_sentence,
)
from .errors import FreeAnchorError
from .model_commands import MODEL_COMMANDS


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """What the commands that look at a finished run share."""
    add_dataset_argument(parser)
    add_options_argument(parser, "the config of the run")


def _add_visualize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of train_net.py")
    _add_run_options(parser)
    parser.add_argument(
        "--num-images", type=number(int), default=8, help="of each data set (default: 8)"
    )
    parser.add_argument(
        "--score-thresh",
        type=number(float, 0, 1),
        help="least score (default: what the evaluation recommends for each class, or else 0.5)",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        metavar="FILE",
        help="draw the matching of these, side by side; a name is of a file in OUTPUT_DIR "
        "(default: model_final.pth, if it is there and has bags)",
    )


def _visualize(args: argparse.Namespace) -> None:
    from .modeling import has_bags
    from .visualization import read_run, write_pictures

    cfg = read_run(args.output_dir, args.dataset, args.opts)
    checkpoints = args.checkpoints
    if checkpoints is None:
        is_there = (args.output_dir / "model_final.pth").is_file()
        checkpoints = ["model_final.pth"] if is_there and has_bags(cfg) else []
    checkpoints = [
        str(args.output_dir / x) if (args.output_dir / x).is_file() else x for x in checkpoints
    ]
    pictures = write_pictures(cfg, args.num_images, args.score_thresh, checkpoints)
    print(f"Detections beside ground truth, matching and curves are in {pictures}")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output_dirs", type=Path, nargs="+", metavar="output_dir", help="OUTPUT_DIR of one or two"
    )
    _add_run_options(parser)
    parser.add_argument(
        "--num-images", type=number(int), default=50, help="on the page (default: 50)"
    )
    parser.add_argument(
        "--score-thresh",
        type=number(float, 0, 1),
        help="where the slider begins (default: what the evaluation of the first run recommends, "
        "or else 0.5)",
    )


def _report(args: argparse.Namespace) -> None:
    from .visualization import read_run, write_report

    if len(args.output_dirs) > 2:
        raise FreeAnchorError(f"one or two runs fit on a page, not {len(args.output_dirs)}")
    cfgs = [read_run(path, args.dataset, args.opts) for path in args.output_dirs]
    print(f"The report is {write_report(cfgs, args.num_images, args.score_thresh)}")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a checkpoint file, or else what MODEL.WEIGHTS takes")
    parser.add_argument("out", type=Path, help="OUT.pth or OUT.safetensors; OUT.yaml is its config")


def _convert(args: argparse.Namespace) -> None:
    from detectron2.utils.logger import setup_logger

    from .checkpoint import convert_file

    setup_logger(name="freeanchor")
    convert_file(args.source, args.out)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder, YOLO's data.yaml, or a COCO file")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="kind", choices=("yolo", "voc"), help="the format of SOURCE")
    what.add_argument(
        "--boxes",
        action="append",
        choices=("xyxy", "cxcywh", "normalised"),
        help="what the boxes of the COCO file SOURCE are: corners, centre and size, or fractions "
        "of the image; may be given twice",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the images are")
    parser.add_argument(
        "--split", metavar="NAME", help="a file that lists names; or train, val, test of data.yaml"
    )


def _import(args: argparse.Namespace) -> None:
    from .data import import_boxes, import_voc, import_yolo

    if not args.source.exists():
        raise FreeAnchorError(f"there is no {args.source}")
    if args.boxes:
        if args.images or args.split:
            raise FreeAnchorError("--images and --split go with --from, not with --boxes")
        import_boxes(args.source, args.out, args.boxes)
        print(f"Wrote {args.out}")
        return
    read = {"voc": import_voc, "yolo": import_yolo}[args.kind]
    images = read(args.source, args.out, args.images, args.split)
    print(f"Wrote {args.out}: use it by --dataset NAME {args.out} {images}")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", metavar="ANNOTATIONS.json")
    parser.add_argument("images", metavar="IMAGE_DIR")
    parser.add_argument(
        "--write", type=Path, metavar="OUT.json", help="write a copy of what can be used"
    )
    parser.add_argument("--config-file", default="", help="of the model to be trained on it")


def _check(args: argparse.Namespace) -> None:
    from .config import CONFIGS, read_config
    from .data import check_dataset
    from .errors import DatasetError

    cfg = read_config(args.config_file or CONFIGS / "Base-FreeAnchor.yaml")
    lines, is_trainable = check_dataset(args.annotations, args.images, cfg, args.write)
    print("\n".join(lines))
    if not is_trainable:
        raise DatasetError(f"{args.annotations} cannot be trained on as it is")


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the non_finite_*.pth that train_net.py names")


def _replay(args: argparse.Namespace) -> None:
    from .engine import replay

    print(replay(args.file))


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out_dir", type=Path)
    for option, default in (("--num-train", 400), ("--num-val", 80), ("--seed", 0)):
        parser.add_argument(
            option, type=number(int), default=default, help="(default: %(default)s)"
        )
    parser.add_argument("--masks", action="store_true", help="with the masks of the objects")


def _shapes(args: argparse.Namespace) -> None:
    from .data import write_shapes

    write_shapes(args.out_dir, args.num_train, args.num_val, args.seed, args.masks)
    print(f"Wrote {args.num_train} training and {args.num_val} val images to {args.out_dir}")


def _add_anchors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", help="the COCO annotation file of the training set")
    parser.add_argument("image_dir")
    parser.add_argument("--config-file", required=True, help="of the training")
    add_options_argument(parser, "the config, as in the training")


def _anchors(args: argparse.Namespace) -> None:
    import numpy as np
    from detectron2.data import DatasetCatalog

    from .config import merge_options, read_config
    from .data import best_anchor_iou, propose_anchors, register_datasets, training_boxes
    from .data.anchors import GOOD_IOU

    cfg = read_config(args.config_file)
    merge_options(cfg, args.opts)
    register_datasets([("anchors", args.annotations, args.image_dir)])
    images = training_boxes(DatasetCatalog.get("anchors"), cfg)
    proposed = propose_anchors(images, cfg)
    generator = cfg.MODEL.ANCHOR_GENERATOR
    for name in ("the config's anchors", "the proposed ones"):
        iou = best_anchor_iou(images, cfg)
        print(
            f"Of {len(iou)} objects, {np.mean(iou >= GOOD_IOU):.1%} have an IoU of at least "
            f"{GOOD_IOU} with {name}; mean {iou.mean():.2f}"
        )
        generator.SIZES, generator.ASPECT_RATIOS = proposed
    print(
        f'MODEL.ANCHOR_GENERATOR.SIZES "{proposed[0]}" '
        f'MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS "{proposed[1]}"'
    )


_COMMANDS: dict[str, Command] = {
    "visualize": (
        "draw the detections, the matching and the curves of a run",
        _add_visualize,
        _visualize,
    ),
    "report": (
        "put a run, or two side by side, on one page, OUTPUT_DIR/report.html",
        _add_report,
        _report,
    ),
    "convert": ("convert weights of other projects to Detectron2's format", _add_convert, _convert),
    "import": (
        "write a COCO file of VOC's or YOLO's annotations, or of boxes of another convention",
        _add_import,
        _import,
    ),
    "check": ("look at a data set before it is trained on", _add_check, _check),
    "replay": ("run a training step that was not finite again", _add_replay, _replay),
    "shapes": ("draw the embedded data set", _add_shapes, _shapes),
    "anchors": ("propose anchors that fit a training set", _add_anchors, _anchors),
    **MODEL_COMMANDS,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: those of the command line, by default the process's.
    """
    parser = argparse.ArgumentParser(prog="freeanchor", description="FreeAnchor for Detectron2.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (description, add_arguments, _) in _COMMANDS.items():
        add_arguments(commands.add_parser(name, help=description, description=description))
    args = parser.parse_args(arguments)
    # Which `import freeanchor` left to the command.
    from . import compat  # noqa: F401  # isort: skip
    from . import checkpoint  # noqa: F401

    with one_sentence(f"freeanchor {args.command}"):
        _COMMANDS[args.command][2](args)


if __name__ == "__main__":
    main()
