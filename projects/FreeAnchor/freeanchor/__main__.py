"""The command line: `freeanchor COMMAND`, or `python -m freeanchor COMMAND`.

Each command is a function that adds its arguments and one that runs it, which imports what it
needs: --help answers at once.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .command_line import add_dataset_argument, add_options_argument, one_sentence
from .errors import FreeAnchorError


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """What the commands that look at a finished run share."""
    add_dataset_argument(parser)
    add_options_argument(parser, "the config of the run")


def _add_visualize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of train_net.py")
    _add_run_options(parser)
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument(
        "--score-thresh",
        type=float,
        help="least score (default: what the evaluation recommends for each class, or else 0.5)",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        metavar="FILE",
        help="draw the matching of these, side by side; a name is of a file in OUTPUT_DIR "
        "(default: model_final.pth, if it is there and a FreeAnchor)",
    )


def _visualize(args: argparse.Namespace) -> None:
    from .visualization import read_run, write_pictures

    cfg = read_run(args.output_dir, args.dataset, args.opts)
    checkpoints = args.checkpoints
    if checkpoints is None:
        is_there = (args.output_dir / "model_final.pth").is_file()
        is_freeanchor = cfg.MODEL.META_ARCHITECTURE == "FreeAnchor"
        checkpoints = ["model_final.pth"] if is_there and is_freeanchor else []
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
    parser.add_argument("--num-images", type=int, default=50, help="on the page (default: 50)")
    parser.add_argument(
        "--score-thresh",
        type=float,
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

    if args.boxes:
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
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-val", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)


def _shapes(args: argparse.Namespace) -> None:
    from .data import write_shapes

    write_shapes(args.out_dir, args.num_train, args.num_val, args.seed)
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


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that use a trained model share."""
    parser.add_argument(
        "model",
        help="OUTPUT_DIR of train_net.py, weights with their config beside them, a config with "
        "MODEL.WEIGHTS, or a name in the model zoo",
    )
    parser.add_argument("--weights", default="", help="others than those that belong to the model")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="image or video files, folders, patterns with *, the number of a camera, or - for a "
        "list of images on standard input",
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["pictures"],
        choices=["pictures", "coco", "csv", "yolo"],
        help="what to write: annotated pictures and videos, detections.json, detections.csv, "
        "labels/*.txt (default: pictures)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        help="least score (default: what is recommended for each class, if the model comes with "
        "thresholds.json, or else 0.5)",
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="only these, names or indices"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", help="cpu or cuda (default: cuda, if there is a GPU)")
    parser.add_argument("--aug", action="store_true", help="detect at the scales of TEST.AUG")
    add_options_argument(parser, "the config of the model")


def _predict(args: argparse.Namespace) -> None:
    from .deploy import Predictor, predict

    def load() -> Predictor:
        predictor = Predictor(
            args.model,
            args.weights,
            confidence=args.confidence,
            classes=args.classes,
            device=args.device,
            batch_size=args.batch_size,
            aug=args.aug,
            options=args.opts,
        )
        print(predictor.describe_thresholds())
        return predictor

    unreadable = predict(load, args.sources, args.out, args.formats)
    print(f"What was found is in {args.out}")
    if unreadable:
        raise FreeAnchorError(f"{unreadable} of the inputs could not be read, see above")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="(default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any (default: 8000)")
    parser.add_argument(
        "--confidence",
        type=float,
        help="where the slider begins (default: the recommended score, or else 0.5)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda, if there is a GPU)")
    parser.add_argument("--max-megabytes", type=float, default=20, help="of a file (default: 20)")
    parser.add_argument(
        "--max-megapixels", type=float, default=40, help="of a picture (default: 40)"
    )
    parser.add_argument("--queue", type=int, default=16, help="pictures that wait (default: 16)")
    parser.add_argument(
        "--rate", type=float, default=240, help="per minute and address; 0 for any (default: 240)"
    )
    add_options_argument(parser, "the config of the model")


def _serve(args: argparse.Namespace) -> None:
    from .deploy import Predictor
    from .deploy.serve import LEAST_SCORE, serve
    from .deploy.uploads import Limits

    limits = Limits(
        max_bytes=int(1e6 * args.max_megabytes),
        max_pixels=int(1e6 * args.max_megapixels),
        max_queue=args.queue,
        rate=args.rate,
    )

    def load() -> Predictor:
        return Predictor(
            args.model,
            args.weights,
            confidence=min(LEAST_SCORE, args.confidence or LEAST_SCORE),
            device=args.device,
            options=args.opts,
        )

    serve(load, args.confidence, args.host, args.port, limits)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--format", default="onnx", choices=["onnx", "torchscript", "torch-export"])
    parser.add_argument(
        "--no-nms",
        action="store_true",
        help="boxes and scores of all anchors, instead of detections",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.05, help="least score (default: 0.05)"
    )
    add_options_argument(parser, "the config of the model")


def _export(args: argparse.Namespace) -> None:
    from .deploy import Predictor, export

    predictor = Predictor(
        args.model, args.weights, confidence=args.confidence, device="cpu", options=args.opts
    )
    export(predictor, args.out, args.format, nms=not args.no_nms)
    print(f"Wrote {args.out}")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="OUTPUT_DIR of train_net.py, or weights with their config")
    parser.add_argument("repository", metavar="OWNER/REPO", help="of the Hugging Face Hub")
    parser.add_argument(
        "--public", action="store_true", help="everybody may see it (default: a private repository)"
    )


def _push(args: argparse.Namespace) -> None:
    from .deploy import push

    address = push(args.model, args.repository, args.public)
    print(f"The model is {address}: say in its README.md under which license it may be used")


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a config file, or its name in the model zoo")
    parser.add_argument("--images", type=int, help="of a training step (default: the config's)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images (default: the config's for training)",
    )
    parser.add_argument("--objects", type=int, default=7, help="in an image (default: 7)")
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each (default: 5)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda, if there is a GPU)")
    add_options_argument(parser, "the config")


def _benchmark(args: argparse.Namespace) -> None:
    import torch

    from .config import merge_options, read_config
    from .engine import benchmark, default_setting, to_markdown
    from .model_zoo import get_config_file

    path = args.config if Path(args.config).is_file() else get_config_file(args.config)
    cfg = read_config(path)
    merge_options(cfg, args.opts)
    cfg.MODEL.DEVICE = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = default_setting(cfg)
    setting = setting._replace(
        images=setting.images if args.images is None else args.images,
        size=tuple(args.size or setting.size),
        objects=args.objects,
        runs=args.runs,
    )
    print(to_markdown(cfg, setting, benchmark(cfg, setting)))


def _add_zoo(parser: argparse.ArgumentParser) -> None:
    pass


def _zoo(args: argparse.Namespace) -> None:
    from . import model_zoo

    print("\n".join(map(str, model_zoo.models())))


_Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]
]
_COMMANDS: dict[str, _Command] = {
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
    "predict": ("detect in images, videos and cameras", _add_predict, _predict),
    "serve": ("a page where pictures are dropped, and a JSON API", _add_serve, _serve),
    "import": (
        "write a COCO file of VOC's or YOLO's annotations, or of boxes of another convention",
        _add_import,
        _import,
    ),
    "check": ("look at a data set before it is trained on", _add_check, _check),
    "export": ("write a model for other runtimes", _add_export, _export),
    "push": ("put a trained model on the Hugging Face Hub, as hf://OWNER/REPO", _add_push, _push),
    "benchmark": (
        "speed and memory of a config on this machine, beside Detectron2's RetinaNet",
        _add_benchmark,
        _benchmark,
    ),
    "zoo": ("list the configs and published weights of the model zoo", _add_zoo, _zoo),
    "replay": ("run a training step that was not finite again", _add_replay, _replay),
    "shapes": ("draw the embedded data set", _add_shapes, _shapes),
    "anchors": ("propose anchors that fit a training set", _add_anchors, _anchors),
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
