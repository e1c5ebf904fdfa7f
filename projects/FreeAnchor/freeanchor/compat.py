"""Detectron2 0.6 on today's PyTorch, NumPy, Pillow, setuptools, and without its compiled ops.

Imported for its effect, before anything of Detectron2. It adds only what is missing, so that a
Detectron2 that works as it is (its main branch, or 0.6 with older packages) is left alone.
Features are tested, never versions: 0.6 and the main branch both call themselves "0.6".
"""

import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["HAS_COMPILED_OPS"]

_HOW_TO_INSTALL = (
    "install the full Detectron2 from its sources, "
    "https://github.com/facebookresearch/detectron2/blob/main/INSTALL.md"
)


def _find_detectron2() -> bool:
    """Whether Detectron2's compiled ops are there; an error if Detectron2 is not."""
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "FreeAnchor needs Detectron2, which is not installed: run `make setup` in the "
            f"repository of FreeAnchor, or {_HOW_TO_INSTALL}"
        )
    return importlib.util.find_spec("detectron2._C") is not None


def _restore_numpy_aliases() -> None:
    """`numpy.bool` and its like, removed in NumPy 1.24 (and `bool` back in 2.0)."""
    import numpy

    for alias in (bool, int, float, object, str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns of the very names that are looked for
            if not hasattr(numpy, alias.__name__):
                setattr(numpy, alias.__name__, alias)


def _restore_pillow_linear() -> None:
    """`PIL.Image.LINEAR`, removed in Pillow 10."""
    from PIL import Image

    if not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]


def _restore_pkg_resources() -> None:
    """The one function of `pkg_resources` that Detectron2 uses, for setuptools without it."""
    if importlib.util.find_spec("pkg_resources") is None:

        def resource_filename(package: str, resource: str) -> str:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return str(Path(spec.origin).parent / resource)

        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_filename = resource_filename  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stand_in


class _MissingOps(types.ModuleType):
    """Stands in for `detectron2._C`: importable, as Detectron2 needs it, but without any op."""

    # What Detectron2's report of the environment asks for at the start of every run.
    has_cuda = staticmethod(lambda: False)
    get_compiler_version = get_cuda_version = staticmethod(lambda: "none, compiled ops are missing")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system and inspect look for such names
            raise AttributeError(name)
        _raise_missing_op(name)


def _raise_missing_op(name: str) -> NoReturn:
    raise RuntimeError(
        f"This Detectron2 was installed without its compiled ops, so `{name}` is missing (rotated "
        "boxes, deformable convolution and the fast COCO evaluation need them; FreeAnchor does "
        f"not). To use it, {_HOW_TO_INSTALL}"
    )


def _stand_in_for_compiled_ops() -> None:
    import torch

    sys.modules["detectron2._C"] = _MissingOps("detectron2._C")
    # 0.6 calls one op by torch.ops, the main branch all of them.
    for name in (
        "nms_rotated",
        "box_iou_rotated",
        "roi_align_rotated_forward",
        "roi_align_rotated_backward",
    ):

        def missing(*args: Any, name: str = name) -> NoReturn:
            _raise_missing_op(name)

        setattr(torch.ops.detectron2, name, missing)


def _stand_in_for_fast_evaluation() -> None:
    """`COCOEvaluator`'s default needs a compiled op: pycocotools computes the same, more slowly.

    The main branch falls back to it by itself, but not where :class:`_MissingOps` can be imported.
    """
    from pycocotools.cocoeval import COCOeval

    stand_in = types.ModuleType("detectron2.evaluation.fast_eval_api")
    stand_in.COCOeval_opt = COCOeval  # type: ignore[attr-defined]
    sys.modules[stand_in.__name__] = stand_in


def _import_export_without_caffe2() -> None:
    """`detectron2.export`, which 0.6 imports with Caffe2 alone, although most of it needs none."""
    try:
        import detectron2.export
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "caffe2":
            raise
        stand_in = types.ModuleType("detectron2.export.api")
        stand_in.__doc__ = "Nothing: the conversion to Caffe2 needs Caffe2."
        stand_in.__all__ = []  # type: ignore[attr-defined]
        sys.modules[stand_in.__name__] = stand_in
        import detectron2.export  # noqa: F401


def _allow_group_norm_in_heads() -> None:
    """`MODEL.RETINANET.NORM: GN`: 0.6 asks for a group norm of one channel, to look at its type."""
    import torch
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.meta_arch import retinanet

    try:
        with torch.device("meta"):  # draws no random numbers
            retinanet.RetinaNetHead(
                input_shape=[ShapeSpec(channels=32, stride=8)],
                num_classes=1,
                num_anchors=1,
                conv_dims=[32],
                norm="GN",
            )
    except ValueError:
        get_norm = retinanet.get_norm
        retinanet.get_norm = lambda norm, channels: get_norm(
            norm, 32 if channels == 1 else channels
        )


def _name_the_indexing_of_grids() -> None:
    """`torch.meshgrid` warns where its `indexing` is left out, as by 0.6's anchors."""
    import inspect

    import torch
    from detectron2.modeling import anchor_generator

    # The main branch has another argument there.
    if "device" not in inspect.signature(anchor_generator._create_grid_offsets).parameters:
        return

    def create_grid_offsets(
        size: list[int], stride: int, offset: float, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, height, width = offset * stride, size[0] * stride, size[1] * stride
        y = torch.arange(start, height, step=stride, dtype=torch.float32, device=device)
        x = torch.arange(start, width, step=stride, dtype=torch.float32, device=device)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        return grid_x.reshape(-1), grid_y.reshape(-1)

    anchor_generator._create_grid_offsets = create_grid_offsets


def _keep_a_pixel_of_slender_images() -> None:
    """Resized, an image of 3000 x 1 pixels would be of no pixel, which Pillow refuses to make."""
    from detectron2.data.transforms import ResizeTransform

    make = ResizeTransform.__init__

    def make_no_smaller(
        self: Any, h: int, w: int, new_h: int, new_w: int, *args: Any, **kwargs: Any
    ) -> None:
        make(self, h, w, max(1, new_h), max(1, new_w), *args, **kwargs)

    ResizeTransform.__init__ = make_no_smaller


HAS_COMPILED_OPS = _find_detectron2()
_restore_numpy_aliases()
_restore_pillow_linear()
_restore_pkg_resources()
if not HAS_COMPILED_OPS:
    _stand_in_for_compiled_ops()
    _stand_in_for_fast_evaluation()
# From here on, Detectron2 can be imported.
_import_export_without_caffe2()
_allow_group_norm_in_heads()
_name_the_indexing_of_grids()
_keep_a_pixel_of_slender_images()
