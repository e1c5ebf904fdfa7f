"""A trained model as a file for other runtimes: `freeanchor export MODEL FILE`.

The files need neither this package nor Detectron2; what :class:`Detector` says of inputs and
outputs holds for all of them.
"""

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import Backbone
from torch import Tensor

from ..checkpoint import replacing
from ..config import is_two_stage
from ..errors import FreeAnchorError, check_folder
from ..modeling import fold_batch_norm
from .graph import Detector
from .predictor import Predictor

__all__ = ["FORMATS", "export", "metadata"]

_OPSET = 17
# torch.export takes a size of 1 for special, and sizes of P7 are those of the image over 128.
_LEAST_SIZE = 129
_MOST_SIZE = 8192


def metadata(predictor: Predictor, nms: bool = True) -> dict[str, Any]:
    """What a user of an exported file has to know, and that is put into it."""
    cfg, model = predictor.cfg, predictor.model
    outputs = ["boxes", "scores", "labels"] if nms else ["boxes", "scores"]
    found = {
        "class_names": predictor.class_names,
        "input": "images: (N, H, W, 3) uint8, BGR",
        "outputs": outputs,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),  # applied by the file, in the order below
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "pixel_order": cfg.INPUT.FORMAT,
        "size_divisibility": model.backbone.size_divisibility,  # padded by the file
        "inclusive_corners": cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS,
    }
    if predictor.recommended is not None:
        found["recommended_scores"] = predictor.recommended.classes
    if nms:
        found["score_threshold"] = model.test_score_thresh
        found["nms_threshold"] = model.test_nms_thresh
        found["topk_candidates"] = model.test_topk_candidates
        found["max_detections"] = model.max_detections_per_image
    return found


def export(predictor: Predictor, path: str | Path, kind: str = "onnx", nms: bool = True) -> None:
    """Write a trained model for other runtimes, as a whole or not at all.

    Args:
        predictor: the model. Its confidence becomes the threshold of the file.
        path: the file.
        kind: one of :data:`FORMATS`.
        nms: whether the file returns detections, or what all anchors predict.

    Raises:
        FreeAnchorError: an unknown format, a package is missing, or the file cannot be written.
    """
    if kind not in FORMATS:
        raise FreeAnchorError(f"there is no format {kind}, only {', '.join(FORMATS)}")
    if is_two_stage(predictor.cfg):
        raise FreeAnchorError(
            "only one-stage models can be exported: one with ROI heads runs by `freeanchor "
            "predict`, `freeanchor serve` and freeanchor.deploy.Predictor"
        )
    if predictor.cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise FreeAnchorError(
            f"INPUT.FORMAT {predictor.cfg.INPUT.FORMAT}: exported files take three colours, so the "
            "format must be BGR or RGB"
        )
    if any(x.dtype != torch.float32 for x in predictor.model.parameters()):
        raise FreeAnchorError(
            "TEST.AMP.ENABLED has rounded the weights: export a Predictor with options="
            "('TEST.AMP.ENABLED', 'False')"
        )
    check_folder(Path(path).parent)
    model = copy.deepcopy(predictor.model).float().cpu()
    if kind != "torch-export" and not _takes_any_size(model.backbone):
        raise FreeAnchorError(
            "the backbone takes the size of an image for a constant where it is traced, so the "
            f"{kind} file would be right for one size alone: the model runs by `freeanchor "
            "predict`, `freeanchor serve` and freeanchor.deploy.Predictor"
        )
    fold_batch_norm(model)
    detector = Detector(model, predictor.cfg.INPUT.FORMAT == "RGB", nms, kind == "onnx").eval()
    detector.requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        # Of values that tracing makes constant: none of them depends on the image.
        warnings.simplefilter("ignore")
        content = FORMATS[kind](detector, metadata(predictor, nms))
    with replacing(path) as f:
        f.write(content)


def _takes_any_size(backbone: Backbone) -> bool:
    """Whether a backbone that is traced with images of one size is right for another."""
    stride = max(32, backbone.size_divisibility)
    first, other = (torch.rand(1, 3, h * stride, w * stride) for h, w in ((10, 14), (3, 11)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = backbone(other)
        try:
            found = torch.jit.trace(backbone, first, strict=False, check_trace=False)(other)
            return all(
                torch.allclose(found[name], x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
                for name, x in expected.items()
            )
        except RuntimeError:  # shapes that do not fit
            return False


def _example() -> Tensor:
    # Of a size that is no multiple of the stride, so that padding is part of the graph.
    return torch.randint(0, 256, (2, 300, 420, 3), dtype=torch.uint8)


def _onnx(detector: Detector, about: dict[str, Any]) -> bytes:
    try:
        import onnx
    except ModuleNotFoundError as e:
        raise FreeAnchorError(
            "to export ONNX, install onnx: pip install 'freeanchor[export]'"
        ) from e
    outputs: list[str] = about["outputs"]
    file = io.BytesIO()
    torch.onnx.export(
        detector,
        (_example(),),
        file,  # type: ignore[arg-type]  # which the newer exporter does not take
        # By tracing. The newer exporter makes sizes of images a condition.
        dynamo=False,
        opset_version=_OPSET,
        input_names=["images"],
        output_names=outputs,
        dynamic_axes={
            "images": {0: "batch", 1: "height", 2: "width"},
            **{name: {0: "batch"} for name in outputs},
        },
    )
    proto = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in about.items()})
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def _torchscript(detector: Detector, about: dict[str, Any]) -> bytes:
    traced = torch.jit.trace(detector, (_example(),), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files={"metadata.json": json.dumps(about)})
    return file.getvalue()


def _torch_export(detector: Detector, about: dict[str, Any]) -> bytes:
    size = {"min": _LEAST_SIZE, "max": _MOST_SIZE}
    dims = [torch.export.Dim("batch"), *(torch.export.Dim(x, **size) for x in ("height", "width"))]
    program = torch.export.export(
        detector,
        (_example(),),
        dynamic_shapes=(dict(enumerate(dims)),),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    about = {**about, "least_size": _LEAST_SIZE}
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(about)})
    return file.getvalue()


FORMATS: dict[str, Callable[[Detector, dict[str, Any]], bytes]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "torch-export": _torch_export,
}
