"""FreeAnchor for Detectron2. Importing it registers the meta-architecture `FreeAnchor`."""

from . import compat  # noqa: F401  # isort: skip  # before anything that imports Detectron2
from . import catalog  # noqa: F401  # MODEL.WEIGHTS understands mmdet://
from .config import add_freeanchor_config
from .model import FreeAnchor

__all__ = ["FreeAnchor", "add_freeanchor_config"]
