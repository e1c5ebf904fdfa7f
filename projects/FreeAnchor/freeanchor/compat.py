"""Detectron2 0.6 on today's NumPy, Pillow and setuptools, and without its compiled ops.

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


HAS_COMPILED_OPS = _find_detectron2()
_restore_numpy_aliases()
_restore_pillow_linear()
_restore_pkg_resources()
if not HAS_COMPILED_OPS:
    _stand_in_for_compiled_ops()
