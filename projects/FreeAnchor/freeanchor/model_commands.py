"""The commands that use, measure or publish a model, see :mod:`freeanchor.__main__`."""

import argparse
from pathlib import Path

from .command_line import Command, add_options_argument, number
from .errors import FreeAnchorError, check_folder

__all__ = ["MODEL_COMMANDS"]


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
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        help="folder to write to (default: predictions)",
    )
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
        type=number(float),
        help="least score (default: what is recommended for each class, if the model comes with "
        "thresholds.json, or else 0.5)",
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="only these, names or indices"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=1, help="images at a time (default: 1)"
    )
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
    parser.add_argument("--port", type=number(int), default=8000, help="0 for any (default: 8000)")
    parser.add_argument(
        "--confidence",
        type=number(float),
        help="where the slider begins (default: the recommended score, or else 0.5)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda, if there is a GPU)")
    parser.add_argument(
        "--max-megabytes", type=number(float), default=20, help="of a file (default: 20)"
    )
    parser.add_argument(
        "--max-megapixels", type=number(float), default=40, help="of a picture (default: 40)"
    )
    parser.add_argument(
        "--queue", type=number(int), default=16, help="pictures that wait (default: 16)"
    )
    parser.add_argument(
        "--rate",
        type=number(float),
        default=240,
        help="per minute and address; 0 for any (default: 240)",
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

    score = LEAST_SCORE if args.confidence is None else min(LEAST_SCORE, args.confidence)

    def load() -> Predictor:
        return Predictor(
            args.model,
            args.weights,
            confidence=score,
            device=args.device,
            options=args.opts,
        )

    serve(load, args.confidence, args.host, args.port, limits)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument(
        "--format",
        default="onnx",
        choices=["onnx", "torchscript", "torch-export"],
        help="of the file (default: onnx)",
    )
    parser.add_argument(
        "--no-nms",
        action="store_true",
        help="boxes and scores of all anchors, instead of detections",
    )
    parser.add_argument(
        "--confidence", type=number(float), default=0.05, help="least score (default: 0.05)"
    )
    add_options_argument(parser, "the config of the model")


def _export(args: argparse.Namespace) -> None:
    from .deploy import Predictor, export

    check_folder(args.out.parent)
    # The file is in float32, whatever the run is tested in.
    options = [*args.opts, "TEST.AMP.ENABLED", "False"]
    predictor = Predictor(
        args.model, args.weights, confidence=args.confidence, device="cpu", options=options
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
    parser.add_argument(
        "--images", type=number(int, 1), help="of a training step (default: the config's)"
    )
    parser.add_argument(
        "--size",
        type=number(int),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images (default: the config's for training)",
    )
    parser.add_argument("--objects", type=number(int), default=7, help="in an image (default: 7)")
    parser.add_argument(
        "--runs", type=number(int, 1), default=5, help="timed steps of each (default: 5)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda, if there is a GPU)")
    add_options_argument(parser, "the config")


def _benchmark(args: argparse.Namespace) -> None:
    from .config import merge_options, read_config
    from .engine import benchmark, default_setting, to_markdown
    from .model_zoo import get_config_file
    from .modeling import choose_device

    path = args.config if Path(args.config).is_file() else get_config_file(args.config)
    cfg = read_config(path)
    merge_options(cfg, args.opts)
    cfg.MODEL.DEVICE = choose_device(args.device)
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


MODEL_COMMANDS: dict[str, Command] = {
    "predict": ("detect in images, videos and cameras", _add_predict, _predict),
    "serve": ("a page where pictures are dropped, and a JSON API", _add_serve, _serve),
    "export": ("write a model for other runtimes", _add_export, _export),
    "push": ("put a trained model on the Hugging Face Hub, as hf://OWNER/REPO", _add_push, _push),
    "benchmark": (
        "speed and memory of a config on this machine, beside Detectron2's RetinaNet",
        _add_benchmark,
        _benchmark,
    ),
    "zoo": ("list the configs and published weights of the model zoo", _add_zoo, _zoo),
}
