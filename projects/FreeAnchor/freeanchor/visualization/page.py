"""Pages that hold all they need: the viewer of pictures with boxes, styles, scripts and data."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import decode_mask, encode_mask

__all__ = ["VIEWER", "data_element", "encode_picture", "fit_masks", "make_page", "read_asset"]

# The scripts of the viewer, in the order in which they need each other.
VIEWER = ("boxes.js", "picture.js", "viewer.js")
_SIDES, _QUALITIES = (1200, 960, 720, 560, 400), (85, 70, 55)
_LEAST_MASK_SIDE = 64


def read_asset(name: str) -> str:
    """A style or script of this package."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def make_page(
    title: str, body: str, styles: Sequence[str], scripts: Sequence[str], connect: str = "'none'"
) -> str:
    """A page that the browser keeps from loading, running and sending anything else.

    Args:
        title: plain text.
        body: html.
        styles: texts of style sheets.
        scripts: texts of scripts, run in this order after the body.
        connect: what scripts may connect to, as a content security policy says it.
    """

    def allow(texts: Sequence[str]) -> str:
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(f"'sha256-{base64.b64encode(x).decode()}'" for x in digests)

    policy = (
        f"default-src 'none'; img-src data: blob:; connect-src {connect}; "
        f"script-src {allow(scripts)}; style-src {allow(styles)}; style-src-attr 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{html.escape(title)}</title>",
            *(f"<style>{text}</style>" for text in styles),
            f"</head><body>{body}",
            *(f"<script>{text}</script>" for text in scripts),
            "</body></html>",
        ]
    )


def data_element(name: str, data: Any) -> str:
    """Data for the scripts of a page, in an element of this id."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{html.escape(name)}">{text}</script>'


def encode_picture(pixels: NDArray[Any], max_bytes: int) -> str:
    """A picture as the address of itself.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        max_bytes: of the address. The picture gets smaller and coarser until it fits; the
            smallest one is taken where none does.
    """
    largest = max(pixels.shape[:2])
    for side in [min(largest, _SIDES[0]), *(side for side in _SIDES[1:] if side < largest)]:
        picture = Image.fromarray(pixels)
        picture.thumbnail((side, side))
        for quality in _QUALITIES:
            content = io.BytesIO()
            picture.save(content, "JPEG", quality=quality)
            data = base64.b64encode(content.getvalue()).decode()
            if len(data) <= max_bytes:
                return f"data:image/jpeg;base64,{data}"
    return f"data:image/jpeg;base64,{data}"


def fit_masks(masks: Sequence[Any], size: tuple[int, int], max_bytes: int) -> list[Any]:
    """Masks for the viewer, of the picture at a size at which they are few bytes.

    Args:
        masks: as :func:`freeanchor.data.decode_mask` takes them, or None where there is none.
        size: width and height of the picture.
        max_bytes: of all of them in the page. They get coarser until they fit; the coarsest are
            taken where none do.

    Returns:
        Their run-length encodings.
    """
    fitted = [encode_mask(decode_mask(x, size)) if isinstance(x, list) else x for x in masks]
    side = max(size)
    while (length := len(data_element("", fitted))) > max_bytes and side > _LEAST_MASK_SIDE:
        # A mask has about as many bytes as columns.
        side = max(_LEAST_MASK_SIDE, int(0.9 * side * max_bytes / length))
        # The pixels in the middle of those of the smaller mask.
        columns, rows = (
            ((np.arange(count) + 0.5) * n / count).astype(int)
            for n, count in ((n, max(1, round(n * side / max(size)))) for n in size)
        )
        fitted = [
            None if x is None else encode_mask(decode_mask(x, size)[rows[:, None], columns])
            for x in masks
        ]
    return fitted
