"""Text of the user's in pictures: class names in any script, and with what is markup elsewhere."""

from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

__all__ = ["find_font", "make_legible"]

# Some fonts have these, as nothing that is seen.
_CONTROL = frozenset(map(chr, range(32)))
_SURROGATE = 0xD800  # no character of its own


@cache
def _characters(font: str) -> frozenset[str]:
    """What the font of a file can draw."""
    try:
        codes = font_manager.get_font(font).get_charmap()
    except (OSError, RuntimeError, ValueError):  # a damaged font of the system
        return frozenset()
    if _SURROGATE in codes:  # as Matplotlib's font of last resort, with one box for all of a script
        return frozenset()
    return frozenset(map(chr, codes)) - _CONTROL


def make_legible(texts: Iterable[Text]) -> None:
    """Have texts drawn as they are, by other fonts of the system where the usual one lacks letters.

    A `$` begins no formula, and a character that no font has is escaped as in Python.
    """
    texts = list(texts)
    lacking = set("".join(text.get_text() for text in texts)) - {"\n"}
    lacking -= _characters(font_manager.findfont(FontProperties(family=["sans-serif"])))
    families = ["sans-serif"]
    for font in font_manager.fontManager.ttflist if lacking else ():
        if found := lacking & _characters(font.fname):
            families.append(font.name)
            lacking -= found
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(families)
        text.set_text(_escape(text.get_text(), lacking))


@cache
def find_font(text: str) -> tuple[str, str]:
    """A font for libraries that draw a text by one alone, and the text as it can be drawn by it.

    Args:
        text: a line.

    Returns:
        The file of the usual font, or of that of the system that draws the most of the text where
        it lacks letters; and the text, with what is lacking escaped as in Python.
    """
    usual = font_manager.findfont(FontProperties(family=["sans-serif"]))
    fonts = [usual]
    if set(text) - _characters(usual):
        fonts += [font.fname for font in font_manager.fontManager.ttflist]
    # Of equals the first.
    best = min(fonts, key=lambda font: len(set(text) - _characters(font)))
    return best, _escape(text, set(text) - _characters(best))


def _escape(text: str, lacking: set[str]) -> str:
    return "".join(c.encode("unicode_escape").decode() if c in lacking else c for c in text)
