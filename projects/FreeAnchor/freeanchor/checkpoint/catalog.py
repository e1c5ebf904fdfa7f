"""Published weights by name: `mmdet://NAME` in `MODEL.WEIGHTS`.

They are MMDetection's, downloaded, checked, converted and cached on first use. There are no others
of FreeAnchor at fixed addresses.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import file_lock

from ..errors import FileError
from .convert import convert
from .files import find, read_checkpoint, write_checkpoint
from .packages import Handler

__all__ = ["CHECKPOINTS", "MMDetHandler"]

_OPENMMLAB = "https://download.openmmlab.com/"
_FREEANCHOR = f"{_OPENMMLAB}mmdetection/v2.0/free_anchor/"
# By the names in MMDetection's configs/free_anchor/metafile.yml; the backbone is by MMEngine's. A
# file's name ends in the start of its SHA-256.
CHECKPOINTS = {
    "freeanchor_r50_fpn_1x_coco": f"{_FREEANCHOR}retinanet_free_anchor_r50_fpn_1x_coco/"
    "retinanet_free_anchor_r50_fpn_1x_coco_20200130-0f67375f.pth",
    "freeanchor_r101_fpn_1x_coco": f"{_FREEANCHOR}retinanet_free_anchor_r101_fpn_1x_coco/"
    "retinanet_free_anchor_r101_fpn_1x_coco_20200130-358324e6.pth",
    "freeanchor_x101-32x4d_fpn_1x_coco": f"{_FREEANCHOR}"
    "retinanet_free_anchor_x101_32x4d_fpn_1x_coco/"
    "retinanet_free_anchor_x101_32x4d_fpn_1x_coco_20200130-d4846968.pth",
    "resnext101_32x4d": f"{_OPENMMLAB}pretrain/third_party/resnext101_32x4d-a5af3160.pth",
}
# Raised when conversion changes, so that what older versions cached is not used.
_REVISION = 1


class MMDetHandler(Handler):
    """Resolves mmdet://NAME to a local file in Detectron2's format."""

    PREFIX = "mmdet://"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(self.PREFIX)
        if name not in CHECKPOINTS:
            raise FileError(f"There is no {path}, only {', '.join(CHECKPOINTS)}")
        downloaded = find(CHECKPOINTS[name])
        # A file that Detectron2's own checkpointer, as in its DefaultPredictor, reads too.
        converted = Path(downloaded).with_suffix(f".detectron2.{_REVISION}.pth")
        with file_lock(str(converted)):  # the processes of one run all come here
            if force or not converted.is_file():
                _check_hash(downloaded)
                result = convert(read_checkpoint(downloaded), downloaded)
                if result is None:
                    raise FileError(f"{downloaded} is not in a format of MMDetection")
                write_checkpoint(converted, result.weights, result.config)
        return str(converted)


def _check_hash(path: str) -> None:
    match = re.search(r"-([0-9a-f]{8})\.pth$", path)
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if match is None or not found.startswith(match[1]):
        os.remove(path)
        raise FileError(
            f"What was downloaded to {path} is not what its name says (its SHA-256 starts with "
            f"{found[:8]}), and was deleted: try again, and if this comes again, do not use it"
        )


PathManager.register_handler(MMDetHandler(), allow_override=True)
